"""Classification metrics from their definitions, in float64.

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
    classes = np.unique(labels)
    count = _class_sums(weights, labels, classes)
    right = _class_sums(weights * correct, labels, classes)
    recall = np.divide(right, count, out=np.full_like(count, np.nan), where=count > 0)
    return np.nanmean(recall, axis=1)


def macro_f1(predicted: NDArray[np.integer], labels: NDArray[np.integer], weights: Floats | None = None) -> Floats:
    """Mean over the classes that occur of 2 x right / (answered + occurring) (N,), (N,) -> (draws,).

    As WILDS computes it for iWildCam: a class that is answered but never occurs has no F1 itself (answering it costs
    the true class recall).
    """
    weights = _ones(len(labels)) if weights is None else weights
    classes = np.unique(labels)
    count = _class_sums(weights, labels, classes)
    answered = _class_sums(weights, predicted, classes)
    right = _class_sums(weights * (predicted == labels), labels, classes)
    f1 = np.divide(2 * right, count + answered, out=np.full_like(count, np.nan), where=count > 0)
    return np.nanmean(f1, axis=1)


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


def average_precision(
    scores: NDArray[np.floating], positives: NDArray[np.bool_], weights: Floats | None = None
) -> Floats:
    """Mean over the positives of the precision at their score (N,) -> (draws,).

    Equal scores are one threshold, as in scikit-learn; CLIP_benchmark breaks such ties in the arbitrary
    order of its sort. Zero in draws without a positive, as in both.
    """
    hits, seen, total = _hits(scores, positives, weights)
    gained = np.diff(hits, prepend=0)
    return np.divide((gained * _precision(hits, seen)).sum(axis=1), total, out=np.zeros_like(total), where=total > 0)


def average_precision_11point(
    scores: NDArray[np.floating],
    positives: NDArray[np.bool_],
    weights: Floats | None = None,
    end_point: bool = True,
) -> Floats:
    """Mean over recalls 0, 0.1 ... 1 of the highest precision at that recall or above (N,) -> (draws,).

    Recalls are compared as exact fractions. Not a number in draws without a positive.

    Args:
        scores: (N,).
        positives: (N,).
        weights: (draws, N).
        end_point: with precision 1 at recall 0, as in ELEVATER (microsoft/vision-evaluation), so that the term of
            recall 0 is always 1; without it, as in the development kit of VOC 2007.
    """
    hits, seen, total = _hits(scores, positives, weights)
    if not hits.shape[1]:
        return np.full(len(hits), np.nan)
    best = np.maximum.accumulate(_precision(hits, seen)[:, ::-1], axis=1)[:, ::-1]  # highest from this recall upwards
    result = np.ones(len(hits)) if end_point else best[:, 0].copy()
    for tenth in range(1, 11):
        first = np.argmax(10 * hits >= tenth * total[:, None], axis=1)
        result += best[np.arange(len(best)), first]
    return np.where(total > 0, result / 11, np.nan)


def map_11point(
    scores: NDArray[np.floating],
    positives: NDArray[np.bool_],
    weights: Floats | None = None,
    end_point: bool = True,
) -> Floats:
    """Mean of :func:`average_precision_11point` over the classes that have a positive (N, C), (N, C) -> (draws,).

    ELEVATER ranks by the softmax over classes of 100 x cosine, not by the cosine: pass those probabilities.
    """
    columns = np.flatnonzero(positives.any(axis=0))
    each = [average_precision_11point(scores[:, c], positives[:, c], weights, end_point) for c in columns]
    return np.nanmean(np.stack(each), axis=0)


def mean_average_precision(
    scores: NDArray[np.floating], positives: NDArray[np.bool_], weights: Floats | None = None
) -> Floats:
    """Mean of :func:`average_precision` over all classes (N, C), (N, C) -> (draws,).

    A class without a positive counts zero, as in CLIP_benchmark (which ranks by cosine) and in scikit-learn's macro
    average.
    """
    each = [average_precision(scores[:, c], positives[:, c], weights) for c in range(scores.shape[1])]
    return np.mean(np.stack(each), axis=0)


def softmax(logits: NDArray[np.floating]) -> Floats:
    """Softmax over the last axis, in float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    exponentials = np.exp(shifted)
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def _ones(n: int) -> Floats:
    return np.ones((1, n))


def _hits(
    scores: NDArray[np.floating], positives: NDArray[np.bool_], weights: Floats | None
) -> tuple[Floats, Floats, Floats]:
    """Positives and images seen at each threshold that gains a positive, best first (draws, T); all positives (draws,).

    A threshold that gains none only lowers precision at the same recall, so no average of precisions needs it.
    """
    weights = _ones(len(scores)) if weights is None else weights
    order, ends = _threshold_groups(scores)
    weights, positives = weights[:, order], positives[order]
    ends = ends[np.diff(np.cumsum(positives)[ends], prepend=0) > 0]
    hits = np.cumsum(weights * positives, axis=1)
    return hits[:, ends], np.cumsum(weights, axis=1)[:, ends], hits[:, -1]


def _precision(hits: Floats, seen: Floats) -> Floats:
    return np.divide(hits, seen, out=np.zeros_like(hits), where=seen > 0)


def _class_sums(values: Floats, labels: NDArray[np.integer], classes: NDArray[np.integer]) -> Floats:
    """Sums over the images of each class: (draws, N), labels (N,), classes (C',) ascending -> (draws, C')."""
    order = np.argsort(labels, kind="stable")
    running = np.cumsum(values[:, order], axis=1)
    running = np.concatenate([np.zeros((len(values), 1)), running], axis=1)
    ranked = labels[order]
    return running[:, np.searchsorted(ranked, classes, "right")] - running[:, np.searchsorted(ranked, classes, "left")]


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
