"""From image and class vectors to one number with its interval and its chance level."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from focalclip.errors import UserError
from focalclip.evaluation import metrics
from focalclip.evaluation.datasets import TaskData
from focalclip.evaluation.intervals import bootstrap_interval, wilson_interval
from focalclip.evaluation.tasks import Metric, Task

ELEVATER_SCALE = 100.0  # ELEVATER scores by softmax(100 x cosine), whatever temperature the model learned
TOP_K = 5
_CHUNK = 8192  # images per block of the score matrix
_RANDOM_DRAWS = 20


@dataclass(frozen=True)
class Score:
    """A metric's value in [0, 1]."""

    value: float
    interval: tuple[float, float]
    chance: float
    extras: dict[str, float] = field(default_factory=dict)
    """Further numbers: accuracy, top5, majority (always saying the commonest class)."""


def check_task(task: Task, data: TaskData) -> str:
    """Refuse data that is not the task's; return which known test set it is.

    Raises:
        UserError: if the number of classes, of images, or the kind of labels is another.
    """
    classes = len(data.class_names)
    if task.classes not in (None, classes):
        raise UserError(f"{data.folder} has {classes} class names, the task has {task.classes}; wrong folder?")
    if data.multilabel != (task.metric == "map_11point"):
        kind = "several labels" if data.multilabel else "one label"
        raise UserError(f"{data.folder} has {kind} per image, which {task.metric} cannot score; wrong folder?")
    if task.metric == "roc_auc" and classes != 2:
        raise UserError(f"roc_auc needs 2 classes, {data.folder} has {classes}; choose another metric")
    return task.which_test_set(len(data.entries))


Blocks = Callable[[slice], np.ndarray]  # the scores (rows, C) of some images


def score(task: Task, images: Tensor, classes: Tensor, labels: np.ndarray) -> Score:
    """Score unit-length image vectors (N, D) against unit-length class vectors (C, D), all float32.

    Args:
        task: says which metric.
        images: (N, D).
        classes: (C, D).
        labels: int64 (N,), or bool (N, C) for ``map_11point``.
    """
    if task.metric == "map_11point":
        cosines = (images @ classes.T).double().numpy()
        return score_matrix(task, metrics.softmax(ELEVATER_SCALE * cosines), labels)
    return _score_blocks(task, lambda rows: (images[rows] @ classes.T).numpy(), labels)


def score_matrix(task: Task, scores: np.ndarray, labels: np.ndarray) -> Score:
    """Score a matrix of class scores, such as a probe's; images are ranked by them as they are.

    Args:
        task: says which metric.
        scores: (N, C), the higher the likelier.
        labels: int64 (N,), or bool (N, C) for ``map_11point``.
    """
    return _score_blocks(task, lambda rows: scores[rows], labels)


def metric_value(metric: Metric, scores: np.ndarray, labels: np.ndarray) -> float:
    """A metric alone, without interval and chance level, of a matrix of class scores (N, C)."""
    if metric == "map_11point":
        return float(metrics.map_11point(scores, labels)[0])
    if metric == "roc_auc":
        return float(metrics.roc_auc(scores[:, 1] - scores[:, 0], labels == 1)[0])
    if metric == "accuracy":
        return float((scores.argmax(axis=1) == labels).mean())
    present, index = metrics.occurring_classes(labels)
    return float(metrics.mean_per_class(scores[:, present].argmax(axis=1) == index, labels)[0])


def _score_blocks(task: Task, blocks: Blocks, labels: np.ndarray) -> Score:
    if task.metric == "map_11point":
        result = _score_map(blocks(slice(None)), labels)
    elif task.metric == "roc_auc":
        result = _score_auc(blocks(slice(None)), labels)
    else:
        result = _score_top1(task.metric, blocks, labels)
    if task.chance is None:
        return result
    return Score(result.value, result.interval, task.chance, result.extras)


def _score_top1(metric: Metric, blocks: Blocks, labels: np.ndarray) -> Score:
    """Accuracy or mean-per-class; the other one and top-5 come along."""
    num_classes, n = blocks(slice(1)).shape[1], len(labels)
    ranks = _ranks(blocks, labels)
    correct = ranks == 0
    top1 = float(metrics.accuracy(correct)[0])
    extras = {"accuracy": top1, "majority": float(np.bincount(labels).max() / n)}
    if num_classes > TOP_K:
        extras["top5"] = float(metrics.accuracy(ranks < TOP_K)[0])
    if metric == "accuracy":
        return Score(top1, wilson_interval(int(correct.sum()), n), 1 / num_classes, extras)
    present, index = metrics.occurring_classes(labels)
    if len(present) < num_classes:  # as in ELEVATER, classes without images cannot win
        correct = _ranks(lambda rows: blocks(rows)[:, present], index) == 0
    value = float(metrics.mean_per_class(correct, labels)[0])
    interval = bootstrap_interval(lambda weights: metrics.mean_per_class(correct, labels, weights), n)
    return Score(value, interval, 1 / len(present), extras)


def _score_auc(scores: np.ndarray, labels: np.ndarray) -> Score:
    """Class 1 is the positive one; with two classes the softmax ranks as the difference of the scores does."""
    margin, positives = scores[:, 1].astype(np.float64) - scores[:, 0], labels == 1
    if positives.all() or not positives.any():
        raise UserError("roc_auc needs images of both classes, the readable ones have only one; complete the data")
    value = float(metrics.roc_auc(margin, positives)[0])
    interval = bootstrap_interval(lambda weights: metrics.roc_auc(margin, positives, weights), len(labels))
    return Score(value, interval, 0.5, {"accuracy": float(((margin > 0) == positives).mean())})


def _score_map(scores: np.ndarray, labels: np.ndarray) -> Score:
    """11-point mAP of the scores as they are."""
    if not labels.any():
        raise UserError("map_11point needs positive labels, the data has none; wrong folder?")
    value = float(metrics.map_11point(scores, labels)[0])
    interval = bootstrap_interval(lambda w: metrics.map_11point(scores, labels, w), len(labels))
    rng = np.random.default_rng(0)
    guesses = [metrics.map_11point(rng.random(labels.shape), labels)[0] for _ in range(_RANDOM_DRAWS)]
    return Score(value, interval, float(np.mean(guesses)))


def _ranks(blocks: Blocks, labels: np.ndarray) -> np.ndarray:
    """Rank of the true class per image, in blocks so that the full score matrix is never held."""
    parts = [slice(start, start + _CHUNK) for start in range(0, len(labels), _CHUNK)]
    return np.concatenate([metrics.true_class_ranks(blocks(rows), labels[rows]) for rows in parts])
