"""Data sets in the files of two libraries, read through these; nothing is downloaded here.

``datasets``: what ``save_to_disk`` wrote, and Parquet files.

torchvision: its own folders. Class names are torchvision's own ``.classes``. Images in files are read unchanged;
those that torchvision keeps in arrays (CIFAR, MNIST, ...) become PNG, which loses nothing, when they are read.
"""

import inspect
import io
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from focalclip.base.errors import UserError, first_line, install_command
from focalclip.data.reader import (
    SPLIT_WORDS,
    FileEntry,
    PictureSet,
    SplitName,
    Unavailable,
    files_below,
    is_data,
    no_split,
)
from focalclip.evaluation.task import Task

# The library datasets

_LABEL_COLUMNS = ("label", "labels", "fine_label")


class RowEntry(NamedTuple):
    """An image in a row of a data set."""

    table: Any
    """``datasets.Dataset`` whose one column holds images that are not decoded."""
    row: int
    place: Path

    @property
    def key(self) -> str:
        """The row's number."""
        return str(self.row)

    @property
    def name(self) -> str:
        """How messages call it."""
        return f"{self.place}: row {self.row}"

    @property
    def file(self) -> None:
        """Unknown: the library keeps the rows in its own files."""

    def read(self) -> bytes:
        """The compressed image, from the row or from the file that it names."""
        (image,) = self.table[self.row].values()
        if image is None:
            return b""
        return image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()


def is_saved(folder: Path) -> bool:
    """Whether ``Dataset.save_to_disk`` or ``DatasetDict.save_to_disk`` wrote the folder."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def parquet_splits(folder: Path) -> dict[str, list[Path]]:
    """The Parquet files in or under a folder by split, by a word in their path; without such a word: test."""
    found: dict[str, list[Path]] = {}
    for path in files_below(folder):
        if path.endswith(".parquet"):
            found.setdefault(_split_of(Path(path)) or "test", []).append(folder / path)
    return found


def read_saved(folder: Path, task: Task, split: SplitName) -> PictureSet:
    """Read one split of what ``save_to_disk`` wrote; a data set without splits counts as test.

    Raises:
        Unavailable: if it has no such split, or the library is not installed.
        UserError: if images or labels cannot be found in its columns.
    """
    library = _library()
    try:
        saved = library.load_from_disk(folder)
    except Exception as error:  # noqa: BLE001 - Arrow's and the library's errors share no base
        raise UserError(f"{folder}: cannot be read ({first_line(error)}); save it again") from None
    whole = {"test": saved} if isinstance(saved, library.Dataset) else {SPLIT_WORDS.get(n, n): saved[n] for n in saved}
    if split not in whole:
        raise no_split(folder, split, [] if isinstance(saved, library.Dataset) else list(whole))
    return _read(whole[split], folder, task)


def read_parquet(folder: Path, task: Task, split: SplitName) -> PictureSet:
    """Read the Parquet files of one split.

    Raises:
        Unavailable: if it has no such split, or the library is not installed.
        UserError: if the files are of several configurations or damaged, or images or labels cannot be found in them.
    """
    library = _library()
    found = parquet_splits(folder)
    if split not in found:
        raise no_split(folder, split, list(found))
    configurations = sorted({_configuration(path.relative_to(folder)) for path in found[split]})
    if len(configurations) > 1:
        raise UserError(
            f"{folder} holds several data sets: {', '.join(configurations)}; give the folder of one of them"
        )
    try:
        table = library.Dataset.from_parquet([str(path) for path in found[split]])
    except Exception as error:  # noqa: BLE001 - Arrow's and the library's errors share no base
        raise UserError(f"{folder}: {found[split][0].name} ... cannot be read ({first_line(error)})") from None
    return _read(table, folder, task)


def _library() -> Any:
    try:
        import datasets
    except ImportError:
        raise Unavailable(f"needs the library datasets; run: {install_command('shards')}") from None
    return datasets


def _split_of(path: Path) -> str | None:
    """The split that a word of the path names, the file's own words first."""
    for part in reversed(path.with_suffix("").parts):
        for word in part.lower().replace("-", "_").replace(".", "_").split("_"):
            if word in SPLIT_WORDS:
                return SPLIT_WORDS[word]
    return None


