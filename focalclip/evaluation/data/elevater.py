"""The 20 sets of ELEVATER as Chinese-CLIP packed them (``OFA-Sys/chinese-clip-eval``, ``ELEVATER_all.zip``, 37 GB).

    label.txt            one English name per line; the line number is ELEVATER's label
    test/007/x.jpg       folders are labels: 3 digits with zeros in front where there are more than 10 classes
    train/007/y.jpg      there is no val
    index.json           for some sets: the i-th image of the official test order is number index[i] of this order

The layout is described in zeroshot_dataset_en.md of OFA-Sys/Chinese-CLIP; "this order" is that of torchvision's
``ImageFolder``, which its evaluation script uses. Read from unpacked folders, from one set's zip, or from the whole
download, where that holds the 20 zips uncompressed. It has no layout for several labels per image (VOC 2007).
"""

import json
import zipfile
from pathlib import Path, PurePosixPath

import numpy as np

from focalclip.base.errors import UserError
from focalclip.evaluation.data.entries import Split, TaskData, no_split, templates_of
from focalclip.evaluation.data.trees import (
    FolderTree,
    Tree,
    ZipTree,
    content_offset,
    images_by_class,
    lines_of,
    zip_members,
)
from focalclip.evaluation.task import Task

WHOLE = "ELEVATER_all.zip"

_LABELS = "label.txt"


def is_archive_folder(folder: Path) -> bool:
    """Whether a folder holds one unpacked set, at once or in its only folder."""
    return _set_folder(folder) is not None


def read_folder(folder: Path, task: Task, split: Split) -> TaskData:
    """Read an unpacked set.

    Raises:
        Unavailable: if it has no such split.
        UserError: if the data is faulty, or the task has no prompts.
    """
    return _read(FolderTree(_set_folder(folder) or folder), task, split)


def read_zip(archive: Path, task: Task, split: Split) -> TaskData:
    """Read a set from its zip, or from the zip of all 20, without unpacking.

    Raises:
        Unavailable: if it has no such split.
        UserError: if the zip is damaged, is not in this layout, or holds the set's zip compressed.
    """
    members, start = zip_members(archive), 0
    inner = _inner_zip(members, task)
    if inner is not None:
        if inner.compress_type != zipfile.ZIP_STORED:
            raise UserError(
                f"{archive}: {inner.filename} is compressed inside it, so it cannot be read in place; unpack it once:"
                f" unzip -j {archive} {inner.filename} -d {archive.parent}"
            )
        start = content_offset(archive, inner)
        members = zip_members(archive, start, inner.file_size)
    labels = [PurePosixPath(path) for path in members if PurePosixPath(path).name == _LABELS]
    if not labels:
        kinds = ", ".join(sorted({path.partition("/")[0] for path in members})[:5])
        raise UserError(
            f"{archive}: no {_LABELS} for {task.id} in it (it holds {kinds} ...); expected {_LABELS}, test/LABEL/*.jpg"
        )
    root = min(labels, key=lambda path: len(path.parts)).parent.as_posix().removeprefix(".")
    return _read(ZipTree(archive, root, members, start), task, split)


def holds(archive: Path, task: Task) -> bool:
    """Whether the zip of all sets holds the task's."""
    return archive.is_file() and _inner_zip(zip_members(archive), task) is not None


def _inner_zip(members: dict[str, zipfile.ZipInfo], task: Task) -> zipfile.ZipInfo | None:
    wanted = {f"{name}.zip" for name in task.folder_names}
    return next((member for path, member in members.items() if PurePosixPath(path).name in wanted), None)


def _set_folder(folder: Path) -> Path | None:
    below = [folder / name for name in FolderTree(folder).folders()]
    for place in [folder, *(below if len(below) == 1 else [])]:
        if (place / _LABELS).is_file() and (place / "test").is_dir():
            return place
    return None


def _read(tree: Tree, task: Task, split: Split) -> TaskData:
    if task.metric.startswith("map_"):
        raise UserError(
            f"{tree.place}: this layout has one label per image, {task.id} needs several; take its wds folder or, for"
            " VOC 2007, the VOCdevkit of its authors"
        )
    present = [name for name in ("train", "test") if tree.folders(name)]
    if split not in present:
        raise no_split(tree.place, split, present)
    class_names = lines_of(tree.read(_LABELS) or b"", f"{tree.place}: {_LABELS}", "one class name per line")
    images = images_by_class(tree, split)
    for folder, path in images:
        if not folder.isdecimal() or int(folder) >= len(class_names):
            raise UserError(
                f"{tree.place}: the folder of {path} is not one of the {len(class_names)} labels of {_LABELS}; is it"
                " a folder of class names? Then take label.txt away"
            )
    entries = tuple(tree.entry(path, path) for _, path in images)
    labels = np.array([int(folder) for folder, _ in images], dtype=np.int64)
    order = _official_order(tree, len(images)) if split == "test" else None
    return TaskData(tree.place, class_names, templates_of(task, tree.place), entries, labels, order)


def _official_order(tree: Tree, count: int) -> np.ndarray | None:
    """index.json as a checked permutation."""
    text = tree.read("index.json")
    if text is None:
        return None
    try:
        order = np.array(json.loads(text))
    except ValueError:
        order = np.array(())
    if order.dtype.kind != "i" or not np.array_equal(np.sort(order, axis=None), np.arange(count)):
        raise UserError(
            f"{tree.place}: index.json is not an order of the {count:,} test images; download the set again"
        )
    return order.astype(np.int64)
