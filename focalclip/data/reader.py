"""What a reader of a data source is, and what it returns: pictures that are read one by one, with captions or classes.

A reader answers two questions: whether a source is of its kind, and what is in it. It reads every header, caption and
label, and leaves the pictures where they are. The table of all readers is in ``focalclip.data.sources``.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, Protocol, get_args

import numpy as np

from focalclip.base.errors import UserError

SplitName = Literal["train", "val", "test"]

SPLITS: tuple[SplitName, ...] = get_args(SplitName)

SPLIT_WORDS: dict[str, SplitName] = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
"""What folders and files call the splits."""

NO_LABEL = -1  # class number of a sample without one

_BESIDE_DATA = {
    "__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "system volume information", "lost+found",
    "@eadir", "#recycle", "#snapshot", "__pycache__",
}  # fmt: skip


def is_data(name: str) -> bool:
    """Whether a file or folder of this name, found in a folder or archive, may be data.

    Hidden ones are not (``.git``, ``.ipynb_checkpoints``, ``._x.jpg`` of macOS), nor what systems and programs put
    beside data (``__MACOSX``, ``Thumbs.db``, ``lost+found``). What the user names is not asked about.

    Args:
        name: without folders, or a path below what the user named, with ``/``: then every part counts.
    """
    parts = name.split("/")
    return not any((part.startswith(".") and part != ".") or part.lower() in _BESIDE_DATA for part in parts)


def data_in(folder: Path, ending: str = "") -> list[Path]:
    """What lies directly in a folder and may be data, sorted by name; empty if there is no such folder.

    Args:
        folder: links to folders count as folders.
        ending: only names that end so, in any case.
    """
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if is_data(path.name) and path.name.lower().endswith(ending))


def folders_in(folder: Path) -> list[str]:
    """Names of the folders directly in a folder, links to folders included, that may be data; in order."""
    if not folder.is_dir():
        return []
    with os.scandir(folder) as items:
        return sorted(item.name for item in items if is_data(item.name) and _is_folder(item))


def files_below(folder: Path) -> list[str]:
    """Every file in a folder and in the folders below it, links included, that may be data; in order.

    A link to a folder that it lies in itself is not followed.

    Returns:
        Paths relative to the folder, with ``/`` on every system; empty if there is no such folder.
    """
    if not folder.is_dir():
        return []
    return list(_files_below(str(folder), "", frozenset([os.path.realpath(folder)])))


def _files_below(folder: str, prefix: str, above: frozenset[str]) -> Iterator[str]:
    with os.scandir(folder) as items:
        entries = sorted((item for item in items if is_data(item.name)), key=lambda item: item.name)
    for entry in entries:
        if not _is_folder(entry):
            yield prefix + entry.name
        elif (place := os.path.realpath(entry.path)) not in above:
            yield from _files_below(entry.path, f"{prefix}{entry.name}/", above | {place})


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


class Unavailable(UserError):
    """The data, or a split of it, is not there; the message says what to do."""


def no_split(place: object, split: str, present: list[str]) -> Unavailable:
    """The error for a split that is not there; it names those that are."""
    has = f"it has {', '.join(present)}" if present else "it is not split and counts as test"
    hint = ""
    if split == "val" and "train" in present:
        hint = "; a validation set can be cut from train"
    elif split == "test" and "val" in present:
        hint = "; where val is what models are tested on, as in ImageNet-1K, give that folder the name test"
    return Unavailable(f"{place} has no {split} split ({has}){hint}")


class Entry(Protocol):
    """Where one picture lies."""

    @property
    def key(self) -> str:
        """Its name within the data, the same wherever the data lies; with ``/`` on every system."""
        ...

    @property
    def name(self) -> str:
        """Its name in messages."""
        ...

    @property
    def file(self) -> Path | None:
        """The file that holds it, which is unchanged as long as the picture is; None where no single file does."""
        ...

    def read(self) -> bytes:
        """The compressed picture; empty where its container is damaged, so that decoding fails and names it."""
        ...


class FileEntry(NamedTuple):
    """A picture that is a file."""

    path: Path
    key: str

    @property
    def name(self) -> str:
        """The path."""
        return str(self.path)

    @property
    def file(self) -> Path:
        """The file itself."""
        return self.path

    def read(self) -> bytes:
        """The compressed picture."""
        return self.path.read_bytes()


class TarEntry(NamedTuple):
    """A picture that is a member of a tar."""

    shard: Path
    key: str
    offset: int
    size: int

    @property
    def name(self) -> str:
        """Folder, shard and key."""
        return f"{self.shard.parent.name}/{self.shard.name}:{self.key}"

    @property
    def file(self) -> Path:
        """The tar."""
        return self.shard

    def read(self) -> bytes:
        """The compressed picture."""
        with self.shard.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


@dataclass(frozen=True)
class PictureSet:
    """What a source holds. A field is None where the source has nothing of the kind.

    Blank captions are left out and counted here, whichever reader found them.

    Raises:
        ValueError: if captions, keywords or labels are not as many as the pictures.
    """

    place: Path
    """The folder or file that it was read from."""
    entries: tuple[Entry, ...]
    """The pictures (N)."""
    name: str = ""
    """A short name for results; empty: the name of ``place``."""
    captions: tuple[tuple[str, ...], ...] | None = None
    """(N,): all captions of each picture, the main one first; an empty tuple where it has none."""
    keywords: tuple[tuple[str, ...], ...] | None = None
    """(N,): words that are too general to describe a picture alone; see :class:`focalclip.data.index.Captions`."""
    faults: Mapping[int, str] = field(default_factory=dict)
    """Why a picture, by its number, has no captions."""
    blank: Mapping[int, int] = field(default_factory=dict)
    """How many captions of a picture, by its number, were blank and are left out."""
    left_out: tuple[str, ...] = ()
    """What belongs to no picture, such as a row that names none: where it is, with the reason."""
    labels: np.ndarray | None = None
    """int64 (N,), -1 where a picture has none; or bool (N, C) where it may have several."""
    class_names: tuple[str, ...] | None = None
    """(C,): the names of the labels."""
    own_class_names: tuple[tuple[str, ...], ...] | None = None
    """(N,): the names of each picture's classes, where a source says them picture by picture."""
    templates: tuple[str, ...] | None = None
    """Prompts with ``{c}`` where the class name goes."""
    official_order: np.ndarray | None = None
    """int64 (N,): the i-th picture of ELEVATER's official test order, which a submission needs, is
    ``entries[official_order[i]]``."""

    def __post_init__(self) -> None:
        if self.captions is not None:
            stripped = [tuple(caption.strip() for caption in own) for own in self.captions]
            kept = tuple(tuple(filter(None, own)) for own in stripped)
            blank = {i: own.count("") for i, own in enumerate(stripped) if "" in own}
            object.__setattr__(self, "captions", kept)
            object.__setattr__(self, "blank", blank)
        for name in ("captions", "keywords", "labels", "own_class_names"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self.entries):
                raise ValueError(f"{self.place}: {len(values)} {name} for {len(self.entries)} pictures")

    @property
    def remarks(self) -> list[str]:
        """What the source holds and this set does not, one clause each."""
        blank, rows = sum(self.blank.values()), self.left_out
        return [
            *([f"{blank:,} blank captions left out"] if blank else []),
            *([f"{len(rows):,} rows left out ({'; '.join(rows[:3])}{' ...' if rows[3:] else ''})"] if rows else []),
        ]


