"""What scores and intervals must equal, by scipy, scikit-learn and plain counting."""

import numpy as np
from scipy import special, stats
from sklearn import metrics as sk


def softmax(logits):
    """Over the classes (N, C), in float64."""
    return special.softmax(np.asarray(logits, dtype=np.float64), axis=1)


def average_precision_11point(scores, positives, end_point=True):
    """From scikit-learn's curve, whose last point is (precision 1, recall 0); exact fractions by counting."""
    precision, recall, _ = sk.precision_recall_curve(positives, scores)
    hits = np.rint(recall * positives.sum()).astype(int)
    if not end_point:
        precision, hits = precision[:-1], hits[:-1]
    return np.mean([max(precision[10 * hits >= tenth * positives.sum()]) for tenth in range(11)])


def map_11point(scores, labels, end_point=True):
    """Mean over the classes that have a positive: (N, C) and 0/1 labels (N, C)."""
    labels = np.asarray(labels, dtype=bool)
    classes = [c for c in range(labels.shape[1]) if labels[:, c].any()]
    return np.mean([average_precision_11point(scores[:, c], labels[:, c], end_point) for c in classes])


def mean_average_precision(scores, labels):
    """Without interpolation, every class having a positive."""
    return sk.average_precision_score(np.asarray(labels, dtype=bool), scores, average="macro")


def wilson_interval(hits, n):
    """Of a share, at 95%."""
    interval = stats.binomtest(int(hits), n).proportion_ci(0.95, method="wilson")
    return interval.low, interval.high
