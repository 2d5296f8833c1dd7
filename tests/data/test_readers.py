"""The table of sources: what each reader returns, shards out of any of them, and training on any of them."""

import json
import multiprocessing

import numpy as np
import pytest
from tiny_shards import picture, write_shards
from wds_folder import write_folder

from focalclip.base.errors import UserError
from focalclip.cli.make_shards import main as make_shards
from focalclip.config import SourceConfig
from focalclip.data import write
from focalclip.data.folders import CLASS_FOLDERS, TASK_FOLDER
from focalclip.data.index import index_shards, read_captions
from focalclip.data.prepared import training_shards
from focalclip.data.reader import FileEntry, PictureSet, Request, Unavailable
from focalclip.data.samples import ShardReader
from focalclip.data.shards import SHARDS
from focalclip.data.sources import find_reader, open_source
from focalclip.data.tables import CAPTION_FILE, TABLE
from focalclip.data.write import write_pictures


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FOCALCLIP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_images(folder, paths, **options):
    for seed, path in enumerate(paths):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(picture(seed, **options))
    return folder


def members(folder):
    shards = sorted(folder.glob("*.tar"))
    reader = ShardReader(shards, keep=4)
    return [reader.read(i, j) for i, count in enumerate(index_shards(shards)) for j in range(count)]


def table(tmp_path):
    write_images(tmp_path / "table", ["a.png", "b.png"])
    (tmp_path / "table" / "pairs.csv").write_text("path,caption\na.png,a cat\nb.png,a dog\na.png,kitty\n")
    return tmp_path / "table" / "pairs.csv"


def caption_file(tmp_path):
    write_images(tmp_path / "coco", ["7.png", "9.png"])
    content = {
        "images": [{"id": 7, "file_name": "7.png"}, {"id": 9, "file_name": "9.png"}],
        "annotations": [{"image_id": 9, "caption": "a dog"}],
    }
    (tmp_path / "coco" / "captions.json").write_text(json.dumps(content))
    return tmp_path / "coco" / "captions.json"


def test_every_kind_of_source_has_its_reader(tmp_path):
    write_shards(tmp_path / "shards", [2])
    write_images(tmp_path / "classes", ["ant/a.png", "bee/b.png"])
    found = {
        str(tmp_path / "shards"): SHARDS,
        "a/{000..331}.tar": SHARDS,
        "a/0.tar": SHARDS,
        "a/0.tar::b/0.tar": SHARDS,
        "s3://bucket/0.tar": SHARDS,
        str(write_folder(tmp_path / "task", [0])): TASK_FOLDER,
        str(tmp_path / "classes"): CLASS_FOLDERS,
        str(table(tmp_path)): TABLE,
        "captions.JSON": CAPTION_FILE,
        str(tmp_path / "shards" / "none"): None,
        str(tmp_path / "table" / "a.png"): None,
        "nowhere": None,
    }
    assert {source: find_reader(source) for source in found} == found


def test_shards_have_captions_keywords_and_class_numbers(tmp_path):
    write_shards(tmp_path / "shards", [2, 1])
    found = open_source(str(tmp_path / "shards"), Request())
    assert found.captions == tuple((f"caption {i}", f"keyword {i}") for i in range(3))
    assert found.labels.tolist() == [0, 1, 2]
    assert (found.class_names, found.templates) == (None, None)
    assert [entry.read() for entry in found.entries] == [picture(i) for i in range(3)]
    assert len(open_source(str(tmp_path / "shards"), Request(limit=2)).entries) == 2


def test_class_folders_have_names_and_labels_with_or_without_splits(tmp_path):
    write_images(tmp_path / "plain", ["bee/b.png", "ant/a.png"])
    found = open_source(str(tmp_path / "plain"), Request())
    assert (found.class_names, found.labels.tolist(), found.captions) == (("ant", "bee"), [0, 1], None)
    write_images(tmp_path / "split", ["train/bee/b.png", "train/ant/a.png", "test/ant/c.png"])
    assert len(open_source(str(tmp_path / "split"), Request()).entries) == 2
    assert len(open_source(str(tmp_path / "split"), Request("test")).entries) == 1
    with pytest.raises(Unavailable, match=r"has no val split \(it has"):
        open_source(str(tmp_path / "split"), Request("val"))


