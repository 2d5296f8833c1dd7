"""Probes over the tasks of a benchmark: encode both splits of each task once, then train and score every probe."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from focalclip.base.errors import UserError, require, unforeseen
from focalclip.base.files import user_path
from focalclip.base.machine import versions
from focalclip.evaluation.data import TaskData, Unavailable
from focalclip.evaluation.features.cache import FeatureCache, open_cache
from focalclip.evaluation.features.images import encode_images
from focalclip.evaluation.features.model import DualEncoder, check_model, describe, evaluating, known_weights
from focalclip.evaluation.features.texts import class_matrix
from focalclip.evaluation.opened import open_checked
from focalclip.evaluation.probes.result import (
    Journal,
    Origin,
    ProbeResult,
    ProbeRun,
    ProbeSettings,
    RunKey,
    TaskProbes,
)
from focalclip.evaluation.probes.train import TrainingSet, every_other, train_probe
from focalclip.evaluation.scoring import score, score_matrix
from focalclip.evaluation.task import Benchmark, Task, load_benchmark


def probe(
    model: DualEncoder,
    benchmark: str | Path | Benchmark,
    settings: ProbeSettings | None = None,
    *,
    data_root: str | Path | None = None,
    device: str | torch.device | None = None,
    journal: str | Path | None = None,
    cache_dir: str | Path | None = None,
    progress: bool = True,
) -> ProbeResult:
    """Train and score probes on a model's frozen, unit-length image embeddings.

    Args:
        model: anything with ``encode_image``, ``encode_text``, ``tokenizer`` and ``preprocess``.
        benchmark: what :func:`~focalclip.evaluation.task.load_benchmark` takes; its tasks need a train split.
        settings: which probes, on which tasks; None: the defaults.
        data_root: where the data of a benchmark given by name or file is.
        device: where to move the model first; the probes themselves are solved on the CPU.
        journal: file of finished probes, which are not trained again; new ones are added as they finish. None: neither.
        cache_dir: where features are kept by content (see ``features.cache``); None: not at all.
        progress: show bars on stderr.

    Returns:
        What was measured, what is missing (with what to do) and what failed (with why).

    Raises:
        UserError: if there is no such benchmark, task or data folder, or ``journal`` holds something else.
    """
    require("probing", "eval", "scipy")
    start = time.perf_counter()
    settings = settings or ProbeSettings()
    full = benchmark if isinstance(benchmark, Benchmark) else load_benchmark(benchmark, data_root)
    chosen = full.select(settings.tasks)
    finished = Journal(None if journal is None else user_path(journal))
    if device is not None and hasattr(model, "to"):
        model.to(device)
    check_model(model)
    weights = known_weights(model)
    cache = open_cache(model, cache_dir, weights)
    facts = {"sha256": weights or "unknown"} | describe(model)
    result = ProbeResult(full.name, full.protocol, full.expected, model=facts, versions=versions())
    for i, task in enumerate(chosen.tasks, start=1):
        label = f"{task.id} ({i} of {len(chosen.tasks)})"
        options: dict[str, Any] = {"batch_size": settings.batch_size, "progress": progress, "cache": cache}
        try:
            with evaluating(model):
                data = encode_task(model, task, chosen, label=label, **options)
                origin = _origin(task, data, facts["sha256"], full.protocol)
                hidden = None if progress else True
                with tqdm(settings.keys(), desc=label, unit=" probes", leave=False, disable=hidden) as bar:
                    runs = [finished.runs(origin).get(key) or _run(task, data, key, finished, origin) for key in bar]
            result.tasks[task.id] = _describe(task, data, runs)
        except Unavailable as reason:
            result.missing[task.id] = str(reason)
        except Exception as error:  # noqa: BLE001 (no fault of one task ends the others)
            result.failed[task.id] = str(error) if isinstance(error, UserError) else unforeseen(error)
    return replace(result, seconds=round(time.perf_counter() - start, 3))


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
    """Where the test data differs from the protocol."""
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
    differences, test = opened.differences, opened.data
    try:
        train = open_checked(task, benchmark, split="train").data
    except Unavailable:
        if not task.halved_for_probes:
            raise
        for_training = every_other(test.labels)
        train, test = test.subset(np.flatnonzero(for_training)), test.subset(np.flatnonzero(~for_training))
        differences = (
            "no train split: trained on every other test image of each class, scored on the rest",
            *differences,
        )
    if train.class_names != test.class_names or train.multilabel != test.multilabel:
        raise UserError(f"{train.folder}: train and test have different classes; download the task again")
    options: dict[str, Any] = {
        "batch_size": batch_size, "progress": progress, "cache": cache, "upright": benchmark.upright
    }  # fmt: skip
    return EncodedTask(
        folder=str(test.folder),
        test_set=opened.test_set,
        differences=differences,
        text=class_matrix(model, test.class_names, test.templates, batch_size, cache=cache),
        train=_encode(model, task, train, label=f"{label} train", **options),
        test=_encode(model, task, test, label=f"{label} test", **options),
    )


def _encode(model: Any, task: Task, data: TaskData, **options: Any) -> EncodedSplit:
    images = encode_images(model, data.entries, resize=task.resize, **options)
    return EncodedSplit(images.embeds, data.labels[images.readable], images.broken, data.digest(images.sha256))


def _run(task: Task, data: EncodedTask, key: RunKey, finished: Journal, origin: Origin) -> ProbeRun:
    """Train a probe, score it on the test images, once, and keep the result."""
    start = time.perf_counter()
    shots, method, seed = key
    probe = train_probe(method, data.training_set(task), shots, seed)
    result = score_matrix(task, probe.classify(data.test.features).numpy(), data.test.labels)
    run = ProbeRun(
        shots=shots,
        method=method,
        seed=seed,
        value=result.value,
        interval=result.interval,
        strength=probe.strength,
        held_out_value=probe.held_out_value,
        n_train=probe.num_images,
        seconds=round(time.perf_counter() - start, 3),
    )
    finished.add(origin, run)
    return run


def _origin(task: Task, data: EncodedTask, model_sha256: str, protocol: str) -> Origin:
    return Origin(
        model_sha256=model_sha256,
        protocol=protocol,
        task=task.id,
        version=task.version,
        metric=task.metric,
        resize=task.resize,
        train_sha256=data.train.sha256,
        test_sha256=data.test.sha256,
    )


def _describe(task: Task, data: EncodedTask, runs: Sequence[ProbeRun]) -> TaskProbes:
    zero_shot = score(task, data.test.features, data.text, data.test.labels)
    return TaskProbes(
        metric=task.metric,
        chance=zero_shot.chance,
        zero_shot=zero_shot.value,
        zero_shot_interval=zero_shot.interval,
        n=len(data.test.labels),
        n_train=len(data.train.labels),
        classes=len(data.text),
        in_score=task.in_score,
        version=task.version,
        test_set=data.test_set,
        differences=data.differences,
        broken=data.train.broken + data.test.broken,
        task_sha256=data.test.sha256,
        train_sha256=data.train.sha256,
        folder=data.folder,
        runs=tuple(runs),
    )
