"""Sources that become shards in the cache: faults, a kill half-way, a source that changes."""

import functools
import subprocess
import sys
import time

import pytest
from tiny_shards import picture

from focalclip.base.errors import UserError
from focalclip.data import prepared
from focalclip.data.index import index_shards, usable_shards
from focalclip.data.prepared import training_shards
from focalclip.data.shards import left_out
from focalclip.data.write import STATE, Output

SLOW = """
import functools, sys, time
from focalclip.data import prepared
from focalclip.data.rules import Rules
apply = Rules.apply
def slowly(self, content):
    time.sleep(0.02)
    return apply(self, content)
Rules.apply = slowly
prepared.Output = functools.partial(prepared.Output, samples_per_shard=4)
prepared.training_shards(sys.argv[1])
"""


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """The folder of the cache, with small shards."""
    monkeypatch.setenv("FOCALCLIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(prepared, "Output", functools.partial(Output, samples_per_shard=4))
    return tmp_path / "cache" / "sources"


@pytest.fixture
def classes(tmp_path):
    """60 pictures of two classes, one of them damaged."""
    folder = tmp_path / "classes"
    for i in range(60):
        (folder / "ant" if i < 59 else folder / "bee").mkdir(parents=True, exist_ok=True)
        (folder / ("ant" if i < 59 else "bee") / f"{i:03d}.png").write_bytes(picture(i) if i != 30 else b"damaged")
    return folder


def test_a_killed_write_goes_on_where_it_was(sources, classes):
    process = subprocess.Popen([sys.executable, "-c", SLOW, str(classes)])
    try:
        while len(list(sources.glob(f"*.unfinished/{STATE}/*.tar.json"))) < 4:
            assert process.poll() is None
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
    (unfinished,) = sources.glob("*.unfinished")
    before = {record.name[:-5]: record.stat().st_mtime_ns for record in unfinished.glob(f"{STATE}/*.tar.json")}
    shards = training_shards(str(classes))
    assert [path.name for path in shards] == [f"{i:05d}.tar" for i in range(15)]
    after = {path.name: (path.parent / STATE / f"{path.name}.json").stat().st_mtime_ns for path in shards}
    assert before.items() <= after.items(), "a finished shard was written again"
    assert not unfinished.exists()
    assert sum(index_shards(shards)) == 59


def test_a_damaged_picture_is_left_out_said_and_limited(sources, classes, capsys):
    shards = training_shards(str(classes))
    assert sum(index_shards(shards)) == 59
    assert "left out 1 picture: damaged, or not a picture, the first being " in capsys.readouterr().err
    (line,) = left_out(str(classes), usable_shards(shards), "first_dot")
    assert line.startswith("1 picture: damaged, or not a picture")
    (classes / "ant" / "031.png").write_bytes(b"damaged")
    with pytest.raises(
        UserError, match=r"2 pictures are damaged or cannot be read, more than the limit of 1 \(data.max"
    ):
        training_shards(str(classes), max_faults=1)
    assert sum(index_shards(training_shards(str(classes), max_faults=2))) == 58


def test_a_changed_source_is_written_again_and_the_older_copies_are_removed_or_named(sources, classes, capsys):
    first = training_shards(str(classes))[0].parent
    (classes / "ant" / "031.png").write_bytes(b"damaged")
    with pytest.raises(UserError, match="more than the limit"):
        training_shards(str(classes), max_faults=1)
    (classes / "ant" / "032.png").write_bytes(b"damaged")
    capsys.readouterr()
    second = training_shards(str(classes))[0].parent
    said = capsys.readouterr().err
    assert f"was written before, with other content or options, in {first} (0.00 GB); remove that folder" in said
    assert sorted(path for path in sources.iterdir() if path.is_dir()) == sorted([first, second])
