"""Shards: where every sample lies inside its tar, and what its text, JSON and class number say.

Member offsets and lengths are found once and kept in an index beside the tar: ``00000.tar.index.npz`` for
``00000.tar``, in the cache folder where the tar's own folder cannot be written. It can be deleted at any time: it is
rebuilt from the tar, also whenever the tar's size or time of change differs from what the index was made from. One
index is read at a time and on demand, so memory does not grow with the number of samples.
"""

import hashlib
import itertools
import json
import re
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from tqdm import tqdm

from focalclip.base.errors import UserError
from focalclip.base.files import cache_dir, whole_file
from focalclip.data.images import SHARD_IMAGES
from focalclip.data.reader import NO_LABEL, PictureSet, TarEntry, is_data

IMAGE, TEXT, JSON, LABEL = range(4)  # columns of the member table

_COLUMNS = dict.fromkeys(SHARD_IMAGES, IMAGE) | {"txt": TEXT, "json": JSON, "cls": LABEL}

# The key ends at the first dot of the file's own name, as in webdataset.
_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)")

_META = re.compile(r"__[^/]*__($|/)")  # members that webdataset skips too

_VERSION = 1

_BLOCK = 512  # bytes of a tar block (POSIX ustar)


def index_shards(shards: Sequence[Path]) -> np.ndarray:
    """Make sure that every shard has an up-to-date index.

    Several processes may do this at once; each writes under its own temporary name and renames.

    Returns:
        Samples per shard, int64 (len(shards),).

    Raises:
        UserError: naming the first shard that cannot be used, and why.
    """
    counts = np.array([_stored_count(shard) for shard in shards], dtype=np.int64)
    todo = [i for i, count in enumerate(counts) if count < 0]
    for i in tqdm(todo, desc="indexing shards", unit="shard", disable=True if len(todo) < 2 else None, leave=False):
        members, keys = scan_shard(shards[i])
        _save(shards[i], members, keys)
        counts[i] = len(members)
    return counts


def load_members(shard: Path) -> np.ndarray:
    """The member table of an indexed shard.

    Returns:
        int64 (samples, 4, 2): offset and length in bytes of image, text, json and label; length -1 where absent.

    Raises:
        OSError: if the shard has gone or changed since :func:`index_shards` saw it.
    """
    return _load(shard, "members")


def load_key(shard: Path, sample: int) -> str:
    """The WebDataset key of one sample (slow: for messages)."""
    return load_keys(shard)[sample]


def load_keys(shard: Path) -> list[str]:
    """The WebDataset keys of all samples of an indexed shard; raises as :func:`load_members` does."""
    return _load(shard, "keys").tobytes().decode(errors="replace").split("\0")


def scan_shard(shard: Path) -> tuple[np.ndarray, list[str]]:
    """Group consecutive members of one key into samples, as webdataset does.

    Returns:
        The member table of :func:`load_members`, and the key of each sample.

    Raises:
        UserError: if the file is not a whole, uncompressed tar, holds two members of one kind under one key, or has no
            sample with an image and a caption.
    """
    rows: list[np.ndarray] = []
    keys: list[str] = []
    for key, extension, member in walk_tar(shard):
        column = _COLUMNS.get(extension)
        if column is None:
            continue
        if not keys or key != keys[-1]:
            keys.append(key)
            rows.append(np.full((4, 2), -1, dtype=np.int64))
        if rows[-1][column, 1] >= 0:
            raise UserError(
                f"{shard}: the sample {key!r} has two members of one kind, the second being {member.name!r}; "
                "give every sample its own key (a key ends at the first dot)"
            )
        rows[-1][column] = member.offset_data, member.size
    members = np.array(rows, dtype=np.int64).reshape(-1, 4, 2)
    _check_content(shard, members)
    return members, keys


