"""Shards: where every sample lies inside its tar, and what its text, JSON and class number say.

Member offsets and lengths are found once and kept in an index beside the tar: ``00000.tar.index.npz`` for
``00000.tar``, in the cache folder where the tar's own folder cannot be written. It can be deleted at any time: it is
rebuilt from the tar, also where a bit of it is wrong (it holds hashes of itself), and whenever the tar's size or time
of change differs from what the index was made from. One index is read at a time and on demand, so memory does not grow
with the number of samples.
"""

import codecs
import contextlib
import errno
import functools
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

from focalclip.base.errors import MachineError, UserError, is_lack, memory_error, system_error
from focalclip.base.files import cache_dir, whole_file
from focalclip.data.images import SHARD_IMAGES
from focalclip.data.reader import NO_LABEL, PictureSet, TarEntry, is_data

IMAGE, TEXT, JSON, LABEL = range(4)  # columns of the member table

_COLUMNS = dict.fromkeys(SHARD_IMAGES, IMAGE) | {"txt": TEXT, "json": JSON, "cls": LABEL}

_NAMES = {
    "first_dot": re.compile(r"((?:.*/)?[^./]+)\.([^/]*)"),  # as in webdataset
    "last_dot": re.compile(r"((?:.*/)?[^./][^/]*)\.([^./]+)"),
}
"""Key and extension by ``data.key_rule``; hidden files have none."""

_META = re.compile(r"__[^/]*__($|/)")  # members that webdataset skips too

_DOTTED = "more than one dot in the name (data.key_rule=last_dot reads them)"

_MAX_REASONS = 20  # for which members are passed over, in one shard

_MAX_NAMED = 50  # bad shards that one message names

_VERSION = 3

_TABLES = ("members", "keys", "passed_over")  # of an index, in the order of their hashes

_BLOCK = 512  # bytes of a tar block (POSIX ustar)

_AGAIN = "copy, download or write it again"

_OCTAL = re.compile(rb" *([0-7]+)[ \0]*")  # a number in a tar header

_SECONDS_ALONE = 1.0  # most data are indexed by then, without the cost of other processes


class PassedOver(NamedTuple):
    """Files or members that are not read, for one reason."""

    count: int
    first: str
    """The name of the first."""