def _configuration(path: Path) -> str:
    """The folders of a Parquet file, but for those that name a split."""
    return "/".join(part for part in path.parent.parts if part.lower() not in SPLIT_WORDS) or "."


def _read(table: Any, folder: Path, task: Task) -> PictureSet:
    image, label = _image_column(table, folder), _label_column(table, folder, task)
    class_names, labels = _labels(table, label, folder)
    pictures = table.select_columns([image]).cast_column(image, _library().Image(decode=False)).with_format(None)
    entries = tuple(RowEntry(pictures, row, folder) for row in range(len(table)))
    return PictureSet(folder, entries, labels=labels, class_names=class_names)


def _image_column(table: Any, folder: Path) -> str:
    library = _library()
    columns = [name for name, feature in table.features.items() if isinstance(feature, library.Image)]
    if not columns:  # Parquet that another program wrote: the same structure without its name
        columns = [name for name, kind in table.features.items() if isinstance(kind, dict) and "bytes" in kind]
    if len(columns) != 1:
        found = f"the columns {', '.join(columns)} hold images" if columns else "no column holds images"
        raise UserError(f"{folder}: {found} (of {', '.join(table.column_names)}); keep one such column")
    return columns[0]


def _label_column(table: Any, folder: Path, task: Task) -> str:
    """The column of class numbers with names; of several, the one with the task's number of classes."""
    named = {name: kind for name, feature in table.features.items() if (kind := _class_label(feature)) is not None}
    fitting = [name for name, kind in named.items() if kind.num_classes == task.classes] or list(named)
    if not fitting:
        texts = [name for name in _LABEL_COLUMNS if getattr(table.features.get(name), "dtype", None) == "string"]
        fitting = texts[:1]
    if len(fitting) == 1:
        return fitting[0]
    usual = [name for name in _LABEL_COLUMNS if name in fitting]
    if usual:
        return usual[0]
    raise UserError(
        f"{folder}: which of the columns {', '.join(table.column_names)} is the label is not clear; there should be one"
        " 'label' of type ClassLabel, which stores the class names, or of class names"
    )


def _class_label(feature: Any) -> Any:
    """The ``ClassLabel`` of a column of numbers or of lists of numbers, else None."""
    kind = getattr(feature, "feature", feature)
    return kind if isinstance(kind, _library().ClassLabel) else None


def _labels(table: Any, column: str, folder: Path) -> tuple[tuple[str, ...], np.ndarray]:
    """Class names, and int64 (N,) or bool (N, C)."""
    feature, values = table.features[column], table.select_columns([column]).with_format(None)[:][column]
    kind = _class_label(feature)
    if any(value is None for value in values):
        raise UserError(f"{folder}: the column {column} has rows without a label; take them out")
    if kind is None:
        names = sorted(set(values))
        numbers = {name: number for number, name in enumerate(names)}
        return tuple(names), np.array([numbers[value] for value in values], dtype=np.int64)
    if kind is feature:
        return tuple(kind.names), np.array(values, dtype=np.int64)
    labels = np.zeros((len(values), kind.num_classes), dtype=bool)
    for row, present in zip(labels, values, strict=True):
        row[present] = True
    return tuple(kind.names), labels


# torchvision

_TEST_ONLY: dict[SplitName, dict[str, Any]] = {"test": {}}

_TRAIN_FLAG: dict[SplitName, dict[str, Any]] = {"train": {"train": True}, "test": {"train": False}}

_TWO: dict[SplitName, dict[str, Any]] = {"train": {"split": "train"}, "test": {"split": "test"}}

_THREE: dict[SplitName, dict[str, Any]] = {**_TWO, "val": {"split": "val"}}


@dataclass(frozen=True)
class TorchvisionSet:
    """One of torchvision's data sets."""

    name: str
    """Its class in ``torchvision.datasets``."""
    marker: str
    """A path below torchvision's root that exists if the set is there; may hold wildcards."""
    splits: dict[SplitName, dict[str, Any]]
    """Arguments of the class for each split."""
    task: str = ""
    """The registry's task of the same data."""
    names: tuple[str, ...] = field(default=(), repr=False)
    """Names of its labels where torchvision has none, from the set's own documentation."""
    obtain: str = field(default="", repr=False)
    """How to get it where torchvision cannot download it."""


