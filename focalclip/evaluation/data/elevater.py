"""Sets of ELEVATER in the layouts of those who packed them.

The 20 sets as Chinese-CLIP packed them (``OFA-Sys/chinese-clip-eval``, ``ELEVATER_all.zip``, 37 GB):

    label.txt            one English name per line; the line number is ELEVATER's label
    test/007/x.jpg       folders are labels: 3 digits with zeros in front where there are more than 10 classes
    train/007/y.jpg      there is no val
    index.json           for some sets: the i-th image of the official test order is number index[i] of this order

The layout is described in zeroshot_dataset_en.md of OFA-Sys/Chinese-CLIP; "this order" is that of torchvision's
``ImageFolder``, which its evaluation script uses. Read from unpacked folders, from one set's zip, or from the whole
download, where that holds the 20 zips uncompressed. It has no layout for several labels per image (VOC 2007).

VOC 2007 as its authors packed it: ``VOCdevkit/VOC2007`` with ``JPEGImages`` and ``ImageSets/Main``.
``Main/CLASS_test.txt`` says for each image of a split 1 (present), 0 (only objects marked difficult) or -1 (absent).
Difficult objects count as present, as in CLIP_benchmark's ``voc2007_multilabel``; VOC's own evaluation leaves them out,
and ELEVATER's rule is not documented.

Hateful Memes as its authors packed it: ``img/ID.png`` and ``dev.jsonl`` or ``dev_seen.jsonl``, which hold ELEVATER's
test images.
"""

import json
import os
import struct
import zipfile
import zlib
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple

import numpy as np

from focalclip.base.errors import UserError
from focalclip.data.folders import FolderTree, Tree, images_by_class, lines_of
from focalclip.data.reader import SPLITS, FileEntry, PictureSet, SplitName, data_in, is_data, no_split
from focalclip.evaluation.task import Task

# The archive of Chinese-CLIP

WHOLE = "ELEVATER_all.zip"

_LABELS = "label.txt"


def is_archive_folder(folder: Path) -> bool:
    """Whether a folder holds one unpacked set, at once or in its only folder."""
    return _set_folder(folder) is not None


def read_folder(folder: Path, task: Task, split: SplitName) -> PictureSet:
    """Read an unpacked set.

    Raises:
        Unavailable: if it has no such split.
        UserError: if the data is faulty.
    """
    return _read(FolderTree(_set_folder(folder) or folder), task, split)


def read_zip(archive: Path, task: Task, split: SplitName) -> PictureSet:
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
    labels = [PurePosixPath(path) for path in members if PurePosixPath(path).name == _LABELS and is_data(path)]
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


def _read(tree: Tree, task: Task, split: SplitName) -> PictureSet:
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
    return PictureSet(tree.place, entries, labels=labels, class_names=class_names, official_order=order)


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


# Files inside a zip

_LOCAL_HEADER = struct.Struct("<4s22xHH")  # PKWARE's APPNOTE 4.3.7: signature, 22 bytes, lengths of name and extra


class ZipEntry(NamedTuple):
    """An image that is a member of a zip."""

    archive: Path
    key: str
    offset: int
    """Of the member's own header in the file."""
    packed: int
    method: int
    crc: int

    @property
    def name(self) -> str:
        """How messages call it."""
        return f"{self.archive.name}:{self.key}"

    @property
    def file(self) -> Path:
        """The zip."""
        return self.archive

    def read(self) -> bytes:
        """The compressed image; empty if the zip's checksum does not fit."""
        with self.archive.open("rb") as file:
            file.seek(self.offset)
            _, name_length, extra_length = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
            file.seek(name_length + extra_length, os.SEEK_CUR)
            data = file.read(self.packed)
        try:
            data = data if self.method == zipfile.ZIP_STORED else zlib.decompress(data, -zlib.MAX_WBITS)
        except zlib.error:
            return b""
        return data if zlib.crc32(data) == self.crc else b""


