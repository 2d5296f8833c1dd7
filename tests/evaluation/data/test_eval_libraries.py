"""Data of the library ``datasets`` and of torchvision, written by the one and in the other's own file formats."""

import hashlib
import json
import pickle
import shutil
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torchvision
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Sequence, Value
from PIL import Image as Pillow
from scipy.io import savemat
from wds_folder import picture

from focalclip.base.errors import UserError
from focalclip.evaluation.data import Unavailable, decode, open_task
from focalclip.evaluation.task import Task, registered_tasks

TASK = Task(id="mine", templates=("a {c}.",))


@pytest.fixture(autouse=True)
def arrow_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "arrow")


def table(labels, feature, image="image", label="label", **others):
    images = [{"bytes": picture(i), "path": None} for i in range(len(labels))]
    kinds = {name: kind for name, (_, kind) in others.items()}
    columns = {name: values for name, (values, _) in others.items()}
    return Dataset.from_dict(
        {image: images, label: labels, **columns}, features=Features({image: Image(), label: feature, **kinds})
    )


BUGS = ClassLabel(names=["ant", "bee", "wasp"])


# the library datasets


def test_what_save_to_disk_wrote_is_read_without_decoding(tmp_path):
    table([2, 0, 1], BUGS).save_to_disk(tmp_path / "mine")
    data = open_task(TASK, tmp_path, {})
    assert (data.class_names, data.labels.tolist()) == (("ant", "bee", "wasp"), [2, 0, 1])
    assert [entry.read() for entry in data.entries] == [picture(0), picture(1), picture(2)]
    assert data.templates == ("a {c}.",)
    with pytest.raises(Unavailable, match="it is not split and counts as test"):
        open_task(TASK, tmp_path, {}, "train")


def test_splits_of_a_saved_dictionary(tmp_path):
    splits = {"train": table([0, 0], BUGS), "validation": table([1], BUGS), "test": table([2, 1, 0], BUGS)}
    DatasetDict(splits).save_to_disk(tmp_path / "mine")
    found = {split: open_task(TASK, tmp_path, {}, split).labels.tolist() for split in ("train", "val", "test")}
    assert found == {"train": [0, 0], "val": [1], "test": [2, 1, 0]}
    DatasetDict({"train": splits["train"]}).save_to_disk(tmp_path / "other")
    with pytest.raises(Unavailable, match=r"has no test split \(it has train\)"):
        open_task(Task(**dict(TASK, source="hf:other")), tmp_path, {})


def test_a_selection_that_was_saved_keeps_its_order(tmp_path):
    table([0, 1, 2, 1], BUGS).select([3, 0]).save_to_disk(tmp_path / "mine")
    data = open_task(TASK, tmp_path, {})
    assert (data.labels.tolist(), data.entries[0].read()) == ([1, 0], picture(3))


def test_several_labels_per_image(tmp_path):
    table([[2, 0], [], [1]], Sequence(BUGS)).save_to_disk(tmp_path / "mine")
    data = open_task(TASK, tmp_path, {})
    assert data.labels.tolist() == [[True, False, True], [False, False, False], [False, True, False]]


def test_parquet_files_of_splits(tmp_path):
    for split, labels in {"train": [0], "validation": [1], "test": [2, 1]}.items():
        (tmp_path / "mine" / "data").mkdir(parents=True, exist_ok=True)
        table(labels, BUGS).to_parquet(tmp_path / "mine" / "data" / f"{split}-00000-of-00001.parquet")
    table([0], BUGS).to_parquet(tmp_path / "mine" / "data" / "test-00001-of-00002.parquet")
    found = {split: open_task(TASK, tmp_path, {}, split).labels.tolist() for split in ("train", "val", "test")}
    assert found == {"train": [0], "val": [1], "test": [2, 1, 0]}
    (tmp_path / "other" / "valid").mkdir(parents=True)
    shutil.move(
        tmp_path / "mine" / "data" / "validation-00000-of-00001.parquet", tmp_path / "other" / "valid" / "0.parquet"
    )
    assert open_task(Task(**dict(TASK, source="hf:other")), tmp_path, {}, "val").labels.tolist() == [1]


def test_parquet_that_another_program_wrote_with_names_for_labels(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = {"image": [{"bytes": picture(i), "path": ""} for i in range(3)], "label": ["wasp", "ant", "wasp"]}
    (tmp_path / "mine").mkdir()
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "mine" / "pictures.parquet")
    data = open_task(TASK, tmp_path, {})
    assert (data.class_names, data.labels.tolist()) == (("ant", "wasp"), [1, 0, 1])
    assert data.entries[2].read() == picture(2)


