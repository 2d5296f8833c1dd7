"""From image and class vectors to one number with its interval and its chance level."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
from torch import Tensor

from focalclip.base.errors import UserError
from focalclip.base.machine import full_float32_matmul
from focalclip.evaluation.metrics import definitions as metrics
from focalclip.evaluation.metrics.intervals import bootstrap_interval, wilson_interval
from focalclip.evaluation.protocols import SCALE, Metric, Scores
from focalclip.evaluation.task import MULTILABEL_METRICS, Task

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
    """Further numbers: accuracy, mean_per_class, top5, majority (always saying the commonest class), or every mAP."""


@full_float32_matmul()
def score(task: Task, images: Tensor, classes: Tensor, labels: np.ndarray) -> Score:
    """Score unit-length image vectors (N, D) against unit-length class vectors (C, D), all float32.

    Args:
        task: says which metric, what ranks, and which classes compete; a protocol has set them.
        images: (N, D).
        classes: (C, D).
        labels: int64 (N,), or bool (N, C) for the three mAP.
    """
    if task.metric in MULTILABEL_METRICS:
        cosines = (images @ classes.T).double().numpy()
        return _score_map(task, {"softmax": metrics.softmax(SCALE * cosines), "cosine": cosines}, labels)
    return _score_blocks(task, lambda rows: (images[rows] @ classes.T).numpy(), labels)


def score_matrix(task: Task, scores: np.ndarray, labels: np.ndarray) -> Score:
    """Score a matrix of class scores, such as a probe's; images are ranked by them as they are.

    Args:
        task: says which metric, and which classes compete.
        scores: (N, C), the higher the likelier.
        labels: int64 (N,), or bool (N, C) for the three mAP.
    """
    if task.metric in MULTILABEL_METRICS:
        return _score_map(task, {task.scores: scores}, labels)
    return _score_blocks(task, lambda rows: scores[rows], labels)


def metric_value(metric: Metric, scores: np.ndarray, labels: np.ndarray) -> float:
    """A metric alone, without interval and chance level, of a matrix of class scores (N, C)."""
    if metric in MULTILABEL_METRICS:
        return float(MAP[metric](scores, labels)[0])
    if metric == "roc_auc":
        return float(metrics.roc_auc(scores[:, 1].astype(np.float64) - scores[:, 0], labels == 1)[0])
    if metric == "macro_f1":
        return float(metrics.macro_f1(scores.argmax(axis=1), labels)[0])
    if metric == "accuracy":
        return float((scores.argmax(axis=1) == labels).mean())
    present, index = metrics.occurring_classes(labels)
    return float(metrics.mean_per_class(scores[:, present].argmax(axis=1) == index, labels)[0])


Blocks = Callable[[slice], np.ndarray]  # the scores (rows, C) of some images

MAP = {
    "map_11point": metrics.map_11point,
    "map_11point_voc": partial(metrics.map_11point, end_point=False),
    "map": metrics.mean_average_precision,
}


def _score_blocks(task: Task, blocks: Blocks, labels: np.ndarray) -> Score:
    result = _score_auc(blocks(slice(None)), labels) if task.metric == "roc_auc" else _score_top1(task, blocks, labels)
    return _with_chance(task, result)


def _with_chance(task: Task, result: Score) -> Score:
    return result if task.chance is None else replace(result, chance=task.chance)


def _score_top1(task: Task, blocks: Blocks, labels: np.ndarray) -> Score:
    """Accuracy, mean-per-class or macro-F1; accuracy, mean-per-class and top-5 come along."""
    num_classes, n = blocks(slice(1)).shape[1], len(labels)
    answers, ranks = _answers(blocks, labels)
    correct = ranks == 0
    top1 = float(metrics.accuracy(correct)[0])
    among = _correct_among_candidates(task, blocks, labels, correct)
    extras = {
        "accuracy": top1,
        "mean_per_class": float(metrics.mean_per_class(among, labels)[0]),
        "majority": float(np.bincount(labels).max() / n),
    }
    if num_classes > TOP_K:
        extras["top5"] = float(metrics.accuracy(ranks < TOP_K)[0])
    if task.metric == "accuracy":
        return Score(top1, wilson_interval(int(correct.sum()), n), 1 / num_classes, extras)
    if task.metric == "macro_f1":
        value = float(metrics.macro_f1(answers, labels)[0])
        interval = bootstrap_interval(lambda weights: metrics.macro_f1(answers, labels, weights), n)
        rng = np.random.default_rng(0)
        guesses = [metrics.macro_f1(rng.integers(num_classes, size=n), labels)[0] for _ in range(_RANDOM_DRAWS)]
        return Score(value, interval, float(np.mean(guesses)), extras)
    interval = bootstrap_interval(lambda weights: metrics.mean_per_class(among, labels, weights), n)
    competing = num_classes if task.candidates == "all" else len(np.unique(labels))
    return Score(extras["mean_per_class"], interval, 1 / competing, extras)


def _correct_among_candidates(task: Task, blocks: Blocks, labels: np.ndarray, correct: np.ndarray) -> np.ndarray:
    """Which images (N,) are right where, as in ELEVATER, classes without images cannot win."""
    present, index = metrics.occurring_classes(labels)
    if task.candidates == "all" or len(present) == blocks(slice(1)).shape[1]:
        return correct
    return _answers(lambda rows: blocks(rows)[:, present], index)[1] == 0


def _score_auc(scores: np.ndarray, labels: np.ndarray) -> Score:
    """Class 1 is the positive one; with two classes the softmax ranks as the difference of the scores does."""
    margin, positives = scores[:, 1].astype(np.float64) - scores[:, 0], labels == 1
    if positives.all() or not positives.any():
        raise UserError("roc_auc needs images of both classes, the readable ones have only one; complete the data")
    value = float(metrics.roc_auc(margin, positives)[0])
    interval = bootstrap_interval(lambda weights: metrics.roc_auc(margin, positives, weights), len(labels))
    return Score(value, interval, 0.5, {"accuracy": float(((margin > 0) == positives).mean())})


def _score_map(task: Task, ranked: dict[Scores, np.ndarray], labels: np.ndarray) -> Score:
    """One of three mAP on what ranks the task's images; every kind comes along, since published numbers mix them."""
    if not labels.any():
        raise UserError(f"{task.metric} needs positive labels, the data has none; wrong folder?")
    extras = {
        f"{metric}_{scores}": float(function(matrix, labels)[0])
        for metric, function in MAP.items()
        for scores, matrix in ranked.items()
    }
    function, matrix = MAP[task.metric], ranked[task.scores]
    interval = bootstrap_interval(lambda weights: function(matrix, labels, weights), len(labels))
    rng = np.random.default_rng(0)
    guesses = [function(rng.random(labels.shape), labels)[0] for _ in range(_RANDOM_DRAWS)]
    value = extras[f"{task.metric}_{task.scores}"]
    return _with_chance(task, Score(value, interval, float(np.mean(guesses)), extras))


def _answers(blocks: Blocks, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The class said and the rank of the true class per image, in blocks so that all scores are never held at once."""
    said, ranks = [], []
    for start in range(0, len(labels), _CHUNK):
        rows = slice(start, start + _CHUNK)
        scores = blocks(rows)
        said.append(scores.argmax(axis=1))
        ranks.append(metrics.true_class_ranks(scores, labels[rows]))
    return np.concatenate(said), np.concatenate(ranks)