def test_records_of_unequal_lengths_are_refused(tmp_path):
    entries = (FileEntry(tmp_path / "a.png", "a.png"),)
    with pytest.raises(ValueError, match="2 captions for 1 pictures"):
        PictureSet(tmp_path, entries, captions=(("a",), ("b",)))
    with pytest.raises(ValueError, match="0 labels for 1 pictures"):
        PictureSet(tmp_path, entries, labels=np.array([]))


# Shards out of any source


def test_captioned_sources_keep_their_captions_and_bytes(tmp_path, capsys):
    assert make_shards([str(table(tmp_path)), str(tmp_path / "out")]) == 0
    assert "2 images with their own captions" in capsys.readouterr().out
    first, second = members(tmp_path / "out")
    assert (first.image, second.image) == (picture(0), picture(1))
    assert read_captions(first.text, first.json).captions == ["a cat", "kitty"]
    assert (first.text, second.text, first.label) == (b"a cat", b"a dog", None)


def test_pictures_without_captions_are_left_out_and_counted(tmp_path, capsys):
    assert make_shards([str(caption_file(tmp_path)), str(tmp_path / "out")]) == 0
    assert "left out 1 picture: neither caption nor label, the first being" in capsys.readouterr().out
    (only,) = members(tmp_path / "out")
    assert (only.image, only.text) == (picture(1), b"a dog")


def test_classes_of_folders_become_captions_and_numbers(tmp_path):
    write_images(tmp_path / "classes", ["bus stop/b.jpg", "ant/a.jpg"], format="JPEG")
    assert make_shards([str(tmp_path / "classes"), str(tmp_path / "out")]) == 0
    ant, stop = members(tmp_path / "out")
    assert (ant.image, ant.json, ant.label) == (
        picture(1, format="JPEG"),
        b'{"captions": ["ant"], "class_names": ["ant"]}',
        b"0",
    )
    assert (stop.json, stop.label) == (b'{"captions": ["bus stop"], "class_names": ["bus stop"]}', b"1")


def test_formats_that_shards_do_not_hold_become_png(tmp_path):
    write_images(tmp_path / "classes", ["ant/a.bmp", "bee/b.bmp"], format="BMP")
    assert make_shards([str(tmp_path / "classes"), str(tmp_path / "out")]) == 0
    assert [sample.image[:4] for sample in members(tmp_path / "out")] == [b"\x89PNG"] * 2


def test_shards_out_of_shards_lose_nothing_that_training_reads(tmp_path):
    keywords = {"captions": ["a cat"], "keywords": ["animal"], "class_names": ["cat"]}
    write.write_shards([{"png": picture(0), "txt": "a cat", "json": keywords, "cls": 7}], tmp_path / "one")
    assert make_shards([str(tmp_path / "one"), str(tmp_path / "two")]) == 0
    assert members(tmp_path / "two") == members(tmp_path / "one")


def test_what_cannot_become_shards_is_one_clear_sentence(tmp_path, capsys):
    def refused(*arguments):
        assert make_shards([*map(str, arguments), str(tmp_path / "out")]) == 2
        return capsys.readouterr().err

    assert "SOURCE nowhere: no such file or folder" in refused("nowhere")
    assert "has no classes to take images from; leave --shots away" in refused(table(tmp_path), "--shots", 5)
    assert "has no val split (it has test)" in refused(write_folder(tmp_path / "task", [0]), "--split", "val")
    damaged = write_images(tmp_path / "classes", ["ant/a.png", "bee/b.png"])
    (damaged / "bee/b.png").write_bytes(picture(1)[:100])
    assert "1 pictures are damaged or cannot be read, more than the limit of 0 (--max-faults): 1 of 2: " in (
        said := refused(damaged, "--max-faults", 0)
    )
    assert "b.png (" in said
    with pytest.raises(UserError, match="has neither captions nor named classes"):
        write_pictures(PictureSet(tmp_path, ()), tmp_path / "out")