def test_of_several_label_columns_the_one_with_the_tasks_classes_counts(tmp_path):
    coarse = ([0, 1, 0], ClassLabel(names=["flies", "crawls"]))
    table([2, 0, 1], BUGS, image="img", label="fine", coarse=coarse).save_to_disk(tmp_path / "mine")
    assert open_task(Task(**dict(TASK, classes=3)), tmp_path, {}).labels.tolist() == [2, 0, 1]
    assert open_task(Task(**dict(TASK, classes=2)), tmp_path, {}).labels.tolist() == [0, 1, 0]
    with pytest.raises(UserError, match="which of the columns img, fine, coarse is the label is not clear"):
        open_task(TASK, tmp_path, {})


def test_images_in_files_of_their_own(tmp_path):
    paths = []
    for i in range(2):
        paths.append(str(tmp_path / f"{i}.png"))
        Path(paths[-1]).write_bytes(picture(i))
    features = Features({"image": Image(), "label": BUGS})
    Dataset.from_dict({"image": paths, "label": [1, 0]}, features=features).save_to_disk(tmp_path / "mine")
    assert [entry.read() for entry in open_task(TASK, tmp_path, {}).entries] == [picture(0), picture(1)]


def test_threads_read_rows_and_arrays_at_once(tmp_path, monkeypatch):
    table([i % 3 for i in range(60)], BUGS).save_to_disk(tmp_path / "mine")
    images = write_cifar(tmp_path, monkeypatch, count=60)
    rows = open_task(TASK, tmp_path, {}).entries
    arrays = open_task(Task(id="cifar-10", templates=("{c}",)), tmp_path, {}).entries
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda entry: entry.read(), rows * 5)) == [picture(i) for i in range(60)] * 5
        read = list(pool.map(lambda entry: np.asarray(decode(entry.read())), arrays * 5))
    assert np.array_equal(read, np.concatenate([images] * 5))


def test_faulty_tables_are_one_clear_sentence(tmp_path):
    cases = {
        "no column holds images": Dataset.from_dict({"label": [0]}, features=Features({"label": BUGS})),
        "which of the columns image, label is the label is not clear": table([0], Value("int64")),
        "the columns image, mask hold images": table([0], BUGS, mask=([{"bytes": picture(0), "path": None}], Image())),
        "the column label has rows without a label": table([0, None], BUGS),
        "the label of .*: row 1 is -1, not one of 0 to 2; a split without labels": table([0, -1], BUGS),
    }
    for i, (message, faulty) in enumerate(cases.items()):
        faulty.save_to_disk(tmp_path / f"case{i}")
        with pytest.raises(UserError, match=message):
            open_task(Task(id=f"case{i}", templates=("a {c}.",)), tmp_path, {})


def test_damaged_files_of_the_library_are_named(tmp_path):
    table([0, 1], BUGS).save_to_disk(tmp_path / "mine")
    (tmp_path / "mine" / "data-00000-of-00001.arrow").write_bytes(b"rubbish")
    with pytest.raises(UserError, match=r"mine: cannot be read \(.+\); save it again"):
        open_task(TASK, tmp_path, {})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "test.parquet").write_bytes(b"rubbish")
    with pytest.raises(UserError, match=r"test\.parquet: not a Parquet file that can be read"):
        open_task(Task(**dict(TASK, source="hf:other")), tmp_path, {})


def test_several_data_sets_in_one_folder_are_listed(tmp_path):
    for name in ("day", "night"):
        (tmp_path / "mine" / name).mkdir(parents=True)
        table([0], BUGS).to_parquet(tmp_path / "mine" / name / "test-0.parquet")
    with pytest.raises(UserError, match="holds several data sets: day, night; give the folder of one of them"):
        open_task(TASK, tmp_path, {})
    assert open_task(Task(**dict(TASK, source="hf:mine/night")), tmp_path, {}).labels.tolist() == [0]


# torchvision


def pixels(seed, shape):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_idx(path, array):
    """The IDX format of MNIST: type and number of dimensions, big-endian sizes, then the bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sizes = struct.pack(f">{array.ndim}i", *array.shape)
    path.write_bytes(bytes((0, 0, 8, array.ndim)) + sizes + array.tobytes())


def write_cifar(root, monkeypatch, count=3):
    """CIFAR-10's pickles, with the checksums of these files in place of the real ones."""
    folder, images = root / "cifar-10-batches-py", pixels(0, (count, 3, 32, 32))
    folder.mkdir(parents=True)
    batch = {"data": images.reshape(count, -1), "labels": [i % 3 for i in range(count)]}
    (folder / "test_batch").write_bytes(pickle.dumps(batch))
    names = {"label_names": ["airplane", "automobile", "bird"]}
    (folder / "batches.meta").write_bytes(pickle.dumps(names))

    def md5(name):
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    make = torchvision.datasets.CIFAR10
    monkeypatch.setattr(make, "train_list", [])
    monkeypatch.setattr(make, "test_list", [["test_batch", md5("test_batch")]])
    monkeypatch.setattr(make, "meta", {**make.meta, "md5": md5("batches.meta")})
    return images.transpose(0, 2, 3, 1)