SETS = (
    TorchvisionSet("CIFAR10", "cifar-10-batches-py", _TRAIN_FLAG, "cifar-10"),
    TorchvisionSet("CIFAR100", "cifar-100-python", _TRAIN_FLAG, "cifar-100"),
    TorchvisionSet("Caltech101", "caltech101/101_ObjectCategories", _TEST_ONLY, "caltech-101"),
    TorchvisionSet(
        "Country211", "country211/test", {**_TWO, "val": {"split": "valid"}}, "country211"
    ),
    TorchvisionSet("DTD", "dtd/dtd/labels", _THREE, "dtd"),
    TorchvisionSet("EuroSAT", "eurosat/2750", _TEST_ONLY, "eurosat_clip"),
    TorchvisionSet(
        "FER2013", "fer2013/*.csv", _TWO, "fer-2013",
        names=("angry", "disgusted", "fearful", "happy", "sad", "surprised", "neutral"),
        obtain="take fer2013.csv from the Kaggle challenge on facial expression recognition",
    ),
    TorchvisionSet("FGVCAircraft", "fgvc-aircraft-2013b/data", _THREE, "fgvc-aircraft-2013b-variants102"),
    TorchvisionSet("FashionMNIST", "FashionMNIST/raw", _TRAIN_FLAG, "fashion-mnist"),
    TorchvisionSet("Flowers102", "flowers-102/jpg", _THREE, "oxford-flower-102"),
    TorchvisionSet("Food101", "food-101/meta", _TWO, "food-101"),
    TorchvisionSet("GTSRB", "gtsrb/GTSRB", _TWO, "gtsrb"),
    TorchvisionSet("MNIST", "MNIST/raw", _TRAIN_FLAG, "mnist"),
    TorchvisionSet(
        "OxfordIIITPet", "oxford-iiit-pet/annotations",
        {"train": {"split": "trainval"}, "test": {"split": "test"}}, "oxford-iiit-pets",
    ),
    TorchvisionSet(
        "PCAM", "pcam/camelyonpatch_*", _THREE, "patch-camelyon",
        names=("lymph node", "lymph node containing metastatic tumor tissue"),
    ),
    TorchvisionSet("RenderedSST2", "rendered-sst2/test", _THREE, "rendered-sst2"),
    TorchvisionSet("STL10", "stl10_binary", _TWO),
    TorchvisionSet("SVHN", "test_32x32.mat", _TWO, names=tuple("0123456789")),
    TorchvisionSet(
        "StanfordCars", "stanford_cars/cars_test", _TWO, "stanford-cars",
        obtain="its authors' links are dead: take the task's hub repository or ELEVATER's archive instead",
    ),
)  # fmt: skip


class ArrayEntry(NamedTuple):
    """An image in an array of a torchvision data set."""

    dataset: Any
    row: int

    @property
    def key(self) -> str:
        """The row's number."""
        return str(self.row)

    @property
    def name(self) -> str:
        """How messages call it."""
        return f"{type(self.dataset).__name__}: image {self.row}"

    @property
    def file(self) -> None:
        """Unknown: torchvision has read the array from its own files."""

    def read(self) -> bytes:
        """The image as PNG."""
        buffer = io.BytesIO()
        self.dataset[self.row][0].save(buffer, "PNG")
        return buffer.getvalue()


def set_named(name: str) -> TorchvisionSet:
    """The set of a class of ``torchvision.datasets``, ignoring case.

    Raises:
        UserError: if there is none that can be read.
    """
    found = next((known for known in SETS if known.name.lower() == name.lower()), None)
    if found is None:
        raise UserError(f"torchvision:{name}: not one of {', '.join(known.name for known in SETS)}")
    return found


def find_root(places: Iterable[Path], sets: Iterable[TorchvisionSet]) -> tuple[TorchvisionSet, Path] | None:
    """The first of the sets that is there, and the folder to give torchvision as ``root``."""
    known = tuple(sets)
    return next(((one, place) for place in places for one in known if any(place.glob(one.marker))), None)


def sets_of(task: Task) -> tuple[TorchvisionSet, ...]:
    """The sets that hold a registered task's data."""
    return tuple(known for known in SETS if known.task == task.id)


