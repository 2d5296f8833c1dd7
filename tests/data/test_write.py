import hashlib
import io
import json

import pytest
import webdataset
from PIL import Image

from focalclip.base.errors import UserError
from focalclip.data.write import write_shards, write_task


def samples(n):
    return [{"png": bytes([i]), "txt": f"çaption {i}", "json": {"captions": [str(i)]}, "cls": i} for i in range(n)]


def hashes(folder):
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*.*")}


def test_equal_samples_give_equal_files(tmp_path):
    assert write_shards(samples(7), tmp_path / "a", 3) == 3
    write_shards(iter(samples(7)), tmp_path / "b", 3)
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")
    assert sorted(hashes(tmp_path / "a")) == ["00000.tar", "00001.tar", "00002.tar"]  # and no partial file


def test_webdataset_reads_back_every_member_in_order(tmp_path):
    write_shards(samples(5), tmp_path, 2)
    urls = [str(path) for path in sorted(tmp_path.glob("*.tar"))]
    read = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [sample["__key__"] for sample in read] == [f"{i:08d}" for i in range(5)]
    assert [sample["png"] for sample in read] == [bytes([i]) for i in range(5)]
    assert [sample["txt"].decode() for sample in read] == [f"çaption {i}" for i in range(5)]
    assert [json.loads(sample["json"]) for sample in read] == [{"captions": [str(i)]} for i in range(5)]
    assert [int(sample["cls"]) for sample in read] == list(range(5))


def test_own_keys_are_kept(tmp_path):
    write_shards([{"__key__": "style_name", "txt": "a"}], tmp_path)
    assert next(iter(webdataset.WebDataset(str(tmp_path / "00000.tar"), shardshuffle=False)))["__key__"] == "style_name"


def test_nothing_to_write_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no samples"):
        write_shards([], tmp_path)


def png(grey):
    buffer = io.BytesIO()
    Image.new("L", (4, 4), grey).save(buffer, "PNG")
    return buffer.getvalue()


def test_task_folder_has_the_wds_layout(tmp_path):
    pictures = [(png(i), i % 2) for i in range(9)]
    write_task(tmp_path, ["cat", "dog"], ["{c}", "a {c}"], pictures)
    assert (tmp_path / "classnames.txt").read_text() == "cat\ndog\n"
    assert (tmp_path / "zeroshot_classification_templates.txt").read_text() == "{c}\na {c}\n"
    count = int((tmp_path / "test" / "nshards.txt").read_text())
    urls = [str(tmp_path / "test" / f"{i}.tar") for i in range(count)]
    assert sorted(urls) == sorted(str(path) for path in (tmp_path / "test").glob("*.tar"))
    read = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [sample["__key__"] for sample in read] == [f"s{i:07d}" for i in range(9)]
    assert [(sample["png"], int(sample["cls"])) for sample in read] == pictures


@pytest.mark.parametrize(
    ("templates", "label", "said"), [(["{c}"], 2, "label 2"), (["{c}"], -1, "label -1"), (["a photo"], 0, "a photo")]
)
def test_wrong_task_is_an_error_before_anything_is_written(tmp_path, templates, label, said):
    with pytest.raises(UserError, match=said):
        write_task(tmp_path / "task", ["cat", "dog"], templates, [(png(0), label)])
    assert not (tmp_path / "task").exists()
