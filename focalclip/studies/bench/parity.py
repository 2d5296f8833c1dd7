"""Our numbers against CLIP_benchmark's: the model and the data, how far each decision is from a tie, the comparison.

An open_clip model of random weights, six small classification tasks and one retrieval set are made from seeds, with
every decision further from a tie than rounding reaches (:data:`MIN_MARGIN`). So the numbers that CLIP_benchmark gave
on one machine must come out of ours on every other; ``tests/studies`` keeps them, :func:`compare` measures them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import normalize

import focalclip
from focalclip.base.errors import UserError
from focalclip.base.files import write_json
from focalclip.evaluation.data import read_task_folder
from focalclip.evaluation.features.images import encode_images
from focalclip.evaluation.features.model import evaluating
from focalclip.evaluation.features.texts import class_matrix, encode_prompts
from focalclip.studies.bench.peers import (
    RECALLS,
    install_clip_benchmark,
    installed_versions,
    run_clip_benchmark,
    run_retrieval,
    run_zeroshot,
)
from focalclip.studies.bench.synthetic import SyntheticPairs, SyntheticTask, write_model

TOLERANCE = 1e-6
"""Largest difference of two numbers that count as equal."""

MIN_MARGIN = 5e-5
"""Smallest accepted margin of a task; float32 instead of float64 moves these cosines by less than 1e-6."""

MODEL: dict[str, Any] = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2, "head_width": 16},
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 64, "heads": 4, "layers": 2},
}

MODEL_SEED, MODEL_GAIN = 0, 3.0  # with smaller weights the model answers most pictures alike

TEMPLATES = (
    "a photo of a {c}.",
    "a drawing of the {c}.",
    "{c}",
    "a bad picture of a {c}, one {c} of many.",
    "the small {c}",
)

_WORDS = ("seen from afar", "in four colours", "as it was drawn")

_SHAPES = {"sizes": ((40, 52), (36, 36), (64, 48)), "extensions": ("png", "webp")}

PEER_METRICS = {
    "acc1": "accuracy",
    "acc5": "top5",
    "mean_per_class_recall": "mean_per_class",
    "mean_average_precision": "map",
}
"""CLIP_benchmark's metrics of classification and ours."""

PEER_DIRECTIONS = {"image_retrieval": "text_to_image", "text_retrieval": "image_to_text"}
"""CLIP_benchmark's directions of retrieval, called by what is retrieved, and ours."""


def _single(names: str, counts: Sequence[int], seed: int, templates: int, **options: Any) -> SyntheticTask:
    """A task with ``counts[c]`` images of class c, in random order."""
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
    return _task(names, labels, seed, templates, **options)


def _multi(
    names: str, images: int, seed: int, templates: int, absent: Sequence[int] = (), **options: Any
) -> SyntheticTask:
    """A task whose images have each class with a probability of 0.3, except those that no image has."""
    labels = np.random.default_rng(seed).integers(0, 10, (images, len(names.split(", ")))) < 3
    labels[:, list(absent)] = False
    return _task(names, labels, seed, templates, **options)


def _task(names: str, labels: np.ndarray, seed: int, templates: int, **options: Any) -> SyntheticTask:
    return SyntheticTask(tuple(names.split(", ")), TEMPLATES[:templates], labels, seed, noise=30, **options)


def _pairs(images: int, seed: int) -> SyntheticPairs:
    """Images with one to three captions, no two of them alike."""
    counts = np.random.default_rng(seed).integers(1, 4, images)
    captions = (tuple(f"picture {i} {words}" for words in _WORDS[:count]) for i, count in enumerate(counts))
    return SyntheticPairs(tuple(captions), seed, shards=2)


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

PAIRS_NAME = "captions"

PAIRS = _pairs(40, seed=3)


def write_case(folder: Path) -> dict[str, str]:
    """Write ``model/``, ``tasks/NAME/`` and ``retrieval/captions/``; returns the SHA-256 of each by its name."""
    digests = {"model": write_model(folder / "model", MODEL, MODEL_SEED, MODEL_GAIN)}
    digests |= {name: task.write(folder / "tasks" / name) for name, task in TASKS.items()}
    return digests | {PAIRS_NAME: PAIRS.write(folder / "retrieval" / PAIRS_NAME)}


def task_margin(model: Any, folder: Path) -> float:
    """Margin of a task folder.

    For one label per image: the smallest lead of the best class over the second, and of the fifth over the sixth. For
    several: the smallest difference between an image that has a class and one that has not, over all classes.
    """
    data = read_task_folder(folder)
    images = encode_images(model, data.entries, batch_size=64, progress=False).embeds.double()
    cosines = (images @ class_matrix(model, data.class_names, data.templates).double().T).numpy()
    if not data.multilabel:
        leads = -np.diff(-np.sort(-cosines, axis=1), axis=1)
        return float(leads[:, [0, 4] if leads.shape[1] > 4 else [0]].min())
    differences = cosines[:, None] - cosines[None]
    rivals = data.labels[:, None] & ~data.labels[None]
    return float(np.abs(differences[rivals]).min())


