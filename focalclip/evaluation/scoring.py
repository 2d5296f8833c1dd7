"""From image and class vectors, or a classifier's scores, to predictions and one number with interval and chance level.

The score matrix is computed once, a block of images at a time: answers, score and predictions all come from it.
"""

import io
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from focalclip.base.machine import full_float32_matmul
from focalclip.evaluation.data import Entry, TaskData, decode
from focalclip.evaluation.features.images import ImageFeatures
from focalclip.evaluation.metrics import METRICS, Metric
from focalclip.evaluation.metrics import definitions as metrics
from focalclip.evaluation.metrics.calibration import FIT_IMAGES, fit_scale
from focalclip.evaluation.metrics.definitions import Floats
from focalclip.evaluation.metrics.metric import SCALE, Answers, Score, score_answers
from focalclip.evaluation.predictions import SIDE, TOP, WORST, Pictures, Predictions
from focalclip.evaluation.task import Task

_CHUNK = 8192  # images per block of the score matrix

Columns = dict[str, NDArray[Any]]


@full_float32_matmul()
def predict(
    task: Task,
    data: TaskData,
    images: ImageFeatures,
    classes: Tensor,
    own_scale: float | None = None,
    keep_all: bool = False,
) -> tuple[Predictions, Score]:
    """A model's answers for a task, and their score.

    Args:
        task: with its protocol applied.
        data: its data; a few pictures are read from it.
        images: unit vectors (N, D).
        classes: unit vectors (C, D).
        own_scale: what the model multiplies cosines with.
        keep_all: keep all N x C cosines, as a submission to ELEVATER's server needs them.

    Raises:
        UserError: if the labels cannot be scored by the task's metric.
    """
    metric, labels = METRICS[task.metric], data.labels[images.readable]
    scales = np.array([SCALE, own_scale or np.nan, np.nan])
    if not data.multilabel:
        every = -(-len(labels) // FIT_IMAGES)
        scales[2] = fit_scale(images.embeds[::every] @ classes.T, labels[::every])
    candidates = _candidates(task.candidates, labels, len(data.class_names))
    keep = keep_all or metric.reads_scores
    blocks = []
    for rows in _blocks(len(labels)):
        cosines = images.embeds[rows] @ classes.T
        scores = cosines.numpy()
        block = _answers(scores, labels[rows], candidates) | _details(cosines, labels[rows], scales)
        blocks.append(block | {"scores": scores if keep else _none(scores)})
    columns = _joined(blocks)
    answers = _collect(metric, columns, labels, candidates, len(data.class_names), task.scores)
    result = score_answers(metric, answers, task.chance)
    places = np.flatnonzero(images.readable).astype(np.int32)
    official = data.official_order
    shown = mistakes(columns["top_classes"][:, 0], columns["top_cosines"][:, 0], labels, columns["true_cosine"])
    predictions = Predictions(
        task=task.id,
        metric=task.metric,
        ranking=task.scores,
        task_sha256=data.digest(images.sha256),
        images_sha256=images.sha256,
        class_names=data.class_names,
        entries=len(data.entries),
        keys=np.array([data.entries[i].key for i in places]),
        places=places,
        labels=labels,
        predicted=answers.predicted.astype(np.uint16),
        top_classes=columns["top_classes"],
        top_cosines=columns["top_cosines"],
        true_rank=answers.true_rank.astype(np.uint16),
        true_cosine=columns["true_cosine"],
        scales=scales,
        log_partition=columns["log_partition"],
        cosines=columns["scores"],
        official=np.array([] if official is None else official, dtype=np.int64),
        pictures=thumbnails(shown, [data.entries[places[i]] for i in shown]),
    )
    return predictions, result


@full_float32_matmul()
def score(task: Task, images: Tensor, classes: Tensor, labels: NDArray[Any]) -> Score:
    """Score unit-length image vectors (N, D) against unit-length class vectors (C, D), all float32.

    Args:
        task: says which metric, what ranks, and which classes compete; a protocol has set them.
        images: (N, D).
        classes: (C, D).
        labels: int64 (N,), or bool (N, C) for multi-label metrics.

    Raises:
        UserError: if the labels cannot be scored by the task's metric.
    """
    blocks = ((images[rows] @ classes.T).numpy() for rows in _blocks(len(labels)))
    candidates = _candidates(task.candidates, labels, len(classes))
    return _score_blocks(task, blocks, labels, candidates, len(classes), are_cosines=True)


def score_matrix(task: Task, scores: NDArray[np.floating], labels: NDArray[Any]) -> Score:
    """Score a matrix of class scores, such as a probe's; images are ranked by the scores themselves.

    Args:
        task: says which metric, and which classes compete.
        scores: (N, C), the higher the likelier.
        labels: int64 (N,), or bool (N, C) for multi-label metrics.

    Raises:
        UserError: if the labels cannot be scored by the task's metric.
    """
    candidates = _candidates(task.candidates, labels, scores.shape[1])
    blocks = (scores[rows] for rows in _blocks(len(labels)))
    return _score_blocks(task, blocks, labels, candidates, scores.shape[1], are_cosines=False)


def metric_value(name: str, scores: NDArray[np.floating], labels: NDArray[Any]) -> float:
    """Only the metric, without interval and chance level, of a matrix of class scores (N, C)."""
    metric, candidates = METRICS[name], _candidates("occurring", labels, scores.shape[1])
    columns = _answers(scores, labels, candidates) | {"scores": scores}
    return metric.value(_collect(metric, columns, labels, candidates, scores.shape[1], are_cosines=False))


def _score_blocks(
    task: Task,
    blocks: Iterable[NDArray[np.floating]],
    labels: NDArray[Any],
    candidates: NDArray[np.int64],
    num_classes: int,
    *,
    are_cosines: bool,
) -> Score:
    metric = METRICS[task.metric]
    columns = _joined(
        _answers(scores, labels[rows], candidates) | {"scores": scores if metric.reads_scores else _none(scores)}
        for rows, scores in zip(_blocks(len(labels)), blocks, strict=True)
    )
    answers = _collect(metric, columns, labels, candidates, num_classes, task.scores, are_cosines=are_cosines)
    return score_answers(metric, answers, task.chance)


def _blocks(n: int) -> list[slice]:
    """Rows of the score matrix that are computed at once, so that all scores are never held unless they are kept."""
    return [slice(start, start + _CHUNK) for start in range(0, n, _CHUNK)]


def _none(scores: NDArray[np.floating]) -> NDArray[np.floating]:
    """No scores, (rows, 0); a slice would keep the whole block in memory."""
    return np.empty((len(scores), 0), scores.dtype)


def _joined(blocks: Iterable[Columns]) -> Columns:
    blocks = list(blocks)
    return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}


