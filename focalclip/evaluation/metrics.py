"""The four ELEVATER metrics from their definitions, in float64.

Every metric takes optional ``weights`` of shape (draws, N): how often each image counts. All ones give the value
itself, multinomial draws give its bootstrap, so that one piece of code computes both.
"""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def true_class_ranks(scores: NDArray[np.floating], labels: NDArray[np.integer]) -> NDArray[np.int64]:
    """Place of each image's true class among its scores, 0 for the best; of equal scores the lower class comes first.

    So rank 0 is exactly ``argmax == label``, and rank < k is top-k.

    Args:
        scores: (N, C).
        labels: (N,), in [0, C).
    """
    true = scores[np.arange(len(labels)), labels][:, None]
    ahead = (scores == true) & (np.arange(scores.shape[1])[None] < labels[:, None])
    return ((scores > true) | ahead).sum(axis=1)


def accuracy(correct: NDArray[np.bool_], weights: Floats | None = None) -> Floats:
    """Fraction of images that are right (N,) -> (draws,)."""
    weights = _ones(len(correct)) if weights is None else weights
    return weights @ correct.astype(np.float64) / weights.sum(axis=1)


def mean_per_class(correct: NDArray[np.bool_], labels: NDArray[np.integer], weights: Floats | None = None) -> Floats:
    """Mean over the classes that occur of the fraction of their images that are right (balanced accuracy) -> (draws,).

    ELEVATER drops classes without images before it takes the arg-max; the caller does so (:func:`occurring_classes`).
    """
    weights = _ones(len(correct)) if weights is None else weights
    member = (labels[:, None] == np.unique(labels)[None]).astype(np.float64)  # N, C'
    count = weights @ member
    right = weights @ (member * correct[:, None])
    recall = np.divide(right, count, out=np.full_like(count, np.nan), where=count > 0)
    return np.nanmean(recall, axis=1)


def occurring_classes(labels: NDArray[np.integer]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The classes that occur (C',), and each label's index among them (N,)."""
    classes, index = np.unique(labels, return_inverse=True)
    return classes.astype(np.int64), index.astype(np.int64)


def roc_auc(scores: NDArray[np.floating], positives: NDArray[np.bool_], weights: Floats | None = None) -> Floats:
    """Chance that a positive image scores above a negative one; a tie counts one half (N,) -> (draws,).

    Not a number in draws that hold only one of the two kinds.
    """
    weights = _ones(len(scores)) if weights is None else weights
    order, ends = _threshold_groups(scores)
    weights, positives = weights[:, order], positives[order]
    positive = _group_sums(weights * positives, ends)  # per distinct score, best first
    negative = _group_sums(weights * ~positives, ends)
    above = np.cumsum(positive, axis=1) - positive
    pairs = positive.sum(axis=1) * negative.sum(axis=1)
    wins = (negative * (above + 0.5 * positive)).sum(axis=1)
    return np.divide(wins, pairs, out=np.full_like(wins, np.nan), where=pairs > 0)


def average_precision_11point(
    scores: NDArray[np.floating], positives: NDArray[np.bool_], weights: Floats | None = None
) -> Floats:
    """Mean over recalls 0, 0.1 ... 1 of the highest precision at that recall or above (N,) -> (draws,).

    As in ELEVATER (microsoft/vision-evaluation), the curve has the artificial end point precision 1 at recall 0, so the
    term of recall 0 is always 1; classic VOC code has no such point. Recalls are compared as exact fractions.
    Not a number in draws without a positive.
    """
    weights = _ones(len(scores)) if weights is None else weights
    if not positives.any():
        return np.full(len(weights), np.nan)
    order, ends = _threshold_groups(scores)
    weights, positives = weights[:, order], positives[order]
    # a threshold that adds no positive only lowers precision at the same recall, so it is never the highest
    ends = ends[np.diff(np.cumsum(positives)[ends], prepend=0) > 0]
    hits = np.cumsum(weights * positives, axis=1)[:, ends]
    seen = np.cumsum(weights, axis=1)[:, ends]
    precision = np.divide(hits, seen, out=np.zeros_like(hits), where=seen > 0)
    best = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]  # highest precision from this recall upwards
    total = hits[:, -1]
    result = np.ones(len(weights))  # recall 0: the artificial end point
    for tenth in range(1, 11):
        first = np.argmax(10 * hits >= tenth * total[:, None], axis=1)
        result += best[np.arange(len(best)), first]
    return np.where(total > 0, result / 11, np.nan)


def map_11point(scores: NDArray[np.floating], positives: NDArray[np.bool_], weights: Floats | None = None) -> Floats:
    """Mean of :func:`average_precision_11point` over the classes that have a positive (N, C), (N, C) -> (draws,).

    ELEVATER ranks by the softmax over classes of 100 x cosine, not by the cosine: pass those probabilities.
    """
    columns = np.flatnonzero(positives.any(axis=0))
    each = [average_precision_11point(scores[:, c], positives[:, c], weights) for c in columns]
    return np.nanmean(np.stack(each), axis=0)


def softmax(logits: NDArray[np.floating]) -> Floats:
    """Softmax over the last axis, in float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    exponentials = np.exp(shifted)
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def _ones(n: int) -> Floats:
    return np.ones((1, n))


def _threshold_groups(scores: NDArray[np.floating]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Order of descending score (N,), and the last place of each run of equal scores (groups,)."""
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    ends = np.append(np.flatnonzero(ranked[1:] != ranked[:-1]), len(ranked) - 1)
    return order, ends


def _group_sums(values: Floats, ends: NDArray[np.int64]) -> Floats:
    """Sums of columns over consecutive groups that end at ``ends``: (draws, N) -> (draws, groups)."""
    starts = np.concatenate([[0], ends[:-1] + 1])
    return np.add.reduceat(values, starts, axis=1)