def pairs_margin(model: Any, pairs: SyntheticPairs, ks: tuple[int, ...] = RECALLS) -> float:
    """Margin of retrieval: the smallest lead of a K-th place over the next, where one is right and the other wrong."""
    pictures = torch.stack([model.preprocess(Image.fromarray(pixels)) for pixels in pairs.pictures()])
    images = normalize(model.encode_image(pictures), dim=-1).double()
    texts = encode_prompts(model, [caption for own in pairs.captions for caption in own]).double()
    owner = np.repeat(np.arange(len(pairs.captions)), [len(own) for own in pairs.captions])
    right = owner[:, None] == np.arange(len(pairs.captions))[None]
    cosines = (texts @ images.T).numpy()
    return min(_closest_place(cosines, right, ks), _closest_place(cosines.T, right.T, ks))


def _closest_place(scores: np.ndarray, right: np.ndarray, ks: tuple[int, ...]) -> float:
    order = np.argsort(-scores, axis=1)
    ranked, hits = np.take_along_axis(scores, order, axis=1), np.take_along_axis(right, order, axis=1)
    leads = [(ranked[:, k - 1] - ranked[:, k])[hits[:, k - 1] != hits[:, k]] for k in ks]
    return float(np.concatenate(leads).min())


class NumberPair(NamedTuple):
    """One number of CLIP_benchmark's and ours."""

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


def number_pairs(theirs: Mapping[str, Mapping[str, float]], result: Mapping[str, Any]) -> list[NumberPair]:
    """Every number that CLIP_benchmark gave, beside that of our result.

    Args:
        theirs: its metrics by task; not-a-number where it has none (top 5 of fewer than five classes).
        result: the JSON of ``eval/zeroshot.py`` under the protocol clip_benchmark, or of ``eval/retrieval.py``.
    """
    return [
        NumberPair(name, metric, value, _ours(result["tasks"].get(name), metric))
        for name, metrics in theirs.items()
        for metric, value in metrics.items()
        if not math.isnan(value)
    ]


def _ours(task: Mapping[str, Any] | None, metric: str) -> float | None:
    """Our number for its ``metric``."""
    if task is None:
        return None
    if metric in PEER_METRICS:
        return task["value"] if task["metric"] == PEER_METRICS[metric] else task.get(PEER_METRICS[metric])
    direction, _, recall = metric.partition("_recall")
    return task[PEER_DIRECTIONS[direction]][f"recall{recall}"]["value"]


@dataclass(frozen=True)
class Parity:
    """Both sides' numbers on the same weights and data."""

    pairs: tuple[NumberPair, ...]
    margins: dict[str, float]
    """Distance of each task's closest decision from a tie, in cosine."""
    digests: dict[str, str]
    """SHA-256 of the model and of each task."""
    theirs: dict[str, dict[str, float]]
    """CLIP_benchmark's metrics by task."""
    versions: dict[str, str]
    """Of CLIP_benchmark and what decides its numbers."""

    @property
    def unequal(self) -> list[NumberPair]:
        """Numbers that differ by more than :data:`TOLERANCE`, or that ours lacks."""
        return [pair for pair in self.pairs if not pair.is_equal]

    def write(self, path: Path) -> Path:
        """Write CLIP_benchmark's numbers as JSON, with seeds, hashes, margins and versions."""
        seeds = {name: task.seed for name, task in TASKS.items()} | {PAIRS_NAME: PAIRS.seed}
        tasks: dict[str, Any] = {
            name: {
                "seed": seeds[name],
                "sha256": self.digests[name],
                "margin": float(f"{self.margins[name]:.2e}"),
                # JSON has no not-a-number, which they give for the top 5 of fewer than five classes
                "metrics": {metric: value for metric, value in metrics.items() if value == value},
            }
            for name, metrics in self.theirs.items()
        }
        content = {
            "made_by": f"python scripts/bench.py parity --output tests/studies/{path.name}",
            "versions": self.versions,
            "model": {"seed": MODEL_SEED, "sha256": self.digests["model"]},
            "tasks": tasks,
        }
        return write_json(path, content)


def compare(folder: Path) -> Parity:
    """Write model and data into ``folder``, run both sides on them on the CPU, and pair their numbers.

    Raises:
        UserError: if a side fails, or a decision is so close to a tie that another machine could decide otherwise.
    """
    python = install_clip_benchmark()
    digests, margins = write_case(folder), _checked_margins(folder)
    model, tasks, retrieval = folder / "model", folder / "tasks", folder / "retrieval"
    theirs = run_clip_benchmark(python, model, tasks, list(TASKS)).metrics
    found = run_clip_benchmark(python, model, retrieval, [PAIRS_NAME], "zeroshot_retrieval").metrics
    pairs = number_pairs(theirs, run_zeroshot(model, tasks).result)
    pairs += number_pairs(found, run_retrieval(model, retrieval / PAIRS_NAME).result)
    return Parity(tuple(pairs), margins, digests, theirs | found, installed_versions(python))


def _checked_margins(folder: Path) -> dict[str, float]:
    """Margin of every task, none below :data:`MIN_MARGIN`."""
    model = focalclip.load(f"open_clip:local-dir:{folder / 'model'}")
    with evaluating(model):
        margins = {name: task_margin(model, folder / "tasks" / name) for name in TASKS}
        margins |= {PAIRS_NAME: pairs_margin(model, PAIRS)}
    for name, found in margins.items():
        if found < MIN_MARGIN:
            raise UserError(f"{name}: two scores are only {found:.1e} apart; choose another seed in bench/parity.py")
    return margins
