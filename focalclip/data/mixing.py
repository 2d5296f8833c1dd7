"""Several sources in exact proportions: which source stands at a position, and how far it has come there.

A segment of the run has fixed weights. They are taken as whole numbers of samples per period (0.5, 0.3, 0.2: five,
three and two of ten), and one period is dealt out so that, with k sources of weights w_i, the samples of source i among
the first n of a segment differ from w_i n by at most 1 - 1 / (2k - 2), so by less than one sample: Tijdeman's bound for
the chairman assignment problem (Discrete Mathematics 32, 1980), which is the best that holds for all weights. In any
window of n consecutive samples the difference is at most one where there is such an order, as a search finds; for many
weights of three or more sources (12 : 5 : 3) there is none, and Tijdeman's own order bounds it by 2 - 1 / (k - 1). With
two sources it is always at most one.

The source at a position and its place in that source's own order follow from the position by a table of one period, so
position 10^9 costs what position 0 does. Each source is permuted by itself, with a seed made of what it holds: weights
and other sources change nothing in its order. Where weights change, a new segment begins, in which each source goes on
at the place that it had reached.
"""

import bisect
import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from focalclip.base.errors import UserError
from focalclip.config import DataConfig, SourceConfig, source_of
from focalclip.data.order import HeldOut, SampleOrder
from focalclip.data.store import read_ranges

LARGEST_PERIOD = 1 << 16
"""Samples per period at most: weights that would need more are rounded to the nearest that do not."""

LARGEST_SEARCHED = 1 << 12
"""Samples per period at most for which an order within one sample in every window is looked for."""

_FIRST_BYTES = 1 << 16  # of a source's first shard, in its identity: shards of several sources have equal names

_TRIES = 16  # steps of that search per place of the period


def shares_of(weights: Sequence[float]) -> tuple[int, ...]:
    """Samples of each source per period.

    Exact where the weights, as they are written in decimals, have a common period of at most :data:`LARGEST_PERIOD`
    samples; else the period with the smallest largest error.

    Args:
        weights: 0 or more each, not all 0, in any unit.

    Raises:
        UserError: if a weight is too small a part of their sum to come once in the longest period.
    """
    exact = [Fraction(str(weight)) for weight in weights]
    parts = [weight / sum(exact) for weight in exact]
    period = math.lcm(*(part.denominator for part in parts))
    if period <= LARGEST_PERIOD:
        return tuple(int(part * period) for part in parts)
    wanted = np.array([float(part) for part in parts])
    periods = np.arange(1, LARGEST_PERIOD + 1)
    counts = np.rint(periods[:, None] * wanted)
    is_possible = (counts.sum(axis=1) == periods) & ((counts > 0) | (wanted == 0)).all(axis=1)
    if not is_possible.any():
        raise UserError(
            f"data.train: weight {min(filter(None, weights)):g} is less than 1/{LARGEST_PERIOD:,} of the sum of all "
            "weights; use a larger one, or 0"
        )
    errors = np.where(is_possible, np.abs(counts / periods[:, None] - wanted).max(axis=1), np.inf)
    return tuple(counts[int(errors.argmin())].astype(int).tolist())