class UsableShards(NamedTuple):
    """Shards that can be trained on."""

    shards: list[Path]
    counts: np.ndarray
    """Samples per shard, int64 (len(shards),)."""
    bad: list[str]
    """Name and fault of each shard that was left out."""


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
        UserError: naming every shard that cannot be used, and why.
    """
    return usable_shards(shards, jobs=jobs).counts


def usable_shards(
    shards: Sequence[Path], key_rule: str = "first_dot", max_bad: int | None = None, jobs: int | None = None
) -> UsableShards:
    """Index shards as :func:`index_shards` does, and leave out those that cannot be used, up to a limit.

    Args:
        shards: Files.
        key_rule: See ``data.key_rule``.
        max_bad: See ``data.max_bad_shards``; None: nothing may be left out, and the setting is not spoken of.
        jobs: See :func:`index_shards`.

    Raises:
        UserError: naming every shard that cannot be used, if they are more than ``max_bad`` or all.
    """
    counts = np.array([_stored_count(shard, key_rule) for shard in shards], dtype=np.int64)
    todo = [i for i, count in enumerate(counts) if count < 0]
    faults: dict[int, str] = {}
    work = functools.partial(_try_index, key_rule=key_rule)
    bar = tqdm(total=len(todo), desc="indexing shards", unit="shard", disable=len(todo) < 2 or None, leave=False)
    with bar, contextlib.closing(_in_processes(work, {i: shards[i] for i in todo}, jobs)) as found:
        for i, result in found:
            bar.update()
            if isinstance(result, str):
                faults[i] = result
            else:
                counts[i] = result
    bad = [faults[i] for i in sorted(faults)]
    if len(bad) > (max_bad or 0) or (bad and len(bad) == len(shards)):
        hint = f"; or leave out up to {len(bad)} with data.max_bad_shards" if max_bad is not None else ""
        if len(bad) == 1:
            raise UserError(bad[0] + hint * (len(shards) > 1))
        named = " ".join(f"({number}) {fault}" for number, fault in enumerate(bad[:_MAX_NAMED], 1))
        more = f" and {len(bad) - _MAX_NAMED} more" if len(bad) > _MAX_NAMED else ""
        raise UserError(f"{len(bad)} of {len(shards)} shards cannot be used: {named}{more}{hint}")
    usable = [i for i, count in enumerate(counts) if count >= 0]
    return UsableShards([shards[i] for i in usable], counts[usable], bad)


def _try_index(shard: Path, key_rule: str) -> int | str:
    """Index a shard: the number of its samples, or what is wrong with it.

    Raises:
        MachineError: if the machine lacks something; the shard may be sound.
    """
    try:
        return len(_index(shard, key_rule)["members"])
    except MachineError:
        raise
    except MemoryError as error:
        raise memory_error(error) or error from None
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


def members_passed_over(shards: Iterable[Path], key_rule: str = "first_dot") -> dict[str, PassedOver]:
    """Members of indexed shards that belong to no sample, by the reason, the most frequent first."""
    found: dict[str, PassedOver] = {}
    for shard in shards:
        try:
            own = json.loads(_load(shard, "passed_over", key_rule).tobytes())
        except OSError:
            continue  # the shard has just changed: its samples will be counted as broken
        for reason, (count, first) in own.items():
            before = found.get(reason, PassedOver(0, f"{shard.name}: {first}"))
            found[reason] = PassedOver(before.count + count, before.first)
    return dict(sorted(found.items(), key=lambda item: -item[1].count))


def load_members(shard: Path, key_rule: str = "first_dot") -> np.ndarray:
    """The member table of an indexed shard.

    Returns:
        int64 (samples, 4, 2): offset and length in bytes of image, text, json and label; length -1 where absent.

    Raises:
        OSError: if the shard has gone or changed since :func:`index_shards` saw it.
        UserError: if its index is damaged and cannot be rebuilt.
    """
    return _load(shard, "members", key_rule)


def load_key(shard: Path, sample: int, key_rule: str = "first_dot") -> str:
    """The WebDataset key of one sample (slow: for messages)."""
    return load_keys(shard, key_rule)[sample]


def load_keys(shard: Path, key_rule: str = "first_dot") -> list[str]:
    """The WebDataset keys of all samples of an indexed shard; raises as :func:`load_members` does."""
    return _load(shard, "keys", key_rule).tobytes().decode(errors="replace").split("\0")


def scan_shard(
    shard: Path, key_rule: str = "first_dot", passed_over: dict[str, PassedOver] | None = None
) -> tuple[np.ndarray, list[str]]:
    """Group consecutive members of one key into samples, as webdataset does.

    Args:
        shard: A tar.
        key_rule: See ``data.key_rule``.
        passed_over: Takes members that belong to no sample, by the reason.

    Returns:
        The member table of :func:`load_members`, and the key of each sample.

    Raises:
        UserError: if the file is not a whole, uncompressed tar, holds two members of one kind under one key, or has no
            sample with an image and a caption.
    """
    rows: list[list[tuple[int, int]]] = []
    keys: list[str] = []
    passed_over = {} if passed_over is None else passed_over
    for key, extension, member in walk_tar(shard, key_rule, passed_over):
        column = _COLUMNS.get(extension)
        if column is None:
            last = extension.rpartition(".")[2]
            _pass_over(passed_over, _DOTTED if last in _COLUMNS else f"the extension .{last}", member.name)
            continue
        if not keys or key != keys[-1]:
            keys.append(key)
            rows.append([(-1, -1)] * 4)
        if rows[-1][column][1] >= 0:
            raise UserError(
                f"{shard}: the sample {key!r} has two members of one kind, the second being {member.name!r}; "
                f"give every sample its own key (a key ends at the {key_rule.replace('_', ' ')})"
            )
        rows[-1][column] = member.offset_data, member.size
    members = np.array(rows, dtype=np.int64).reshape(-1, 4, 2)
    _check_content(shard, members, passed_over.get(_DOTTED))
    return members, keys


def _pass_over(passed_over: dict[str, PassedOver], reason: str, name: str) -> None:
    if reason not in passed_over and len(passed_over) >= _MAX_REASONS:
        reason = "other extensions"
    count, first = passed_over.get(reason, (0, name))
    passed_over[reason] = PassedOver(count + 1, first)


def walk_tar(
    shard: Path, key_rule: str = "first_dot", passed_over: dict[str, PassedOver] | None = None
) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """Key, extension in lower case, and header of every file in a tar that has both, in order.

    Args:
        shard: A tar.
        key_rule: See ``data.key_rule``.
        passed_over: Takes the other members, by the reason; folders and webdataset's ``__meta__`` are none.

    Raises:
        UserError: if the file is not a whole, uncompressed tar, or has a member stored as a sparse file.
    """
    end = size = 0
    others = {} if passed_over is None else passed_over
    try:
        size = shard.stat().st_size
        with shard.open("rb") as file, tarfile.open(fileobj=file, mode="r:", tarinfo=_Header) as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # pyrefly: ignore[missing-attribute]  # tarfile would keep every member it has seen
                if member.size < 0 or not end < tar.offset <= size:
                    raise UserError(f"{shard}: cut short or damaged at byte {end} of {size}; {_AGAIN}")
                end = tar.offset
                match = _NAMES[key_rule].fullmatch(member.name)
                if member.isdir() or _META.match(member.name):
                    continue
                if not member.isreg():
                    _pass_over(others, "links and other members that are not files", member.name)
                elif match is None or not is_data(member.name):
                    _pass_over(others, "no extension, or a hidden file", member.name)
                elif member.issparse():
                    raise UserError(
                        f"{shard}: the member {member.name!r} is stored as a sparse file, of which the tar holds "
                        "pieces; write it again without --sparse (-S)"
                    )
                else:
                    yield match[1], match[2].lower(), member
            _check_end(shard, file, tar.offset)
    except UserError:
        raise
    except tarfile.TarError as error:
        raise UserError(f"{shard}: not a whole, uncompressed tar ({error}); {_AGAIN}") from None
    except OSError as error:
        raise _unreadable(shard, error) from None
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001 (damaged headers make tarfile raise errors of any kind)
        raise UserError(f"{shard}: damaged at byte {end} of {size}; {_AGAIN}") from None


def _unreadable(shard: Path, error: OSError) -> UserError:
    """What a failed read says: MachineError where the machine is at fault, whatever the shard holds."""
    if is_lack(error):
        return system_error(OSError(error.errno, error.strerror, str(shard)))
    return UserError(f"{shard}: cannot be read ({error.strerror}); check the file and its permissions")


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


def _check_content(shard: Path, members: np.ndarray, dotted: PassedOver | None) -> None:
    """Single samples may lack a part (they are replaced and counted); a whole shard that does is a mistake."""
    has = members[:, :, 1] >= 0
    image, caption = has[:, IMAGE], has[:, TEXT] | has[:, JSON]
    if (image & caption).any():
        return
    if dotted:
        raise UserError(
            f"{shard}: holds no pair, and {dotted.count} names of its members have more than one dot, such as "
            f"{dotted.first!r}; a key ends at the first dot unless data.key_rule=last_dot"
        )
    if not image.any():
        raise UserError(f"{shard}: holds no image (.jpg, .jpeg, .png or .webp); leave it out or write it again")
    if not caption.any():
        raise UserError(f"{shard}: holds no caption (.txt or .json); leave it out or write it again with captions")
    raise UserError(
        f"{shard}: no image stands next to a caption of the same key; write the members of one sample together"
    )


def _places(shard: Path, key_rule: str) -> list[Path]:
    """Where the index may lie: beside the tar, else in the cache folder."""
    name = f"{shard.name}.index.npz" if key_rule == "first_dot" else f"{shard.name}.{key_rule}.index.npz"
    digest = hashlib.sha256(str(shard.resolve()).encode()).hexdigest()[:16]
    return [shard.with_name(name), cache_dir() / "index" / digest / name]


def _stamp(shard: Path) -> list[int]:
    """What an index must agree with to be believed."""
    stat = shard.stat()
    return [_VERSION, stat.st_size, stat.st_mtime_ns]


def _load(shard: Path, name: str, key_rule: str) -> np.ndarray:
    """A table of a shard's index, which is rebuilt where it is damaged or lost."""
    table = _stored(shard, name, key_rule)
    return _index(shard, key_rule)[name] if table is None else table


