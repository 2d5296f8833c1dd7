"""Shards: where every sample lies inside its tar, and what its text, JSON and class number say.

Member offsets and lengths are found once and kept in an index beside the tar: ``00000.tar.index.npz`` for
``00000.tar``, in the cache folder where the tar's own folder cannot be written. It can be deleted at any time: it is
rebuilt from the tar, also where a bit of it is wrong (it holds hashes of itself), and whenever the tar's size or time
of change differs from what the index was made from. One index is read at a time and on demand, so memory does not grow
with the number of samples.
"""

import contextlib
import errno
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import re
import signal
import sys
import tarfile
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np
from tqdm import tqdm

from focalclip.base.errors import UserError
from focalclip.base.files import cache_dir, whole_file
from focalclip.data.images import SHARD_IMAGES
from focalclip.data.reader import NO_LABEL, PictureSet, TarEntry

IMAGE, TEXT, JSON, LABEL = range(4)  # columns of the member table

_COLUMNS = dict.fromkeys(SHARD_IMAGES, IMAGE) | {"txt": TEXT, "json": JSON, "cls": LABEL}

# The key ends at the first dot of the file's own name, as in webdataset.
_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)")

_META = re.compile(r"__[^/]*__($|/)")  # members that webdataset skips too

_VERSION = 3

_TABLES = ("members", "keys")  # of an index, in the order of their hashes

_BLOCK = 512  # bytes of a tar block (POSIX ustar)

_AGAIN = "copy, download or write it again"

_OCTAL = re.compile(rb" *([0-7]+)[ \0]*")  # a number in a tar header

_SECONDS_ALONE = 1.0  # most data are indexed by then, without the cost of other processes


def index_shards(shards: Sequence[Path], jobs: int | None = None) -> np.ndarray:
    """Make sure that every shard has an up-to-date index.

    Several processes may do this at once; each writes under its own temporary name and renames.

    Args:
        shards: Files.
        jobs: Processes that share the work; the result does not depend on it. None: one per usable core where it
            takes longer than a second.

    Returns:
        Samples per shard, int64 (len(shards),).

    Raises:
        UserError: naming the first shard that cannot be used, and why.
    """
    counts = np.array([_stored_count(shard) for shard in shards], dtype=np.int64)
    todo = [i for i, count in enumerate(counts) if count < 0]
    faults: dict[int, str] = {}
    bar = tqdm(total=len(todo), desc="indexing shards", unit="shard", disable=len(todo) < 2 or None, leave=False)
    with bar, contextlib.closing(_in_processes(_try_index, {i: shards[i] for i in todo}, jobs)) as found:
        for i, result in found:
            bar.update()
            if isinstance(result, str):
                faults[i] = result
            else:
                counts[i] = result
    if faults:
        raise UserError(faults[min(faults)])
    return counts


def _try_index(shard: Path) -> int | str:
    """Index a shard: the number of its samples, or what is wrong with it."""
    try:
        return len(_index(shard)["members"])
    except UserError as error:
        return str(error)


Work = Callable[[Path], int | str]


def _in_processes(work: Work, shards: dict[int, Path], jobs: int | None) -> Generator[tuple[int, int | str]]:
    """The result of ``work`` for each shard, in any order; see :func:`index_shards` for ``jobs``.

    What a process leaves undone that ends early, for want of memory for instance, is done by this one.
    """
    waiting, end = dict(shards), time.monotonic() + _SECONDS_ALONE
    can_fork = sys.platform == "linux" and not multiprocessing.current_process().daemon
    while waiting and jobs is None and time.monotonic() < end:
        number = next(iter(waiting))
        yield number, work(waiting.pop(number))
    jobs = min(jobs or len(os.sched_getaffinity(0)), len(waiting)) if can_fork else 1
    processes: list[multiprocessing.process.BaseProcess] = []
    connections: list[Connection] = []
    if jobs > 1:
        tqdm.write(f"Indexing {len(waiting):,} shards in {jobs} processes (once)", file=sys.stderr)
    try:
        for job in range(jobs if jobs > 1 else 0):
            with contextlib.suppress(OSError):  # no more processes are allowed
                process, connection = _start(work, list(waiting.items())[job::jobs], connections)
                processes.append(process)
                connections.append(connection)
        while connections:
            for ready in cast(list[Connection], wait(connections)):
                try:
                    number, result = ready.recv()
                except EOFError:
                    connections.remove(ready)
                else:
                    del waiting[number]
                    yield number, result
    finally:
        for connection in connections:
            connection.close()
        for process in processes:
            process.join()
    for number, shard in waiting.items():
        yield number, work(shard)


