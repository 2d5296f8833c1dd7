"""Eight kinds of source, each from raw files to three training steps by one command; and what is wrong with them."""

import json
import re
import shlex
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers_run import losses, run
from tiny_shards import good_sample, picture, write_tar

from focalclip.base.errors import UserError
from focalclip.cli.make_shards import main as make_shards
from focalclip.data.reader import Request
from focalclip.data.sources import open_source

SHORT = ["--train.steps", "3", "--data.batch-size", "4", "--data.workers", "0"]
N = 6
CAPTIONS = [f"photo {i}" for i in range(N)]


def images(folder):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(N):
        (folder / f"{i}.png").write_bytes(picture(i))
    return folder


def beside(folder):
    for i in range(N):
        (images(folder / "sub") / f"{i}.txt").write_text(f"photo {i}\n")
    return folder


def csv_table(folder):
    (images(folder) / "pairs.csv").write_text("path,caption\n" + "".join(f"{i}.png,photo {i}\n" for i in range(N)))
    return folder / "pairs.csv"


def json_lines(folder):
    rows = [json.dumps({"image": f"{i}.png", "captions": [f"photo {i}"]}) for i in range(N)]
    (images(folder) / "pairs.jsonl").write_text("\n".join(rows))
    return folder / "pairs.jsonl"


def parquet(folder):
    folder.mkdir()
    rows = {"image": [{"bytes": picture(i), "path": None} for i in range(N)], "caption": CAPTIONS}
    pq.write_table(pa.table(rows), folder / "pairs.parquet", row_group_size=4)
    return folder / "pairs.parquet"


def classes(folder):
    for i in range(N):
        (folder / f"bird {i % 2}").mkdir(parents=True, exist_ok=True)
        (folder / f"bird {i % 2}" / f"{i}.png").write_bytes(picture(i))
    return folder


def saved(folder):
    rows = {"image": [{"bytes": picture(i), "path": None} for i in range(N)], "label": [i % 2 for i in range(N)]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    data = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict({"train": data}).save_to_disk(str(folder))
    return folder


def coco(folder):
    content = {
        "images": [{"id": i, "file_name": f"{i}.png"} for i in range(N)],
        "annotations": [{"image_id": i, "caption": f"photo {i}"} for i in range(N)],
    }
    (images(folder) / "captions.json").write_text(json.dumps(content))
    return folder / "captions.json"


def img2dataset(folder):
    folder.mkdir()
    write_tar(folder / "00000.tar", [member for i in range(N) for member in good_sample(i)])
    (folder / "00000_stats.json").write_text("{}")
    pq.write_table(pa.table({"url": ["x"], "caption": ["y"]}), folder / "00000.parquet")
    return folder


KINDS = [beside, csv_table, json_lines, parquet, classes, saved, coco, img2dataset]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FOCALCLIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_one_command_trains_on_raw_files(kind, tmp_path):
    launched = kind is parquet  # one of them by the command as it is typed; the others are forked
    done = run(tmp_path, kind(tmp_path / "raw"), *SHORT, launched=launched)
    assert done.returncode == 0, done.stderr
    assert len(losses(tmp_path / "runs/tiny")) == 3


@pytest.mark.parametrize("kind", [beside, parquet])
def test_pictures_and_captions_are_those_of_the_files(kind, tmp_path):
    found = open_source(str(kind(tmp_path / "raw")), Request())
    assert [entry.read() for entry in found.entries] == [picture(i) for i in range(N)]
    assert found.captions == tuple((caption,) for caption in CAPTIONS)


def test_a_saved_data_set_has_its_labels_and_names(tmp_path):
    found = open_source(str(saved(tmp_path / "raw")), Request())
    assert found.labels is not None
    assert found.labels.tolist() == [0, 1] * 3
    assert found.class_names == ("cat", "dog")
    assert found.entries[5].read() == picture(5)


def test_what_is_not_paired_is_counted(tmp_path):
    folder = beside(tmp_path / "raw")
    (folder / "sub" / "alone.txt").write_text("nothing")
    (folder / "sub" / "0.txt").write_bytes(b"\xff\xfe\x00")
    (folder / "sub" / "1.txt").unlink()
    found = open_source(str(folder), Request())
    assert found.left_out == ("sub/alone.txt: no picture beside it",)
    assert "not UTF-8" in found.faults[0]
    assert found.captions is not None
    assert [len(own) for own in found.captions] == [0, 0, 1, 1, 1, 1]


def test_columns_are_named_on_the_command_line(tmp_path, capsys):
    pq.write_table(pa.table({"a": [picture(0)], "title": ["x"], "text": ["y"]}), tmp_path / "p.parquet")
    assert make_shards(["p.parquet", "out"]) == 2
    assert "title, text may all be meant; say which with --caption-column" in capsys.readouterr().err
    assert make_shards(["p.parquet", "out", "--caption-column", "nope"]) == 2
    assert "has no column 'nope'; it has a, title, text" in capsys.readouterr().err
    assert make_shards(["p.parquet", "out", "--caption-column", "text", "--caption-column", "title"]) == 0
    assert open_source("out", Request()).captions == (("y", "x"),)


def test_options_that_a_kind_does_not_heed_are_refused(tmp_path, capsys):
    assert make_shards([str(classes(tmp_path / "raw")), "out", "--label-column", "x"]) == 2
    assert "--label-column" in capsys.readouterr().err
    assert make_shards([str(tmp_path / "raw"), "out", "--template", "a {c}"]) == 0


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("cc.tsv", b"a cat\thttp://x/1.jpg\n", "img2dataset"),
        ("broken.parquet", b"PAR1", "not a Parquet file"),
        ("absent.parquet", None, "no such file"),
    ],
)
def test_bad_files_are_one_sentence(name, content, message, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        open_source(str(tmp_path / name), Request())


def test_a_parquet_list_of_urls_is_turned_away(tmp_path):
    pq.write_table(pa.table({"URL": ["http://x"], "TEXT": ["y"]}), tmp_path / "laion.parquet")
    with pytest.raises(UserError, match="img2dataset"):
        open_source(str(tmp_path / "laion.parquet"), Request())


def test_a_data_set_of_the_hub_that_cannot_be_reached(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: (_ for _ in ()).throw(ConnectionError("offline")))
    with pytest.raises(UserError, match=r"datasets cannot open it .*save_to_disk"):
        open_source("datasets:some/set", Request())


def test_the_commands_of_the_page_run(tmp_path):
    page = (Path(__file__).parents[2] / "docs/data.md").read_text().split("## Sources")[1].split("\n## ")[0]
    commands = re.findall(r"```bash\n(.*?)```", page, re.DOTALL)[0].splitlines()
    made = {"photos": beside, "birds": classes, "saved": saved, "img2dataset": img2dataset}
    for name, kind in made.items():
        kind(tmp_path / name)
    for kind in (csv_table, json_lines, parquet, coco):
        file = kind(tmp_path / "files" / kind.__name__) if kind is not parquet else parquet(tmp_path / "p")
        file.rename(tmp_path / file.name)
    images(tmp_path)
    assert len(commands) == 8
    for command in commands:
        assert make_shards(shlex.split(command)[2:]) == 0, command
