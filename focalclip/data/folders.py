"""Folders of pictures: task folders in the wds layout of CLIP_benchmark, and one folder per class.

A task folder in the wds layout:

    classnames.txt                         one name per line; the line number is the label
    zeroshot_classification_templates.txt  one prompt per line, {c} stands for the name
    dataset_type.txt                       optional: "multilabel", or "retrieval", which has captions and no classes
    test/nshards.txt  test/0.tar ...       members KEY.webp|png|jpg|jpeg with KEY.cls (or KEY.npy, a 0/1 vector);
                                           for retrieval KEY.txt with one caption per line
    train/...  val/...                     other splits, where there are any; most mirrors have no val

Class folders are ``CLASS NAME/*.jpg``, below a folder for each split (``train/CLASS NAME/*.jpg``) or without splits.
"""

import io
import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from focalclip.base.errors import UserError, first_line
from focalclip.base.files import user_path
from focalclip.data.images import IMAGE_SUFFIXES, SHARD_IMAGES
from focalclip.data.index import read_pairs, walk_tar
from focalclip.data.reader import (
    SPLIT_WORDS,
    SPLITS,
    Entry,
    FileEntry,
    PictureSet,
    Reader,
    Request,
    TarEntry,
    data_in,
    files_below,
    folders_in,
    no_split,
)

# Files of folders, wherever they lie


class Tree(Protocol):
    """Files by their path below a root, with ``/`` on every system: of a folder, or of a zip."""

    place: Path
    """Its name in messages."""

    def folders(self, under: str = "") -> list[str]:
        """Names of the folders directly in a folder, in order; what :func:`is_data` says no to is left out."""
        ...

    def paths(self, under: str = "") -> list[str]:
        """Every file below a folder; what :func:`is_data` says no to is left out."""
        ...

    def read(self, path: str) -> bytes | None:
        """A file's content; None if there is no such file."""
        ...

    def entry(self, path: str, key: str) -> Entry:
        """A picture, to be read later."""
        ...


class FolderTree:
    """The files of a folder."""

    def __init__(self, root: Path) -> None:
        self.place = root

    def folders(self, under: str = "") -> list[str]:
        """Names of the folders directly in a folder, in order."""
        return folders_in(self.place / under)

    def paths(self, under: str = "") -> list[str]:
        """Every file below a folder."""
        prefix = f"{under}/" if under else ""
        return [prefix + path for path in files_below(self.place / under)]

    def read(self, path: str) -> bytes | None:
        """A file's content; None if there is no such file."""
        file = self.place / path
        return file.read_bytes() if file.is_file() else None

    def entry(self, path: str, key: str) -> FileEntry:
        """A picture, to be read later."""
        return FileEntry(self.place / path, key)


def images_by_class(tree: Tree, folder: str) -> list[tuple[str, str]]:
    """Class folder and path of every image below ``folder``, in the order of torchvision's ``ImageFolder``."""
    prefix = f"{folder}/" if folder else ""
    found = []
    for path in _images(tree, folder):
        class_folder, _, inside = path.removeprefix(prefix).partition("/")
        if inside:
            parent, _, name = inside.rpartition("/")
            found.append((class_folder, parent, name, path))
    return [(class_folder, path) for class_folder, _, _, path in sorted(found)]


def _images(tree: Tree, folder: str) -> list[str]:
    return [path for path in tree.paths(folder) if path.lower().endswith(IMAGE_SUFFIXES)]


def lines_of(data: bytes, what: object, content: str, *, empty: bool = False) -> tuple[str, ...]:
    """The stripped lines of a UTF-8 text, except empty ones at its end.

    Raises:
        UserError: naming ``what``, if it is not UTF-8 or a line is empty (all lines, where ``empty`` ones are allowed);
            ``content`` says what lines should hold.
    """
    try:
        lines = [line.strip() for line in data.decode("utf-8-sig").rstrip().split("\n")]
    except UnicodeDecodeError as error:
        raise UserError(f"{what}: not UTF-8 (byte {error.start}); save it as UTF-8") from None
    if not (any(lines) if empty else all(lines)):
        raise UserError(f"{what}: line {lines.index('') + 1} is empty; expected {content}")
    return tuple(lines)


# Task folders in the wds layout

NAMES, TEMPLATES, TYPE = "classnames.txt", "zeroshot_classification_templates.txt", "dataset_type.txt"

COUNT = "nshards.txt"

_LABELS = ("cls", "npy")


def is_task_folder(folder: Path) -> bool:
    """Whether a folder has the wds layout, complete or not."""
    return (folder / NAMES).is_file() or (folder / TYPE).is_file() or bool(splits_of(folder))


def splits_of(folder: Path) -> list[str]:
    """The splits that a task folder holds."""
    return [name for name in SPLITS if (folder / name / COUNT).is_file() or data_in(folder / name, ".tar")]


