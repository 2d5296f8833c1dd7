"""Layouts of evaluation data other than wds: folders and archives that a test writes as their makers do."""

import json
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from torchvision.datasets import ImageFolder
from wds_folder import picture, write_folder

from focalclip.base.errors import UserError
from focalclip.evaluation.data import TaskData, Unavailable, decode, open_task
from focalclip.evaluation.task import Task, load_benchmark

TASK = Task(id="pets", folders=("vtab-pets",), templates=("a photo of a {c}.",))


def write_images(folder, paths):
    """Seeded pictures at paths below a folder; returns it."""
    for seed, path in enumerate(paths):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(picture(seed))
    return folder


def write_archive_set(folder, classes=12, index=None):
    """A set as Chinese-CLIP packs it: two images per class in test, one in train; returns it."""
    width = 3 if classes > 10 else 1
    labels = [f"{label:0{width}d}" for label in range(classes)]
    write_images(folder, [f"test/{label}/{i}.png" for label in labels for i in ("b", "a")])
    write_images(folder, [f"train/{label}/x.JPG" for label in labels])
    (folder / "label.txt").write_text("".join(f"name {label}\n" for label in range(classes)))
    (folder / "label_cn.txt").write_text("".join(f"名 {label}\n" for label in range(classes)))
    if index is not None:
        (folder / "index.json").write_text(json.dumps(index))
    return folder


def zip_folder(folder, archive, root="", method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(archive, "w", method) as target:
        for path in sorted(folder.rglob("*")):
            target.write(path, Path(root, path.relative_to(folder)))
    return archive


def contents(data):
    return [entry.read() for entry in data.entries]


# ELEVATER's sets by Chinese-CLIP


def test_archive_folder_has_the_order_of_torchvisions_image_folder(tmp_path):
    folder = write_archive_set(tmp_path / "pets")
    write_images(folder, ["test/003/deep/er/z.png", "test/003/deep-er/a.png", "test/003/Z.png"])
    data = open_task(TASK, tmp_path, {})
    reference = ImageFolder(folder / "test")
    assert [entry.path for entry in data.entries] == [Path(path) for path, _ in reference.samples]
    assert data.labels.tolist() == reference.targets
    assert data.class_names == tuple(f"name {label}" for label in range(12))
    assert data.templates == ("a photo of a {c}.",)
    assert data.official_order is None


def test_archive_labels_are_the_folders_numbers_even_where_a_class_has_no_images(tmp_path):
    folder = write_archive_set(tmp_path / "pets", classes=4)
    for file in (folder / "test" / "1").iterdir():
        file.unlink()
    (folder / "test" / "1").rmdir()
    assert open_task(TASK, tmp_path, {}).labels.tolist() == [0, 0, 2, 2, 3, 3]


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("root", ["", "pets"])
def test_a_sets_zip_reads_like_its_folder(tmp_path, method, root):
    order = np.random.default_rng(0).permutation(24).tolist()
    folder = write_archive_set(tmp_path / "made", index=order)
    (tmp_path / "data").mkdir()
    zip_folder(folder, tmp_path / "data" / "pets.zip", root, method)
    zipped, unpacked = open_task(TASK, tmp_path / "data", {}), open_task(Task(**dict(TASK, id="made")), tmp_path, {})
    assert contents(zipped) == contents(unpacked)
    assert [entry.key for entry in zipped.entries] == [entry.key for entry in unpacked.entries]
    assert zipped.digest("x") == unpacked.digest("x")
    assert zipped.official_order.tolist() == order
    assert zipped.entries[0].name == "pets.zip:test/000/a.png"
    assert open_task(TASK, tmp_path / "data", {}, "train").labels.tolist() == list(range(12))


def test_threads_read_one_zip_at_once(tmp_path):
    zip_folder(write_archive_set(tmp_path / "made", classes=30), tmp_path / "pets.zip")
    data = open_task(TASK, tmp_path, {})
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda entry: entry.read(), data.entries * 5)) == contents(data) * 5


