"""VOC 2007 as its authors packed it: ``VOCdevkit/VOC2007`` with ``JPEGImages`` and ``ImageSets/Main``.

``Main/CLASS_test.txt`` says for each image of a split 1 (present), 0 (only objects marked difficult) or -1 (absent).
Difficult objects count as present, as in CLIP_benchmark's ``voc2007_multilabel``; VOC's own evaluation leaves them out,
and ELEVATER's rule is not documented.
"""

from pathlib import Path

import numpy as np

from focalclip.errors import UserError
from focalclip.evaluation.datasets.files import FileEntry
from focalclip.evaluation.datasets.records import SPLITS, Split, TaskData, no_split, templates_of
from focalclip.evaluation.registry.tasks import Task

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