def is_whole(folder: Path) -> bool:
    """Whether a split's folder holds every shard that its nshards.txt counts."""
    return (folder / COUNT).is_file() and all(path.is_file() for path in _expected_shards(folder))


def read_classes(folder: Path, split: str, *, empty_names: bool = False) -> PictureSet:
    """Read names, prompts, labels and image positions of a task folder; ``empty_names``: a class may have no name.

    Raises:
        UserError: naming the file at fault: a missing or empty text file, a prompt without ``{c}``, a missing or broken
            shard, a sample without image or label, a label outside the classes.
    """
    class_names = _lines(folder / NAMES, "one class name per line", empty=empty_names)
    templates = _lines(folder / TEMPLATES, "one prompt per line with {c} for the class name")
    for template in templates:
        if "{c}" not in template:
            raise UserError(f"{folder / TEMPLATES}: the prompt {template!r} has no {{c}} where the class name goes")
    kind = _type_of(folder) or "classification"
    if kind == "retrieval":
        raise UserError(f"{folder}: a retrieval set, which has no classes; run eval/retrieval.py --data {folder}")
    if kind not in ("classification", "multilabel"):
        raise UserError(f"{folder / TYPE}: {kind!r} is neither classification nor multilabel; use another task")
    entries: list[TarEntry] = []
    labels: list[Any] = []
    for shard in _shards(folder / split):
        for entry, label in _scan(shard, len(class_names), multilabel=kind == "multilabel"):
            entries.append(entry)
            labels.append(label)
    if not entries:
        raise UserError(f"{folder / split}: the shards hold no images; download the task again")
    dtype = bool if kind == "multilabel" else np.int64
    return PictureSet(
        folder, tuple(entries), labels=np.array(labels, dtype=dtype), class_names=class_names, templates=templates
    )


def _read_retrieval(folder: Path, split: str, limit: int | None) -> PictureSet:
    """Images and captions of a retrieval set in the wds layout."""
    present = splits_of(folder)
    if split not in present:
        raise UserError(
            f"{folder / split / COUNT}: missing, or not a number of shards; splits that are there:"
            f" {', '.join(sorted(present)) or 'none'} (--split)"
        )
    return read_pairs(folder, _shards(folder / split), _caption_lines, limit)


def _open_task_folder(source: str, request: Request) -> PictureSet:
    folder, split = user_path(source), request.split or "train"
    if _type_of(folder) == "retrieval":
        return _read_retrieval(folder, split, request.limit)
    present = splits_of(folder)
    if present and split not in present:
        raise no_split(folder, split, present)
    return read_classes(folder, split)


TASK_FOLDER = Reader(
    "a task folder of CLIP_benchmark (classnames.txt and test/0.tar ...)",
    lambda source: is_task_folder(user_path(source)),
    _open_task_folder,
)


def _type_of(folder: Path) -> str:
    return _text(folder / TYPE).strip()


def _text(path: Path) -> str:
    """Empty where there is no such file; what is not UTF-8 matches none of the words that the file may hold."""
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _lines(path: Path, content: str, *, empty: bool = False) -> tuple[str, ...]:
    if not path.is_file():
        raise UserError(f"{path}: missing; a task folder needs it ({content})")
    return lines_of(path.read_bytes(), path, content, empty=empty)


def _shards(folder: Path) -> list[Path]:
    """The shards of a split, all of which are there."""
    shards = _expected_shards(folder)
    missing = [path.name for path in shards if not path.is_file()]
    if missing:
        raise UserError(
            f"{folder}: {len(missing)} of {len(shards)} shards are missing ({missing[0]} ...); download again"
        )
    return shards


def _expected_shards(folder: Path) -> list[Path]:
    """The shards that are there, in the order of their numbers; where nshards.txt counts others: 0.tar, 1.tar ..."""
    found = sorted(data_in(folder, ".tar"), key=lambda path: [int(n) for n in re.findall(r"\d+", path.stem)])
    text = _text(folder / COUNT).strip() if (folder / COUNT).is_file() else str(len(found))
    if not text.isdecimal() or int(text) == 0:
        raise UserError(f"{folder}: no shards; expected {folder.name}/0.tar ... and {folder.name}/{COUNT}")
    return found if len(found) == int(text) else [folder / f"{i}.tar" for i in range(int(text))]


