"""Shard patterns and shard indexes: what is found, what is rebuilt, and what is refused before training starts."""

import fcntl
import io
import json
import multiprocessing
import os
import pty
import resource
import select
import signal
import struct
import subprocess
import sys
import tarfile
import termios
import time
from pathlib import Path

import numpy as np
import pytest
import webdataset
from tiny_shards import good_sample, picture, write_shards, write_tar

from focalclip.base.errors import MachineError, UserError
from focalclip.data import index
from focalclip.data.index import (
    IMAGE,
    JSON,
    LABEL,
    TEXT,
    index_shards,
    load_key,
    load_keys,
    load_members,
    members_passed_over,
    scan_shard,
    usable_shards,
)
from focalclip.data.samples import ShardReader
from focalclip.data.shards import resolve_shards


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FOCALCLIP_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def shard(tmp_path):
    return write_shards(tmp_path / "data", [4])[0]


# Patterns


def test_braces_lists_and_folders_name_the_same_shards(tmp_path):
    shards = write_shards(tmp_path, [1] * 12)
    assert resolve_shards(f"{tmp_path}/{{00000..00011}}.tar") == shards
    assert resolve_shards(str(tmp_path)) == shards
    assert resolve_shards([f"{tmp_path}/0000{{0..9}}.tar", str(shards[10]), str(shards[11])]) == shards
    assert resolve_shards(f"{tmp_path}/0000{{0,1}}.tar::{shards[5]}") == [shards[0], shards[1], shards[5]]


def test_missing_shards_are_counted_and_named(tmp_path):
    write_shards(tmp_path, [1, 1])
    with pytest.raises(
        UserError, match=r"data.train: 8 of 10 shards do not exist \(.*00002.tar, .*00004.tar and 5 more"
    ):
        resolve_shards(f"{tmp_path}/{{00000..00009}}.tar")


@pytest.mark.parametrize("empty", ["", "  ", [], ["a.tar", ""]])
def test_empty_pattern(empty):
    with pytest.raises(UserError, match=r"data\.train is empty; name shards"):
        resolve_shards(empty)


@pytest.mark.parametrize("remote", ["s3://bucket/{0..3}.tar", "https://host/0.tar", "pipe:cat 0.tar"])
def test_remote_shards_are_refused_with_the_remedy(remote):
    with pytest.raises(UserError, match=r"is remote, .* mount the store or copy the shards"):
        resolve_shards(remote)


def test_unbalanced_braces_empty_folder_and_repeated_shard(tmp_path, shard):
    with pytest.raises(UserError, match=r"the braces of '.*\{00000\.\.00003\.tar' do not match"):
        resolve_shards(f"{tmp_path}/{{00000..00003.tar")
    with pytest.raises(UserError, match=r"the folder .* holds no \.tar file"):
        resolve_shards(str(tmp_path))
    with pytest.raises(UserError, match="1 shards are named more than once"):
        resolve_shards([str(shard), str(shard.parent)])


# Contents


def test_index_points_at_the_members(shard):
    members, keys = scan_shard(shard)
    data = shard.read_bytes()
    cut = [[data[offset : offset + length] for offset, length in row] for row in members.tolist()]
    for number, parts in enumerate(cut):
        assert [parts[c] for c in (IMAGE, TEXT, JSON, LABEL)] == [part for _, part in good_sample(number)]
    assert keys == ["000000", "000001", "000002", "000003"]


def test_samples_are_those_of_webdataset(tmp_path):
    """Folders in names, several dots, upper case, other members, metadata, folders, long names."""
    path = tmp_path / "odd.tar"
    names = [
        "a/b.jpg",
        "a/b.txt",
        "a/b.seg.png",
        "c.d.JPEG",
        "c.JPEG",
        "c.TXT",
        "__meta__/a.png",
        "./e/f.webp",
        "./e/f.txt",
    ]
    names += [f"{'long' * 60}.png", f"{'long' * 60}.txt", ".hidden.jpg", "nodot", "g.cls", "g.png", "g.npy", "g.txt"]
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        folder = tarfile.TarInfo("folder.png")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(name)
            tar.addfile(info, io.BytesIO(name.encode()))
    members, keys = scan_shard(path)
    theirs = [
        s for s in webdataset.WebDataset(str(path), shardshuffle=False) if set(s) & {"jpg", "jpeg", "png", "webp"}
    ]
    assert keys == [sample["__key__"] for sample in theirs]
    assert [row[:, 1].max() > 0 for row in members] == [True] * 5
    image_names = [next(s[e] for e in ("jpg", "jpeg", "png", "webp") if e in s).decode() for s in theirs]
    data = path.read_bytes()
    assert [data[o : o + n].decode() for o, n in members[:, IMAGE].tolist()] == image_names


