"""One line per class, and which classes are taken for which."""

from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from focalclip.evaluation.metrics import METRICS
from focalclip.evaluation.metrics.definitions import Floats
from focalclip.evaluation.predictions import Predictions


class Confusion(NamedTuple):
    """Images of one class that were taken for another."""

    true: int
    given: int
    count: int
    share: float
    """Of the true class's images."""
    rows: NDArray[np.int64]
    """Of the predictions."""


class ClassNumbers(NamedTuple):
    """How one class fares."""

    index: int
    name: str
    n: int
    value: float
    """Recall; average precision for multi-label data; not a number without images."""
    given: int
    """Images that were answered with this class."""
    precision: float
    """Of those, the share that was right; not a number where there is none."""
    confused: tuple[Confusion, ...]
    """What its images were most often taken for; empty for multi-label data."""


def confusions(predictions: Predictions) -> list[Confusion]:
    """Every pair of classes that was confused, the commonest first; none for multi-label data."""
    if predictions.multilabel:
        return []
    wrong = np.flatnonzero(~predictions.correct)
    size = len(predictions.class_names)
    pair = predictions.labels[wrong] * size + predictions.predicted[wrong]
    order = np.argsort(pair, kind="stable")
    kinds, starts = np.unique(pair[order], return_index=True)
    groups = np.split(wrong[order], starts[1:]) if len(kinds) else []
    totals = np.bincount(predictions.labels, minlength=size)
    found = [
        Confusion(int(kind) // size, int(kind) % size, len(rows), len(rows) / int(totals[int(kind) // size]), rows)
        for kind, rows in zip(kinds, groups, strict=True)
    ]
    return sorted(found, key=lambda c: (-c.count, -c.share, c.true, c.given))


def class_numbers(predictions: Predictions, shown: int = 3) -> list[ClassNumbers]:
    """One row per class, in the order of the labels, each with its ``shown`` commonest confusions."""
    size, labels, correct = len(predictions.class_names), predictions.labels, predictions.correct
    given = np.bincount(predictions.predicted, minlength=size)
    right = np.bincount(predictions.predicted[correct], minlength=size)
    by_class: dict[int, list[Confusion]] = {}
    for confusion in confusions(predictions):
        by_class.setdefault(confusion.true, []).append(confusion)
    if predictions.multilabel:
        n, values = labels.sum(axis=0), _average_precisions(predictions)
    else:
        n = np.bincount(labels, minlength=size)
        values = _ratio(np.bincount(labels[correct], minlength=size), n)
    precision = _ratio(right, given)
    return [
        ClassNumbers(
            i, name, int(n[i]), float(values[i]), int(given[i]), float(precision[i]), tuple(by_class.get(i, [])[:shown])
        )
        for i, name in enumerate(predictions.class_names)
    ]


def _average_precisions(predictions: Predictions) -> Floats:
    """Of each class, as the metric averages them; not a number without positives."""
    metric, answers = METRICS[predictions.metric], predictions.answers
    ranked, labels = answers.ranked, answers.labels
    columns = [
        replace(answers, labels=labels[:, [c]], scores=ranked[:, [c]], are_cosines=False)
        for c in range(labels.shape[1])
    ]
    return np.array([metric.value(column) if column.labels.any() else np.nan for column in columns])


def _ratio(part: NDArray[np.integer], whole: NDArray[np.integer]) -> Floats:
    return np.divide(part, whole, out=np.full(len(whole), np.nan), where=whole > 0)