def walk_tar(shard: Path) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """Key, extension in lower case, and header of every file in a tar that has both, in order.

    Raises:
        UserError: if the file is not a whole, uncompressed tar.
    """
    try:
        with shard.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # pyrefly: ignore[missing-attribute]  # tarfile would keep every member it has seen
                match = _NAME.fullmatch(member.name)
                if match is not None and member.isreg() and not _META.match(member.name) and is_data(member.name):
                    yield match[1], match[2].lower(), member
            _check_end(shard, file, tar.offset)
    except tarfile.TarError as error:
        raise UserError(f"{shard}: not a whole, uncompressed tar ({error}); copy, download or write it again") from None
    except OSError as error:
        raise UserError(f"{shard}: cannot be read ({error.strerror}); check the file and its permissions") from None


def _check_end(shard: Path, file: BinaryIO, end: int) -> None:
    """Check that zero blocks end the tar: tarfile stops without an error at a header that is cut short or damaged."""
    file.seek(end)
    first = file.read(_BLOCK)
    if len(first) < _BLOCK or any(first):
        raise UserError(
            f"{shard}: cut short or damaged at byte {end} of {shard.stat().st_size}; copy, download or write it again"
        )
    while chunk := file.read(1 << 20):
        if chunk.count(0) != len(chunk):
            raise UserError(
                f"{shard}: more data follows its end mark at byte {end} (tars joined end to end?); write it as one tar"
            )


def _check_content(shard: Path, members: np.ndarray) -> None:
    """Single samples may lack a part (they are replaced and counted); a whole shard that does is a mistake."""
    has = members[:, :, 1] >= 0
    image, caption = has[:, IMAGE], has[:, TEXT] | has[:, JSON]
    if not image.any():
        raise UserError(f"{shard}: holds no image (.jpg, .jpeg, .png or .webp); leave it out or write it again")
    if not caption.any():
        raise UserError(f"{shard}: holds no caption (.txt or .json); leave it out or write it again with captions")
    if not (image & caption).any():
        raise UserError(
            f"{shard}: no image stands next to a caption of the same key; write the members of one sample together"
        )


def _places(shard: Path) -> list[Path]:
    """Where the index may lie: beside the tar, else in the cache folder."""
    name = f"{shard.name}.index.npz"
    digest = hashlib.sha256(str(shard.resolve()).encode()).hexdigest()[:16]
    return [shard.with_name(name), cache_dir() / "index" / digest / name]


def _stamp(shard: Path) -> list[int]:
    """What an index must agree with to be believed."""
    stat = shard.stat()
    return [_VERSION, stat.st_size, stat.st_mtime_ns]


def _load(shard: Path, name: str) -> np.ndarray:
    stamp = _stamp(shard)
    for place in _places(shard):
        try:
            with np.load(place) as index:
                if index["stamp"].tolist() == stamp:
                    return index[name]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            continue  # absent, or damaged: as good as absent
    raise FileNotFoundError(2, "no index fits the shard; it changed since it was indexed", str(shard))


def _stored_count(shard: Path) -> int:
    """Samples according to a valid index; -1 without one."""
    try:
        return int(_load(shard, "count"))
    except OSError:
        return -1


def _save(shard: Path, members: np.ndarray, keys: list[str]) -> None:
    """Write the index whole or not at all, in the first place that can be written."""
    names = np.frombuffer("\0".join(keys).encode(errors="replace"), dtype=np.uint8)
    for place in _places(shard):
        try:
            with whole_file(place) as temporary, temporary.open("wb") as file:
                np.savez(file, stamp=_stamp(shard), count=len(members), members=members, keys=names)
        except OSError:
            continue
        return
    raise UserError(f"{shard}: its index can be written neither beside it nor in {place.parent}; set FOCALCLIP_CACHE")


# What samples say

ReadTexts = Callable[[bytes | None, bytes | None], tuple[Sequence[str], Sequence[str]]]
"""From the text and the JSON of a sample to its captions and keywords."""


class Captions(NamedTuple):
    """All texts of a sample, each once."""

    captions: list[str]
    """One or more; each describes the picture alone."""
    keywords: list[str]
    """Too general to stand alone: they are only joined to the first caption."""