@pytest.mark.parametrize("place", ["", "cifar10"])
def test_cifar_pickles_become_png_without_loss(tmp_path, monkeypatch, place):
    images = write_cifar(tmp_path / place, monkeypatch)
    data = open_task(Task(id="cifar-10", folders=("cifar10",), templates=("a {c}.",)), tmp_path, {})
    assert (data.class_names, data.labels.tolist()) == (("airplane", "automobile", "bird"), [0, 1, 2])
    read = [np.asarray(decode(entry.read())) for entry in data.entries]
    assert all(entry.read().startswith(b"\x89PNG") for entry in data.entries)
    assert np.array_equal(read, images)


def test_several_sets_share_torchvisions_root(tmp_path, monkeypatch):
    write_cifar(tmp_path, monkeypatch)
    write_dtd(tmp_path)
    write_files(tmp_path / "VOCdevkit" / "VOC2007" / "JPEGImages", ["0.jpg"])
    for name, text in (("test", "0\n"), ("bus_test", "0 1\n"), ("cat_test", "0 -1\n")):
        (tmp_path / "VOCdevkit" / "VOC2007" / "ImageSets" / "Main").mkdir(parents=True, exist_ok=True)
        (tmp_path / "VOCdevkit" / "VOC2007" / "ImageSets" / "Main" / f"{name}.txt").write_text(text)
    found = {}
    for task_id, folder in (("cifar-10", "cifar10"), ("dtd", "dtd"), ("voc-2007-classification", "voc2007_multilabel")):
        found[task_id] = open_task(Task(id=task_id, folders=(folder,), templates=("{c}",)), tmp_path, {}).class_names
    assert found == {
        "cifar-10": ("airplane", "automobile", "bird"),
        "dtd": ("banded", "dotted"),
        "voc-2007-classification": ("bus", "cat"),
    }


def test_a_changed_cifar_file_is_not_accepted(tmp_path, monkeypatch):
    write_cifar(tmp_path, monkeypatch)
    with (tmp_path / "cifar-10-batches-py" / "test_batch").open("ab") as file:
        file.write(b"x")
    with pytest.raises(
        Unavailable, match=r"corrupted.*; to download: python -c .*CIFAR10\('.*', train=False, download=True"
    ):
        open_task(Task(id="cifar-10", templates=("a {c}.",)), tmp_path, {})


@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST"])
def test_mnist_files(tmp_path, name):
    for prefix, count in (("t10k", 4), ("train", 6)):
        write_idx(tmp_path / name / "raw" / f"{prefix}-images-idx3-ubyte", pixels(count, (count, 28, 28)))
        write_idx(tmp_path / name / "raw" / f"{prefix}-labels-idx1-ubyte", np.arange(count, dtype=np.uint8))
    task = Task(id="mine", source=f"torchvision:{name.lower()}", templates=("a {c}.",))
    data = open_task(task, tmp_path, {})
    assert data.labels.tolist() == [0, 1, 2, 3]
    assert data.class_names == tuple(getattr(torchvision.datasets, name).classes)
    assert np.array_equal(np.asarray(decode(data.entries[2].read()))[..., 0], pixels(4, (4, 28, 28))[2])
    assert len(open_task(task, tmp_path, {}, "train").entries) == 6
    with pytest.raises(Unavailable, match=f"torchvision's {name} has no val split .* can be cut from train"):
        open_task(task, tmp_path, {}, "val")


def write_files(root, paths):
    for seed, path in enumerate(paths):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(picture(seed))


def write_dtd(root):
    write_files(root / "dtd" / "dtd" / "images", ["banded/b_1.jpg", "dotted/d_1.jpg", "dotted/d_2.jpg"])
    (root / "dtd" / "dtd" / "labels").mkdir()
    (root / "dtd" / "dtd" / "labels" / "test1.txt").write_text("dotted/d_2.jpg\nbanded/b_1.jpg\n")
    (root / "dtd" / "dtd" / "labels" / "val1.txt").write_text("dotted/d_1.jpg\n")


