"""From a global position to a decoded sample, with a fixed rule for samples that are broken."""

import hashlib
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from focalclip.base.errors import MachineError, UserError, first_line, is_lack, system_error
from focalclip.config import DataConfig
from focalclip.data.images import decode_array
from focalclip.data.index import (
    Captions,
    class_names_of,
    load_key,
    load_members,
    read_captions,
    read_label,
)
from focalclip.data.mixing import MixedOrder
from focalclip.data.order import Draw, SampleOrder
from focalclip.data.reader import NO_LABEL
from focalclip.data.transforms import min_decoded_side, random_resized_crop

_MAX_REPLACEMENTS = 100  # broken samples in a row after which the data, not a sample, is at fault

_MAX_GAPS = 1 << 16  # bytes between the members of a sample that one read may take along; tar's own are about 3 KB


def choose_caption(texts: Captions, draws: Sequence[float], data: DataConfig) -> str:
    """The first caption, or it joined with one or two others, or any: see the two probabilities of :class:`DataConfig`.

    Args:
        texts: The sample's captions and keywords.
        draws: The position's row of :func:`focalclip.data.order.uniform_draws`.
        data: The probabilities.
    """
    first, *others = texts.captions
    others += texts.keywords
    rule = draws[Draw.CAPTION_FIRST] - data.first_caption
    if rule < 0 or not others:
        return first
    if rule >= data.joined_captions:
        return texts.captions[int(draws[Draw.CAPTION] * len(texts.captions))]
    picked = [others[int(draws[Draw.CAPTION] * len(others))]]
    more = 2 * draws[Draw.CAPTION_MORE] - 1  # uniform in [0, 1) in half of all cases
    if more >= 0 and (second := others[int(more * len(others))]) not in picked:
        picked.append(second)
    is_behind = rule < data.joined_captions / 2
    return ", ".join([first, *picked] if is_behind else [*picked, first])


def label_of(number: int, source: int, num_sources: int) -> int:
    """One number for a class number and the source that it belongs to; -1 stays -1, one source changes nothing.

    Different classes get different numbers as long as class numbers are below 2**63 / num_sources; beyond, where only
    hashes are, numbers wrap around.
    """
    return number if number < 0 else (number * num_sources + source) % 2**63


def label_of_names(names: Sequence[str]) -> int:
    """One number for the names of a sample's classes, whatever their case, spaces and order: 0 or more, by a hash."""
    alike = sorted({" ".join(name.casefold().replace("_", " ").split()) for name in names})
    return int.from_bytes(hashlib.sha256("\0".join(alike).encode(errors="replace")).digest()[:8]) >> 1


class Members(NamedTuple):
    """The bytes of one sample, None where a part is absent; in the order of the index's columns."""

    image: bytes | None
    text: bytes | None
    json: bytes | None
    label: bytes | None


class BrokenSampleError(Exception):
    """One sample cannot be used; the message says why."""


class Ignored(NamedTuple):
    """A part of a sound sample that could not be used."""

    reason: str
    """One of a few."""
    where: str
    """``shard.tar: key`` the first time that a process meets this reason, else empty: keys are slow to read."""


@dataclass(frozen=True)
class Sample:
    """A pair; with the parts of it that were ignored, its number in the data, and the entry of ``data.train``."""

    image: Tensor
    """uint8 (3, size, size)."""
    caption: str
    label: int
    """One number for its class among those of all sources; -1: it has none."""
    ignored: tuple[str, ...] = ()
    id: int = -1
    entry: int = 0


class TrainSamples:
    """Training samples by global position.

    A broken sample (no image, an undecodable one, no caption, one that cannot be tokenised) is replaced by the sample
    at the next position that is not (of weighted sources: the next of the same source), with the crop and colours of
    the position asked for. So no rank runs short, and the batch is still a pure function of (seed, position). Any error
    that one sample raises is its own fault.

    Args:
        shards: Indexed shards.
        counts: Samples per shard, int64 (len(shards),).
        order: Which sample stands at a position.
        data: Augmentation, captions and window.
        image_size: Side of the images in pixels.
        sources: Numbers of the source that gives each shard's class numbers their meaning, and of the entry of
            ``data.train`` that it belongs to.
    """

    def __init__(
        self,
        shards: Sequence[Path],
        counts: np.ndarray,
        order: SampleOrder | MixedOrder,
        data: DataConfig,
        image_size: int,
        sources: Sequence[tuple[int, int]],
    ):
        self.order = order
        self._reader = ShardReader(shards, 2 * data.window_shards * order.num_windows, data.key_rule)
        self._first = np.cumsum(counts) - counts  # number within the data of each shard's first sample
        self._sources = sources
        self._num_sources = max((source for source, _ in sources), default=0) + 1
        self._rules = data.of_entries()
        self._image_size = image_size
        self._named: set[str] = set()

    def load(
        self, position: int, draws: Sequence[float], check: Callable[[str], object] | None = None
    ) -> tuple[Sample, str | None]:
        """The sample at a position, or its replacement and what is wrong with the one that belongs there.

        Only the fault of the position's own sample is returned: that of a replacement is returned at its own position,
        so every broken sample is counted once per epoch.

        Args:
            position: Global position, 0 or more.
            draws: The position's row of :func:`focalclip.data.order.uniform_draws`.
            check: Raises an error of any kind for a caption that cannot be used.

        Raises:
            UserError: if too many samples in a row are broken.
        """
        first_fault = None
        for behind in range(_MAX_REPLACEMENTS):
            shard, number = self.order.locate(position, behind)
            try:
                sample = self._decode(self._reader.read(shard, number), draws, *self._sources[shard])
                if check is not None:
                    _check_caption(sample.caption, check)
            except BrokenSampleError as error:
                first_fault = first_fault or f"{self._reader.name(shard, number)}: {error}"
            else:
                return replace(sample, id=int(self._first[shard]) + number), first_fault
        raise UserError(
            f"data.train: {_MAX_REPLACEMENTS} broken samples in a row, the first being {first_fault}; repair the shards"
        )

    def ignored(self, position: int, reasons: Sequence[str]) -> list[Ignored]:
        """What was ignored in the sample at a position, with its name where a reason is new."""
        found = []
        for reason in reasons:
            where = "" if reason in self._named else self._reader.name(*self.order.locate(position))
            self._named.add(reason)
            found.append(Ignored(reason, where))
        return found

    def _decode(self, members: Members, draws: Sequence[float], source: int, entry: int) -> Sample:
        if members.image is None:
            raise BrokenSampleError("no image")
        data, size = self._rules[entry], self._image_size
        try:
            texts = texts_of(members, data)
            label, unreadable = class_of(members, data, source, self._num_sources)
            caption = choose_caption(texts, draws, data)
            pixels = decode_array(members.image, min_decoded_side(draws, data.augment, size))
            image = random_resized_crop(pixels, draws, data.augment, size)
        except ValueError as error:
            raise BrokenSampleError(str(error)) from None
        except ImportError:
            raise
        except Exception as error:  # noqa: BLE001 (whatever one sample raises must not end the run)
            raise BrokenSampleError(f"{type(error).__name__}: {first_line(error)}") from None
        return Sample(image, caption, label, texts.ignored + unreadable, entry=entry)