def _candidates(rule: str, labels: NDArray[Any], num_classes: int) -> NDArray[np.int64]:
    """The classes that compete where a metric has candidates: all, or, as in ELEVATER, those with an image."""
    if rule == "all" or labels.ndim == 2:
        return np.arange(num_classes)
    return metrics.occurring_classes(labels)[0]


def _answers(scores: NDArray[np.floating], labels: NDArray[Any], candidates: NDArray[np.int64]) -> Columns:
    """One block's answers, which every metric but the ranking ones is computed from."""
    best = scores.argmax(axis=1)
    few = len(candidates) < scores.shape[1]
    return {
        "best": best,
        "best_candidate": candidates[scores[:, candidates].argmax(axis=1)] if few else best,
        "true_rank": metrics.true_class_ranks(scores, labels) if labels.ndim == 1 else np.empty(0, np.int64),
    }


def _collect(
    metric: Metric,
    columns: Columns,
    labels: NDArray[Any],
    candidates: NDArray[np.int64],
    num_classes: int,
    ranking: str = "softmax",
    *,
    are_cosines: bool = True,
) -> Answers:
    return Answers(
        labels=labels,
        num_classes=num_classes,
        predicted=columns["best_candidate" if metric.among_candidates else "best"],
        true_rank=columns["true_rank"],
        scores=columns["scores"],
        ranking=ranking,
        are_cosines=are_cosines,
        best_candidate=columns["best_candidate"],
        num_candidates=len(candidates),
    )


