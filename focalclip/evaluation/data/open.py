"""One split of a task, opened wherever its data lies and in any known layout.

Layouts that any data may have are read by the table of ``focalclip.data.sources``; those of certain data sets and
libraries are here in ``evaluation.data``. All return a :class:`~focalclip.data.reader.PictureSet`, which becomes a
:class:`TaskData` once its labels are checked and it has prompts.
"""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np

from focalclip.base.errors import UserError
from focalclip.base.files import is_inside
from focalclip.data.folders import is_task_folder, read_classes, splits_of
from focalclip.data.reader import SPLITS, Entry, PictureSet, Request, SplitName, Unavailable, data_in, no_split
from focalclip.data.sources import find_reader
from focalclip.evaluation.data import elevater, hub, libraries
from focalclip.evaluation.task import Task


@dataclass(frozen=True)
class TaskData:
    """One split of a task: names, prompts, labels, and where the images lie.

    Raises:
        UserError: if there are no images, or a label lies outside the classes.
    """

    folder: Path
    """The folder or archive that it came from."""
    class_names: tuple[str, ...]
    templates: tuple[str, ...]
    entries: tuple[Entry, ...]
    labels: np.ndarray
    """int64 (N,), or bool (N, C) for multi-label data."""
    official_order: np.ndarray | None = None
    """int64 (N,): the i-th image of ELEVATER's official test order, which a submission needs, is
    ``entries[official_order[i]]``; None where the source does not state that order."""

    def __post_init__(self) -> None:
        if not self.entries:
            raise UserError(f"{self.folder}: it holds no images; download the data again")
        if self.multilabel:
            return
        outside = np.flatnonzero((self.labels < 0) | (self.labels >= len(self.class_names)))
        if len(outside):
            first = int(outside[0])
            raise UserError(
                f"{self.folder}: the label of {self.entries[first].name} is {self.labels[first]}, not one of 0 to"
                f" {len(self.class_names) - 1}; a split without labels cannot be evaluated"
            )

    @property
    def multilabel(self) -> bool:
        """Whether an image may have several labels."""
        return self.labels.ndim == 2

    def subset(self, chosen: np.ndarray) -> "TaskData":
        """Only these images, by their places (M,); the official order is that of all, so it is lost."""
        entries = tuple(self.entries[i] for i in chosen)
        return replace(self, entries=entries, labels=self.labels[chosen], official_order=None)

    def digest(self, images_sha256: str) -> str:
        """SHA-256 of everything that decides a result: names, prompts, keys, labels and the images' own digest."""
        keys = [entry.key for entry in self.entries]
        parts = ["\n".join(lines).encode() for lines in (self.class_names, self.templates, keys)]
        return hashlib.sha256(b"\0".join([*parts, self.labels.tobytes(), images_sha256.encode()])).hexdigest()


_UNPACKED = "ELEVATER"  # the folder that the archive of all sets unpacks to

_LAYOUTS = (
    "classnames.txt with test/0.tar (wds), label.txt with test/000/*.jpg (ELEVATER's sets by Chinese-CLIP), test/CLASS"
    " NAME/*.jpg, Parquet files, a data set saved by the library datasets, or torchvision's files"
)


def open_task(
    task: Task, data_root: Path | None, absent: dict[str, str], split: str = "test", place: Path | None = None
) -> TaskData:
    """Read one split of a task wherever its data lies and in any known layout.

    Args:
        task: its ``source`` says where, or else its ``folders`` under ``data_root``, or else its ``hub`` repository.
        data_root: folder that holds the data; None: the hub.
        absent: tasks known to be absent, and why.
        split: ``train``, ``val`` or ``test``.
        place: the task's folder, where it is known: nothing is looked for.

    Raises:
        Unavailable: if the data or the split is not there, saying what to do.
        UserError: if the data is faulty or its layout is none of the known ones, naming what was found.
    """
    if split not in SPLITS:
        raise UserError(f"the split {split!r} is not one of {', '.join(SPLITS)}")
    split = cast("SplitName", split)
    if place is not None:
        return _checked(_read_place(place, task, split), task)
    if task.source:
        return _checked(_read_source(task, task.source, data_root, split), task)
    return _checked(_read_place(locate(task, data_root, absent, split), task, split), task)


def locate(task: Task, data_root: Path | None, absent: dict[str, str], split: SplitName = "test") -> Path:
    """Folder or zip of the task's data: under ``data_root``, or from the hub where there is none.

    Raises:
        Unavailable: saying what to do.
    """
    if data_root is None:
        if task.hub is None:
            raise Unavailable(f"on no hub; {task.obtain or 'put its folder somewhere'}, then give --data-root")
        return hub.fetch(task.hub, split)
    found = _find(task, data_root)
    if found is not None:
        return found
    if task.id in absent:
        raise Unavailable(absent[task.id])
    wanted = data_root / f"wds_{(*task.folders, task.id)[0]}"
    if task.hub is None:
        raise Unavailable(f"needs {wanted}; {task.obtain or 'put the task folder there'}")
    raise Unavailable(f"needs {wanted}; on the hub: {task.hub}")


