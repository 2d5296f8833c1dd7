"""One probe from training images alone: test images are not at hand here, so nothing can be chosen on them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from focalclip.base.errors import UserError
from focalclip.evaluation.data import TaskData
from focalclip.evaluation.features.cache import FeatureCache
from focalclip.evaluation.features.images import encode_images
from focalclip.evaluation.features.texts import class_matrix
from focalclip.evaluation.metrics import METRICS
from focalclip.evaluation.opened import open_checked
from focalclip.evaluation.probes.draw import choose_shots, hold_out
from focalclip.evaluation.probes.solvers import EXACT, ROUGH, choose_strength, knn, language_head, logistic, ridge
from focalclip.evaluation.scoring import metric_value
from focalclip.evaluation.task import Benchmark, Task

METHODS: dict[str, str] = {
    "ridge": "ridge regression in closed form",
    "logistic": "logistic regression by L-BFGS",
    "language": "the same, drawn towards the zero-shot text classifier (ELEVATER's language initialisation)",
    "knn": "20 nearest neighbours by cosine",
}

Shots = int | Literal["full"]

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
        method: a key of :data:`METHODS`.
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


@dataclass(frozen=True)
class EncodedSplit:
    """The readable images of a split."""

    features: Tensor
    """float32 (N, D), unit length."""
    labels: np.ndarray
    """int64 (N,), or bool (N, C)."""
    broken: tuple[str, ...]
    """Unreadable images by name; they are not in N."""
    sha256: str
    """Of names, prompts, keys, labels and images."""


@dataclass(frozen=True)
class EncodedTask:
    """A task through a model."""

    folder: str
    test_set: str
    """Which known test set it is."""
    differences: tuple[str, ...]
    """Where the test data departs from the protocol."""
    text: Tensor
    """float32 (C, D), unit length."""
    train: EncodedSplit
    test: EncodedSplit

    def training_set(self, task: Task) -> TrainingSet:
        """What probes may see."""
        return TrainingSet(self.train.features, self.train.labels, self.text, task.metric)


def encode_task(
    model: Any,
    task: Task,
    benchmark: Benchmark,
    *,
    batch_size: int,
    label: str,
    progress: bool,
    cache: FeatureCache | None = None,
) -> EncodedTask:
    """Read and encode both splits of a task; faulty data of either is known before the first image is encoded.

    Raises:
        Unavailable: if the task, or its train split, is not there; says what to do.
        UserError: if what is there is faulty.
    """
    opened = open_checked(task, benchmark)
    train, test = open_checked(task, benchmark, split="train").data, opened.data
    if train.class_names != test.class_names or train.multilabel != test.multilabel:
        raise UserError(f"{train.folder}: train and test have different classes; download the task again")
    options: dict[str, Any] = {"batch_size": batch_size, "progress": progress, "cache": cache}
    return EncodedTask(
        folder=str(test.folder),
        test_set=opened.test_set,
        differences=opened.differences,
        text=class_matrix(model, test.class_names, test.templates, batch_size, cache=cache),
        train=_encode(model, task, train, label=f"{label} train", **options),
        test=_encode(model, task, test, label=f"{label} test", **options),
    )


def _encode(model: Any, task: Task, data: TaskData, **options: Any) -> EncodedSplit:
    images = encode_images(model, data.entries, resize=task.resize, **options)
    return EncodedSplit(images.embeds, data.labels[images.readable], images.broken, data.digest(images.sha256))
