"""From a global position to a decoded sample, with a fixed rule for samples that are broken."""

import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from focalclip.base.errors import UserError, is_lack, system_error
from focalclip.config import DataConfig
from focalclip.data.images import decode_array
from focalclip.data.index import Captions, load_key, load_members, read_captions, read_label
from focalclip.data.order import Draw, SampleOrder
from focalclip.data.transforms import min_decoded_side, random_resized_crop

_MAX_REPLACEMENTS = 100  # broken samples in a row after which the data, not a sample, is at fault


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


class Members(NamedTuple):
    """The bytes of one sample, None where a part is absent; in the order of the index's columns."""

    image: bytes | None
    text: bytes | None
    json: bytes | None
    label: bytes | None


class BrokenSampleError(Exception):
    """One sample cannot be used; the message says why."""


@dataclass(frozen=True)
class Sample:
    """A training pair: image uint8 (3, size, size), one caption, a class number or -1."""

    image: Tensor
    caption: str
    label: int


class TrainSamples:
    """Training samples by global position.

    A broken sample (undecodable image, no image, no caption, unreadable JSON or class number) is replaced by the
    sample at the next position that is not, with the crop and colours of the position asked for. So no rank runs
    short, and the batch is still a pure function of (seed, position).

    Args:
        shards: Indexed shards.
        counts: Samples per shard, int64 (len(shards),).
        data: Augmentation, captions and window.
        image_size: Side of the images in pixels.
        seed: Seed of the order.
    """

    def __init__(self, shards: Sequence[Path], counts: np.ndarray, data: DataConfig, image_size: int, seed: int):
        self.order = SampleOrder(counts, seed, data.window_shards)
        self._reader = ShardReader(shards, keep=2 * data.window_shards)
        self._data = data
        self._image_size = image_size

    def load(self, position: int, draws: Sequence[float]) -> tuple[Sample, str | None]:
        """The sample at a position, or its replacement and what is wrong with the one that belongs there.

        Only the fault of the position's own sample is returned: that of a replacement is returned at its own position,
        so every broken sample is counted once per epoch.

        Args:
            position: Global position, 0 or more.
            draws: The position's row of :func:`focalclip.data.order.uniform_draws`.

        Raises:
            UserError: if too many samples in a row are broken.
        """
        first_fault = None
        for candidate in range(position, position + _MAX_REPLACEMENTS):
            shard, sample = self.order.locate(candidate)
            try:
                return self._decode(self._reader.read(shard, sample), draws), first_fault
            except BrokenSampleError as error:
                first_fault = first_fault or f"{self._reader.name(shard, sample)}: {error}"
        raise UserError(
            f"data.train: {_MAX_REPLACEMENTS} broken samples in a row, the first being {first_fault}; repair the shards"
        )

    def _decode(self, members: Members, draws: Sequence[float]) -> Sample:
        if members.image is None:
            raise BrokenSampleError("no image")
        augment, size = self._data.augment, self._image_size
        try:
            label = read_label(members.label)
            caption = choose_caption(read_captions(members.text, members.json), draws, self._data)
            pixels = decode_array(members.image, min_decoded_side(draws, augment, size))
        except ValueError as error:
            raise BrokenSampleError(str(error)) from None
        return Sample(random_resized_crop(pixels, draws, augment, size), caption, label)


class ShardReader:
    """Raw members of samples; the tables and files of the shards read last stay open.

    Args:
        shards: Indexed shards.
        keep: Shards to keep open.
    """

    def __init__(self, shards: Sequence[Path], keep: int):
        self._shards = shards
        self._keep = keep
        self._open: OrderedDict[int, tuple[np.ndarray, int]] = OrderedDict()  # shard: member table, file descriptor

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_open": OrderedDict()}  # a worker process opens its own files

    def read(self, shard: int, sample: int) -> Members:
        """The members of one sample, in one read.

        Raises:
            BrokenSampleError: if the shard can no longer be read as it was indexed.
        """
        try:
            members, file = self._table_and_file(shard)
            offsets, lengths = members[sample].T.tolist()
            start = min(offset for offset in offsets if offset >= 0)
            stop = max(offset + length for offset, length in zip(offsets, lengths, strict=True))
            data = os.pread(file, stop - start, start)  # leaves no file position behind: safe across a fork
        except OSError as error:
            if is_lack(error):
                raise system_error(error) from None
            raise BrokenSampleError(f"cannot be read ({error.strerror})") from None
        if len(data) < stop - start:
            raise BrokenSampleError("the shard has become shorter since it was indexed")
        parts = zip((offset - start for offset in offsets), lengths, strict=True)
        return Members(*(data[at : at + length] if length >= 0 else None for at, length in parts))

    def name(self, shard: int, sample: int) -> str:
        """``shard.tar: key`` of a sample, for messages."""
        try:
            return f"{self._shards[shard].name}: {load_key(self._shards[shard], sample)}"
        except OSError:
            return f"{self._shards[shard].name}: sample {sample}"

    def _table_and_file(self, shard: int) -> tuple[np.ndarray, int]:
        if shard in self._open:
            self._open.move_to_end(shard)
        else:
            members = load_members(self._shards[shard])
            self._open[shard] = members, os.open(self._shards[shard], os.O_RDONLY)
            if len(self._open) > self._keep:
                os.close(self._open.popitem(last=False)[1][1])
        return self._open[shard]
