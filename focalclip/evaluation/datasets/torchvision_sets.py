"""Data sets as torchvision downloads them, read through its own classes; nothing is downloaded here.

Class names are torchvision's own ``.classes``. Images in files are read as they are; those that torchvision keeps in
arrays (CIFAR, MNIST, ...) become PNG, which loses nothing, when they are read.
"""

import inspect
import io
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from focalclip.errors import UserError, first_line
from focalclip.evaluation.datasets.files import FileEntry
from focalclip.evaluation.datasets.records import Split, TaskData, Unavailable, no_split, templates_of
from focalclip.evaluation.registry.tasks import Task

_TEST_ONLY: dict[Split, dict[str, Any]] = {"test": {}}
_TRAIN_FLAG: dict[Split, dict[str, Any]] = {"train": {"train": True}, "test": {"train": False}}
_TWO: dict[Split, dict[str, Any]] = {"train": {"split": "train"}, "test": {"split": "test"}}
_THREE: dict[Split, dict[str, Any]] = {**_TWO, "val": {"split": "val"}}


@dataclass(frozen=True)
class TorchvisionSet:
    """One of torchvision's data sets."""

    name: str
    """Its class in ``torchvision.datasets``."""
    marker: str
    """A path below torchvision's root that tells it is there; may hold wildcards."""
    splits: dict[Split, dict[str, Any]]
    """What the class has to be told for each split."""
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
        """Unknown: torchvision has read the array from files of its own."""

    def read(self) -> bytes:
        """The image as PNG."""
        buffer = io.BytesIO()
        self.dataset[self.row][0].save(buffer, "PNG")
        return buffer.getvalue()


def set_named(name: str) -> TorchvisionSet:
    """The set of a class of ``torchvision.datasets``, whatever its capitals.

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


def read_torchvision(known: TorchvisionSet, root: Path, task: Task, split: Split) -> TaskData:
    """Read one split; a set that torchvision does not split counts as test.

    Raises:
        Unavailable: if the set has no such split, or not the task's, its files are not all there, or a library that it
            needs is missing.
        UserError: if neither torchvision nor the task names its classes, or the task has no prompts.
    """
    from torchvision import datasets

    if split not in known.splits:
        raise no_split(f"torchvision's {known.name}", split, list(known.splits) if len(known.splits) > 1 else [])
    if len(known.splits) == 1 and known.task == task.id and task.sizes:
        others = f"its hub repository {task.hub} or " if task.hub else ""
        raise Unavailable(
            f"{root}: torchvision's {known.name} is not split, and {task.id} is defined on a test set of its own; take"
            f" {others}ELEVATER's images from ELEVATER_all.zip (docs/evaluation-data.md)"
        )
    if find_root([root], [known]) is None:
        raise _absent(known, root, split, f"has no {known.marker}")
    make = getattr(datasets, known.name)
    # torchvision's classes load an image by a function of its path: with this one they tell the path instead
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
    return TaskData(place, class_names, templates_of(task, place), entries, np.array(labels, dtype=np.int64))


def _absent(known: TorchvisionSet, root: Path, split: Split, reason: str) -> Unavailable:
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
    paths = [Path(path) for path, _ in samples]
    return tuple(FileEntry(path, _key(path, root)) for path in paths), [int(label) for _, label in samples]


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