class ZipTree:
    """The files of a zip below one of its folders.

    Args:
        archive: The file.
        root: Folder inside the zip.
        members: The zip's directory, by path.
        start: Where the zip begins in the file; not 0 for a zip inside a zip.
    """

    def __init__(self, archive: Path, root: str, members: dict[str, zipfile.ZipInfo], start: int = 0) -> None:
        self.place = archive
        self._start = start
        prefix = f"{root}/" if root else ""
        self._members = {
            inside: member
            for path, member in members.items()
            if path.startswith(prefix) and is_data(inside := path.removeprefix(prefix))
        }

    def folders(self, under: str = "") -> list[str]:
        """Names of the folders directly in a folder, in order."""
        depth = len(PurePosixPath(under).parts)
        parts = (PurePosixPath(path).parts for path in self.paths(under))
        return sorted({names[depth] for names in parts if len(names) > depth + 1})

    def paths(self, under: str = "") -> list[str]:
        """Every file below a folder."""
        return [path for path in self._members if not under or path.startswith(f"{under}/")]

    def read(self, path: str) -> bytes | None:
        """A file's content; None if there is no such file."""
        return self.entry(path, path).read() if path in self._members else None

    def entry(self, path: str, key: str) -> ZipEntry:
        """An image, to be read later.

        Raises:
            UserError: if it is encrypted, or packed in a way that images seldom are.
        """
        member = self._members[path]
        if member.flag_bits & 1 or member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise UserError(f"{self.place}: {path} is encrypted or packed by method {member.compress_type}; unzip it")
        return ZipEntry(
            self.place, key, self._start + member.header_offset, member.compress_size, member.compress_type, member.CRC
        )


def zip_members(archive: Path, start: int = 0, size: int | None = None) -> dict[str, zipfile.ZipInfo]:
    """The directory of a zip, or of a zip that is ``size`` bytes from ``start`` of the file, by path.

    Raises:
        UserError: if it is not a whole zip.
    """
    try:
        with archive.open("rb") as file:
            part = file if size is None else _Section(file, start, size)
            with zipfile.ZipFile(part) as opened:
                return {member.filename: member for member in opened.infolist() if not member.is_dir()}
    except zipfile.BadZipFile as error:
        raise UserError(f"{archive}: not a whole zip ({error}); download it again") from None


def content_offset(archive: Path, member: zipfile.ZipInfo) -> int:
    """Where a stored member's content begins in the file."""
    with archive.open("rb") as file:
        file.seek(member.header_offset)
        _, name_length, extra_length = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
    return member.header_offset + _LOCAL_HEADER.size + name_length + extra_length


class _Section:
    """A part of a file seen as a file, as far as ``zipfile`` needs it to read a zip's directory."""

    def __init__(self, file: IO[bytes], start: int, size: int) -> None:
        self._file, self._start, self._size, self._at = file, start, size, 0

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        self._at = max(0, offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence])
        return self._at

    def read(self, count: int = -1, /) -> bytes:
        left = max(0, self._size - self._at)
        self._file.seek(self._start + self._at)
        data = self._file.read(left if count < 0 else min(count, left))
        self._at += len(data)
        return data


# VOC 2007

VOC_TASK = "voc-2007-classification"
"""The registry's task of this data."""

_VOC_PLACES = ("", "VOC2007", "VOCdevkit/VOC2007")


def find_voc(folder: Path) -> Path | None:
    """The VOC2007 folder in or under a folder, if there is one."""
    return next((folder / p for p in _VOC_PLACES if (folder / p / "ImageSets" / "Main").is_dir()), None)


def read_voc(folder: Path, split: SplitName) -> PictureSet:
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
    names = [path.name.removesuffix(ending) for path in data_in(main, ending)]
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
    return PictureSet(folder, entries, labels=labels, class_names=tuple(names))


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


# Hateful Memes

_MEMES = ("meme", "hatespeech meme")
"""Labels 0 and 1 in the words of OpenAI's and ELEVATER's prompts."""

_MEME_FILES: dict[SplitName, tuple[str, ...]] = {"test": ("dev.jsonl", "dev_seen.jsonl"), "train": ("train.jsonl",)}


def is_hateful_memes(folder: Path) -> bool:
    """Whether a folder has this layout."""
    return (folder / "img").is_dir() and any(
        (folder / name).is_file() for names in _MEME_FILES.values() for name in names
    )


def read_hateful_memes(folder: Path, split: SplitName) -> PictureSet:
    """Read one split.

    Raises:
        Unavailable: if it has no such split.
        UserError: naming the line at fault, or the image that is missing.
    """
    present = {
        name: folder / file for name, files in _MEME_FILES.items() for file in files if (folder / file).is_file()
    }
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
    return PictureSet(folder, tuple(entries), labels=np.array(labels, dtype=np.int64), class_names=_MEMES)


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