def _scan(shard: Path, num_classes: int, multilabel: bool) -> Iterator[tuple[TarEntry, Any]]:
    """Image positions and labels of one shard, in its order."""
    kind = "npy" if multilabel else "cls"
    wanted = [found for found in walk_tar(shard) if found[1] in SHARD_IMAGES + _LABELS]
    with shard.open("rb") as data:
        for key, group in groupby(wanted, lambda found: found[0].removeprefix("./")):
            members = {extension: member for _, extension, member in group}
            image = next((members[extension] for extension in SHARD_IMAGES if extension in members), None)
            if image is None or kind not in members:
                lacks = f"no image ({', '.join(SHARD_IMAGES)})" if image is None else f"no .{kind} label"
                raise UserError(f"{shard}: the sample {key} has {lacks}; write the shard again")
            data.seek(members[kind].offset_data)
            label = _label(data.read(members[kind].size), num_classes, multilabel, f"{shard}: the label of {key}")
            yield TarEntry(shard, key, image.offset_data, image.size), label


def _label(data: bytes, num_classes: int, multilabel: bool, what: str) -> Any:
    if multilabel:
        try:
            vector = np.load(io.BytesIO(data), allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise UserError(f"{what} is not a .npy vector ({first_line(error)}); write the shard again") from None
        if vector.shape != (num_classes,) or not np.isin(vector, (0, 1)).all():
            raise UserError(f"{what} is not a vector of {num_classes} zeros and ones; is {NAMES} of the same task?")
        return vector.astype(bool)
    text = data.decode("ascii", errors="replace").strip()
    if not text.isdecimal() or int(text) >= num_classes:
        raise UserError(f"{what} is {text!r}, not one of 0 to {num_classes - 1}; is {NAMES} of the same task?")
    return int(text)


def _caption_lines(text: bytes | None, _: bytes | None) -> tuple[list[str], list[str]]:
    """CLIP_benchmark's captions: one per line of the text, blank ones before its end included."""
    if text is None:
        raise ValueError("no .txt with captions")
    try:
        return text.decode("utf-8-sig").rstrip().splitlines(), []
    except UnicodeDecodeError:
        raise ValueError("captions are not UTF-8") from None


# One folder per class


def is_class_folders(folder: Path) -> bool:
    """Whether a folder has this layout: at least two class folders with images."""
    tree = FolderTree(folder)
    folders = tree.folders()
    named = [name for name in folders if name.lower() in SPLIT_WORDS]
    places = [(name, name) for name in folders if name not in named]
    places += [(name, f"{split}/{name}") for split in named for name in tree.folders(split)]
    with_images: set[str] = set()
    for name, path in places:
        if name not in with_images and _images(tree, path):
            with_images.add(name)
        if len(with_images) > 1:
            return True
    return bool(named) and not with_images.isdisjoint(folders) and _are_classes(tree, named)


def _open_class_folders(source: str, request: Request) -> PictureSet:
    folder = user_path(source)
    tree = FolderTree(folder)
    splits = _split_folders(tree) or {"test": ""}
    is_split = splits != {"test": ""}
    split = request.split or ("train" if is_split else "test")
    if split not in splits:
        raise no_split(folder, split, list(splits) if is_split else [])
    images = images_by_class(tree, splits[split])
    present = {name for name, _ in images}
    elsewhere = [(place, name) for place in splits.values() for name in tree.folders(place) if name not in present]
    names = sorted(present | {name for place, name in elsewhere if _images(tree, f"{place}/{name}".lstrip("/"))})
    numbers = {name: number for number, name in enumerate(names)}
    entries = tuple(tree.entry(path, path) for _, path in images)
    labels = np.array([numbers[name] for name, _ in images], dtype=np.int64)
    return PictureSet(folder, entries, labels=labels, class_names=tuple(names))


def _split_folders(tree: Tree) -> dict[str, str]:
    """Split -> its folder; empty where the folders are classes, of which one may well be called "train".

    Raises:
        UserError: if two folders are of one split, or it is not clear whether the folders are splits or classes.
    """
    folders = tree.folders()
    named = [name for name in folders if name.lower() in SPLIT_WORDS]
    others = [name for name in folders if name not in named and _images(tree, name)]
    if not named or (others and _are_classes(tree, named)):
        return {}
    if others:
        raise UserError(
            f"{tree.place}: holds {', '.join(named)} and beside them pictures in {', '.join(others[:3])}"
            f"{' ...' if others[3:] else ''}, so its folders are neither all splits nor all classes; take out what does"
            f" not belong there, or name the folder of one split"
        )
    splits: dict[str, str] = {}
    for name in named:
        split = SPLIT_WORDS[name.lower()]
        if split in splits:
            raise UserError(f"{tree.place}: {splits[split]} and {name} are both the split {split}; keep one of them")
        splits[split] = name
    return splits


def _are_classes(tree: Tree, folders: Sequence[str]) -> bool:
    """Whether each of these folders, which have names of splits, holds pictures directly, as a class does."""
    return all(any("/" not in path.removeprefix(f"{name}/") for path in _images(tree, name)) for name in folders)


CLASS_FOLDERS = Reader(
    "a folder per class (CLASS NAME/*.jpg, or train/CLASS NAME/*.jpg)",
    lambda source: is_class_folders(user_path(source)),
    _open_class_folders,
)