def write_eurosat(root):
    write_files(root / "eurosat" / "2750", ["AnnualCrop/a.jpg", "SeaLake/b.jpg"])


def write_food(root):
    write_files(root / "food-101" / "images", ["apple_pie/1.jpg", "waffles/2.jpg"])
    (root / "food-101" / "meta").mkdir()
    test = {"waffles": ["waffles/2"], "apple_pie": ["apple_pie/1"]}
    (root / "food-101" / "meta" / "test.json").write_text(json.dumps(test))


def write_gtsrb(root):
    write_files(root / "gtsrb" / "GTSRB" / "Final_Test" / "Images", ["00000.ppm", "00001.ppm"])
    (root / "gtsrb" / "GT-final_test.csv").write_text("Filename;Width;ClassId\n00000.ppm;12;16\n00001.ppm;12;1\n")


def write_pets(root):
    folder = root / "oxford-iiit-pet"
    write_files(folder / "images", ["Abyssinian_1.jpg", "great_pyrenees_7.jpg"])
    (folder / "annotations").mkdir()
    (folder / "annotations" / "test.txt").write_text("great_pyrenees_7 2 2 1\nAbyssinian_1 1 1 1\n")


def write_aircraft(root):
    folder = root / "fgvc-aircraft-2013b" / "data"
    write_files(folder / "images", ["0034309.jpg", "0034958.jpg"])
    (folder / "variants.txt").write_text("707-320\nA380\n")
    (folder / "images_variant_test.txt").write_text("0034958 A380\n0034309 707-320\n")


def write_country(root):
    write_files(
        root / "country211", [f"{split}/{code}/1.jpg" for split in ("train", "valid", "test") for code in ("AD", "ZW")]
    )


def write_sst2(root):
    write_files(root / "rendered-sst2", ["test/negative/1.png", "test/positive/0.png"])


def write_caltech(root):
    names = ["BACKGROUND_Google/image_0001.jpg", "Faces/image_0001.jpg", "ant/image_0001.jpg", "ant/image_0002.jpg"]
    write_files(root / "caltech101" / "101_ObjectCategories", names)
    (root / "caltech101" / "Annotations").mkdir()


def write_cars(root):
    folder = root / "stanford_cars"
    write_files(folder / "cars_test", ["00001.jpg", "00002.jpg"])
    (folder / "devkit").mkdir()
    savemat(folder / "devkit" / "cars_meta.mat", {"class_names": np.array(["Acura", "smart"], dtype=object)})
    kind = [("fname", object), ("class", int)]
    annotations = np.array([("00001.jpg", 2), ("00002.jpg", 1)], dtype=kind)
    savemat(folder / "cars_test_annos_withlabels.mat", {"annotations": annotations})


FILE_SETS = [
    ("dtd", write_dtd, ("banded", "dotted"), [1, 0]),
    ("eurosat_clip", write_eurosat, ("AnnualCrop", "SeaLake"), [0, 1]),
    ("food-101", write_food, ("apple_pie", "waffles"), [1, 0]),
    ("gtsrb", write_gtsrb, tuple(f"sign {i}" for i in range(43)), [16, 1]),
    ("oxford-iiit-pets", write_pets, ("Abyssinian", "Great Pyrenees"), [1, 0]),
    ("fgvc-aircraft-2013b-variants102", write_aircraft, ("707-320", "A380"), [1, 0]),
    ("country211", write_country, ("AD", "ZW"), [0, 1]),
    ("rendered-sst2", write_sst2, ("negative", "positive"), [0, 1]),
    ("caltech-101", write_caltech, ("Faces", "ant"), [0, 1, 1]),
    ("stanford-cars", write_cars, ("Acura", "smart"), [1, 0]),
]


@pytest.mark.parametrize("case", FILE_SETS, ids=lambda case: case[0])
def test_torchvisions_files_are_read_as_they_are(tmp_path, monkeypatch, case):
    task_id, write, names, labels = case
    write(tmp_path)
    monkeypatch.setattr(Pillow, "open", lambda *_: pytest.fail("no image is decoded to find the labels"))
    own = {"classes": 43, "names": names} if task_id == "gtsrb" else {}  # torchvision names all but these
    task = Task(id=task_id, folders=(task_id.split("-")[0].split("_")[0],), templates=("{c}",), **own)
    data = open_task(task, tmp_path, {})
    assert (data.class_names, data.labels.tolist()) == (names, labels)
    assert [entry.read() for entry in data.entries] == [entry.path.read_bytes() for entry in data.entries]
    assert all(not Path(entry.key).is_absolute() for entry in data.entries)
    assert data.folder.parent == tmp_path  # the set's own folder, not the root that it may share


