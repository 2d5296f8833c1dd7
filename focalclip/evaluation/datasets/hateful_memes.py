"""The Hateful Memes set as its authors packed it: ``dev.jsonl`` (or ``dev_seen.jsonl``), ``train.jsonl`` and ``img/``.

Each line of a ``.jsonl`` file is one meme, ``{"id": 8291, "img": "img/08291.png", "label": 1, "text": ...}``. The test
set of ELEVATER is the 500 memes of the challenge's dev file, whose second phase calls it dev_seen; its test files came
without labels. Each user has to accept the licence, so there is no mirror.
"""

import json
from pathlib import Path

import numpy as np

from focalclip.errors import UserError
from focalclip.evaluation.datasets.files import FileEntry, lines_of
from focalclip.evaluation.datasets.records import Split, TaskData, no_split, templates_of
from focalclip.evaluation.registry.tasks import Task

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