def read_torchvision(known: TorchvisionSet, root: Path, task: Task, split: SplitName) -> PictureSet:
    """Read one split; a set that torchvision does not split counts as test.

    Raises:
        Unavailable: if the set has no such split, or not the task's, its files are not all there, or a library that it
            needs is missing.
        UserError: if neither torchvision nor the task names its classes.
    """
    from torchvision import datasets

    if split not in known.splits:
        raise no_split(f"torchvision's {known.name}", split, list(known.splits) if len(known.splits) > 1 else [])
    if len(known.splits) == 1 and known.task == task.id and task.sizes:
        others = f"its hub repository {task.hub} or " if task.hub else ""
        raise Unavailable(
            f"{root}: torchvision's {known.name} is not split, and {task.id} is defined on another test set; take"
            f" {others}ELEVATER's images from ELEVATER_all.zip (docs/evaluation-data.md)"
        )
    if find_root([root], [known]) is None:
        raise _absent(known, root, split, f"has no {known.marker}")
    make = getattr(datasets, known.name)
    # torchvision's classes load an image by a function of its path: with this one they return the path instead
    loader = {"loader": os.fspath} if "loader" in inspect.signature(make).parameters else {}
    try:
        dataset = make(root, **known.splits[split], **loader)
    except (ImportError, RuntimeError) as error:
        raise _absent(known, root, split, first_line(error).partition(". You can")[0]) from None
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{root}: torchvision cannot read its {known.name} ({first_line(error)})") from None
    class_names = _class_names(known, dataset, task)
    entries, labels = _entries(dataset, root)
    place = root / Path(known.marker).parts[0]
    return PictureSet(place, entries, labels=np.array(labels, dtype=np.int64), class_names=class_names)


def _absent(known: TorchvisionSet, root: Path, split: SplitName, reason: str) -> Unavailable:
    arguments = "".join(f", {name}={value!r}" for name, value in known.splits[split].items())
    call = f"{known.name}('{root}'{arguments}, download=True)"
    how = known.obtain or f'to download: python -c "from torchvision.datasets import *; {call}"'
    return Unavailable(f"{root}: {reason}; {how}")


def _class_names(known: TorchvisionSet, dataset: Any, task: Task) -> tuple[str, ...]:
    """torchvision's, or the set's own.

    GTSRB has neither: its labels are the sign numbers of its authors, as in ELEVATER, so the task's names fit as they
    are.
    """
    own = getattr(dataset, "classes", None) or getattr(dataset, "categories", None) or known.names
    names = tuple(own) or (task.names if known.task == task.id else None)
    if not names:
        raise UserError(f"torchvision does not name the classes of {known.name}; give the task names in its YAML file")
    return tuple(names)


def _entries(dataset: Any, root: Path) -> tuple[tuple[FileEntry | ArrayEntry, ...], list[int]]:
    """Entries and labels, without decoding an image."""
    samples = _samples(dataset)
    if samples is None:
        labels = _array_labels(dataset)
        return tuple(ArrayEntry(dataset, i) for i in range(len(labels))), labels
    found = [(FileEntry(Path(path), _key(Path(path), root)), int(label)) for path, label in samples]
    found = [(entry, label) for entry, label in found if entry.key.startswith("/") or is_data(entry.key)]
    return tuple(entry for entry, _ in found), [label for _, label in found]


def _samples(dataset: Any) -> list[tuple[Any, int]] | None:
    """Paths and labels; None for a set whose images are in arrays."""
    match type(dataset).__name__:  # three classes open files themselves
        case "GTSRB":
            return dataset._samples
        case "OxfordIIITPet":
            return list(zip(dataset._images, dataset._labels, strict=True))
        case "Caltech101":
            folder = Path(dataset.root, "101_ObjectCategories")
            pairs = zip(dataset.y, dataset.index, strict=True)
            return [(folder / dataset.categories[y] / f"image_{i:04d}.jpg", y) for y, i in pairs]
    return [dataset[i] for i in range(len(dataset))] if hasattr(dataset, "loader") else None


def _array_labels(dataset: Any) -> list[int]:
    if type(dataset).__name__ == "PCAM":  # opens its files for each image: minutes for all of them
        with dataset.h5py.File(dataset._base_folder / dataset._FILES[dataset._split]["targets"][0]) as file:
            return file["y"][:, 0, 0, 0].tolist()
    return [dataset[i][1] for i in range(len(dataset))]


def _key(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix()