def test_webdataset_writer_and_pax_headers(tmp_path):
    path = tmp_path / "wds.tar"
    with webdataset.TarWriter(str(path)) as tar:  # float times become pax headers
        for i in range(3):
            tar.write({"__key__": f"é{i}", "png": picture(i), "json": json.dumps({"caption": "ü"}).encode()})
    members, keys = scan_shard(path)
    assert keys == ["é0", "é1", "é2"]
    offset, length = members[2, IMAGE]
    assert path.read_bytes()[offset : offset + length] == picture(2)


# Storing


def test_index_is_stored_beside_the_shard_and_read_back(shard):
    assert index_shards([shard]).tolist() == [4]
    stored = shard.with_name("00000.tar.index.npz")
    assert [path.name for path in sorted(shard.parent.iterdir())] == ["00000.tar", "00000.tar.index.npz"]
    before = stored.stat()
    assert index_shards([shard]).tolist() == [4]
    assert stored.stat().st_mtime_ns == before.st_mtime_ns, "a valid index is not written again"
    np.testing.assert_array_equal(load_members(shard), scan_shard(shard)[0])
    assert load_key(shard, 3) == "000003"


def test_index_is_rebuilt_when_lost_damaged_or_out_of_date(shard):
    index_shards([shard])
    stored = shard.with_name("00000.tar.index.npz")
    stored.unlink()
    assert index_shards([shard]).tolist() == [4]
    stored.write_bytes(stored.read_bytes()[:200])
    assert index_shards([shard]).tolist() == [4]
    write_tar(shard, [member for i in range(7) for member in good_sample(i)])
    assert index_shards([shard]).tolist() == [7]
    write_tar(shard, [member for i in range(7, 14) for member in good_sample(i)])
    later = time.time_ns() + 10**9
    os.utime(shard, ns=(later, later))  # same size, other time
    assert index_shards([shard]).tolist() == [7]
    assert load_key(shard, 0) == "000007"


def test_an_index_with_a_wrong_bit_is_rebuilt(shard):
    """Wherever the bit is, and also where it turns over between the start of a run and the first use of the index."""
    expected = scan_shard(shard)
    index_shards([shard])
    stored = shard.with_name("00000.tar.index.npz")
    whole = stored.read_bytes()
    rng = np.random.default_rng(0)
    places = [*range(0, 100, 4), *rng.integers(len(whole), size=50), *range(len(whole) - 100, len(whole), 4)]
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(rng.integers(8))
        stored.write_bytes(damaged)
        assert ShardReader([shard], keep=1).read(0, 2).image == picture(2)
        np.testing.assert_array_equal(load_members(shard), expected[0])
        stored.write_bytes(damaged)
        assert load_keys(shard) == expected[1]
        stored.write_bytes(damaged)
        assert index_shards([shard]).tolist() == [4]


def test_a_damaged_index_of_a_damaged_shard_is_one_sentence(shard):
    index_shards([shard])
    stat, content = shard.stat(), shard.read_bytes()
    shard.write_bytes(content[:600] + b"x" * (len(content) - 600))
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    shard.with_name("00000.tar.index.npz").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"00000\.tar: cut short or damaged at byte \d+ of "):
        ShardReader([shard], keep=1).read(0, 2)