def test_a_zip_inside_the_whole_download_is_read_in_place(tmp_path):
    folder = write_archive_set(tmp_path / "made")
    inner, other = zip_folder(folder, tmp_path / "pets.zip", "pets"), zip_folder(folder, tmp_path / "other.zip")
    (tmp_path / "data").mkdir()
    with zipfile.ZipFile(tmp_path / "data" / "ELEVATER_all.zip", "w", zipfile.ZIP_STORED) as whole:
        whole.write(other, "ELEVATER/other.zip")
        whole.write(inner, "ELEVATER/pets.zip")
    data = open_task(TASK, tmp_path / "data", {})
    assert contents(data) == contents(open_task(Task(**dict(TASK, id="made")), tmp_path, {}))
    with pytest.raises(Unavailable, match=r"needs .*wds_cars"):
        open_task(Task(id="cars"), tmp_path / "data", {})


def test_a_compressed_zip_inside_the_whole_download_says_how_to_unpack_it(tmp_path):
    inner = zip_folder(write_archive_set(tmp_path / "made"), tmp_path / "pets.zip", "pets")
    (tmp_path / "data").mkdir()
    with zipfile.ZipFile(tmp_path / "data" / "ELEVATER_all.zip", "w", zipfile.ZIP_DEFLATED) as whole:
        whole.write(inner, "ELEVATER/pets.zip")
    command = f"unzip -j {tmp_path}/data/ELEVATER_all.zip ELEVATER/pets.zip -d {tmp_path}/data"
    with pytest.raises(UserError, match=command):
        open_task(TASK, tmp_path / "data", {})


def test_the_unpacked_download_is_found(tmp_path):
    write_archive_set(tmp_path / "ELEVATER" / "pets" / "pets", classes=3)
    zip_folder(write_archive_set(tmp_path / "made", classes=4), tmp_path / "ELEVATER" / "cars.zip")
    assert open_task(TASK, tmp_path, {}).labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert len(open_task(Task(**dict(TASK, id="cars", folders=())), tmp_path, {}).class_names) == 4


def test_the_official_order_is_kept_and_checked(tmp_path):
    folder = write_archive_set(tmp_path / "pets", classes=3, index=[5, 0, 4, 1, 2, 3])
    data = open_task(TASK, tmp_path, {})
    official = [data.entries[i].key for i in data.official_order]
    assert official[:2] == ["test/2/b.png", "test/0/a.png"]
    assert open_task(TASK, tmp_path, {}, "train").official_order is None
    for faulty in (
        "[0, 1, 2, 3, 4]",
        "[0, 1, 2, 3, 4, 4]",
        '{"a": 1}',
        "[0.5, 1, 2, 3, 4, 5]",
        "nonsense",
        "[[0], [1, 2]]",
    ):
        (folder / "index.json").write_text(faulty)
        with pytest.raises(UserError, match=r"pets: index\.json is not an order of the 6 test images"):
            open_task(TASK, tmp_path, {})


def test_a_folder_that_is_no_label_is_named(tmp_path):
    folder = write_archive_set(tmp_path / "pets", classes=3)
    write_images(folder, ["test/3/a.png"])
    with pytest.raises(UserError, match=r"the folder of test/3/a\.png is not one of the 3 labels of label\.txt"):
        open_task(TASK, tmp_path, {})


def test_a_faulty_label_file_is_named(tmp_path):
    folder = write_archive_set(tmp_path / "pets", classes=3)
    for content, message in ((b"ant\n\nbee\n", "line 2 is empty"), ("bière".encode("latin-1"), "not UTF-8")):
        (folder / "label.txt").write_bytes(content)
        with pytest.raises(UserError, match=rf"pets: label\.txt: {message}"):
            open_task(TASK, tmp_path, {})


def test_several_labels_per_image_are_refused_where_the_layout_has_one(tmp_path):
    write_archive_set(tmp_path / "voc-2007-classification", classes=20)
    task = Task(id="voc-2007-classification", metric="map_11point", templates=("a {c}.",))
    with pytest.raises(
        UserError, match="one label per image, voc-2007-classification needs several; take its wds folder"
    ):
        open_task(task, tmp_path, {})