def _start(
    work: Work, part: list[tuple[int, Path]], others: list[Connection]
) -> tuple[multiprocessing.process.BaseProcess, Connection]:
    """Fork a process for a part of the shards; a script without the guard of ``__main__`` could not be started anew.

    Returns:
        The process, and where its results are received.
    """
    ours, theirs = multiprocessing.Pipe(duplex=False)
    fork = multiprocessing.get_context("fork")
    with theirs:
        process = fork.Process(target=_do_part, args=(work, part, theirs, [*others, ours]), daemon=True)
        process.start()
    return process, ours


def _do_part(work: Work, part: list[tuple[int, Path]], connection: Connection, inherited: list[Connection]) -> None:
    """The body of a process: its part of the shards, until it is done or nobody listens."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the main one ends the others
    for other in inherited:
        other.close()
    with contextlib.suppress(Exception):  # the main process meets an error again
        for number, shard in part:
            connection.send((number, work(shard)))


def load_members(shard: Path) -> np.ndarray:
    """The member table of an indexed shard.

    Returns:
        int64 (samples, 4, 2): offset and length in bytes of image, text, json and label; length -1 where absent.

    Raises:
        OSError: if the shard has gone or changed since :func:`index_shards` saw it.
        UserError: if its index is damaged and cannot be rebuilt.
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
    rows: list[list[tuple[int, int]]] = []
    keys: list[str] = []
    for key, extension, member in walk_tar(shard):
        column = _COLUMNS.get(extension)
        if column is None:
            continue
        if not keys or key != keys[-1]:
            keys.append(key)
            rows.append([(-1, -1)] * 4)
        if rows[-1][column][1] >= 0:
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
    end = size = 0
    try:
        size = shard.stat().st_size
        with shard.open("rb") as file, tarfile.open(fileobj=file, mode="r:", tarinfo=_Header) as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # pyrefly: ignore[missing-attribute]  # tarfile would keep every member it has seen
                if member.size < 0 or not end < tar.offset <= size:
                    raise UserError(f"{shard}: cut short or damaged at byte {end} of {size}; {_AGAIN}")
                end = tar.offset
                match = _NAME.fullmatch(member.name)
                if match is not None and member.isreg() and not _META.match(member.name):
                    yield match[1], match[2].lower(), member
            _check_end(shard, file, tar.offset)
    except UserError:
        raise
    except tarfile.TarError as error:
        raise UserError(f"{shard}: not a whole, uncompressed tar ({error}); {_AGAIN}") from None
    except OSError as error:
        remedy = (
            "raise the limit of open files (ulimit -n)"
            if is_open_files_limit(error)
            else "check the file and its permissions"
        )
        raise UserError(f"{shard}: cannot be read ({error.strerror}); {remedy}") from None
    except Exception:  # noqa: BLE001 (damaged headers make tarfile raise errors of any kind)
        raise UserError(f"{shard}: damaged at byte {end} of {size}; {_AGAIN}") from None


def is_open_files_limit(error: OSError) -> bool:
    """Whether a limit of the system on open files is at fault, rather than the file."""
    return error.errno in (errno.EMFILE, errno.ENFILE)


