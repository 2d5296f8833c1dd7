"""One probe from training images only: draw the shots, choose the strength, train.

Test images are not available here, so nothing can be chosen on them.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from focalclip.base.errors import UserError
from focalclip.evaluation.metrics import METRICS
from focalclip.evaluation.probes.result import Shots
from focalclip.evaluation.probes.solvers import EXACT, ROUGH, choose_strength, knn, language_head, logistic, ridge
from focalclip.evaluation.scoring import metric_value

HELD_OUT = 5  # one image in five of each class, rounded up: ELEVATER's 20%


class HoldOut(NamedTuple):
    """Indices of the images that heads are fitted on, and of those that the strength is chosen on; each int64."""

    fit: np.ndarray
    held_out: np.ndarray


def choose_shots(labels: np.ndarray, shots: int, seed: int) -> np.ndarray:
    """A subset with ``shots`` images of each class; all of a class that has fewer.

    An image with several labels is kept while its rarest label has fewer than ``shots`` images and it upsets no
    balance: its rarest label has at most half of ``shots``, or its commonest at most one and a half times as many.
    Of images without any label ``shots`` are kept.

    Args:
        labels: int64 (N,), or bool (N, C).
        shots: images per class.
        seed: of the shuffle.

    Returns:
        int64 indices, ascending.
    """
    counts = np.zeros(_num_classes(labels) + 1, dtype=np.int64)  # the last one counts images without a label
    kept = []
    for i, own in _shuffled(labels, seed):
        rarest, commonest = counts[own].min(), counts[own].max()
        if rarest < shots and (rarest <= shots / 2 or commonest <= 1.5 * shots):
            kept.append(i)
            counts[own] += 1
    return np.sort(np.array(kept, dtype=np.int64))


def hold_out(labels: np.ndarray, seed: int) -> HoldOut:
    """Divide images: a fifth of each class, rounded up, is held out; a class's last image never is.

    An image with several labels is held out where one of them is still below its quota.

    Args:
        labels: int64 (N,), or bool (N, C).
        seed: of the shuffle.
    """
    images = list(_shuffled(labels, seed))
    total = np.zeros(_num_classes(labels) + 1, dtype=np.int64)
    for _, own in images:
        total[own] += 1
    quota, held = -(-total // HELD_OUT), np.zeros_like(total)
    is_held = np.zeros(len(labels), dtype=bool)
    for i, own in images:
        if (held[own] < quota[own]).any() and (held[own] + 1 < total[own]).all():
            is_held[i] = True
            held[own] += 1
    return HoldOut(np.flatnonzero(~is_held), np.flatnonzero(is_held))


def every_other(labels: np.ndarray) -> np.ndarray:
    """Every other image of each class in the data's order, from the second on: bool (N,) for labels int64 (N,)."""
    chosen = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        chosen[np.flatnonzero(labels == label)[1::2]] = True
    return chosen


def _shuffled(labels: np.ndarray, seed: int) -> Iterator[tuple[int, np.ndarray]]:
    """Index and labels of each image in random order; C stands for "no label"."""
    order = list(range(len(labels)))
    random.Random(seed).shuffle(order)
    none = np.array([_num_classes(labels)])
    for i in order:
        own = np.flatnonzero(labels[i]) if labels.ndim == 2 else labels[i : i + 1]
        yield i, own if len(own) else none


def _num_classes(labels: np.ndarray) -> int:
    return labels.shape[1] if labels.ndim == 2 else int(labels.max(initial=0)) + 1


Classifier = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class TrainingSet:
    """Everything that a probe may see of a task."""

    features: Tensor
    """float32 (N, D), unit length."""
    labels: np.ndarray
    """int64 (N,), or bool (N, C)."""
    text: Tensor
    """float32 (C, D), unit length: the zero-shot classifier."""
    metric: str

    def part(self, indices: np.ndarray) -> "TrainingSet":
        """Some of its images."""
        return TrainingSet(self.features[torch.from_numpy(indices)], self.labels[indices], self.text, self.metric)

    def quality(self, classify: Classifier) -> float:
        """The metric of a classifier on these images."""
        return metric_value(self.metric, classify(self.features).numpy(), self.labels)


@dataclass(frozen=True)
class Probe:
    """A trained probe and how it came about."""

    classify: Classifier
    """Unit-length features (M, D) to scores (M, C)."""
    strength: float | None
    """Chosen on held-out images; None for a method without one."""
    held_out_value: float | None
    """The metric on the held-out images at this strength, before they were trained on too."""
    num_images: int
    """It was trained on."""


def train_probe(method: str, data: TrainingSet, shots: Shots, seed: int) -> Probe:
    """Draw the shots, choose the strength on a fifth of them, then train on all of them.

    Args:
        method: a key of :data:`~focalclip.evaluation.probes.result.METHODS`.
        data: the whole training set.
        shots: images per class, or ``full``.
        seed: of both draws.

    Raises:
        UserError: if there is nothing to hold out, or it cannot be scored.
    """
    chosen = data if shots == "full" else data.part(choose_shots(data.labels, shots, seed))
    if method == "knn":
        classify = knn(chosen.features, torch.from_numpy(chosen.labels), len(chosen.text))
        return Probe(classify, None, None, len(chosen.labels))
    split = hold_out(chosen.labels, seed)
    held_out = chosen.part(split.held_out)
    if METRICS[data.metric].problem(held_out.labels):
        raise UserError(
            f"{shots} shots leave {len(split.held_out)} of {len(chosen.labels):,} training images to choose a strength "
            f"on, too few for {data.metric}; use more shots, or --methods knn, which has no strength"
        )
    unit = float((chosen.features - chosen.features.mean(dim=0)).square().sum(dim=1).mean())
    attempt = _prepare(method, chosen.part(split.fit), ROUGH)
    strength = choose_strength(lambda value: held_out.quality(attempt(value)), unit)
    return Probe(
        classify=_prepare(method, chosen, EXACT)(strength),
        strength=strength,
        held_out_value=held_out.quality(attempt(strength)),
        num_images=len(chosen.labels),
    )


def _prepare(method: str, data: TrainingSet, tolerance: float) -> Callable[[float], Classifier]:
    """A function from the strength to a classifier; what does not depend on the strength is done once, here."""
    features, labels, num_classes = data.features, torch.from_numpy(data.labels), len(data.text)
    if method == "ridge":
        return ridge(features, labels, num_classes)
    prior = language_head(features, labels, data.text) if method == "language" else None
    return logistic(features, labels, num_classes, prior, tolerance=tolerance)
