"""Write standard WebDataset shards and evaluation task folders, byte for byte the same for the same samples.

:func:`write_pictures` writes a whole source in many processes. A shard holds what the rules leave of a fixed stretch of
the source, so that its bytes depend on nothing else: neither on the number of processes, nor on an earlier attempt that
was killed. What is finished is recorded in ``.make-shards`` beside the shards.
"""

import contextlib
import errno
import hashlib
import importlib
import itertools
import json
import logging
import multiprocessing
import os
import signal
import sys
import tarfile
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, cast

import numpy as np
from tqdm import tqdm

from focalclip.base.errors import MachineError, UserError, first_line, is_lack
from focalclip.base.files import locked, user_path, whole_file, write_json, write_text
from focalclip.base.terminal import some
from focalclip.data.index import index_shards
from focalclip.data.reader import NO_LABEL, Entry, PictureSet
from focalclip.data.rules import COPY, FAULTS, NO_TEXT, UNREADABLE, Refused, Rules, earlier_copies
from focalclip.data.shards import LEFT_OUT

SHARDS_PER_TASK = 4  # clip_benchmark's loader has 4 workers by default and fails with fewer shards than workers


def write_shards(
    samples: Iterable[Mapping[str, Any]], folder: str | Path, samples_per_shard: int = 1024, name: str = "{:05d}.tar"
) -> int:
    """Write ``folder/00000.tar``, ``00001.tar`` ...

    Args:
        samples: Each maps member extensions (``png``, ``txt``, ``json``, ``cls`` ...) to bytes, or to what becomes
            bytes: text, an integer, or anything that JSON can say. ``__key__`` names the sample; without it the
            running number does.
        folder: Created if needed; a shard appears in it under its name only when it is complete.
        samples_per_shard: The last shard may hold fewer.
        name: Format of the shard names.

    Returns:
        The number of shards.

    Raises:
        UserError: if there are no samples.
    """
    folder = user_path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    numbered = enumerate(samples)
    num_shards = 0
    while shard := list(itertools.islice(numbered, samples_per_shard)):
        path = folder / name.format(num_shards)
        with whole_file(path) as temporary, temporary.open("wb") as file:
            for number, sample in shard:
                members = {kind: _to_bytes(value) for kind, value in sample.items() if kind != "__key__"}
                _add(file, sample.get("__key__", f"{number:08d}"), members)
            _end(file)
        num_shards += 1
    if not num_shards:
        raise UserError(f"{folder}: no samples to write")
    return num_shards