@dataclass(frozen=True)
class Request:
    """What of a source is wanted. A reader leaves aside what does not concern its kind."""

    split: str | None = None
    """None: ``train`` where the source has splits, else everything."""
    image_root: Path | None = None
    """The folder that picture paths are relative to; None: the folder of the file that names them."""
    limit: int | None = None
    """Only the first so many samples are needed; a reader may return more."""
    field: str = "data.train"
    """The setting that named the source, for messages."""
    image_column: str | None = None
    """Column or field of a table that holds the picture (a path or bytes); None: found by its name."""
    caption_columns: tuple[str, ...] = ()
    """Columns that hold captions, the main one first; empty: found by their names."""
    label_column: str | None = None
    """Column that holds the class, by number or by name; None: found by its name."""
    templates: tuple[str, ...] = ()
    """Prompts with ``{c}`` for the names of classes, in the place of the source's own."""


@dataclass(frozen=True)
class Reader:
    """One kind of source."""

    what: str
    """The kind in a few words, for help and messages."""
    recognises: Callable[[str], bool]
    """Whether a source is of this kind, judged by its name and by what lies there."""
    open: Callable[[str, Request], PictureSet]
    """Read a source of this kind.

    Raises:
        Unavailable: if it has no such split.
        UserError: naming the file at fault.
    """
    takes: tuple[str, ...] = ()
    """Which of ``image_column``, ``caption_columns`` and ``label_column`` of a request it heeds; the others are
    refused by :func:`focalclip.data.sources.open_source`."""