def _find(task: Task, data_root: Path) -> Path | None:
    """Folders by name first, then zips, then a folder that several sets share."""
    unpacked = data_root / _UNPACKED
    for root in (data_root, unpacked):
        if (folder := task.find(root)) is not None:
            return folder
    zips = [root / f"{name}.zip" for root in (data_root, unpacked) for name in task.folder_names]
    if (archive := next((path for path in zips if path.is_file()), None)) is not None:
        return archive
    if elevater.holds(data_root / elevater.WHOLE, task):
        return data_root / elevater.WHOLE
    if libraries.find_root([data_root], libraries.sets_of(task)):
        return data_root
    return elevater.find_voc(data_root) if task.id == elevater.VOC_TASK else None


def read_task_folder(folder: Path, split: str = "test") -> TaskData:
    """Read one split of a folder in the wds layout, with the prompts that it brings.

    Raises:
        UserError: naming the file at fault.
    """
    return _checked(read_classes(folder, split), None)


def _read_place(place: Path, task: Task, split: SplitName) -> PictureSet:
    """Read one split from a folder or zip, whose layout follows from what is in it."""
    if place.is_file():
        return elevater.read_zip(place, task, split)
    if is_task_folder(place):
        present = splits_of(place)
        if present and split not in present:
            raise no_split(place, split, present)
        return read_classes(place, split, empty_names="" in (task.names or ()))
    own = libraries.sets_of(task)
    if (found := libraries.find_root([place], own)) is not None:  # before the others: several sets may share it
        return libraries.read_torchvision(*found, task, split)
    if elevater.is_hateful_memes(place):
        return elevater.read_hateful_memes(place, split)
    if (folder := elevater.find_voc(place)) is not None:
        return elevater.read_voc(folder, split)
    if elevater.is_archive_folder(place):
        return elevater.read_folder(place, task, split)
    if libraries.is_saved(place):
        return libraries.read_saved(place, task, split)
    # the folder may be a set's own one inside torchvision's root, or the root of a set that the task does not know
    found = libraries.find_root([place.parent], own) or libraries.find_root([place], libraries.SETS)
    if found is not None:
        return libraries.read_torchvision(*found, task, split)
    if (reader := find_reader(str(place))) is not None:
        return reader.open(str(place), Request(split, field=task.id))
    if libraries.parquet_splits(place):
        return libraries.read_parquet(place, task, split)
    present = [path.name for path in data_in(place)]
    some = ", ".join(present[:5]) + (" ..." if present[5:] else "")
    raise UserError(f"{place}: no layout that can be read (it holds {some or 'nothing'}); expected {_LAYOUTS}")


def _read_source(task: Task, source: str, data_root: Path | None, split: SplitName) -> PictureSet:
    """``hf:REPOSITORY``, ``hf:REPOSITORY:FOLDER``, ``hf:FOLDER`` under ``data_root``, or ``torchvision:NAME``."""
    kind, _, name = source.partition(":")
    if kind == "hf" and name:
        if not is_inside(name.replace(":", "/")):
            raise UserError(f"task {task.id}: source {source!r} leads out of the data root; name a folder in it")
        if data_root is not None and (data_root / name).is_dir():
            return _read_place(data_root / name, task, split)
        repo, _, subfolder = name.partition(":")
        return _read_place(hub.fetch(repo, split, subfolder) / subfolder, task, split)
    if kind == "torchvision":
        known = libraries.set_named(name)
        if data_root is None:
            raise Unavailable(f"{source} needs --data-root, the folder that torchvision was given as root")
        places = [data_root, data_root / known.name, *(data_root / folder for folder in task.folder_names)]
        found = libraries.find_root(places, [known])
        return libraries.read_torchvision(known, found[1] if found else data_root, task, split)
    raise UserError(f"task {task.id}: source {source!r} is not hf:REPOSITORY, hf:FOLDER or torchvision:NAME")


def _checked(found: PictureSet, task: Task | None) -> TaskData:
    """The task's data with its prompts; those of the source come first.

    Raises:
        UserError: if the source has no classes, the labels are faulty, or neither source nor task has prompts.
    """
    if found.labels is None or found.class_names is None:
        raise UserError(f"{found.place}: has no classes; for captions run eval/retrieval.py --data {found.place}")
    templates = found.templates or (task.templates if task else None)
    if not templates:
        raise UserError(
            f"{found.place}: this layout brings no prompts and the task {task.id if task else ''} has none; give it"
            " templates in its YAML file, such as 'a photo of a {c}.'"
        )
    return TaskData(found.place, found.class_names, templates, found.entries, found.labels, found.official_order)
