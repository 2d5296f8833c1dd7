"""The case on which our numbers must equal CLIP_benchmark's: an open_clip model of random weights and six small tasks.

All is made from seeds, and nothing hangs on rounding: :func:`margin` says how far a task's closest decision is from a
tie. So what CLIP_benchmark gave on one machine must come out of ours on every other.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from focalclip.bench.random_model import write_model
from focalclip.bench.synthetic_task import SyntheticTask
from focalclip.evaluation.classifier import class_matrix
from focalclip.evaluation.datasets import read_task_folder
from focalclip.evaluation.features import encode_images

MODEL: dict[str, Any] = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2, "head_width": 16},
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 64, "heads": 4, "layers": 2},
}
MODEL_SEED, MODEL_GAIN = 0, 3.0  # with smaller weights the model answers most pictures alike
MIN_MARGIN = 5e-5
"""Smallest accepted margin of a task; float32 instead of float64 moves these cosines by less than 1e-6."""
TEMPLATES = (
    "a photo of a {c}.",
    "a drawing of the {c}.",
    "{c}",
    "a bad picture of a {c}, one {c} of many.",
    "the small {c}",
)
_SHAPES = {"sizes": ((40, 52), (36, 36), (64, 48)), "extensions": ("png", "webp")}


def _single(names: str, counts: Sequence[int], seed: int, templates: int, **options: Any) -> SyntheticTask:
    """A task with ``counts[c]`` images of class c, in random order."""
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
    return _task(names, labels, seed, templates, **options)


def _multi(
    names: str, images: int, seed: int, templates: int, absent: Sequence[int] = (), **options: Any
) -> SyntheticTask:
    """A task whose images have each class with a chance of 0.3, but for classes that no image has."""
    labels = np.random.default_rng(seed).integers(0, 10, (images, len(names.split(", ")))) < 3
    labels[:, list(absent)] = False
    return _task(names, labels, seed, templates, **options)


def _task(names: str, labels: np.ndarray, seed: int, templates: int, **options: Any) -> SyntheticTask:
    return SyntheticTask(tuple(names.split(", ")), TEMPLATES[:templates], labels, seed, noise=30, **options)


TOLERANCE = 1e-6
NAMES = {
    "acc1": "accuracy",
    "acc5": "top5",
    "mean_per_class_recall": "mean_per_class",
    "mean_average_precision": "map",
}
"""CLIP_benchmark's metrics and ours."""

# Seeds and the order of names were searched for: large margins, and names that the model gives to the right pictures
# more often than chance would. In absent-classes it also gives pictures to the two classes that have none.
TASKS = {
    "few-classes": _single("bridge, teapot, guitar", (20, 20, 20), 15, 1, **_SHAPES),
    "many-classes": _single(
        "fire engine, violin, candle, falcon, clock, boat, teapot, ankle boot, glove, mushroom, bus, lamp, igloo, "
        "guitar, harp, kite, tree, drum, bridge, saddle, zebra, wolf, owl, anchor, desk, cat, lemon, eagle, dog, tower",
        (5,) * 30, 36, 5, shards=3, **_SHAPES,
    ),
    "unbalanced": _single(
        "bridge, bus, boat, saddle, zebra, guitar, owl, dog", (40, 20, 10, 8, 4, 2, 1, 1), 29, 3, shards=2
    ),
    "absent-classes": _single("ankle boot, saddle, guitar, glove, teapot, dog", (10, 0, 10, 10, 0, 10), 23, 2),
    "multilabel": _multi("ankle boot, guitar, teapot, owl, violin, lamp", 40, 23, 3, shards=2, **_SHAPES),
    "multilabel-absent": _multi("guitar, fire engine, harp, teapot, cat", 30, 25, 2, absent=(2,)),
}  # fmt: skip


def write_case(folder: Path) -> dict[str, str]:
    """Write ``model/`` and ``tasks/NAME/``; returns the SHA-256 of the weights (``model``) and of each task."""
    digests = {"model": write_model(folder / "model", MODEL, MODEL_SEED, MODEL_GAIN)}
    return digests | {name: task.write(folder / "tasks" / name) for name, task in TASKS.items()}


def margin(model: Any, folder: Path) -> float:
    """Distance of a task's closest decision from a tie, as a difference of cosines.

    For one label per image: the smallest lead of the best class over the second, and of the fifth over the sixth. For
    several: the smallest difference between an image that has a class and one that has not, over all classes.
    """
    data = read_task_folder(folder)
    with torch.no_grad():
        images = encode_images(model, data.entries, batch_size=64, progress=False).embeds.double()
        cosines = (images @ class_matrix(model, data.class_names, data.templates).double().T).numpy()
    if not data.multilabel:
        leads = -np.diff(-np.sort(-cosines, axis=1), axis=1)
        return float(leads[:, [0, 4] if leads.shape[1] > 4 else [0]].min())
    differences = cosines[:, None] - cosines[None]
    rivals = data.labels[:, None] & ~data.labels[None]
    return float(np.abs(differences[rivals]).min())


class Difference(NamedTuple):
    """One number of both."""

    task: str
    metric: str
    """CLIP_benchmark's name."""
    theirs: float
    ours: float | None
    """None where the result lacks it."""

    @property
    def is_equal(self) -> bool:
        """Whether they agree to :data:`TOLERANCE`."""
        return self.ours is not None and abs(self.ours - self.theirs) <= TOLERANCE


def differences(theirs: Mapping[str, Mapping[str, float]], result: Mapping[str, Any]) -> list[Difference]:
    """Every number that CLIP_benchmark gave, beside that of our result.

    Args:
        theirs: its metrics by task; not-a-number where it has none (top 5 of fewer than five classes).
        result: the JSON of ``eval/zeroshot.py``, under the protocol clip_benchmark.
    """
    pairs = []
    for name, metrics in theirs.items():
        task = result["tasks"].get(name, {})
        known = task | {task["metric"]: task["value"]} if task else {}
        pairs += [
            Difference(name, metric, value, known.get(NAMES[metric]))
            for metric, value in metrics.items()
            if not math.isnan(value)
        ]
    return pairs