def class_of(members: Members, data: DataConfig, source: int, num_sources: int) -> tuple[int, tuple[str, ...]]:
    """One number for a sample's class, -1 where it has none; and what of it cannot be used.

    Args:
        members: The sample.
        data: The settings of its entry of ``data.train``.
        source: The number of its source.
        num_sources: Of how many.
    """
    if not data.use_labels:
        return NO_LABEL, ()
    if data.label_space == "name" and (names := class_names_of(members.json)):
        return label_of_names(names), ()
    try:
        number = read_label(members.label)
    except ValueError as error:
        return NO_LABEL, (str(error),)
    if data.label_space == "number" or number < 0:
        return number, ()
    nameless = ("its class has a number and no name: it counts within its source",)
    return label_of(number, source, num_sources), nameless if data.label_space == "name" else ()


def texts_of(members: Members, data: DataConfig) -> Captions:
    """The captions of a sample, or prompts with the names of its classes in their place.

    Raises:
        ValueError: if there is none.
    """
    if data.templates is None:
        return read_captions(members.text, members.json, data.caption_keys, data.use_keywords)
    names = class_names_of(members.json)
    if not names:
        raise ValueError("no class_names in its JSON for templates")
    return Captions([template.replace("{c}", name) for name in names for template in data.templates], [])


def _check_caption(caption: str, check: Callable[[str], object]) -> None:
    try:
        check(caption)
    except Exception as error:  # noqa: BLE001 (tokenizers raise errors of any kind)
        raise BrokenSampleError(f"caption cannot be tokenised ({first_line(error)})") from None


class ShardReader:
    """Raw members of samples; the tables and files of the shards read last stay open.

    Args:
        shards: Indexed shards.
        keep: Shards to keep open.
        key_rule: Rule of the index, see ``data.key_rule``.
    """

    def __init__(self, shards: Sequence[Path], keep: int, key_rule: str = "first_dot"):
        self._shards = shards
        self._keep = keep
        self._key_rule = key_rule
        self._open: OrderedDict[int, tuple[np.ndarray, int]] = OrderedDict()  # shard: member table, file descriptor

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_open": OrderedDict()}  # a worker process opens its own files

    def read(self, shard: int, sample: int) -> Members:
        """The members of one sample, in one read unless other data lies between them.

        Raises:
            BrokenSampleError: if the shard can no longer be read as it was indexed.
            UserError: if the system allows no more open files, or the shard's index is damaged and cannot be rebuilt.
        """
        try:
            members, file = self._table_and_file(shard)
            places = members[sample].tolist()
            present = [(offset, offset + length) for offset, length in places if length >= 0]
            start, stop = min(first for first, _ in present), max(last for _, last in present)
            if stop - start > sum(last - first for first, last in present) + _MAX_GAPS:
                return Members(*(_read_at(file, *place) if place[1] >= 0 else None for place in places))
            data = _read_at(file, start, stop - start)
        except OSError as error:
            if is_lack(error):
                raise MachineError(
                    f"data.window_shards={self._keep // 2}: {system_error(error)}; or lower it"
                ) from None
            raise BrokenSampleError(f"cannot be read ({error.strerror})") from None
        return Members(*(data[at - start : at - start + length] if length >= 0 else None for at, length in places))

    def name(self, shard: int, sample: int) -> str:
        """``shard.tar: key`` of a sample, for messages."""
        try:
            return f"{self._shards[shard].name}: {load_key(self._shards[shard], sample, self._key_rule)}"
        except OSError:
            return f"{self._shards[shard].name}: sample {sample}"

    def _table_and_file(self, shard: int) -> tuple[np.ndarray, int]:
        if shard in self._open:
            self._open.move_to_end(shard)
        else:
            members = load_members(self._shards[shard], self._key_rule)
            self._open[shard] = members, os.open(self._shards[shard], os.O_RDONLY)
            if len(self._open) > self._keep:
                os.close(self._open.popitem(last=False)[1][1])
        return self._open[shard]


def _read_at(file: int, offset: int, length: int) -> bytes:
    data = os.pread(file, length, offset)  # leaves no file position behind: safe across a fork
    if len(data) < length:
        raise BrokenSampleError("the shard has become shorter since it was indexed")
    return data
