"""Features of a task's train and test images, and its zero-shot classifier: all that the probes of a task need."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from focalclip.errors import UserError
from focalclip.evaluation.datasets import TaskData
from focalclip.evaluation.features.cache import FeatureCache
from focalclip.evaluation.features.classifier import class_matrix
from focalclip.evaluation.features.encode import encode_images
from focalclip.evaluation.opened import open_checked
from focalclip.evaluation.probes.train import TrainingSet
from focalclip.evaluation.registry.tasks import Benchmark, Task


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
