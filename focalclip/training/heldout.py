"""Held-out pairs: their loss and their retrieval, measured during training by all ranks.

Which pairs they are depends on names and numbers alone: those of a source, or a fraction of the training pairs by
:class:`focalclip.data.order.HeldOut`; of more than ``data.val_max``, those with the smallest words of the same hash.

Retrieval is that of ``eval/retrieval.py``: all captions of a picture count, each picture and each caption asks once.
The loss is the run's own on batches of a training micro-batch's size, the first caption of each picture taken, in an
order by hash. The last batch ends at the last pair, so that it may share pairs with the one before and all batches are
of one size; fewer pairs than that are one batch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from focalclip.base.errors import MachineError, UserError, is_lack, system_error
from focalclip.base.ranks import gather_objects, is_main, rank, together, world_size
from focalclip.config import DataConfig, LossConfig, RunConfig
from focalclip.data import store
from focalclip.data.index import (
    IMAGE,
    JSON,
    LABEL,
    TEXT,
    load_keys,
    load_members,
    usable_shards,
)
from focalclip.data.loader import TrainLoader
from focalclip.data.order import HeldOut, hash_words
from focalclip.data.prepared import training_shards
from focalclip.data.samples import Members, class_of, texts_of
from focalclip.data.shards import source_numbers
from focalclip.evaluation.features.model import evaluating
from focalclip.evaluation.retrieval.pairs import PairData
from focalclip.evaluation.retrieval.ranks import retrieval_ranks
from focalclip.evaluation.retrieval.recall import RECALL_AT, Direction, image_to_text, text_to_image
from focalclip.evaluation.retrieval.run import embed_pairs
from focalclip.models.clip import FocalCLIP
from focalclip.training.engine import device
from focalclip.training.step import create_loss

_ENCODED_AT_ONCE = 256  # pictures, and captions, per forward pass

_TEXTS = (TEXT, JSON, LABEL)  # in the order of Members

_OUTPUTS = ("image", "text", "scale")  # what a loss can be computed from


class ShardEntry(NamedTuple):
    """A picture in a shard, wherever the shard lies."""

    shard: store.Shard
    key: str
    offset: int
    size: int

    @property
    def name(self) -> str:
        """Shard and key."""
        return f"{self.shard.name}: {self.key}"

    @property
    def file(self) -> Path | None:
        """The tar, if it is a file of this machine."""
        return self.shard if isinstance(self.shard, Path) else None

    def read(self) -> bytes:
        """The compressed picture; empty if the shard can no longer be read."""
        try:
            return store.read_ranges(self.shard, [(self.offset, self.size)])[0]
        except OSError as error:
            if is_lack(error):
                raise system_error(error) from None
            return b""


@dataclass(frozen=True)
class HeldOutPairs:
    """What is measured, equal on all ranks."""

    data: PairData
    """Pictures in the order of the shards, with all their captions; ``faults`` names the pairs without a picture or a
    caption."""
    labels: np.ndarray
    """int64 (N,): class numbers, -1 where a picture has none."""
    words: np.ndarray
    """uint64 (N,): the order in which pairs are dealt to the loss."""
    held_out: int
    """Pairs of the source or fraction, of which at most ``data.val_max`` are measured."""
    source: str
    """``data.val`` in words."""

    def introduction(self, config: DataConfig) -> str:
        """What is held out and measured, in one line."""
        n, faults = len(self.data.entries), self.data.faults
        left = f"; {len(faults)} left out: {', '.join(faults[:3])}{' ...' if faults[3:] else ''}" if faults else ""
        which = "all" if n + len(faults) == self.held_out else f"{n + len(faults):,} (data.val_max)"
        return f"{self.held_out:,} pairs, {self.source}; {which} measured every {config.val_every:,} steps{left}"


def check_overlap(train: Sequence[Any], val: Sequence[Any]) -> None:
    """Check that no shard is both trained on and held out.

    Raises:
        UserError: naming the first that is.
    """
    trained = {_place(shard) for shard in train}
    both = [shard for shard in val if _place(shard) in trained]
    if both:
        raise UserError(
            f"data.val: {len(both)} of its {len(val)} shards are in data.train, too ({both[0]}); name other data, or "
            "give a fraction such as 0.01, which takes the held-out pairs out of training"
        )


def _place(shard: Any) -> Any:
    return shard.resolve() if isinstance(shard, Path) else shard


def val_shards(config: DataConfig, train: Sequence[Any]) -> list[Any]:
    """The shards of ``data.val`` where it names a source; empty where it is a fraction or null.

    Args:
        config: the section ``data``.
        train: the training shards.

    Raises:
        UserError: if the source cannot be used, or shares a shard with the training.
    """
    if config.val is None or config.val_fraction:
        return []
    assert not isinstance(config.val, float)
    shards = training_shards(config.val, field="data.val")
    check_overlap(train, shards)
    return shards


def open_held_out(config: DataConfig, shards: Sequence[Any], loader: TrainLoader) -> HeldOutPairs | None:
    """Choose the held-out pairs and read their captions: the main rank does, and all get them.

    Args:
        config: the section ``data``.
        shards: of :func:`val_shards`.
        loader: of this run, which leaves the held-out fraction out.

    Returns:
        None where nothing is held out.

    Raises:
        SharedError: on all ranks, if there are fewer than two pairs or a shard cannot be used.
    """
    if config.val is None:
        return None
    found = together(lambda: _open(config, shards, loader) if is_main() else None)
    return gather_objects(found)[0]


def _open(config: DataConfig, shards: Sequence[Any], loader: TrainLoader) -> HeldOutPairs:
    held, source = None, str(config.val)
    if config.val_fraction:
        usable, counts, rules = loader.usable.shards, loader.counts, config.of_entries()
        settings = list(zip(loader.sources, [rules[entry] for entry in loader.entries], strict=True))
        held = HeldOut([shard.name for shard in usable], config.val_fraction)
        source = f"{config.val_fraction:g} of data.train by hash, never trained on"
    else:
        usable, counts, _ = usable_shards(shards, config.key_rule, 0)
        settings = [(number, config) for number, _ in source_numbers(shards)]
    chosen, words = [], []
    for i, count in enumerate(counts.tolist()):
        places = np.arange(count) if held is None else np.flatnonzero(held.mask(i, count))
        chosen.append(np.stack([np.full(len(places), i), places], axis=1))
        words.append(hash_words(usable[i].name, count)[places])
    samples, order = np.concatenate(chosen), np.concatenate(words)
    total = len(samples)
    if config.val_max is not None and total > config.val_max:
        kept = np.sort(np.argsort(order, kind="stable")[: config.val_max])
        samples, order = samples[kept], order[kept]
    data, labels, places = _read(config, usable, samples, settings)
    if len(places) < 2:
        without = f" ({'; '.join(data.faults)})" if data.faults else ""
        what = f"{config.val:g} holds out {total} of {counts.sum():,} pairs" if held else f"{source} has {total} pairs"
        raise UserError(
            f"data.val: {what}, of which {len(places)} can be measured{without}; two or more are needed: "
            f"{'give a larger fraction' if held else 'name more data'}"
        )
    return HeldOutPairs(data, labels, order[places], total, source)


def _read(
    config: DataConfig, shards: Sequence[Any], samples: np.ndarray, settings: Sequence[tuple[int, DataConfig]]
) -> tuple[PairData, np.ndarray, list[int]]:
    """The captions and class numbers of samples, int64 (n, 2) of shard and number within it, in order.

    Args:
        config: the section ``data``.
        shards: indexed shards.
        samples: see above.
        settings: the number of each shard's source, and the settings of its entry.

    Returns:
        The pairs; their class numbers, int64; and which of the samples they are.
    """
    entries, captions, image_of, faults, labels, places = [], [], [], [], [], []
    num_sources = max((source for source, _ in settings), default=0) + 1
    done = 0
    for shard in np.unique(samples[:, 0]).tolist():
        source, rules = settings[shard]
        numbers = samples[samples[:, 0] == shard, 1]
        for place, (entry, members) in enumerate(_read_shard(shards[shard], numbers, config.key_rule), done):
            try:
                texts = texts_of(members, rules).captions
                if entry.size < 0:
                    raise ValueError("no image")
            except ValueError as fault:
                faults.append(f"{entry.name} ({fault})")
                continue
            image_of += [len(entries)] * len(texts)
            captions += texts
            entries.append(entry)
            labels.append(class_of(members, rules, source, num_sources)[0])
            places.append(place)
        done += len(numbers)
    pairs = np.stack([np.array(image_of, np.int64), np.arange(len(captions))], axis=1)
    data = PairData("held-out", str(config.val), tuple(entries), tuple(captions), pairs, tuple(faults))
    return data, np.array(labels, np.int64), places


def _read_shard(shard: Any, numbers: np.ndarray, key_rule: str) -> list[tuple[ShardEntry, Members]]:
    """Where the pictures of some samples lie, and what else the samples hold."""
    try:
        table, keys = load_members(shard, key_rule)[numbers], load_keys(shard, key_rule)
        wanted = [(i, column) for i in range(len(numbers)) for column in _TEXTS if table[i, column, 1] >= 0]
        ranges = [(int(table[at][0]), int(table[at][1])) for at in wanted]
        content = dict(zip(wanted, store.read_ranges(shard, ranges), strict=True))
    except OSError as error:
        raise system_error(error) from None
    return [
        (
            ShardEntry(shard, keys[number], *table[i, IMAGE].tolist()),
            Members(None, *(content.get((i, column)) for column in _TEXTS)),
        )
        for i, number in enumerate(numbers.tolist())
    ]


class HeldOutMeasure:
    """Measures held-out pairs: one model after another.

    Args:
        config: of the run.
        pairs: what is measured.
    """

    def __init__(self, config: RunConfig, pairs: HeldOutPairs) -> None:
        self._pairs = pairs
        self._batch = config.data.batch_size // config.train.accumulation
        try:
            self._loss = create_loss(config.loss, _OUTPUTS)
        except UserError:  # it needs more than embeddings
            self._loss = create_loss(LossConfig(), _OUTPUTS)

    def __call__(self, model: FocalCLIP) -> tuple[dict[str, Any], list[str]]:
        """Loss and recall of a model on this rank's device; all ranks call this together.

        Returns:
            Values by name, JSON-ready, equal on all ranks (empty where the features are not finite, or fewer than two
            pictures can be read), and what could not be measured, with the reason.
        """
        try:
            features, data, texts = embed_pairs(model, self._pairs.data, batch_size=_ENCODED_AT_ONCE, progress=False)
        except UserError as error:
            if error.status == MachineError.status:
                raise
            return {}, [f"nothing: {error}"]
        n = len(data.entries)
        if n < 2:
            return {}, [f"nothing: fewer than two of the held-out pictures can be read ({features.broken[0]})"]
        with evaluating(model):
            ranks = retrieval_ranks(features.embeds, texts, data.pairs, device=device(), progress=False)
            batch = min(self._batch, n)
            loss = self._mean_loss(
                model.scale(), features.embeds, _first_captions(texts, data), features.readable, batch
            )
        values = {
            "loss": loss if math.isfinite(loss) else None,
            "loss_batch": batch,
            "n": n,
            "captions": len(data.captions),
            "left_out": len(self._pairs.data.faults) + len(features.broken),
            "image_to_text": _numbers(image_to_text(ranks.image_to_text, data)),
            "text_to_image": _numbers(text_to_image(ranks.text_to_image, data)),
        }
        return values, list(features.broken)

    def _mean_loss(self, scale: Tensor, images: Tensor, texts: Tensor, readable: np.ndarray, batch: int) -> float:
        """Mean over batches of the loss of unit vectors (n, D), each dealt to the ranks as a micro-batch is."""
        order = torch.from_numpy(np.argsort(self._pairs.words[readable], kind="stable"))
        labels = torch.from_numpy(self._pairs.labels[readable])
        share = -(-batch // world_size())
        losses = []
        for start in range(0, len(order), batch):
            rows = order[min(start, len(order) - batch) :][:batch]
            # Where ranks cannot have equally many, copies of the first pair fill up; by their id they do not count.
            rows = torch.cat([rows, rows[:1].expand(share * world_size() - batch)])
            own = rows[rank() * share :][:share]
            outputs = {"image": images[own].to(device()), "text": texts[own].to(device()), "scale": scale}
            losses.append(self._loss(outputs, labels[own].to(device()), own.to(device())).item())
        return sum(losses) / len(losses)


def _first_captions(texts: Tensor, data: PairData) -> Tensor:
    """The vector of each image's first caption (n, D)."""
    _, first = np.unique(data.pairs[:, 0], return_index=True)
    return texts[torch.from_numpy(data.pairs[first, 1])]


def _numbers(way: Direction) -> dict[str, float]:
    recalls = {f"recall@{k}": way.recall[k].value for k in RECALL_AT}
    return recalls | {"chance@1": way.recall[1].chance, "ceiling@1": way.recall[1].ceiling}