def read_captions(text: bytes | None, record: bytes | None) -> Captions:
    """The texts of a sample: first its text, then ``captions`` or ``caption`` of its JSON; and the JSON's ``keywords``.

    Raises:
        ValueError: if there is no caption, or the members cannot be read.
    """
    try:
        captions = [text.decode()] if text is not None else []
        values = json.loads(record.decode()) if record is not None else {}
    except UnicodeDecodeError:
        raise ValueError("caption is not UTF-8") from None
    except ValueError as error:
        raise ValueError(f"unreadable JSON ({error})") from None
    keywords = []
    if isinstance(values, dict):  # JSON of another kind is other metadata
        single = values.get("caption")
        captions += _texts("captions", values.get("captions") or ([] if single is None else [single]))
        keywords = _texts("keywords", values.get("keywords") or [])
    captions = _each_once(captions)
    if not captions:
        raise ValueError("no caption")
    return Captions(captions, [keyword for keyword in _each_once(keywords) if keyword not in captions])


def _texts(name: str, value: Any) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise ValueError(f"{name} in its JSON are not text")
    return value


def _each_once(texts: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(stripped for text in texts if (stripped := text.strip())))


def read_pairs(place: Path, shards: Sequence[Path], texts: ReadTexts, limit: int | None = None) -> PictureSet:
    """Images, captions and class numbers of shards, in order; missing indexes are built.

    A class number that cannot be read counts as none.

    Args:
        place: What the result calls the place it was read from.
        shards: Tars that exist.
        texts: Makes captions and keywords of a sample's text and JSON; raises ValueError with the reason if it cannot.
        limit: Only the first so many samples, those at fault included; None for all.

    Raises:
        UserError: naming the first shard that cannot be used.
    """
    index_shards(shards)
    samples = list(itertools.islice(_pairs(shards, texts), limit))
    labels = np.array([sample.label for sample in samples], dtype=np.int64)
    return PictureSet(
        place,
        tuple(sample.entry for sample in samples),
        captions=tuple(sample.captions for sample in samples),
        keywords=tuple(sample.keywords for sample in samples),
        faults={i: sample.fault for i, sample in enumerate(samples) if sample.fault},
        labels=labels if (labels != NO_LABEL).any() else None,
    )


class _Pair(NamedTuple):
    entry: TarEntry
    captions: tuple[str, ...] = ()
    keywords: tuple[str, ...] = ()
    label: int = NO_LABEL
    fault: str = ""


def _pairs(shards: Sequence[Path], texts: ReadTexts) -> Iterator[_Pair]:
    for shard in tqdm(shards, desc="captions", unit=" shards", leave=False, disable=None):
        members = load_members(shard)
        with shard.open("rb") as file:
            for key, places in zip(load_keys(shard), members.tolist(), strict=True):
                offset, size = places[IMAGE]
                if size < 0:
                    yield _Pair(TarEntry(shard, key, 0, 0), fault="no image")
                    continue
                text, record, label = (_member(file, *places[column]) for column in (TEXT, JSON, LABEL))
                entry = TarEntry(shard, key, offset, size)
                try:
                    captions, keywords = texts(text, record)
                except ValueError as error:
                    yield _Pair(entry, fault=str(error))
                else:
                    yield _Pair(entry, tuple(captions), tuple(keywords), _label_or_none(label))


def _member(file: BinaryIO, offset: int, size: int) -> bytes | None:
    if size < 0:
        return None
    file.seek(offset)
    return file.read(size)


def _label_or_none(text: bytes | None) -> int:
    try:
        return read_label(text)
    except ValueError:
        return NO_LABEL


def read_label(text: bytes | None) -> int:
    """A sample's class number; -1 if it has none.

    Raises:
        ValueError: if it is not an integer of 64 bits.
    """
    if text is None:
        return NO_LABEL
    try:
        return int(np.int64(int(text)))
    except (ValueError, OverflowError):
        raise ValueError(f"class number {text[:20]!r} is not an integer of 64 bits") from None
