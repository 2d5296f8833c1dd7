"""A folder per class: ``test/CLASS NAME/*.jpg`` with ``train`` and ``val`` beside it, or ``CLASS NAME/*.jpg`` alone.

Folder names are the class names. Labels number the classes of all splits in alphabetical order, so that a class without
images in one split has its number all the same.
"""

from pathlib import Path

import numpy as np

from focalclip.evaluation.datasets.files import IMAGE_SUFFIXES, FolderTree, images_by_class
from focalclip.evaluation.datasets.records import SPLIT_WORDS, Split, TaskData, no_split, templates_of
from focalclip.evaluation.registry.tasks import Task


def is_image_folder(folder: Path) -> bool:
    """Whether a folder has this layout: at least two class folders with images."""
    tree = FolderTree(folder)
    places = [f"{place}/" for place in _splits(tree).values()] or [""]
    classes = ((place + name, name) for place in places for name in tree.folders(place))
    with_images: set[str] = set()
    for path, name in classes:
        if any(file.lower().endswith(IMAGE_SUFFIXES) for file in tree.paths(path)):
            with_images.add(name)
        if len(with_images) > 1:
            return True
    return False


def read_image_folder(folder: Path, task: Task, split: Split) -> TaskData:
    """Read one split.

    Raises:
        Unavailable: if it has no such split.
        UserError: if it holds no images, or the task has no prompts.
    """
    tree = FolderTree(folder)
    splits = _splits(tree) or {"test": ""}
    if split not in splits:
        raise no_split(folder, split, [] if splits == {"test": ""} else list(splits))
    names = sorted({name for place in splits.values() for name in tree.folders(place)})
    numbers = {name: number for number, name in enumerate(names)}
    images = images_by_class(tree, splits[split])
    entries = tuple(tree.entry(path, path) for _, path in images)
    labels = np.array([numbers[name] for name, _ in images], dtype=np.int64)
    return TaskData(folder, tuple(names), templates_of(task, folder), entries, labels)


def _splits(tree: FolderTree) -> dict[str, str]:
    """Split -> its folder, where every folder is a split; a class may well be called "train"."""
    folders = tree.folders()
    if not folders or any(name.lower() not in SPLIT_WORDS for name in folders):
        return {}
    return {SPLIT_WORDS[name.lower()]: name for name in folders}