def test_the_archive_has_no_val_and_says_where_one_can_be_cut(tmp_path):
    write_archive_set(tmp_path / "pets", classes=3)
    with pytest.raises(Unavailable, match=r"has no val split \(it has train, test\); a validation set can be cut from"):
        open_task(TASK, tmp_path, {}, "val")


def test_faulty_zips_are_one_clear_sentence(tmp_path):
    archive = zip_folder(write_archive_set(tmp_path / "made", classes=3), tmp_path / "pets.zip")
    whole = archive.read_bytes()
    archive.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"pets\.zip: not a whole zip .*; download it again"):
        open_task(TASK, tmp_path, {})
    zip_folder(write_images(tmp_path / "else", ["cats/a.png"]), archive)
    with pytest.raises(UserError, match=r"pets\.zip: no label\.txt for pets in it \(it holds cats"):
        open_task(TASK, tmp_path, {})


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_damaged_member_is_found_when_decoded(tmp_path, method):
    archive = zip_folder(write_archive_set(tmp_path / "made", classes=3), tmp_path / "pets.zip", method=method)
    data = open_task(TASK, tmp_path, {})
    entry, raw = data.entries[2], bytearray(archive.read_bytes())
    raw[entry.offset + 30 + len("test/1/a.png") + entry.packed // 2] ^= 255
    archive.write_bytes(raw)
    assert entry.read() == b""
    with pytest.raises(ValueError, match="damaged where it is stored"):
        decode(entry.read())
    assert decode(data.entries[3].read()).size == (12, 12)


# a folder per class


@pytest.mark.parametrize(("val", "test"), [("val", "test"), ("validation", "testing"), ("valid", "Test")])
def test_image_folder_with_splits(tmp_path, val, test):
    write_images(
        tmp_path / "pets",
        [f"{test}/zebra/a.jpg", f"{test}/ant/b.png", f"{test}/.DS_Store", "train/bee/a.png", f"{val}/ant/c.webp"],
    )
    write_images(tmp_path / "pets", ["train/ant/a.png"])
    data = open_task(TASK, tmp_path, {})
    assert data.class_names == ("ant", "bee", "zebra")
    assert (data.labels.tolist(), [entry.key for entry in data.entries]) == (
        [0, 2],
        [f"{test}/ant/b.png", f"{test}/zebra/a.jpg"],
    )
    assert open_task(TASK, tmp_path, {}, "train").labels.tolist() == [0, 1]
    assert open_task(TASK, tmp_path, {}, "val").labels.tolist() == [0]


def test_image_folder_without_splits_counts_as_test_even_with_a_class_called_train(tmp_path):
    write_images(tmp_path / "pets", ["train/a.png", "bus/b.png", "tram/c.png"])
    data = open_task(TASK, tmp_path, {})
    assert (data.class_names, data.labels.tolist()) == (("bus", "train", "tram"), [0, 1, 2])
    with pytest.raises(Unavailable, match=r"has no train split \(it is not split and counts as test"):
        open_task(TASK, tmp_path, {}, "train")


def test_a_set_that_is_tested_on_its_val_says_how(tmp_path):
    write_images(tmp_path / "pets", ["val/n01440764/a.JPEG", "val/n01443537/b.JPEG", "train/n01440764/c.JPEG"])
    with pytest.raises(
        Unavailable, match=r"no test split \(it has train, val\); where val is what models are tested on"
    ):
        open_task(TASK, tmp_path, {})
    (tmp_path / "pets" / "test").symlink_to("val")
    assert open_task(TASK, tmp_path, {}).class_names == ("n01440764", "n01443537")


def test_a_layout_without_prompts_needs_the_tasks(tmp_path):
    write_images(tmp_path / "pets", ["bus/b.png", "tram/c.png"])
    with pytest.raises(UserError, match="brings no prompts and the task pets has none; give it templates"):
        open_task(Task(id="pets"), tmp_path, {})


# Hateful Memes and VOC 2007 as their authors packed them


def write_memes(folder, name, labels):
    write_images(folder, [f"img/{i:05d}.png" for i in range(len(labels))])
    memes = [{"id": i, "img": f"img/{i:05d}.png", "label": label, "text": "…"} for i, label in enumerate(labels)]
    (folder / name).write_text("".join(json.dumps(meme, ensure_ascii=False) + "\n" for meme in memes), encoding="utf-8")


MEMES = Task(id="hateful-memes", folders=("hateful_memes",), templates=("a {c}.",))


@pytest.mark.parametrize("dev", ["dev.jsonl", "dev_seen.jsonl"])
def test_hateful_memes_test_set_is_the_dev_file(tmp_path, dev):
    write_memes(tmp_path / "hateful_memes", "train.jsonl", [0, 0, 1])
    write_memes(tmp_path / "hateful_memes", dev, [1, 0])
    (tmp_path / "hateful_memes" / "test.jsonl").write_text('{"id": 1, "img": "img/1.png", "text": "no label"}\n')
    data = open_task(MEMES, tmp_path, {})
    assert (data.labels.tolist(), data.class_names) == ([1, 0], ("meme", "hatespeech meme"))
    assert contents(data) == [picture(0), picture(1)]
    assert open_task(MEMES, tmp_path, {}, "train").labels.tolist() == [0, 0, 1]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": 2}', r'dev\.jsonl: line 3 is not \{"img": "img/ID\.png", "label": 0 or 1, \.\.\.\}'),
        ("<html>", r"dev\.jsonl: line 3 is not"),
        ('{"img": "img/00000.png", "label": 2}', r"dev\.jsonl: line 3 has the label 2, not 0 or 1"),
        ('{"img": "img/77777.png", "label": 1}', r"1 of 3 images are missing \(img/77777\.png \.\.\.\); unpack"),
    ],
)
def test_faulty_memes_are_named(tmp_path, line, message):
    write_memes(tmp_path / "hateful_memes", "dev.jsonl", [1, 0])
    with (tmp_path / "hateful_memes" / "dev.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(UserError, match=message):
        open_task(MEMES, tmp_path, {})


def write_voc(folder, split, marks):
    """VOC's own files: ``marks`` maps a class to 1, 0 or -1 for each image."""
    main = folder / "ImageSets" / "Main"
    main.mkdir(parents=True, exist_ok=True)
    count = len(next(iter(marks.values())))
    write_images(folder, [f"JPEGImages/{i:06d}.jpg" for i in range(count)])
    (main / f"{split}.txt").write_text("".join(f"{i:06d}\n" for i in range(count)))
    for name, values in marks.items():
        (main / f"{name}_{split}.txt").write_text("".join(f"{i:06d} {mark:2d}\n" for i, mark in enumerate(values)))


VOC = Task(id="voc-2007-classification", metric="map_11point", templates=("There is a {c} in the image.",))


@pytest.mark.parametrize(
    "place", ["VOCdevkit/VOC2007", "voc-2007-classification", "voc-2007-classification/VOCdevkit/VOC2007"]
)
def test_voc_has_several_labels_and_counts_difficult_objects(tmp_path, place):
    write_voc(tmp_path / place, "test", {"person": [1, -1, 0], "bus": [-1, -1, 1]})
    data = open_task(VOC, tmp_path, {})
    assert data.class_names == ("bus", "person")
    assert data.labels.tolist() == [[False, True], [False, False], [True, True]]
    assert data.multilabel
    assert contents(data) == [picture(0), picture(1), picture(2)]
    with pytest.raises(Unavailable, match=r"has no train split \(it has test\)"):
        open_task(VOC, tmp_path, {}, "train")


def test_faulty_voc_files_are_named(tmp_path):
    folder = tmp_path / "VOCdevkit" / "VOC2007"
    write_voc(folder, "test", {"person": [1, -1], "bus": [-1, 1]})
    (folder / "ImageSets" / "Main" / "bus_test.txt").write_text("000000 1\n")
    with pytest.raises(UserError, match=r"bus_test\.txt: not one line"):
        open_task(VOC, tmp_path, {})
    (folder / "JPEGImages" / "000001.jpg").unlink()
    (folder / "ImageSets" / "Main" / "bus_test.txt").write_text("000000 1\n000001 -1\n")
    with pytest.raises(UserError, match=r"1 of 2 images are missing \(000001\.jpg"):
        open_task(VOC, tmp_path, {})


# which layout it is


def test_a_layout_that_is_none_names_what_was_found(tmp_path):
    (tmp_path / "pets").mkdir()
    with pytest.raises(
        UserError, match=r"pets: no layout that can be read \(it holds nothing\); expected classnames\.txt"
    ):
        open_task(TASK, tmp_path, {})
    for name in ("notes.md", "labels.csv"):
        (tmp_path / "pets" / name).write_text("x")
    with pytest.raises(UserError, match=r"\(it holds labels\.csv, notes\.md\)"):
        open_task(TASK, tmp_path, {})


def test_folders_come_before_zips_and_the_likeliest_name_first(tmp_path):
    zip_folder(write_archive_set(tmp_path / "made", classes=4), tmp_path / "pets.zip")
    write_archive_set(tmp_path / "pets", classes=3)
    assert len(open_task(TASK, tmp_path, {}).class_names) == 3
    write_folder(tmp_path / "wds_vtab-pets", [0, 1], names=("cat", "dog"))
    assert open_task(TASK, tmp_path, {}).class_names == ("cat", "dog")


def test_the_tasks_in_the_documentation_are_understood(tmp_path):
    text = (Path(__file__).parents[3] / "docs" / "evaluation-data.md").read_text(encoding="utf-8")
    (tmp_path / "mine.yaml").write_text(text.split("```yaml\n")[1].split("```")[0])
    write_images(tmp_path / "bees", ["honey/a.png", "bumble/b.png"])
    found = {}
    for task in load_benchmark(tmp_path / "mine.yaml").tasks:
        try:
            found[task.id] = open_task(task, tmp_path, {}).class_names
        except Unavailable as reason:
            found[task.id] = str(reason).split(",")[0]
    assert found == {
        "bugs": "offline",
        "ants": "offline",
        "bees": ("bumble", "honey"),
        "svhn": f"{tmp_path}: has no test_32x32.mat; to download: python -c "
        f"\"from torchvision.datasets import *; SVHN('{tmp_path}'",
    }


def test_an_unknown_split_or_source_is_refused(tmp_path):
    with pytest.raises(UserError, match="the split 'dev' is not one of train, val, test"):
        open_task(TASK, tmp_path, {}, "dev")
    with pytest.raises(
        UserError, match="task pets: source 'ftp:x' is not hf:REPOSITORY, hf:FOLDER or torchvision:NAME"
    ):
        open_task(Task(id="pets", source="ftp:x"), tmp_path, {})


def test_labels_outside_the_classes_are_refused_whatever_the_reader(tmp_path):
    write_images(tmp_path / "pets", ["ant/a.png", "bee/b.png"])
    entries = open_task(TASK, tmp_path, {}).entries
    with pytest.raises(UserError, match=r"the label of .*b\.png is -1, not one of 0 to 1; a split without labels"):
        TaskData(tmp_path, ("ant", "bee"), ("{c}",), entries, np.array([0, -1]))
    with pytest.raises(UserError, match="it holds no images"):
        TaskData(tmp_path, ("ant", "bee"), ("{c}",), (), np.array([], dtype=np.int64))


def test_a_subset_loses_the_order_that_is_of_all(tmp_path):
    write_archive_set(tmp_path / "pets", classes=3, index=[5, 0, 4, 1, 2, 3])
    data = open_task(TASK, tmp_path, {})
    part = data.subset(np.array([4, 0]))
    assert ([entry.key for entry in part.entries], part.labels.tolist()) == (["test/2/a.png", "test/0/a.png"], [2, 0])
    assert part.official_order is None
    assert [entry.file for entry in part.entries] == [tmp_path / "pets" / entry.key for entry in part.entries]