@pytest.mark.parametrize(("task_id", "write"), [("eurosat_clip", write_eurosat), ("caltech-101", write_caltech)])
def test_sets_that_torchvision_does_not_split_are_not_taken_for_elevaters(tmp_path, write, task_id):
    write(tmp_path)
    task = next(task for task in registered_tasks("elevater") if task.id == task_id)
    with pytest.raises(Unavailable, match=rf"is not split, .*{task.hub} or ELEVATER's images from ELEVATER_all\.zip"):
        open_task(task, tmp_path, {})


def test_svhn_has_digits_for_names_and_ten_means_zero(tmp_path, monkeypatch):
    images = pixels(1, (32, 32, 3, 3))
    savemat(tmp_path / "test_32x32.mat", {"X": images, "y": np.array([[10], [1], [9]], dtype=np.uint8)})
    md5 = hashlib.md5((tmp_path / "test_32x32.mat").read_bytes()).hexdigest()
    make = torchvision.datasets.SVHN
    monkeypatch.setattr(make, "split_list", {**make.split_list, "test": [*make.split_list["test"][:2], md5]})
    data = open_task(Task(id="svhn", source="torchvision:SVHN", templates=("{c}",)), tmp_path, {})
    assert (data.class_names, data.labels.tolist()) == (tuple("0123456789"), [0, 1, 9])
    assert np.array_equal(np.asarray(decode(data.entries[1].read())), images[..., 1])


def md5_of(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


def test_flowers_labels_count_from_one_in_the_file(tmp_path, monkeypatch):
    folder, make = tmp_path / "flowers-102", torchvision.datasets.Flowers102
    write_files(folder / "jpg", [f"image_{i:05d}.jpg" for i in (1, 2, 3)])
    savemat(folder / "imagelabels.mat", {"labels": np.array([[102, 1, 77]])})
    savemat(folder / "setid.mat", {"trnid": np.array([[2]]), "valid": np.array([[2]]), "tstid": np.array([[3, 1]])})
    checksums = {
        key: (name, md5_of(folder / name)) for key, name in (("label", "imagelabels.mat"), ("setid", "setid.mat"))
    }
    monkeypatch.setattr(make, "_file_dict", {**make._file_dict, **checksums})
    data = open_task(Task(id="oxford-flower-102", templates=("{c}",)), tmp_path, {})
    assert [data.class_names[label] for label in data.labels] == ["passion flower", "blackberry lily"]
    assert data.entries[0].key == "flowers-102/jpg/image_00003.jpg"


def test_stl10_is_stored_by_columns(tmp_path, monkeypatch):
    folder, make = tmp_path / "stl10_binary", torchvision.datasets.STL10
    folder.mkdir()
    images = pixels(2, (2, 96, 96, 3))
    (folder / "test_X.bin").write_bytes(images.transpose(0, 3, 2, 1).tobytes())
    (folder / "test_y.bin").write_bytes(bytes([3, 1]))
    (folder / "class_names.txt").write_text("airplane\nbird\ncar\n")
    monkeypatch.setattr(make, "train_list", [])
    names = ("test_X.bin", "test_y.bin")
    monkeypatch.setattr(make, "test_list", [[name, md5_of(folder / name)] for name in names])
    data = open_task(Task(id="stl10", source="torchvision:STL10", templates=("{c}",)), tmp_path, {})
    assert (data.class_names, data.labels.tolist()) == (("airplane", "bird", "car"), [2, 0])
    assert np.array_equal(np.asarray(decode(data.entries[1].read())), images[1])


def test_every_set_in_the_table_is_torchvisions_and_says_how_to_get_it(tmp_path):
    from focalclip.evaluation.data.libraries import SETS

    for known in SETS:
        assert hasattr(torchvision.datasets, known.name)
        task = Task(id="x", source=f"torchvision:{known.name}", templates=("{c}",))
        how = {"FER2013": "take fer2013.csv", "StanfordCars": "links are dead"}.get(
            known.name, rf"to download: python -c .* {known.name}\('.*download=True"
        )
        with pytest.raises(Unavailable, match=rf"has no .*; .*{how}"):
            open_task(task, tmp_path, {})
    assert not list(tmp_path.iterdir())


def test_torchvision_needs_a_root_and_a_known_name(tmp_path):
    with pytest.raises(Unavailable, match="torchvision:MNIST needs --data-root"):
        open_task(Task(id="x", source="torchvision:MNIST"), None, {})
    with pytest.raises(UserError, match="torchvision:ImageNet9: not one of CIFAR10, CIFAR100"):
        open_task(Task(id="x", source="torchvision:ImageNet9"), tmp_path, {})
