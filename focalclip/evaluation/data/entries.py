"""What every reader returns: one split's names, prompts and labels, and entries that read one image each."""

import hashlib
import io
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol, get_args

import numpy as np
from PIL import Image

from focalclip.base.errors import UserError, first_line
from focalclip.evaluation.task import Task


def decode(data: bytes) -> Image.Image:
    """Decode an image to RGB with Pillow, as the other harnesses do.

    Raises:
        ValueError: if it is damaged.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.convert("RGB")
    except Image.UnidentifiedImageError:  # its message holds the address of the buffer
        raise ValueError("not an image" if data else "empty, or damaged where it is stored") from None
    except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as error:
        raise ValueError(first_line(error)) from None


Split = Literal["train", "val", "test"]

SPLITS: tuple[Split, ...] = get_args(Split)

SPLIT_WORDS: dict[str, Split] = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
"""What folders and files call the splits."""


class Unavailable(Exception):
    """A task's data, or a split of it, is not there; the message says what to do."""


class Entry(Protocol):
    """Where one image lies."""

    @property
    def key(self) -> str:
        """Its name within the data, the same wherever the data lies; with ``/`` on every system."""
        ...

    @property
    def name(self) -> str:
        """How messages call it."""
        ...

    @property
    def file(self) -> Path | None:
        """The file that holds it: as long as that stays as it is, so does the image; None where no one file does."""
        ...

    def read(self) -> bytes:
        """The compressed image; empty where its container is damaged, so that decoding fails and names it."""
        ...


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
    ``entries[official_order[i]]``; None where the source does not tell that order."""

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


def templates_of(task: Task, place: object) -> tuple[str, ...]:
    """The task's own prompts, for layouts that bring none.

    Raises:
        UserError: if the task has none either.
    """
    if not task.templates:
        raise UserError(
            f"{place}: this layout brings no prompts and the task {task.id} has none; give it templates in its YAML"
            " file, such as 'a photo of a {c}.'"
        )
    return task.templates


def no_split(place: object, split: str, present: list[str]) -> Unavailable:
    """That a split is not there; says which are."""
    has = f"it has {', '.join(present)}" if present else "it has no splits of its own and counts as test"
    hint = ""
    if split == "val" and "train" in present:
        hint = "; a validation set can be cut from train"
    elif split == "test" and "val" in present:
        hint = "; where val is what models are tested on, as in ImageNet-1K, give that folder the name test"
    return Unavailable(f"{place} has no {split} split ({has}){hint}")