class _Header(tarfile.TarInfo):
    """A tar header; of a plain file only name and size are parsed, which is most of the cost of an index."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_Header":
        """See :class:`tarfile.TarInfo`; a size that no file has is an error, which would keep tarfile busy for ever."""
        name, prefix, kind = buf[:100].rstrip(b"\0"), buf[345:500].rstrip(b"\0"), buf[156:157]
        size, checksum = _OCTAL.fullmatch(buf, 124, 136), _OCTAL.fullmatch(buf, 148, 156)
        is_plain = kind in (tarfile.REGTYPE, tarfile.AREGTYPE) and size and checksum and len(buf) == _BLOCK
        if is_plain and b"\0" not in name + prefix and not name.endswith(b"/"):
            found = int(checksum[1], 8)
            if found == sum(buf) - sum(buf[148:156]) + 8 * ord(" "):
                header = cls((prefix + b"/" + name if prefix else name).decode(encoding, errors))
                header.size, header.type, header.chksum = int(size[1], 8), bytes(kind), found
                return header
        header = super().frombuf(buf, encoding, errors)
        if not 0 <= header.size < 2**63:
            raise tarfile.ReadError(f"a member of {header.size} bytes")
        return header


def _check_end(shard: Path, file: BinaryIO, end: int) -> None:
    """Check that zero blocks end the tar: tarfile stops without an error at a header that is cut short or damaged."""
    file.seek(end)
    first = file.read(_BLOCK)
    if len(first) < _BLOCK or any(first):
        raise UserError(f"{shard}: cut short or damaged at byte {end} of {shard.stat().st_size}; {_AGAIN}")
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
    """A table of a shard's index, which is rebuilt where it is damaged or lost."""
    table = _stored(shard, name)
    return _index(shard)[name] if table is None else table


def _stored(shard: Path, name: str) -> np.ndarray | None:
    """A table of the shard's index, or its head; None where it is damaged or lost.

    Raises:
        OSError: if the shard has gone or changed since it was indexed.
    """
    stamp, has_changed = _stamp(shard), False
    for place in _places(shard):
        found = _read(place, name)
        if found is not None and found[0][:-1] == stamp:
            return found[1]
        has_changed |= found is not None
    if has_changed:
        raise FileNotFoundError(errno.ENOENT, "it changed since it was indexed", str(shard))
    return None


def _read(place: Path, name: str) -> tuple[list[int], np.ndarray] | None:
    """The head of an index file and one of its tables (or the head again); None where it is damaged or absent."""
    try:
        with np.load(place) as index:
            head, hashes = index["head"], index["hashes"]
            if not np.array_equal(_hash(head, hashes), index["hash"]):
                return None
            table = head if name == "head" else index[name]
            is_whole = name == "head" or np.array_equal(_hash(table), hashes[_TABLES.index(name)])
            return (head.tolist(), table) if is_whole else None
    except Exception as error:  # (damaged files make zipfile and numpy raise errors of any kind)
        if isinstance(error, OSError) and is_open_files_limit(error):
            raise
        return None


def _hash(*arrays: np.ndarray) -> np.ndarray:
    """SHA-256 of types, shapes and values, uint8 (32,)."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype.str} {array.shape} ".encode())
        digest.update(array.tobytes())
    return np.frombuffer(digest.digest(), dtype=np.uint8)


def _stored_count(shard: Path) -> int:
    """Samples according to a valid index; -1 without one."""
    try:
        head = _stored(shard, "head")
    except OSError:
        return -1
    return -1 if head is None else int(head[-1])


def _index(shard: Path) -> dict[str, np.ndarray]:
    """Scan a shard and write its index, whole or not at all, in the first place that can be written.

    Returns:
        The tables of the index.
    """
    try:
        stamp = _stamp(shard)
    except OSError as error:
        raise UserError(f"{shard}: cannot be read ({error.strerror}); check the file and its permissions") from None
    members, keys = scan_shard(shard)
    names = "\0".join(key.replace("\0", " ") for key in keys).encode(errors="replace")
    tables = {"members": members, "keys": np.frombuffer(names, dtype=np.uint8)}
    head, hashes = np.array([*stamp, len(members)], dtype=np.int64), np.stack([_hash(tables[name]) for name in _TABLES])
    content = io.BytesIO()
    np.savez(content, head=head, hashes=hashes, hash=_hash(head, hashes), **tables)
    reason = None
    for place in _places(shard):
        try:
            with whole_file(place) as temporary:
                temporary.write_bytes(content.getvalue())
        except OSError as error:
            reason = error.strerror
        else:
            return tables
    raise UserError(
        f"{shard}: its index can be written neither beside it nor in {place.parent} ({reason}); set FOCALCLIP_CACHE"
    )


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