def _stored(shard: Path, name: str, key_rule: str) -> np.ndarray | None:
    """A table of the shard's index, or its head; None where it is damaged or lost.

    Raises:
        OSError: if the shard has gone or changed since it was indexed.
    """
    stamp, has_changed = _stamp(shard), False
    for place in _places(shard, key_rule):
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
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and is_lack(error)):
            raise
        return None


def _hash(*arrays: np.ndarray) -> np.ndarray:
    """SHA-256 of types, shapes and values, uint8 (32,)."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype.str} {array.shape} ".encode())
        digest.update(array.tobytes())
    return np.frombuffer(digest.digest(), dtype=np.uint8)


def _stored_count(shard: Path, key_rule: str) -> int:
    """Samples according to a valid index; -1 without one."""
    try:
        head = _stored(shard, "head", key_rule)
    except OSError as error:
        if is_lack(error):
            raise system_error(error) from None
        return -1
    return -1 if head is None else int(head[-1])


def _index(shard: Path, key_rule: str) -> dict[str, np.ndarray]:
    """Scan a shard and write its index, whole or not at all, in the first place that can be written.

    Returns:
        The tables of the index.
    """
    try:
        stamp = _stamp(shard)
    except OSError as error:
        raise _unreadable(shard, error) from None
    passed_over: dict[str, PassedOver] = {}
    members, keys = scan_shard(shard, key_rule, passed_over)
    names = "\0".join(key.replace("\0", " ") for key in keys).encode(errors="replace")
    others = json.dumps(passed_over).encode()
    tables = {
        "members": members,
        "keys": np.frombuffer(names, np.uint8),
        "passed_over": np.frombuffer(others, np.uint8),
    }
    head, hashes = np.array([*stamp, len(members)], dtype=np.int64), np.stack([_hash(tables[name]) for name in _TABLES])
    content = io.BytesIO()
    np.savez(content, head=head, hashes=hashes, hash=_hash(head, hashes), **tables)
    reason = None
    for place in _places(shard, key_rule):
        try:
            with whole_file(place) as temporary:
                temporary.write_bytes(content.getvalue())
        except OSError as error:
            reason = error.strerror
        else:
            return tables
    raise MachineError(
        f"{shard}: its index can be written neither beside it nor in {place.parent} ({reason}); set FOCALCLIP_CACHE"
    )


# What samples say

CAPTION_KEYS = ("txt", "captions", "caption")
"""Where captions are read from by default: the text, then two keys of the JSON."""

ReadTexts = Callable[[bytes | None, bytes | None], Sequence[Any]]
"""From the text and the JSON of a sample to its captions, its keywords, and more that does not matter here."""


class Captions(NamedTuple):
    """All texts of a sample, each once."""

    captions: list[str]
    """One or more; each describes the picture alone."""
    keywords: list[str]
    """Too general to stand alone: they are only joined to the first caption."""
    ignored: tuple[str, ...] = ()
    """Parts that cannot be used although the sample can, and why."""


def read_captions(
    text: bytes | None, record: bytes | None, keys: Sequence[str] = CAPTION_KEYS, keywords: bool = True
) -> Captions:
    """The texts of a sample, in the order of ``keys``, and the ``keywords`` of its JSON.

    A part that cannot be read costs the sample only if no caption is left. Null, NaN and blank texts count as absent.

    Args:
        text: The sample's ``txt``: UTF-8, or UTF-16 with a byte order mark.
        record: Its ``json``: UTF-8, UTF-16 or UTF-32. Only an object has captions: one text or a list of texts each.
        keys: ``txt`` for the text itself, and keys of the JSON.
        keywords: Whether to read keywords.

    Raises:
        ValueError: if there is no caption; says what was there instead.
    """
    values, unreadable = _read_record(record)
    ignored = [unreadable] if unreadable else []
    captions: list[str] = []
    for key in keys:
        if key == "txt":
            try:
                captions += [] if text is None else [_decode(text)]
            except UnicodeDecodeError:
                ignored.append("caption is not UTF-8")
        else:
            captions += _texts(key, values.get(key), ignored)
    words = _texts("keywords", values.get("keywords"), ignored) if keywords else []
    captions = _each_once(captions)
    if not captions:
        raise ValueError("; ".join(ignored) or "no caption")
    if sound := [caption for caption in captions if _is_unicode(caption)]:  # else let the tokenizer decide
        ignored += ["a caption holds a lone surrogate"] if len(sound) < len(captions) else []
        captions = sound
    others = [word for word in _each_once(words) if word not in captions and _is_unicode(word)]
    return Captions(captions, others, tuple(ignored))


def _read_record(record: bytes | None) -> tuple[dict[str, Any], str]:
    """The object that a JSON member holds, empty where it holds none; and what is wrong with it, if anything."""
    try:
        values = json.loads(record) if record is not None else {}
    except UnicodeDecodeError:
        return {}, "its JSON is not UTF-8"
    except RecursionError:
        return {}, "its JSON is nested too deeply"
    except ValueError:
        return {}, "unreadable JSON"
    return (values if isinstance(values, dict) else {}), ""  # JSON of another kind is other metadata


def _decode(text: bytes) -> str:
    has_utf16_mark = text.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return text.decode("utf-16" if has_utf16_mark else "utf-8-sig")


def _texts(name: str, value: Any, ignored: list[str]) -> list[str]:
    """The texts in a value of JSON; if it holds anything else, that is added to ``ignored``."""
    values = [item for item in (value if isinstance(value, list) else [value]) if not _is_absent(item)]
    texts = [item for item in values if isinstance(item, str)]
    if len(texts) < len(values):
        ignored.append(f"{name} in its JSON are not text")
    return texts


def _is_absent(value: Any) -> bool:
    return value is None or value != value  # NaN, as tables write an empty cell


def _is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8: JSON may hold one half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


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
    names = tuple(sample.class_names for sample in samples)
    return PictureSet(
        place,
        tuple(sample.entry for sample in samples),
        captions=tuple(sample.captions for sample in samples),
        keywords=tuple(sample.keywords for sample in samples),
        faults={i: sample.fault for i, sample in enumerate(samples) if sample.fault},
        labels=labels if (labels != NO_LABEL).any() else None,
        own_class_names=names if any(names) else None,
    )


class _Pair(NamedTuple):
    entry: TarEntry
    captions: tuple[str, ...] = ()
    keywords: tuple[str, ...] = ()
    label: int = NO_LABEL
    fault: str = ""
    class_names: tuple[str, ...] = ()


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
                    captions, keywords = texts(text, record)[:2]
                except ValueError as error:
                    yield _Pair(entry, fault=str(error))
                else:
                    yield _Pair(
                        entry,
                        tuple(captions),
                        tuple(keywords),
                        _label_or_none(label),
                        class_names=class_names_of(record),
                    )


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


def class_names_of(record: bytes | None) -> tuple[str, ...]:
    """``class_names`` of a sample's JSON: one text or a list of texts; empty where there is none."""
    try:
        values = json.loads(record) if record is not None else {}
    except (ValueError, RecursionError):
        return ()
    names = values.get("class_names") if isinstance(values, dict) else None
    return tuple(name for name in (names if isinstance(names, list) else [names]) if isinstance(name, str) and name)


def read_label(text: bytes | None) -> int:
    """A sample's class number; -1 if it has none.

    Raises:
        ValueError: if it is not an integer of 64 bits.
    """
    if text is None:
        return NO_LABEL
    try:
        return int(np.int64(int(_decode(text).replace("_", " "))))  # int() would read 2_3 as 23
    except (ValueError, OverflowError):
        raise ValueError("cls is not an integer of 64 bits") from None
