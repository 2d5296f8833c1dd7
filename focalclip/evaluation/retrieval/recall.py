"""Numbers of one direction from its ranks: recall with interval, chance level and ceiling; mean reciprocal rank."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from focalclip.evaluation.metrics.intervals import wilson_interval
from focalclip.evaluation.retrieval.pairs import PairData

RECALL_AT = (1, 5, 10)


@dataclass(frozen=True)
class Recall:
    """Fraction of queries with a right answer among the first K."""

    value: float
    interval: tuple[float, float]
    """95%."""
    chance: float
    """Of answers in random order."""
    ceiling: float
    """Of a perfect model: below 1 where several images have the same caption, which no model can distinguish."""


@dataclass(frozen=True)
class Direction:
    """One way of asking."""

    queries: int
    candidates: int
    recall: dict[int, Recall]
    """By K."""
    mrr: float
    """Mean of 1 / rank."""
    mrr_interval: tuple[float, float]
    median_rank: float
    """1 is the best."""
    mean_rank: float

    def to_json(self) -> dict[str, object]:
        """JSON-ready; recalls are called ``recall@1`` ..."""
        recalls = {f"recall@{k}": vars(recall) for k, recall in self.recall.items()}
        rest = {name: value for name, value in vars(self).items() if name != "recall"}
        return recalls | rest


def image_to_text(ranks: NDArray[np.int64], data: PairData) -> Direction:
    """Images ask for one of their captions; the images are independent of each other."""
    n, m = len(data.entries), len(data.captions)
    right = np.bincount(data.pairs[:, 0], minlength=n)
    return _direction(ranks, m, right, np.arange(n), _image_ceilings(data))


def text_to_image(ranks: NDArray[np.int64], data: PairData) -> Direction:
    """Captions ask for their image; those of one image are correlated, and the intervals allow for it."""
    n, m = len(data.entries), len(data.captions)
    right = np.bincount(data.pairs[:, 1], minlength=m)
    first_image = np.full(m, n)
    np.minimum.at(first_image, data.pairs[:, 1], data.pairs[:, 0])
    return _direction(ranks, n, right, first_image, _text_ceilings(data))


def clustered_interval(values: NDArray[np.floating], clusters: NDArray[np.integer]) -> tuple[float, float]:
    """95% interval of the mean of numbers in [0, 1], of which those of one cluster may be correlated.

    Wilson's score interval on an effective sample size: the variance of the mean is taken over clusters (the
    linearised ratio estimator; also arXiv 2411.00640), and n is what would give that variance to a proportion (Korn and
    Graubard, 1998, who put it into another interval). It is never above the number of values, and the number of
    clusters where all values are 0 or all are 1. With a cluster for each value of 0 or 1 it is Wilson's interval.

    Args:
        values: (n,).
        clusters: (n,), numbers that name each value's cluster.
    """
    mean = float(values.mean())
    excess = np.bincount(clusters, weights=values - mean)
    variance = float((excess**2).sum()) / len(values) ** 2
    spread = mean * (1 - mean)
    n = min(spread / variance, len(values)) if spread > 0 and variance > 0 else len(np.unique(clusters))
    return wilson_interval(mean * n, n)


def chance_recall(candidates: int, right: NDArray[np.integer], k: int) -> float:
    """Mean chance that one of a query's ``right`` (queries,) answers is among the first ``k`` in random order."""
    if k >= candidates:
        return 1.0
    drawn = np.arange(k)
    counts, how_often = np.unique(right, return_counts=True)
    left = np.clip(candidates - counts[:, None] - drawn, 0, None) / (candidates - drawn)
    return float(((1 - left.prod(axis=1)) * how_often).sum() / len(right))


def _direction(
    ranks: NDArray[np.int64],
    candidates: int,
    right: NDArray[np.integer],
    clusters: NDArray[np.integer],
    ceilings: Sequence[float],
) -> Direction:
    recalls = {}
    for k, ceiling in zip(RECALL_AT, ceilings, strict=True):
        hits = (ranks <= k).astype(np.float64)
        interval = clustered_interval(hits, clusters)
        recalls[k] = Recall(float(hits.mean()), interval, chance_recall(candidates, right, k), ceiling)
    reciprocal = 1 / ranks
    return Direction(
        queries=len(ranks),
        candidates=candidates,
        recall=recalls,
        mrr=float(reciprocal.mean()),
        mrr_interval=clustered_interval(reciprocal, clusters),
        median_rank=float(np.median(ranks)),
        mean_rank=float(ranks.mean()),
    )


def _image_ceilings(data: PairData) -> list[float]:
    """Of the equal captions that a perfect model puts first, those of lower index come before the image's own."""
    if data.is_merged:
        return [1.0] * len(RECALL_AT)
    _, text = data.distinct()
    best = np.full(len(data.entries), len(data.captions))
    np.minimum.at(best, data.pairs[:, 0], _place_in_group(text)[data.pairs[:, 1]])
    return [float((best < k).mean()) for k in RECALL_AT]


def _text_ceilings(data: PairData) -> list[float]:
    """A perfect model puts all images of a text first; at most K of them, best those with most copies, are in time."""
    if data.is_merged:
        return [1.0] * len(RECALL_AT)
    _, text = data.distinct()
    places, copies = np.unique(text[data.pairs[:, 1]] * len(data.entries) + data.pairs[:, 0], return_counts=True)
    group = places // len(data.entries)
    order = np.lexsort((-copies, group))
    place = _place_in_group(group[order])
    return [float(copies[order][place < k].sum() / len(data.captions)) for k in RECALL_AT]


def _place_in_group(group: NDArray[np.integer]) -> NDArray[np.int64]:
    """How many earlier elements are of the same group, for each element (n,)."""
    order = np.argsort(group, kind="stable")
    _, first, counts = np.unique(group[order], return_index=True, return_counts=True)
    place = np.empty(len(group), dtype=np.int64)
    place[order] = np.arange(len(group)) - np.repeat(first, counts)
    return place
