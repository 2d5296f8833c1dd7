"""VOC 2007 as its authors packed it: ``VOCdevkit/VOC2007`` with ``JPEGImages`` and ``ImageSets/Main``.

``Main/CLASS_test.txt`` says for each image of a split 1 (present), 0 (only objects marked difficult) or -1 (absent).
Difficult objects count as present, as in CLIP_benchmark's ``voc2007_multilabel``; VOC's own evaluation leaves them out,
and ELEVATER's rule is not documented.
"""

import json
from pathlib import Path

import numpy as np

from focalclip.base.errors import UserError
from focalclip.evaluation.data.entries import SPLIT_WORDS, SPLITS, Split, TaskData, no_split, templates_of
from focalclip.evaluation.data.trees import IMAGE_SUFFIXES, FileEntry, FolderTree, images_by_class, lines_of
from focalclip.evaluation.task import Task

NAMES = ("meme", "hatespeech meme")
"""Labels 0 and 1 in the words of OpenAI's and ELEVATER's prompts."""

_FILES: dict[Split, tuple[str, ...]] = {"test": ("dev.jsonl", "dev_seen.jsonl"), "train": ("train.jsonl",)}


def is_hateful_memes(folder: Path) -> bool:
    """Whether a folder has this layout."""
    return (folder / "img").is_dir() and any((folder / name).is_file() for names in _FILES.values() for name in names)


def read_hateful_memes(folder: Path, task: Task, split: Split) -> TaskData:
    """Read one split.

    Raises:
        Unavailable: if it has no such split.
        UserError: naming the line at fault, or the image that is missing.
    """
    present = {name: folder / file for name, files in _FILES.items() for file in files if (folder / file).is_file()}
    if split not in present:
        raise no_split(folder, split, list(present))
    entries, labels = [], []
    lines = lines_of(present[split].read_bytes(), present[split], "one meme per line")
    for number, line in enumerate(lines, start=1):
        image, label = _meme(line, f"{present[split]}: line {number}")
        entries.append(FileEntry(folder / image, image))
        labels.append(label)
    missing = [entry.key for entry in entries if not entry.path.is_file()]
    if missing:
        raise UserError(
            f"{folder}: {len(missing)} of {len(entries)} images are missing ({missing[0]} ...); unpack img.tar.gz"
        )
    return TaskData(folder, NAMES, templates_of(task, folder), tuple(entries), np.array(labels, dtype=np.int64))


def _meme(line: str, what: str) -> tuple[str, int]:
    try:
        meme = json.loads(line)
        image, label = str(meme["img"]), int(meme["label"])
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f'{what} is not {{"img": "img/ID.png", "label": 0 or 1, ...}}; download the file again'
        ) from None
    if label not in (0, 1):
        raise UserError(f"{what} has the label {label}, not 0 or 1; download the file again")
    return image, label


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


TASK = "voc-2007-classification"
"""The registry's task of this data."""

_PLACES = ("", "VOC2007", "VOCdevkit/VOC2007")


def find_voc(folder: Path) -> Path | None:
    """The VOC2007 folder in or under a folder, if there is one."""
    return next((folder / p for p in _PLACES if (folder / p / "ImageSets" / "Main").is_dir()), None)


def read_voc(folder: Path, task: Task, split: Split) -> TaskData:
    """Read one split; labels are bool (N, 20).

    Raises:
        Unavailable: if it has no such split (train and val come in one archive, test in another).
        UserError: naming the file or line at fault, or the image that is missing.
    """
    main = folder / "ImageSets" / "Main"
    if not (main / f"{split}.txt").is_file():
        raise no_split(folder, split, [name for name in SPLITS if (main / f"{name}.txt").is_file()])
    keys = (main / f"{split}.txt").read_text().split()
    ending = f"_{split}.txt"
    names = sorted(path.name.removesuffix(ending) for path in main.glob(f"*{ending}"))
    if not names:
        raise UserError(
            f"{main}: no CLASS{ending} files, which hold the labels; unpack the VOC 2007 {split} archive again"
        )
    labels = np.stack([_present(main / f"{name}{ending}", keys) for name in names], axis=1)
    entries = tuple(FileEntry(folder / "JPEGImages" / f"{key}.jpg", key) for key in keys)
    missing = [entry.key for entry in entries if not entry.path.is_file()]
    if missing:
        raise UserError(
            f"{folder}: {len(missing)} of {len(keys)} images are missing ({missing[0]}.jpg ...); unpack again"
        )
    return TaskData(folder, tuple(names), templates_of(task, folder), entries, labels)


def _present(path: Path, keys: list[str]) -> np.ndarray:
    """Bool (N,): which images hold the class."""
    try:
        marks = {
            key: int(mark) for key, mark in (line.split() for line in path.read_text().splitlines() if line.strip())
        }
        return np.array([marks[key] >= 0 for key in keys])
    except (KeyError, ValueError):
        raise UserError(
            f"{path}: not one line 'IMAGE 1, 0 or -1' for each image of the split; unpack it again"
        ) from None