def write_task(
    folder: str | Path,
    classnames: Sequence[str],
    templates: Sequence[str],
    samples: Sequence[tuple[bytes, int]],
    split: str = "test",
) -> None:
    """Write a classification task in the wds layout of CLIP_benchmark.

    Args:
        folder: The task's folder.
        classnames: Line ``i`` of ``classnames.txt`` names label ``i``.
        templates: Prompts with ``{c}`` where the class name goes.
        samples: PNG bytes and label of each picture.
        split: Subfolder of the shards.

    Raises:
        UserError: if there are no samples, a label has no name, or a template has no ``{c}``.
    """
    folder = user_path(folder)
    if bad := [label for _, label in samples if not 0 <= label < len(classnames)]:
        raise UserError(f"{folder}: label {bad[0]} has no line among the {len(classnames)} class names")
    if wrong := [template for template in templates if "{c}" not in template]:
        raise UserError(f"{folder}: template {wrong[0]!r} has no {{c}}, the place of the class name")
    pictures = ({"__key__": f"s{i:07d}", "png": png, "cls": label} for i, (png, label) in enumerate(samples))
    per_shard = max(1, -(-len(samples) // SHARDS_PER_TASK))
    num_shards = write_shards(pictures, folder / split, per_shard, name="{}.tar")
    (folder / split / "nshards.txt").write_text(f"{num_shards}\n")
    (folder / "classnames.txt").write_text("".join(f"{name}\n" for name in classnames))
    (folder / "zeroshot_classification_templates.txt").write_text("".join(f"{template}\n" for template in templates))


def captions_of(pictures: PictureSet) -> Sequence[Sequence[str]]:
    """All captions of each picture, or the prompts of its classes; empty where it has none.

    Raises:
        UserError: if the source has neither captions nor named classes.
    """
    if pictures.captions is not None:
        return pictures.captions
    labels, names = pictures.labels, pictures.class_names
    if labels is None or names is None:
        raise UserError(f"{pictures.place}: has neither captions nor named classes; add captions")
    prompts = [[template.replace("{c}", name) for template in pictures.templates or ("{c}",)] for name in names]
    classes = map(np.flatnonzero, labels) if labels.ndim == 2 else ([label] if label >= 0 else [] for label in labels)
    return [[prompt for label in own for prompt in prompts[label]] for own in classes]


# Whole sources

STATE = ".make-shards"
"""Folder beside the shards: what they are made of, and what of it is finished."""

_VERSION = 1  # raise it when the shards written for one and the same source could change

_REPORTED = 32  # pictures between two messages of a process about its progress

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # some network file systems have none


@dataclass(frozen=True)
class Output:
    """How a source is written. Only ``samples_per_shard`` decides what is in a shard."""

    samples_per_shard: int = 1024
    """Pictures of the source that one shard is made of; it holds fewer where some of them are left out."""
    jobs: int | None = None
    """Processes; None: one per usable core."""
    part: tuple[int, int] = (1, 1)
    """Write part i of n, counted from 1: a stretch of the shards. Copies are then looked for within the part alone."""
    engine: Literal["local", "ray"] = "local"
    """``ray``: the processes of a Ray cluster, which see the same files."""
    max_faults: int = 1000
    """Stop once more pictures than this are damaged or cannot be read."""
    limit: str = "--max-faults"
    """What the user calls that limit."""


@dataclass
class Written:
    """What was written of a source, and what was not."""

    samples: int = 0
    shards: int = 0
    left_out: dict[str, list[str]] = field(default_factory=dict)
    """By the reason: names of pictures, some with a detail in brackets."""
    dropped_captions: int = 0
    """Captions of other lengths than the rules ask for, of pictures that have others."""
    sides: Counter[int] = field(default_factory=Counter)
    """Pictures by their shorter side in pixels."""
    words: Counter[int] = field(default_factory=Counter)
    """Captions by their number of words."""
    classes: Counter[str] = field(default_factory=Counter)
    """Pictures by the names of their classes."""
    resumed: int = 0
    """Shards that an earlier attempt had finished."""
    faults: list[str] = field(default_factory=list)
    """Pictures that are damaged or cannot be read."""
    blank_captions: int = 0
    rows: list[str] = field(default_factory=list)
    """What belongs to no picture."""

    def add(self, record: Mapping[str, Any]) -> None:
        """Add the record of one stretch of the source."""
        self.samples += record["samples"]
        self.shards += record["samples"] > 0
        self.dropped_captions += record["dropped_captions"]
        for reason, name in record["left_out"]:
            self.left_out.setdefault(reason, []).append(name)
            if reason in FAULTS:
                self.faults.append(name)
        for side, count in record["sides"].items():
            self.sides[int(side)] += count
        for number, count in record["words"].items():
            self.words[int(number)] += count
        self.classes.update(record["classes"])

    @property
    def remarks(self) -> list[str]:
        """What was left out, in one line for each reason, the most frequent first."""
        ordered = sorted(self.left_out.items(), key=lambda item: -len(item[1]))
        lines = [f"{_many(len(names), 'picture')}: {reason}, the first being {names[0]}" for reason, names in ordered]
        rows = f"{_many(len(self.rows), 'row')}: of no picture, the first being {self.rows[0]}" if self.rows else ""
        others = {"of other lengths": self.dropped_captions, "without a word": self.blank_captions}
        captions = [f"{_many(count, 'caption')} {which}" for which, count in others.items() if count]
        return [*lines, *filter(None, [rows]), *captions]


def _many(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (count != 1)}"


class _Block(NamedTuple):
    """A stretch of a source that becomes one shard; all that a process anywhere needs to write it."""

    path: Path
    """The shard."""
    first: int
    """Running number of its first picture among all that have a text."""
    entries: list[Entry]
    samples: list[dict[str, Any]]
    """Members besides the picture."""
    copies: dict[int, str]
    """Pictures, counted in the block, that look like an earlier one, whose name is given."""
    dropped_captions: int
    """Captions of other lengths than wanted."""
    rules: Rules


def write_pictures(
    pictures: PictureSet,
    folder: str | Path,
    chosen: Sequence[int] | None = None,
    rules: Rules | None = None,
    output: Output | None = None,
) -> Written:
    """Write pictures of a source as training shards, in their order; see :class:`Rules` for what is changed.

    Captions are the source's own (``txt`` holds the first, ``json`` all, and keywords where there are any). A source
    that has classes and no captions gets every prompt of a picture's classes, or the bare name where it has no prompts.
    Pictures of one class carry the same ``cls``; so do pictures with the same set of several labels; the JSON names the
    classes (``class_names``). Keys are the running numbers of the pictures that have a text. A format that shards do
    not hold becomes PNG. ``left-out.txt`` lists what is not written, and each shard has its index.

    A call that is repeated after its process was killed goes on behind the shards that are finished.

    Args:
        pictures: What :func:`focalclip.data.sources.open_source` returned.
        folder: Where the shards go.
        chosen: Which of the pictures, by number; None for all.
        rules: Filters and changes; None: none.
        output: Shards, processes and limits; None: the defaults.

    Returns:
        What this part wrote, or earlier attempts at it.

    Raises:
        UserError: if ``folder`` holds shards of something else, too many pictures are damaged, or none is left.
        OSError: if ``folder`` cannot be written.
    """
    source = _Source(pictures, chosen, rules or Rules(), output or Output())
    folder = user_path(folder).absolute()
    _claim(folder, source.identity())
    part, parts = source.output.part
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(folder / STATE / f"{part}-of-{parts}.lock"))
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        names = {source.name(block) for block in source.blocks()}
        stack.callback(_remove_halves, folder, names)  # what killed processes leave, of this attempt and the last
        _remove_halves(folder, names)
        resumed = _write_missing(source, folder)
        write_json(folder / STATE / "rest.json", source.rest())
        everything = read_summary(folder)[1]
        write_text(folder / LEFT_OUT, _left_out_text(everything))
    written = everything if parts == 1 else _summary(source, folder)
    written.resumed = resumed
    if not written.samples and parts == 1:
        first = next(iter(written.left_out.values()))[0]
        raise UserError(
            f"{pictures.place}: every picture is left out, the first being {first}; see {folder / LEFT_OUT}"
        )
    return written


def _write_missing(source: "_Source", folder: Path) -> int:
    """Write the shards of a part that are not there yet; returns how many are."""
    done = _finished(source, folder, source.blocks())
    missing = [block for block in source.blocks() if block not in done]
    copies = _copies(source, folder) if missing and source.rules.duplicates is not None else {}
    faults = Written()
    for record in done.values():
        faults.add(record)
    work = _Work(_write_block, lambda block: source.block(block, folder, copies), missing)
    with _progress("writing shards", source, missing) as bar, contextlib.closing(_run(work, source, bar)) as records:
        for record in records:
            faults.add(record)
            _check_faults(source, faults.faults)
    return len(done)


def _check_faults(source: "_Source", faults: Sequence[str]) -> None:
    if len(faults) > (limit := source.output.max_faults):
        raise UserError(
            f"{source.pictures.place}: {len(faults):,} pictures are damaged or cannot be read, more than the limit "
            f"of {limit:,} ({source.output.limit}): {some(faults, len(source.numbers))}; "
            "repair the source, or raise the limit"
        )


class _Source:
    """The pictures of a source that have a text, cut into the stretches that become shards."""

    def __init__(self, pictures: PictureSet, chosen: Sequence[int] | None, rules: Rules, output: Output) -> None:
        self.pictures, self.rules, self.output = pictures, rules, output
        self.captions = captions_of(pictures)
        self.chosen = range(len(self.captions)) if chosen is None else chosen
        self.numbers = np.array([i for i in self.chosen if self._fitting(self.captions[i])], dtype=np.int64)
        if not len(self.numbers):
            rule = f" of {rules.caption_rule}" if rules.caption_rule and pictures.captions is not None else ""
            raise UserError(
                f"{pictures.place}: no picture with a caption{rule} or a label, so there is nothing to write"
            )
        labels = pictures.labels
        if labels is not None and labels.ndim == 2:  # one number for each set of labels
            sets = np.unique(labels, axis=0, return_inverse=True)[1].ravel()
            labels = np.where(labels.any(axis=1), sets, NO_LABEL)
        self.labels = labels
        part, parts = output.part
        if not 1 <= part <= parts:
            raise UserError(f"--part {part}/{parts}: give 1/{parts} to {parts}/{parts}")
        self.total = -(-len(self.numbers) // output.samples_per_shard)

    def _fitting(self, captions: Sequence[str]) -> Sequence[str]:
        return captions if self.pictures.captions is None else self.rules.kept_captions(captions)

    def rest(self) -> dict[str, Any]:
        """What no stretch holds: pictures without a text, by reason and name; rows of no picture; blank captions."""
        found, written = [], set(self.numbers.tolist())
        for i in self.chosen:
            if i not in written:
                reason = f"no caption of {self.rules.caption_rule}" if self.captions[i] else NO_TEXT
                fault = self.pictures.faults.get(i)
                found.append((reason, self.pictures.entries[i].name + (f" ({fault})" if fault else "")))
        blank = sum(self.pictures.blank.values())
        return {"left_out": found, "rows": list(self.pictures.left_out), "blank_captions": blank}

    def blocks(self, everything: bool = False) -> range:
        """Numbers of the stretches that this part writes, or of all."""
        part, parts = (1, 1) if everything else self.output.part
        return range(self.total * (part - 1) // parts, self.total * part // parts)

    def name(self, block: int) -> str:
        """Name of the shard of a stretch: sorted by name they are in order."""
        return f"{block:0{max(5, len(str(self.total - 1)))}d}.tar"

    def size(self, block: int) -> int:
        """Pictures of a stretch."""
        return min(self.output.samples_per_shard, len(self.numbers) - block * self.output.samples_per_shard)

    def block(self, block: int, folder: Path, copies: Mapping[int, str]) -> _Block:
        """A stretch with all that belongs to it."""
        first = block * self.output.samples_per_shard
        numbers = self.numbers[first : first + self.size(block)].tolist()
        pictures = self.pictures
        entries = [pictures.entries[i] for i in numbers]
        captions = [self._fitting(self.captions[i]) for i in numbers]
        samples = [self._members(i, own) for i, own in zip(numbers, captions, strict=True)]
        own_copies = {at: copies[first + at] for at in range(len(numbers)) if first + at in copies}
        dropped = sum(len(self.captions[i]) - len(own) for i, own in zip(numbers, captions, strict=True))
        return _Block(folder / self.name(block), first, entries, samples, own_copies, dropped, self.rules)

    def _class_names(self, i: int) -> list[str]:
        labels, names = self.pictures.labels, self.pictures.class_names
        if self.pictures.own_class_names is not None:
            return list(self.pictures.own_class_names[i])
        if labels is None or names is None:
            return []
        own = np.flatnonzero(labels[i]) if labels.ndim == 2 else [labels[i]] if labels[i] >= 0 else []
        return [names[int(label)] for label in own]

    def _members(self, i: int, captions: Sequence[str]) -> dict[str, Any]:
        pictures = self.pictures
        record: dict[str, Any] = {"captions": list(captions)}
        if pictures.keywords is not None and pictures.keywords[i]:
            record["keywords"] = list(pictures.keywords[i])
        if names := self._class_names(i):
            record["class_names"] = names
        members: dict[str, Any] = {"json": record}
        if pictures.captions is not None:
            members["txt"] = captions[0]
        if self.labels is not None and self.labels[i] >= 0:
            members["cls"] = int(self.labels[i])
        return members

    def identity(self) -> dict[str, Any]:
        """All that decides the bytes of the shards; JSON-ready."""
        rules = {name: value for name, value in asdict(self.rules).items() if value != getattr(Rules(), name)}
        if self.rules.resize is not None:
            rules["quality"] = self.rules.quality
        if self.rules.duplicates is not None and self.output.part[1] > 1:
            rules["parts"] = self.output.part[1]
        if not isinstance(self.chosen, range):
            rules["pictures"] = len(self.chosen)
        return {
            "version": _VERSION,
            "source": str(self.pictures.place.absolute()),
            "content": source_digest(self.pictures, self.chosen),
            "rules": rules | {"samples_per_shard": self.output.samples_per_shard},
        }


def source_digest(pictures: PictureSet, chosen: Sequence[int] | None = None) -> str:
    """SHA-256, shortened, of what was read of a source, and of size and time of change of the files of its pictures."""
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        digest.update(json.dumps(value).encode() + b"\n")

    add([_VERSION, str(pictures.place.resolve()), pictures.class_names, pictures.templates])
    seen: set[Path] = set()
    for i, entry in enumerate(pictures.entries):
        captions, keywords, names = pictures.captions, pictures.keywords, pictures.own_class_names
        add([entry.key, captions and captions[i], keywords and keywords[i], names and names[i]])
        if (file := entry.file) is not None and file not in seen:
            seen.add(file)
            add(_stamp(file))
    if pictures.labels is not None:
        digest.update(pictures.labels.tobytes())
    if chosen is not None and len(chosen) != len(pictures.entries):
        digest.update(np.array(chosen, dtype=np.int64).tobytes())
    return digest.hexdigest()[:32]


def _stamp(file: Path) -> list[int]:
    """Size and time of change; of a picture that has gone nothing: it is counted when it is read."""
    try:
        stat = file.stat()
    except OSError:
        return []
    return [stat.st_size, stat.st_mtime_ns]


def _claim(folder: Path, identity: dict[str, Any]) -> None:
    """Record what the folder is for, or check that it is for the same.

    Raises:
        UserError: if the folder holds shards of something else.
    """
    place = folder / STATE / "source.json"
    try:
        before = json.loads(place.read_bytes())
    except FileNotFoundError:
        if any(folder.glob("*.tar")) and not place.is_file():  # else another part has just begun
            raise UserError(f"{folder}: holds shards already; name another folder, or remove them") from None
        write_json(place, identity)
        return
    except ValueError:
        raise UserError(f"{place}: cannot be read; name another folder, or remove {folder}") from None
    if before == identity:
        return
    old, new = before.get("rules", {}), identity["rules"]
    changed = [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
    if before.get("source") != identity["source"]:
        what = f"of {before.get('source')}"
    elif changed:
        rules = [
            f"{name.replace('_', '-')} {old.get(name, 'not given')}, not {new.get(name, 'left away')}"
            for name in changed
        ]
        what = f"by other rules ({'; '.join(rules)})"
    else:
        what = f"of {identity['source']} before it changed, or with other options"
    raise UserError(f"{folder}: holds shards already, {what}; name another folder, or remove it")


def _remove_halves(folder: Path, names: set[str]) -> None:
    """Remove what killed processes left of shards with these names and of their records."""
    for place in (folder, folder / STATE):
        for half in place.glob(".*.tmp"):
            if half.name[1:].partition(".tar")[0] + ".tar" in names:
                half.unlink(missing_ok=True)


def _finished(source: _Source, folder: Path, blocks: Iterable[int]) -> dict[int, dict[str, Any]]:
    """Records of the stretches that are written."""
    found = {}
    for block in blocks:
        shard = folder / source.name(block)
        with contextlib.suppress(OSError, ValueError, KeyError):
            record = json.loads(_record_of(shard).read_bytes())
            if not record["samples"] or shard.stat().st_size == record["bytes"]:
                found[block] = record
    return found


def _record_of(shard: Path) -> Path:
    return shard.parent / STATE / f"{shard.name}.json"


def _hashes_of(shard: Path) -> Path:
    return shard.parent / STATE / f"{shard.name}.hashes.json"


def _summary(source: _Source, folder: Path) -> Written:
    """What the records say of this part."""
    written = Written()
    for record in _finished(source, folder, source.blocks()).values():
        written.add(record)
    return written


def read_summary(folder: Path) -> tuple[dict[str, Any], Written]:
    """What a folder of shards is made of (``source``, ``rules``), and all that was written and left out so far.

    Raises:
        OSError: if :func:`write_pictures` did not write there.
    """
    written = Written()
    state = folder / STATE
    identity = json.loads((state / "source.json").read_bytes())
    rest = json.loads((state / "rest.json").read_bytes())
    written.rows, written.blank_captions = rest["rows"], rest["blank_captions"]
    for reason, name in rest["left_out"]:
        written.left_out.setdefault(reason, []).append(name)
    for path in sorted(state.glob("*.tar.json")):
        written.add(json.loads(path.read_bytes()))
    return identity, written


def _left_out_text(written: Written) -> str:
    """The lines for the introduction of a run, an empty line, and the name of every picture with the reason."""
    names = [f"{name}: {reason}" for reason, names in written.left_out.items() for name in names]
    lines = [*written.remarks, "", *names, *written.rows] if written.remarks else []
    return "".join(f"{line}\n" for line in lines)


def _copies(source: _Source, folder: Path) -> dict[int, str]:
    """Pictures of this part that look like an earlier one, by running number, and the name of that one."""
    own = source.blocks()
    missing = [block for block in own if not _hashes_of(folder / source.name(block)).is_file()]
    work = _Work(_hash_block, lambda block: source.block(block, folder, {}), missing)
    with _progress("hashing pictures", source, missing) as bar, contextlib.closing(_run(work, source, bar)) as done:
        for _ in done:
            pass
    hashes = [value for block in own for value in json.loads(_hashes_of(folder / source.name(block)).read_bytes())]
    first = own.start * source.output.samples_per_shard
    entries, numbers = source.pictures.entries, source.numbers
    return {
        first + copy: entries[numbers[first + original]].name
        for copy, original in earlier_copies(hashes, source.rules.duplicates or 0).items()
    }


def _progress(what: str, source: _Source, blocks: Sequence[int]) -> tqdm:
    total = sum(map(source.size, blocks))
    return tqdm(total=total, desc=what, unit=" pictures", leave=False, disable=None)


# What a process does

Advance = Callable[[int], object]
"""Takes how many pictures were done since the last call."""


def _read(entry: Entry) -> bytes:
    try:
        return entry.read()
    except OSError as error:
        if is_lack(error):
            raise
        raise Refused(UNREADABLE, error.strerror or "") from None


def _write_block(block: _Block, advance: Advance) -> dict[str, Any]:
    """Write one shard, its index and its record; returns the record."""
    left_out: list[tuple[str, str]] = []
    sides: Counter[int] = Counter()
    words: Counter[int] = Counter()
    classes: Counter[str] = Counter()
    with contextlib.ExitStack() as stack:
        file: BinaryIO | None = None
        for at, (entry, members) in enumerate(zip(block.entries, block.samples, strict=True)):
            if at % _REPORTED == 0 and at:
                advance(_REPORTED)
            try:
                if original := block.copies.get(at):
                    raise Refused(COPY, original)
                picture = block.rules.apply(_read(entry))
            except Refused as error:
                left_out.append((error.reason, f"{entry.name} ({error.detail})" if error.detail else entry.name))
                continue
            if file is None:
                file = stack.enter_context(stack.enter_context(whole_file(block.path)).open("wb"))
            text = {kind: _to_bytes(value) for kind, value in members.items()}
            _add(file, f"{block.first + at:08d}", text | {picture.extension: picture.content})
            sides[min(picture.width, picture.height)] += 1
            words.update(len(caption.split()) for caption in members["json"]["captions"])
            classes.update(members["json"].get("class_names", ()))
        if file is not None:
            _end(file)
    if file is not None:
        index_shards([block.path], jobs=1)
    record = {
        "samples": sides.total(),
        "bytes": block.path.stat().st_size if file is not None else 0,
        "left_out": left_out,
        "dropped_captions": block.dropped_captions,
        "sides": sides,
        "words": words,
        "classes": classes,
    }
    write_json(_record_of(block.path), record)
    advance(len(block.entries) - _REPORTED * ((len(block.entries) - 1) // _REPORTED))
    return record


def _hash_block(block: _Block, advance: Advance) -> None:
    """Write the perceptual hashes of the pictures of one shard; None for those that other rules leave out."""
    hashes: list[int | None] = []
    for at, entry in enumerate(block.entries):
        if at % _REPORTED == 0 and at:
            advance(_REPORTED)
        try:
            hashes.append(block.rules.fingerprint(_read(entry)))
        except Refused:
            hashes.append(None)  # the reason is recorded when the shard is written
    write_json(_hashes_of(block.path), hashes)
    advance(len(block.entries) - _REPORTED * ((len(block.entries) - 1) // _REPORTED))


class _Work(NamedTuple):
    """What is done with which stretches of a source."""

    do: Callable[[_Block, Advance], Any]
    block: Callable[[int], _Block]
    numbers: Sequence[int]


def _run(work: _Work, source: _Source, bar: tqdm) -> Generator[Any]:
    """The result for each block, in the order in which they end."""
    for module in ("torch",) * (source.rules.resize is not None):
        importlib.import_module(module)  # once, not in each process
    output = source.output
    if output.engine == "ray":
        return _run_with_ray(work, output.jobs, bar)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    jobs = min(output.jobs or cores, len(work.numbers))
    if jobs > 1 and not multiprocessing.current_process().daemon:
        return _run_in_processes(work, jobs, bar)
    return _run_here(work, bar)


def _run_here(work: _Work, bar: tqdm) -> Generator[Any]:
    with _one_thread():
        for number in work.numbers:
            yield work.do(work.block(number), bar.update)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """A picture is too small for several threads of torch, if that is in use at all."""
    if (torch := sys.modules.get("torch")) is None:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _run_in_processes(work: _Work, jobs: int, bar: tqdm) -> Generator[Any]:
    # A script without the guard of __main__ could not be started anew. A forked process has the source already; others
    # are sent each stretch of it.
    can_fork = sys.platform == "linux"
    context = multiprocessing.get_context("fork" if can_fork else None)
    block = work.block if can_fork else None
    numbers = iter(work.numbers)
    connections: list[Connection] = []
    processes: list[multiprocessing.process.BaseProcess] = []
    try:
        for number in itertools.islice(numbers, jobs):
            ours, theirs = context.Pipe()
            inherited = [*connections, ours] if can_fork else []
            process = context.Process(target=_serve, args=(work.do, block, theirs, inherited), daemon=True)
            process.start()
            theirs.close()
            connections.append(ours)
            processes.append(process)
            ours.send(number if can_fork else work.block(number))
        while connections:
            for ready in cast(list[Connection], wait(connections)):
                try:
                    message = ready.recv()
                except (EOFError, ConnectionError):
                    raise MachineError(
                        "a process that writes shards was killed (for want of memory?); repeat the command, with fewer "
                        "--jobs: it goes on behind the shards that are finished"
                    ) from None
                if isinstance(message, int):
                    bar.update(message)
                    continue
                if isinstance(message, BaseException):
                    raise message
                if (number := next(numbers, None)) is None:
                    ready.close()
                    connections.remove(ready)
                else:
                    ready.send(number if can_fork else work.block(number))
                yield message[0]
    finally:
        for connection in connections:
            connection.close()
        for process in processes:
            process.kill() if connections else process.join()
            process.join()


def _serve(
    do: Callable[[_Block, Advance], Any],
    block: Callable[[int], _Block] | None,
    connection: Connection,
    inherited: list[Connection],
) -> None:
    """The body of a process: does the stretches that it is sent until the other side closes, or is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the main one ends the others
    for other in inherited:
        other.close()
    with contextlib.suppress(EOFError, ConnectionError), _one_thread():
        while True:
            message = connection.recv()
            try:
                result = (do(block(message) if block else message, connection.send),)
            except ConnectionError:
                raise
            except Exception as error:  # noqa: BLE001 (the main process raises it)
                result = error
            connection.send(result)


def _run_with_ray(work: _Work, jobs: int | None, bar: tqdm) -> Generator[Any]:
    """On the cluster that ``RAY_ADDRESS`` names or this machine belongs to; without one Ray starts one here."""
    import ray

    is_ours = not ray.is_initialized()
    if is_ours:
        cores = None if os.environ.get("RAY_ADDRESS") else jobs
        ray.init(log_to_driver=False, logging_level=logging.WARNING, num_cpus=cores, include_dashboard=False)
    task = ray.remote(num_cpus=1)(_do_elsewhere)
    most = jobs or max(1, int(ray.cluster_resources().get("CPU", 1)))
    numbers = iter(work.numbers)
    running: dict[Any, int] = {}
    try:
        while True:
            for block in map(work.block, itertools.islice(numbers, most - len(running))):
                running[task.remote(work.do, block, str(Path.cwd()))] = len(block.entries)
            if not running:
                return
            (ready,), _ = ray.wait(list(running), num_returns=1)
            bar.update(running.pop(ready))
            yield ray.get(ready)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        raise cause if isinstance(cause, (UserError, OSError)) else error from None
    except ray.exceptions.RayError as error:
        raise MachineError(
            f"Ray: {first_line(error)}; repeat the command: it goes on behind what is finished"
        ) from None
    finally:
        if is_ours:
            ray.shutdown()


def _do_elsewhere(do: Callable[[_Block, Advance], Any], block: _Block, folder: str) -> Any:
    """What Ray runs: paths are relative to the folder in which the command was started."""
    with contextlib.suppress(OSError):
        os.chdir(folder)
    return do(block, lambda _: None)


# Members of a tar


def _add(file: BinaryIO, key: str, members: Mapping[str, bytes]) -> None:
    """Append the members of a sample by extension, as webdataset's writer does, whose bytes these are.

    One owner, mode and time for all members: equal samples give equal files.
    """
    for extension, content in sorted(members.items()):
        header = tarfile.TarInfo(f"{key}.{extension}")
        header.size, header.mode = len(content), 0o444
        file.write(header.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape"))
        file.write(content)
        file.write(bytes(-len(content) % tarfile.BLOCKSIZE))


def _end(file: BinaryIO) -> None:
    """End a tar: two zero blocks, and more up to a whole record."""
    end = file.tell() + 2 * tarfile.BLOCKSIZE
    file.write(bytes(2 * tarfile.BLOCKSIZE + -end % tarfile.RECORDSIZE))


def _to_bytes(value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text.encode()