def test_the_limit_of_open_files_is_not_the_fault_of_a_shard(tmp_path):
    shards = write_shards(tmp_path, [1] * 40)
    index_shards(shards)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(list(Path("/proc/self/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 10, hard))
    try:
        reader = ShardReader(shards, keep=80)
        with pytest.raises(MachineError, match=r"^data\.window_shards=40: .*Too many open files; .*; or lower it"):
            [reader.read(number, 0) for number in range(40)]
        resource.setrlimit(resource.RLIMIT_NOFILE, (used, hard))
        with pytest.raises(UserError, match=r"00000\.tar: Too many open files; raise the limit"):
            scan_shard(shards[0])
        for shard in shards:
            shard.with_name(f"{shard.name}.index.npz").unlink()
        with pytest.raises(MachineError, match="Too many open files"):  # no shard is bad
            usable_shards(shards, max_bad=39, jobs=1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# Several processes


def test_the_number_of_processes_changes_nothing(tmp_path, capsys):
    shards = write_shards(tmp_path, [3, 1, 4, 1, 5, 2])
    found = {}
    for jobs in (1, 2, 3, 50):
        counts = index_shards(shards, jobs)
        found[jobs] = [
            counts.tolist(),
            *(part for path in shards for part in (load_members(path).tolist(), load_keys(path))),
        ]
        said = f"Indexing 6 shards in {min(jobs, 6)} processes (once)\n"
        assert capsys.readouterr().err == (said if jobs > 1 else "")
        for path in tmp_path.glob("*.npz"):
            path.unlink()
        assert not list(tmp_path.glob(".*"))
    assert found[1] == found[2] == found[3] == found[50]
    assert found[1][0] == [3, 1, 4, 1, 5, 2]
    for number in (1, 4):
        shards[number].write_bytes(b"damaged")
    for jobs in (1, 2, 6):
        with pytest.raises(UserError, match=r"00001\.tar: "):
            index_shards(shards, jobs)


def test_long_work_is_shared_by_all_cores(tmp_path, monkeypatch, capsys):
    shards = write_shards(tmp_path, [1] * 5)
    monkeypatch.setattr(index, "_SECONDS_ALONE", 0.0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})
    assert index_shards(shards).tolist() == [1] * 5
    assert capsys.readouterr().err == "Indexing 5 shards in 3 processes (once)\n"


def _dies_elsewhere(path):
    if multiprocessing.parent_process() is not None and path.name > "00001":
        os.kill(os.getpid(), signal.SIGKILL)
    return int(path.stem)


def _fails(path):
    raise RuntimeError(path.name)


def test_what_a_killed_process_leaves_is_done_by_the_main_one(tmp_path, capfd):
    shards = {number: tmp_path / f"{number:05d}.tar" for number in range(6)}
    assert dict(index._in_processes(_dies_elsewhere, shards, 2)) == {number: number for number in range(6)}
    with pytest.raises(RuntimeError, match=r"00000\.tar"):
        list(index._in_processes(_fails, shards, 2))
    assert "Traceback" not in capfd.readouterr().err


# Refused headers


def _with_header(size=None, pax=None):
    """A tar of one pair whose picture's header was changed: its size field, or a pax header before it."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for number, (name, data) in enumerate([("a.txt", b"caption"), ("b.png", picture(0)), ("b.txt", b"caption")]):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            if number == 1 and pax:
                info.pax_headers = pax
            tar.addfile(info, io.BytesIO(data))
    content = bytearray(buffer.getvalue())
    if size is not None:
        header = content[1024:1536]
        header[124:136] = size
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        content[1024:1536] = header
    return bytes(content)


HEADERS = {
    "beyond 64 bits": {"size": b"\x80\x01" + b"\0" * 10},
    "64 bits": {"size": b"\x80\0\0\0\xff" + b"\xff" * 7},
    "63 bits": {"size": b"\x80\0\0\0\x7f" + b"\xff" * 7},
    "beyond the end": {"size": b"77777777777\0"},
    "negative": {"size": b"\xff" * 10 + b"\xfc\0"},
    "minus": {"size": b"-0000002000\0"},
    "not octal": {"size": b"00000000891\0"},
    "not a number": {"size": b"abc\0\0\0\0\0\0\0\0\0"},
    "pax beyond 64 bits": {"pax": {"size": str(2**70)}},
    "pax negative": {"pax": {"size": "-1536"}},
    "pax no number": {"pax": {"size": "12x"}},
    "pax sparse map": {"pax": {"GNU.sparse.map": "1,x", "GNU.sparse.size": "7"}},
    "pax sparse numbers": {"pax": {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "x"}},
    "pax sparse 0.0": {"pax": {"GNU.sparse.size": "x"}},
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", HEADERS)
def test_a_header_that_cannot_be_is_one_sentence(tmp_path, kind):
    path = tmp_path / "00000.tar"
    path.write_bytes(_with_header(**HEADERS[kind]))
    with pytest.raises(
        UserError, match=r"00000\.tar: .*; (copy, download or write it again|.*write it again)"
    ) as caught:
        scan_shard(path)
    assert "\n" not in str(caught.value)
    assert "invalid literal" not in str(caught.value)


@pytest.mark.timeout(20)
def test_a_broken_pax_record_is_one_sentence_or_does_not_matter(tmp_path):
    """Every byte of a pax header in turn; what is found otherwise is what stands in the tar."""
    path, content = tmp_path / "00000.tar", _with_header(pax={"comment": "x" * 20})
    start = content.index(b" comment=") - 2
    right = {"b.png": picture(0), "b.txt": b"caption"}
    for place in range(start, start + 34):
        for value in (b"\0", b"=", b"9", b"\xff", b"\n"):
            path.write_bytes(content[:place] + value + content[place + 1 :])
            try:
                members, keys = scan_shard(path)
            except UserError:
                continue
            assert keys == ["a", "b"]
            for column, name in ((IMAGE, "b.png"), (TEXT, "b.txt")):
                offset, length = members[1, column]
                assert content[offset : offset + length] == right[name]


def test_index_goes_to_the_cache_where_the_folder_cannot_be_written(shard, tmp_path):
    blocked = shard.with_name("00000.tar.index.npz")
    blocked.mkdir()  # stands in for a read-only folder, which root could write to
    assert index_shards([shard]).tolist() == [4]
    assert [path.name for path in (tmp_path / "cache").rglob("*.npz")] == [blocked.name]
    assert len(load_members(shard)) == 4
    assert [path.name for path in shard.parent.iterdir() if "tmp" in path.name] == []


def test_same_shard_name_in_two_folders_keeps_two_indexes_in_the_cache(tmp_path):
    shards = [write_shards(tmp_path / name, [size])[0] for name, size in (("a", 2), ("b", 3))]
    for shard in shards:
        shard.with_name("00000.tar.index.npz").mkdir()
    assert index_shards(shards).tolist() == [2, 3]
    assert index_shards(shards).tolist() == [2, 3]


# Refused shards


def test_truncated_shard_is_named_and_leaves_no_index(shard):
    data = shard.read_bytes()
    shard.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"00000\.tar: .* (copy|write) "):
        index_shards([shard])
    assert not shard.with_name("00000.tar.index.npz").exists()


def test_every_truncation_is_noticed(shard):
    """Inside the data, at a header or just before the end mark: nothing is lost in silence."""
    data = shard.read_bytes()
    end = data.rstrip(b"\0")
    for size in range(0, len(end) + 256, 512):
        shard.write_bytes(data[:size])
        with pytest.raises(UserError, match=r"00000\.tar: "):
            scan_shard(shard)


def test_damaged_header_joined_tars_and_compression(shard, tmp_path):
    data = bytearray(shard.read_bytes())
    second = 512 + -(-len(picture(0)) // 512) * 512  # header of the second member
    broken = tmp_path / "broken.tar"
    broken.write_bytes(data[:second] + bytes([data[second] ^ 1]) + data[second + 1 :])
    with pytest.raises(UserError, match=rf"broken.tar: cut short or damaged at byte {second} of "):
        scan_shard(broken)
    joined = tmp_path / "joined.tar"
    joined.write_bytes(data + data)
    with pytest.raises(UserError, match=r"joined\.tar: more data follows its end mark"):
        scan_shard(joined)
    packed = tmp_path / "packed.tar"
    with tarfile.open(packed, "w:gz") as tar:
        tar.add(shard, "a.png")
    with pytest.raises(UserError, match=r"packed\.tar: not a whole, uncompressed tar"):
        scan_shard(packed)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.txt", b"x"), ("b.json", b"{}")], "holds no image"),
        ([("a.png", b"x"), ("b.png", b"x")], "holds no caption"),
        ([("a.jpg", b"x"), ("b.jpg", b"x"), ("a.txt", b"x"), ("b.txt", b"x")], "no image stands next to a caption"),
        ([("a.jpg", b"x"), ("a.txt", b"x"), ("a.jpg", b"x")], "'a' has two members of one kind"),
        (
            [("a.jpg", b"x"), ("a.png", b"x"), ("a.txt", b"x")],
            "'a' has two members of one kind, the second being 'a.png'",
        ),
        ([], "holds no image"),
    ],
)
def test_shard_without_pairs(tmp_path, members, message):
    path = write_tar(tmp_path / "00007.tar", members)
    with pytest.raises(UserError, match=rf"00007\.tar: .*{message}"):
        index_shards([path])


# Shards and members that are left out


def dotted(count: int, start: int = 0) -> list[tuple[str, bytes]]:
    return [
        (f"holiday v1.{i}.{e}", x) for i in range(start, start + count) for e, x in (("png", picture(i)), ("txt", b"a"))
    ]


def test_members_that_belong_to_no_sample_are_counted_by_reason(tmp_path):
    others = ["a.npy", "b.NPY", "README", "._c.jpg", "x.seg.png", "__meta__/d.jpg"]
    members = [*good_sample(0), *dotted(2), *((name, b"x") for name in others)]
    shard = write_tar(tmp_path / "a.tar", members)
    with tarfile.open(shard, "a") as tar:
        for name, kind in (("folder", tarfile.DIRTYPE), ("e.jpg", tarfile.LNKTYPE), ("f.jpg", tarfile.SYMTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "000000.png"
            tar.addfile(info)
    second = write_tar(tmp_path / "b.tar", [*good_sample(0), *dotted(1)])
    assert index_shards([shard, second]).tolist() == [1, 1]
    found = {reason: tuple(value) for reason, value in members_passed_over([shard, second]).items()}
    several = "more than one dot in the name (data.key_rule=last_dot reads them)"
    assert found == {
        several: (7, "a.tar: holiday v1.0.png"),
        "the extension .npy": (2, "a.tar: a.npy"),
        "no extension, or a hidden file": (2, "a.tar: README"),
        "links and other members that are not files": (2, "a.tar: e.jpg"),
    }
    assert next(iter(found)) == several


def test_reasons_for_passing_over_are_bounded(tmp_path):
    shard = write_tar(tmp_path / "a.tar", [*good_sample(0), *((f"frame.{i}", b"x") for i in range(100))])
    index_shards([shard])
    found = members_passed_over([shard])
    assert sum(value.count for value in found.values()) == 100
    assert len(found) <= 21


def test_key_rule_reads_names_with_dots(tmp_path):
    """Both rules at once, each with its own index; at the last dot as at the first where there is one dot."""
    shard = write_tar(tmp_path / "a.tar", [*dotted(3), *good_sample(7)])
    assert usable_shards([shard], "first_dot").counts.tolist() == [1]
    assert usable_shards([shard], "last_dot").counts.tolist() == [4]
    assert usable_shards([shard], "first_dot").counts.tolist() == [1]
    assert load_key(shard, 0) == "000007"
    assert [load_key(shard, i, "last_dot") for i in range(4)] == [f"holiday v1.{i}" for i in range(3)] + ["000007"]
    offset, length = load_members(shard, "last_dot")[1, IMAGE]
    assert shard.read_bytes()[offset : offset + length] == picture(1)
    assert members_passed_over([shard], "last_dot") == {}


def test_shard_of_dotted_names_alone_is_refused_for_the_true_reason(tmp_path):
    shard = write_tar(tmp_path / "a.tar", dotted(8))
    with pytest.raises(
        UserError, match=r"16 names of its members have more than one dot, such as 'holiday v1\.0\.png'"
    ):
        index_shards([shard])


def bad_and_good_shards(folder):
    shards = write_shards(folder, [4] * 6)
    shards[1].write_bytes(b"")
    shards[2].write_bytes(bytes(10240))
    shards[4].write_bytes(shards[4].read_bytes()[:3000])
    return shards


def test_bad_shards_are_named_all_together_and_left_out_up_to_a_limit(tmp_path):
    shards = bad_and_good_shards(tmp_path)
    for limit in (None, 0, 2):
        with pytest.raises(UserError, match=r"^3 of 6 shards .*00001\.tar.*00002\.tar.*00004\.tar") as caught:
            usable_shards(shards, max_bad=limit)
        assert ("; or leave out up to 3 with data.max_bad_shards" in str(caught.value)) == (limit is not None)
    usable = usable_shards(shards, max_bad=3)
    assert [path.name for path in usable.shards] == ["00000.tar", "00003.tar", "00005.tar"]
    assert usable.counts.tolist() == [4, 4, 4]
    assert [fault.split(": ")[0] for fault in usable.bad] == [str(shards[i]) for i in (1, 2, 4)]
    with pytest.raises(UserError, match="3 of 3 shards cannot be used"):
        usable_shards([shards[i] for i in (1, 2, 4)], max_bad=9)


def test_missing_shards_count_as_bad_ones_where_these_may_be_left_out(tmp_path):
    write_shards(tmp_path, [4, 4])
    pattern = f"{tmp_path}/{{00000..00003}}.tar"
    with pytest.raises(UserError, match="2 of 4 shards do not exist"):
        resolve_shards(pattern, max_missing=1)
    usable = usable_shards(resolve_shards(pattern, max_missing=2), max_bad=2)
    assert usable.counts.tolist() == [4, 4]
    assert all("No such file" in fault for fault in usable.bad)


def test_hidden_tars_are_no_shards(tmp_path):
    shards = write_shards(tmp_path, [4])
    (tmp_path / "._00000.tar").write_bytes(b"AppleDouble")
    assert resolve_shards(str(tmp_path)) == shards


def test_folder_without_tars_says_what_it_holds(tmp_path):
    for name in ("00000.TAR", "00001.tar.gz"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match=r"holds no \.tar file \(it holds 00000\.TAR, 00001\.tar\.gz\)"):
        resolve_shards(str(tmp_path))


@pytest.mark.parametrize("format", ["gnu", "oldgnu", "pax"])
def test_sparse_members_are_refused_for_the_true_reason(tmp_path, format):
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "a.txt").write_text("a")
    with (folder / "a.png").open("wb") as file:
        file.write(picture(0))
        file.truncate(1 << 20)
        file.seek(1 << 21)
        file.write(b"end")
    shard = tmp_path / "a.tar"
    command = ["tar", "-S", f"--format={format}", "-C", folder, "-cf", shard, "a.png", "a.txt"]
    subprocess.run(command, check=True)
    with pytest.raises(UserError, match=r"a\.tar: the member 'a\.png' is stored as a sparse file.*without --sparse"):
        index_shards([shard])


INDEX = """
import sys
from pathlib import Path
from focalclip.data.index import index_shards
index_shards(sorted(Path(sys.argv[1]).glob("*.tar")))
"""


def test_progress_bar_for_several_shards_on_a_terminal_alone(tmp_path):
    write_shards(tmp_path, [1, 1, 1])
    terminal, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    subprocess.run([sys.executable, "-c", INDEX, tmp_path], stderr=end, check=True)
    assert select.select([terminal], [], [], 5)[0]
    assert "indexing shards" in os.read(terminal, 10_000).decode()
    for path in (terminal, end):
        os.close(path)
    indexes = list(tmp_path.glob("*.npz"))
    assert len(indexes) == 3
    for path in indexes:
        path.unlink()
    for _ in range(2):  # to a file, then again with nothing to do
        done = subprocess.run([sys.executable, "-c", INDEX, tmp_path], capture_output=True, text=True, check=True)
        assert done.stderr == ""


def test_an_index_that_cannot_be_written_makes_no_bad_shard(tmp_path, monkeypatch):
    shards = write_shards(tmp_path / "data", [1, 1])
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FOCALCLIP_CACHE", str(tmp_path / "file"))
    shards[0].with_name(f"{shards[0].name}.index.npz").mkdir()  # stands in the way of the file
    (shards[0].with_name(f"{shards[0].name}.index.npz") / "x").write_text("")
    with pytest.raises(MachineError, match="its index can be written neither"):
        usable_shards(shards, max_bad=1)
