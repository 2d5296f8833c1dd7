"""The model and the data: an open_clip model of random weights, six small classification tasks and one of retrieval.

All is made from seeds, and nothing hangs on rounding (see ``margins``), so that what CLIP_benchmark gave on one machine
must come out of ours on every other.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from focalclip.bench.random_model import write_model
from focalclip.bench.synthetic_pairs import SyntheticPairs
from focalclip.bench.synthetic_task import SyntheticTask

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
