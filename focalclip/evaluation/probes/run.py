"""Probes over the tasks of a benchmark."""

import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch
from tqdm import tqdm

from focalclip.base.errors import UserError
from focalclip.base.machine import versions
from focalclip.evaluation.data import Unavailable
from focalclip.evaluation.features.cache import open_cache
from focalclip.evaluation.features.model import DualEncoder, describe, evaluating, known_weights
from focalclip.evaluation.probes.result import Journal, Origin, ProbeResult, ProbeRun, RunKey, TaskProbes
from focalclip.evaluation.probes.train import METHODS, EncodedTask, Shots, encode_task, train_probe
from focalclip.evaluation.scoring import score, score_matrix
from focalclip.evaluation.task import Benchmark, Task, load_benchmark

SHOTS: tuple[Shots, ...] = (5, 20, 50, "full")

SEEDS = (0, 1, 2)  # ELEVATER's


def probe(
    model: DualEncoder,
    benchmark: str | Path | Benchmark,
    shots: Sequence[Shots] = SHOTS,
    methods: Sequence[str] = tuple(METHODS),
    seeds: Sequence[int] = SEEDS,
    *,
    data_root: str | Path | None = None,
    batch_size: int = 256,
    device: str | torch.device | None = None,
    tasks: Sequence[str] | None = None,
    journal: str | Path | None = None,
    cache_dir: str | Path | None = None,
    progress: bool = True,
) -> ProbeResult:
    """Train and score probes on a model's frozen, unit-length image embeddings.

    Args:
        model: anything with ``encode_image``, ``encode_text``, ``tokenizer`` and ``preprocess``.
        benchmark: what :func:`~focalclip.evaluation.task.load_benchmark` takes; its tasks need a train split.
        shots: training images per class, ``full`` for all.
        methods: keys of :data:`~focalclip.evaluation.probes.train.METHODS`.
        seeds: of the draws of training images; for ``full`` the first alone, as nothing is drawn there but the
            held-out part.
        data_root: where the data is.
        batch_size: images, and prompts, per forward pass.
        device: where to move the model first; the probes themselves are solved on the CPU.
        tasks: ids of the tasks to run; None for all.
        journal: file of finished probes, which are not trained again; new ones are added as they finish. None: neither.
        cache_dir: where features are kept by content (see ``features.cache``); None: nowhere.
        progress: show bars on stderr.

    Returns:
        What was measured, what is missing (with what to do) and what failed (with why).

    Raises:
        UserError: if there is no such benchmark, task or data folder, or ``journal`` holds something else.
    """
    start = time.perf_counter()
    full = benchmark if isinstance(benchmark, Benchmark) else load_benchmark(benchmark, data_root)
    chosen = full.select(tasks)
    finished = Journal(None if journal is None else Path(journal))
    if device is not None and hasattr(model, "to"):
        model.to(device)
    weights = known_weights(model)
    cache = open_cache(model, cache_dir, weights)
    facts = {"sha256": weights or "unknown"} | describe(model)
    plan = [(k, how, seed) for k, how in product(shots, methods) for seed in (seeds[:1] if k == "full" else seeds)]
    result = ProbeResult(full.name, full.protocol, full.expected, model=facts, versions=versions())
    for i, task in enumerate(chosen.tasks, start=1):
        label = f"{task.id} ({i} of {len(chosen.tasks)})"
        try:
            with evaluating(model):
                data = encode_task(
                    model, task, chosen, batch_size=batch_size, label=label, progress=progress, cache=cache
                )
                origin = _origin(task, data, facts["sha256"], full.protocol)
                with tqdm(plan, desc=label, unit=" probes", leave=False, disable=None if progress else True) as bar:
                    runs = [finished.runs(origin).get(key) or _run(task, data, key, finished, origin) for key in bar]
            result.tasks[task.id] = _describe(task, data, runs)
        except Unavailable as reason:
            result.missing[task.id] = str(reason)
        except UserError as error:
            result.failed[task.id] = str(error)
    return replace(result, seconds=round(time.perf_counter() - start, 3))


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