@lru_cache(maxsize=8)
def deal(shares: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """One period: the source at each place of it, and how often that source came before in the period.

    Returns:
        int64 (period,) and int64 (period,).
    """
    numbers = np.flatnonzero(shares)
    active = tuple(share for share in shares if share)
    sources = numbers[_within_one(active) or _tijdeman(active)]
    places = np.zeros(len(sources), np.int64)
    for number, share in zip(numbers, active, strict=True):
        places[sources == number] = np.arange(share)
    return sources, places


def _tijdeman(shares: tuple[int, ...]) -> list[int]:
    """The source at each place of a period, by the algorithm of his theorem."""
    period, slack = sum(shares), max(2 * len(shares) - 2, 1)  # deviations are at most 1 - 1 / slack
    order, counts = [], [0] * len(shares)
    for place in range(1, period + 1):
        chosen, soonest = 0, math.inf
        for number, share in enumerate(shares):
            lag = share * place - counts[number] * period  # in samples times the period
            deadline = ((slack - 1) * period - slack * lag) / share  # fractions this small differ as floats, too
            if slack * lag >= period and deadline < soonest:
                chosen, soonest = number, deadline
        order.append(chosen)
        counts[chosen] += 1
    return order


_Deviations = tuple[tuple[int, int, int], ...]  # of each source: now, least and largest so far, in 1/period


def _within_one(shares: tuple[int, ...]) -> list[int] | None:
    """A period in which every window is within one sample of the shares, and every beginning within Tijdeman's bound.

    Found by a search in depth, which meets a few states per place: nearly every place is forced.

    Returns:
        The source at each place; None where there is no such order, or the period is too long to look for it.
    """
    period, slack = sum(shares), max(2 * len(shares) - 2, 1)

    def after(state: _Deviations) -> Iterator[tuple[int, _Deviations]]:
        """The sources that may come next, the most urgent first, and where each leads."""
        for chosen in sorted(range(len(shares)), key=lambda number: (state[number][0] + period) / shares[number]):
            new = []
            for number, (now, least, largest) in enumerate(state):
                now += (period if number == chosen else 0) - shares[number]
                new.append((now, min(least, now), max(largest, now)))
            if all(high - low <= period and abs(now) * slack <= period * (slack - 1) for now, low, high in new):
                yield chosen, tuple(new)

    if period > LARGEST_SEARCHED or len(shares) == 1:
        return None
    start = tuple((0, 0, 0) for _ in shares)
    order, path, dead = [], [(start, after(start))], set()
    for _ in range(_TRIES * period):
        if len(order) == period:
            return order
        state, options = path[-1]
        chosen, reached = next(((chosen, new) for chosen, new in options if new not in dead), (-1, start))
        if chosen >= 0:
            order.append(chosen)
            path.append((reached, after(reached)))
        elif not order:
            return None
        else:
            dead.add(state)
            path.pop()
            order.pop()
    return None


@dataclass(frozen=True)
class SourceShare:
    """One source within a segment."""

    id: str
    """What it holds, in a hash: see :func:`identities`."""
    name: str
    """As the configuration calls it."""
    share: int
    """Samples per period."""
    place: int
    """Samples drawn from it before the segment."""
    rules: dict[str, Any] = field(default_factory=dict)
    """Its own settings, beside the weight."""


@dataclass(frozen=True)
class Segment:
    """A part of the run with fixed weights."""

    start: int
    """Position of its first sample."""
    parts: tuple[SourceShare, ...]

    @property
    def shares(self) -> tuple[int, ...]:
        """Samples per period of each part."""
        return tuple(part.share for part in self.parts)

    def at(self, position: int) -> tuple[int, int]:
        """The part at a position of the segment, and the place in that source's own order."""
        sources, places = deal(self.shares)
        periods, rest = divmod(position - self.start, len(sources))
        number = int(sources[rest])
        part = self.parts[number]
        return number, part.place + periods * part.share + int(places[rest])

    def drawn(self, position: int) -> dict[str, int]:
        """Samples drawn from each source before a position, by its id."""
        sources, _ = deal(self.shares)
        periods, rest = divmod(position - self.start, len(sources))
        begun = np.bincount(sources[:rest], minlength=len(self.parts)).tolist()
        return {part.id: part.place + periods * part.share + begun[i] for i, part in enumerate(self.parts)}

    def to_json(self) -> dict[str, Any]:
        """For a checkpoint; :func:`read_segments` reads it."""
        return {"start": self.start, "parts": [asdict(part) for part in self.parts]}


def read_segments(values: Sequence[dict[str, Any]]) -> list[Segment]:
    """The segments of a checkpoint."""
    return [Segment(value["start"], tuple(SourceShare(**part) for part in value["parts"])) for value in values]


def identities(sources: Sequence[tuple[bytes, Sequence[tuple[Path, int]]]]) -> list[str]:
    """What each source holds, in a hash: names and numbers of samples of its shards, and the first bytes of the first.

    It is the same wherever the shards lie. Of sources that are equal in all of it, the second has a hash of its own.

    Args:
        sources: Of each source the first bytes, and file and samples of each shard.
    """
    found, seen = [], Counter()
    for first, shards in sources:
        lines = [hashlib.sha256(first).hexdigest(), *[f"{shard.name} {count}" for shard, count in shards]]
        digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
        seen[digest] += 1
        found.append(digest if seen[digest] == 1 else f"{digest}-{seen[digest]}")
    return found


def continued(past: Sequence[Segment], parts: Sequence[SourceShare], position: int) -> tuple[list[Segment], list[str]]:
    """The segments of a run that begins or goes on at a position.

    Args:
        past: Its segments so far; none at the start of a run.
        parts: The sources now, in the order of the configuration; their places do not matter.
        position: Samples consumed so far.

    Returns:
        The segments, with another one if weights have changed; and what has changed, in sentences.

    Raises:
        UserError: if a source has gone, or its own settings are others than before.
    """
    if not past:
        return [Segment(0, tuple(parts))], []
    last = past[-1]
    before, now = {part.id: part for part in last.parts}, {part.id: part for part in parts}
    if gone := [part.name for part in last.parts if part.id not in now]:
        raise UserError(
            f"data.train: the run was drawing from {gone[0]}, which is not in the list or holds other shards than "
            "before (names, numbers of samples); give the same shards, with weight 0 if they are to be left out from "
            "now on, or choose another --name"
        )
    for part in parts:
        old = before.get(part.id, part).rules
        for rule in sorted(old | part.rules):
            if old.get(rule) != part.rules.get(rule):
                raise UserError(
                    f"data.train: {part.name} had {rule}={old.get(rule)} until now, and now has "
                    f"{part.rules.get(rule)}; only weights may change at a resume, so give the same, or choose another "
                    "--name"
                )
    proportions = [{part.id: Fraction(part.share, sum(segment.shares)) for part in segment.parts if part.share}
                   for segment in (last, Segment(position, tuple(parts)))]  # fmt: skip
    if proportions[0] == proportions[1] and before.keys() == now.keys():
        return list(past), []
    drawn = last.drawn(position)
    changes = []
    for part in parts:
        weights = [float(shares.get(part.id, 0)) for shares in proportions]
        if part.id not in before:
            changes.append(f"{part.name} added with weight {weights[1]:.6g}")
        elif weights[0] != weights[1]:
            changes.append(f"{part.name} from weight {weights[0]:.6g} to {weights[1]:.6g}, from its sample "
                           f"{drawn[part.id]:,} on")  # fmt: skip
    renewed = tuple(SourceShare(part.id, part.name, part.share, drawn.get(part.id, 0), part.rules) for part in parts)
    kept = [segment for segment in past if segment.start < position]
    return [*kept, Segment(position, renewed)], changes


class MixedOrder:
    """The order of samples of several weighted sources.

    Args:
        shards: Numbers of the shards of each source within all shards, int64 each.
        orders: The order of each source by itself.
        ids: The identity of each source.
        segments: In order; the first begins where the run does.
    """

    def __init__(
        self, shards: Sequence[np.ndarray], orders: Sequence[SampleOrder], ids: Sequence[str], segments: list[Segment]
    ):
        self._shards, self._orders = shards, orders
        self._segments, self._starts = segments, [segment.start for segment in segments]
        self.num_windows = len(orders)
        """Windows that are in use at a time."""
        numbers = {identity: number for number, identity in enumerate(ids)}
        self._sources = [[numbers[part.id] for part in segment.parts] for segment in segments]

    def locate(self, position: int, behind: int = 0) -> tuple[int, int]:
        """Shard number and sample number within it, at a position counted over the whole run.

        Args:
            position: From the start of the first segment on.
            behind: So many samples later in the order of the same source.
        """
        number = max(bisect.bisect_right(self._starts, position) - 1, 0)
        part, place = self._segments[number].at(position)
        source = self._sources[number][part]
        shard, sample = self._orders[source].locate(place, behind)
        return int(self._shards[source][shard]), sample


@dataclass
class Mixture:
    """What decides which sample stands at a position, and what is said about it."""

    order: SampleOrder | MixedOrder
    names: list[str]
    """The sources, in the order of ``data.train``."""
    counts: list[int]
    """Pairs of each source that are not held out."""
    ids: list[str]
    segments: list[Segment]
    """Empty where sources are not weighted."""
    changes: list[str]
    """What differs from before, in sentences, where the run goes on with other weights or sources."""

    def table(self, samples: int) -> list[str]:
        """A line for each source: pairs, weight, share of all samples, and epochs of a run of so many samples."""
        total, rows = sum(self.counts), [("pairs", "share", "epochs", "source")]
        parts = {part.id: part for part in self.segments[-1].parts} if self.segments else {}
        drawn = self.segments[-1].drawn(samples) if self.segments else {}
        for name, count, identity in zip(self.names, self.counts, self.ids, strict=True):
            if parts:
                share, epochs = parts[identity].share / sum(self.segments[-1].shares), drawn[identity] / count
            else:
                share, epochs = count / total, samples / total
            rows.append((f"{count:,}", f"{share:.4g}", f"{epochs:.1f}", name))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        widths[-1] = 0
        return ["  ".join(map(str.rjust, row, widths)) for row in rows]


def mixture(
    shards: Sequence[tuple[Path, int, int]], data: DataConfig, seed: int, past: Sequence[Segment], position: int
) -> Mixture:
    """The order of the samples of ``data.train`` for a run that begins or goes on at a position.

    Args:
        shards: File, samples, and number of its entry of ``data.train``, of each shard that is trained on.
        data: The sources with their weights.
        seed: Seed of all permutations.
        past: Segments of the run so far; none at its start, or where sources are not weighted.
        position: Samples consumed so far.

    Raises:
        UserError: if a source is too small for its part of a batch, or is not what it was.
        ValueError: if the shards are not those of ``data.train``.
    """
    entries, weights = data.entries, data.weights
    if any(own >= len(entries) for *_, own in shards):
        raise ValueError("the shards are of more sources than data.train names")
    numbers = [np.array([i for i, (*_, own) in enumerate(shards) if own == n], dtype=np.int64)
               for n in range(len(entries))]  # fmt: skip
    names = [source_of(entry) for entry in entries]
    counts = np.array([count for _, count, _ in shards], dtype=np.int64)
    if weights is None:
        if past:
            raise UserError("data.train: the run mixes its sources by weights; give them, or choose another --name")
        order = SampleOrder(counts, seed, data.window_shards, held_out=_held_out(shards, data))
        return Mixture(order, names, [int(order.counts[own].sum()) for own in numbers], names, [], [])
    firsts = [_first_bytes(shards[own[0]][0]) if len(own) else b"" for own in numbers]
    ids = identities([(first, [shards[i][:2] for i in own]) for first, own in zip(firsts, numbers, strict=True)])
    orders = [SampleOrder(counts[own], seed, data.window_shards, identity, _held_out([shards[i] for i in own], data))
              for own, identity in zip(numbers, ids, strict=True)]  # fmt: skip
    totals = [order.num_samples for order in orders]
    shares = shares_of(weights)
    for name, total, share in zip(names, totals, shares, strict=True):
        if share * data.batch_size > total * sum(shares):
            raise UserError(
                f"data.train: {name} has {total:,} pairs, fewer than its {share * data.batch_size // sum(shares)} of "
                f"data.batch_size={data.batch_size}; a batch would hold samples twice; lower its weight or the batch"
            )
    rules = [entry.rules if isinstance(entry, SourceConfig) else {} for entry in entries]
    parts = [SourceShare(*values) for values in zip(ids, names, shares, [0] * len(ids), rules, strict=True)]
    segments, changes = continued(past, parts, position)
    return Mixture(MixedOrder(numbers, orders, ids, segments), names, totals, ids, segments, changes)


def _held_out(shards: Sequence[tuple[Path, int, int]], data: DataConfig) -> HeldOut | None:
    return HeldOut([shard.name for shard, *_ in shards], data.val_fraction) if data.val_fraction else None


def _first_bytes(shard: Path) -> bytes:
    try:
        return read_ranges(shard, [(0, _FIRST_BYTES)])[0]
    except OSError as error:
        raise UserError(f"data.train: {shard} cannot be read ({error.strerror or error}); try again") from None
