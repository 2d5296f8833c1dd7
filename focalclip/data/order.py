"""Which sample stands at a position, and which random numbers it meets there: pure functions, nothing is stored.

A position counts samples from the start of training over all epochs: position p lies in epoch ``p // n``. Everything
follows from (seed, position), so the whole state of the data is one integer, for any number of ranks, workers and
batches. Only the raw words of numpy's Philox are used, whose stream numpy keeps stable (NEP 19), never its
distributions, which may change.
"""

import bisect
import enum
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_SHARDS, _SAMPLES, _DRAWS = range(3)  # what a stream of random words is for

_KEPT_WINDOWS = 2  # a batch may lie across the border of two windows


class Draw(enum.IntEnum):
    """Columns of the uniform numbers that belong to one position."""

    CAPTION_FIRST = 0
    CAPTION = enum.auto()
    AREA = enum.auto()
    RATIO = enum.auto()
    LEFT = enum.auto()
    TOP = enum.auto()
    FLIP = enum.auto()
    GREY = enum.auto()
    INVERT = enum.auto()
    RECOLOUR = enum.auto()
    PERMUTATION = enum.auto()
    RED = enum.auto()
    GREEN = enum.auto()
    BLUE = enum.auto()
    ANGLE = enum.auto()
    CAPTION_MORE = enum.auto()


_WORDS = 16  # per position; a multiple of Philox's block of 4

_BLOCKS = _WORDS // 4


def uniform_draws(seed: int, start: int, count: int) -> np.ndarray:
    """The random numbers of ``count`` positions from ``start`` on.

    Returns:
        float64 (count, 16), uniform in [0, 1); the columns are named by :class:`Draw`.
    """
    key = np.random.SeedSequence([_DRAWS, seed]).generate_state(2, np.uint64)
    philox = np.random.Philox(key=key, counter=start * _BLOCKS)
    return (philox.random_raw(count * _WORDS) >> np.uint64(11)).reshape(count, _WORDS) * 2.0**-53


def hash_words(shard: str, count: int) -> np.ndarray:
    """A random word for each sample of a shard, which depends on the shard's name and the sample's number alone.

    Returns:
        uint64 (count,).
    """
    digest = hashlib.sha256(shard.encode(errors="surrogateescape")).digest()
    return np.random.Philox(key=np.frombuffer(digest[:16], "<u8")).random_raw(count)


@dataclass(frozen=True)
class HeldOut:
    """Which samples are never trained on: those whose word of :func:`hash_words` is below a limit.

    So it depends neither on the seed nor on the other shards, and a larger fraction holds out those of a smaller one.
    """

    names: Sequence[str]
    """The file name of each shard."""
    fraction: float
    """Of the samples, in (0, 1)."""

    def mask(self, shard: int, count: int) -> np.ndarray:
        """Whether each of the shard's ``count`` samples is held out, bool (count,)."""
        return hash_words(self.names[shard], count) < np.uint64(self.fraction * 2.0**64)


class SampleOrder:
    """The order of samples: shards are permuted, then samples within windows of consecutive permuted shards.

    Every sample comes exactly once per epoch, and each epoch has another order. A reader touches the files of
    one window at a time.

    Args:
        counts: Samples per shard, int64 (shards,).
        seed: Seed of all permutations.
        window_shards: Shards per window.
        identity: Of one of several sources that are permuted separately; None where there is one order.
        held_out: Samples that come in no epoch; None: there are none.
    """

    num_windows = 1
    """Windows that are in use at a time."""

    def __init__(
        self,
        counts: np.ndarray,
        seed: int,
        window_shards: int,
        identity: str | None = None,
        held_out: HeldOut | None = None,
    ):
        self._all, self._held_out = counts, held_out
        if held_out is not None:
            kept = [int(count) - int(held_out.mask(i, count).sum()) for i, count in enumerate(counts)]
            counts = np.array(kept, dtype=np.int64)
        self.counts = counts
        """Samples per shard that are not held out, int64 (shards,)."""
        self.num_samples = int(counts.sum())
        """Samples per epoch."""
        self._seed = (seed,) if identity is None else (seed, int.from_bytes(identity.encode()))
        self._window_shards = window_shards
        self._epoch = -1
        self._windows: dict[tuple[int, int], np.ndarray] = {}

    def locate(self, position: int, behind: int = 0) -> tuple[int, int]:
        """Shard number and sample number within it, at a position counted over all epochs, or so many behind it."""
        epoch, place = divmod(position + behind, self.num_samples)
        if epoch != self._epoch:
            self._enter_epoch(epoch)
        window = bisect.bisect_right(self._window_starts, place) - 1
        shard, sample = self._window(epoch, window)[place - self._window_starts[window]].tolist()
        return shard, sample

    def _enter_epoch(self, epoch: int) -> None:
        """Permute the shards, cut them into windows and lay these end to end."""
        self._shards = _permutation(len(self.counts), _SHARDS, *self._seed, epoch)
        ends = np.cumsum(self.counts[self._shards])
        self._window_starts = [0, *ends[self._window_shards - 1 : -1 : self._window_shards].tolist()]
        self._epoch = epoch

    def _window(self, epoch: int, window: int) -> np.ndarray:
        """Shard and sample at each place of one window, int64 (places, 2); kept while it is in use."""
        if (epoch, window) not in self._windows:
            shards = self._shards[window * self._window_shards :][: self._window_shards]
            table = np.concatenate([self._samples_of(shard) for shard in shards])
            while len(self._windows) >= _KEPT_WINDOWS:
                del self._windows[next(iter(self._windows))]
            self._windows[epoch, window] = table[_permutation(len(table), _SAMPLES, *self._seed, epoch, window)]
        return self._windows[epoch, window]

    def _samples_of(self, shard: int) -> np.ndarray:
        """All samples of a shard that are trained on, int64 (samples, 2)."""
        numbers = np.arange(self._all[shard])
        if self._held_out is not None:
            numbers = numbers[~self._held_out.mask(shard, len(numbers))]
        return np.stack([np.full(len(numbers), shard), numbers], axis=1)


def _permutation(n: int, *entropy: int) -> np.ndarray:
    """A permutation of 0..n-1 that depends on the integers of ``entropy`` alone."""
    words = np.random.Philox(np.random.SeedSequence(entropy)).random_raw(n)
    return np.argsort(words, kind="stable")