# Training on other sources


def test_training_takes_shards_as_they_are(tmp_path):
    shards = write_shards(tmp_path / "shards", [2, 1])
    assert training_shards(str(tmp_path / "shards")) == shards
    assert training_shards([str(path) for path in shards]) == shards
    with pytest.raises(UserError, match=r"data\.train nowhere: no such file or folder"):
        training_shards("nowhere")
    with pytest.raises(UserError, match=r"data\.train is empty"):
        training_shards(" ")


def test_training_writes_another_source_once_and_again_when_it_changes(tmp_path, own_cache, capsys):
    source = table(tmp_path)
    shards = training_shards(str(source))
    assert shards[0].is_relative_to(own_cache / "sources")
    assert [sample.text for sample in members(shards[0].parent)] == [b"a cat", b"a dog"]
    assert "Writing" in capsys.readouterr().err
    before = shards[0].stat().st_mtime_ns
    assert training_shards(str(source)) == shards
    assert shards[0].stat().st_mtime_ns == before
    assert "Writing" not in capsys.readouterr().err
    source.write_text(source.read_text().replace("a dog", "a puppy"))
    captions = training_shards(str(source))
    assert [sample.text for sample in members(captions[0].parent)] == [b"a cat", b"a puppy"]
    (source.parent / "a.png").write_bytes(picture(5))
    pictures = training_shards(str(source))
    assert members(pictures[0].parent)[0].image == picture(5)
    assert len({shards[0], captions[0], pictures[0]}) == 3


def test_processes_that_ask_at_once_get_the_same_shards(tmp_path):
    source, fork = str(table(tmp_path)), multiprocessing.get_context("fork")
    with fork.Pool(3) as pool:
        first, *others = pool.map(training_shards, [source] * 3)
    assert others == [first, first]
    assert len(members(first[0].parent)) == 2


def _folder_of_pictures(tmp_path):
    write_images(tmp_path / "flat", ["a.png", "b.png"])
    return (
        "flat",
        "a folder of 2 pictures without captions beside them or a folder for each class",
        "flat.csv shards/flat --image-root flat",
    )


def _workbook(tmp_path):
    (tmp_path / "pairs.xlsx").write_bytes(b"PK")
    return "pairs.xlsx", "a xlsx file", "pairs.csv shards/pairs"


def _images_elsewhere(tmp_path):
    (tmp_path / "pairs.csv").write_text("path,caption\na.png,a cat\n")
    return "pairs.csv", "images are not there", "pairs.csv shards/pairs"


def _other_split(tmp_path):
    images = [{"filename": "a.png", "split": "val", "sentences": [{"raw": "a cat"}]}]
    (tmp_path / "k.json").write_text(json.dumps({"images": images}))
    return "k.json", "no image of the split 'train'", "k.json shards/k"


@pytest.mark.parametrize("make", [_folder_of_pictures, _workbook, _images_elsewhere, _other_split])
def test_what_training_cannot_read_leads_to_make_shards(make, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source, kind, arguments = make(tmp_path)
    with pytest.raises(UserError) as error:
        training_shards(source)
    assert str(error.value).startswith("data.train") or "pairs.csv" in str(error.value) or "k.json" in str(error.value)
    assert kind in str(error.value)
    assert f": python scripts/make_shards.py {arguments}" in str(error.value)


def test_a_list_takes_any_kind_of_source(tmp_path, own_cache):
    shards = write_shards(tmp_path / "shards", [2, 1])
    both = training_shards([SourceConfig(source=str(table(tmp_path))), f"{shards[0]}::{shards[1]}"])
    assert both[0].is_relative_to(own_cache / "sources")
    assert both[1:] == shards
    assert (both.sources, both.entries) == ((0, 1, 2), (0, 1, 1))
    with pytest.raises(UserError, match=r"data\.train nowhere: no such file or folder"):
        training_shards([str(shards[0]), "nowhere"])