def _details(cosines: Tensor, labels: NDArray[Any], scales: Floats) -> Columns:
    """One block's best classes with their cosines, and what turns cosines into probabilities."""
    scores, rows = cosines.numpy(), np.arange(len(labels))
    values, best = (x.numpy() for x in cosines.topk(min(TOP, scores.shape[1]), dim=1))
    order = np.lexsort((best, -values), axis=-1)  # of equal scores the lower class comes first, as for the metrics
    best, values = np.take_along_axis(best, order, 1), np.take_along_axis(values, order, 1)
    best[:, 0] = scores.argmax(axis=1)
    log_partition = [torch.logsumexp(float(scale) * cosines, dim=1).numpy() for scale in scales]
    return {
        "top_classes": best.astype(np.uint16),
        "top_cosines": values,
        "true_cosine": scores[rows, labels] if labels.ndim == 1 else np.empty(0, np.float32),
        "log_partition": np.stack(log_partition, axis=1).astype(np.float32),
    }


_PAIRS = 8


def mistakes(
    predicted: NDArray[np.integer], confidence: NDArray[Any], labels: NDArray[Any], true_confidence: NDArray[Any]
) -> list[int]:
    """Rows worth a picture: the worst mistakes, then one of each of the commonest confusions.

    The worst mistake is the one whose answer scores highest above the true class (for multi-label data, above nothing).
    Where there are many pairs of true and given class, each gets one picture, so that no two look-alikes fill the page.

    Args:
        predicted: (N,).
        confidence: (N,), cosine of the answer.
        labels: (N,), or bool (N, C).
        true_confidence: (N,), cosine of the true class; empty for multi-label data.
    """
    if labels.ndim == 2:
        wrong = np.flatnonzero(~labels[np.arange(len(labels)), predicted])
        order = wrong[np.argsort(-confidence[wrong], kind="stable")]
        return _spread(order, predicted.astype(np.int64))
    wrong = np.flatnonzero(predicted != labels)
    order = wrong[np.argsort(-(confidence - true_confidence)[wrong], kind="stable")]
    pair = labels * (int(predicted.max(initial=0)) + 1) + predicted
    worst = _spread(order, pair)
    kinds, counts = np.unique(pair[wrong], return_counts=True)
    commonest = set(kinds[np.argsort(-counts, kind="stable")][:_PAIRS].tolist())
    examples = [row for row in _first(order, pair, 1) if int(pair[row]) in commonest]
    return list(dict.fromkeys([*worst, *examples]))


def thumbnails(rows: Sequence[int], entries: Sequence[Entry]) -> Pictures:
    """Read and shrink the images of some rows."""
    return Pictures(np.array(rows, dtype=np.int64), tuple(_thumbnail(entry.read()) for entry in entries))


def _spread(order: NDArray[np.integer], kind: NDArray[np.integer]) -> list[int]:
    """The first rows of ``order``, no kind oftener than needed to fill the page."""
    kinds = max(1, len(np.unique(kind[order])))
    return _first(order, kind, -(-WORST // kinds))[:WORST]


def _first(order: NDArray[np.integer], kind: NDArray[np.integer], times: int) -> list[int]:
    """The rows of ``order`` whose kind came fewer than ``times`` times before."""
    seen: dict[int, int] = {}
    kept = []
    for row in order.tolist():
        seen[int(kind[row])] = seen.get(int(kind[row]), 0) + 1
        if seen[int(kind[row])] <= times:
            kept.append(row)
    return kept


def _thumbnail(data: bytes) -> bytes:
    image = decode(data)
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=75, method=4)
    return buffer.getvalue()
