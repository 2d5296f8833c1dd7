"""Zero-shot classification over ELEVATER's tasks, timed against CLIP_benchmark.

Class names and prompts are the true ones; pictures are few and synthetic, weights random. Both sides run as commands on
the same folders and the same weights, in float32 on the CPU, in turn.
"""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np

from focalclip.base.errors import UserError
from focalclip.evaluation.metrics import METRICS
from focalclip.evaluation.task import Task, registered_tasks
from focalclip.studies.bench import BenchResult, BenchRow
from focalclip.studies.bench.parity import number_pairs
from focalclip.studies.bench.peers import (
    CLIP_BENCHMARK,
    SHARED,
    OurRun,
    PeerRun,
    install_clip_benchmark,
    installed_versions,
    run_clip_benchmark,
    run_zeroshot,
)
from focalclip.studies.bench.synthetic import SyntheticTask, write_model

SHARDS = 4  # as many as CLIP_benchmark's loader has workers by default; with fewer shards it fails

PICTURE = (240, 320)  # pixels


def timed(architecture: str, images: int, rounds: int, ids: Sequence[str] | None, folder: Path) -> BenchResult:
    """Measure both sides.

    Args:
        architecture: of open_clip, such as ``ViT-B-32``; its weights are random.
        images: per task.
        rounds: how often each side runs; they take turns in going first.
        ids: ELEVATER's tasks to run; None for its 20.
        folder: receives model and tasks.

    Raises:
        UserError: if there is no such architecture or task, or one of the sides fails.
    """
    import open_clip

    config = open_clip.get_model_config(architecture)
    if config is None:
        raise UserError(f"--model {architecture}: open_clip has no such architecture; see open_clip.list_models()")
    tasks = _chosen(ids)
    python = install_clip_benchmark()
    write_model(folder / "model", config)
    for seed, task in enumerate(tasks):
        synthetic_task(task, images, seed).write(folder / "tasks" / task.id)
    ids = [task.id for task in tasks]
    workers = min(int((folder / "tasks" / name / "test" / "nshards.txt").read_text()) for name in ids)
    run_peer = partial(run_clip_benchmark, python, folder / "model", folder / "tasks", ids, workers=workers)
    runs = [_round(i, rounds, run_peer, folder) for i in range(rounds)]
    prompts = sum(len(task.names or ()) * len(task.templates or ()) for task in tasks)
    return BenchResult(
        "eval",
        _rows(runs, len(tasks), prompts, images * len(tasks)),
        {
            "peer_name": f"clip_benchmark {CLIP_BENCHMARK}",
            "model": f"open_clip {architecture}, random weights, float32",
            "tasks": len(tasks),
            "classes": sum(len(task.names or ()) for task in tasks),
            "prompts": prompts,
            "images": images * len(tasks),
            "largest_difference": max(_largest_difference(ours, theirs) for ours, theirs in runs),
            "versions": {
                "ours": {name: version(name) for name in ("numpy", *SHARED)},
                "peer": installed_versions(python),
            },
        },
    )


def synthetic_task(task: Task, images: int, seed: int) -> SyntheticTask:
    """The task with its own names and prompts, and ``images`` synthetic images.

    Raises:
        UserError: if the registry has no names or prompts for it.
    """
    if not task.names or not task.templates:
        raise UserError(f"{task.id}: the registry has no class names or no prompts of it; choose other --tasks")
    rng = np.random.default_rng(seed)
    classes = len(task.names)
    is_multilabel = METRICS[task.metric].labels == "multilabel"
    labels = rng.random((images, classes)) < 0.1 if is_multilabel else rng.integers(0, classes, images)
    return SyntheticTask(task.names, task.templates, labels, seed, (PICTURE,), ("webp",), min(SHARDS, images))


def _chosen(ids: Sequence[str] | None) -> list[Task]:
    tasks = [task for task in registered_tasks("elevater") if task.in_score]
    known = {task.id: task for task in tasks}
    if unknown := [name for name in ids or () if name not in known]:
        raise UserError(f"--tasks: no task {unknown[0]!r}; known: {', '.join(known)}")
    return [known[name] for name in ids] if ids else tasks


def _round(i: int, rounds: int, run_peer: Callable[[], PeerRun], folder: Path) -> tuple[OurRun, PeerRun]:
    """One run of each, the other one first in every second round."""
    peer = None if i % 2 else run_peer()
    ours = run_zeroshot(folder / "model", folder / "tasks")
    peer = peer or run_peer()
    print(f"round {i + 1} of {rounds}: ours {ours.seconds:.1f} s, clip_benchmark {peer.seconds:.1f} s", file=sys.stderr)
    return ours, peer


def _rows(runs: Sequence[tuple[OurRun, PeerRun]], tasks: int, prompts: int, images: int) -> tuple[BenchRow, ...]:
    def spent(ours: OurRun, side: str) -> float:
        return sum(task[side] for task in ours.result["tasks"].values())

    return (
        BenchRow(f"end to end, {tasks} tasks", [ours.seconds for ours, _ in runs], [peer.seconds for _, peer in runs]),
        BenchRow(
            f"text side, {prompts:,} prompts",
            [spent(ours, "text_seconds") for ours, _ in runs],
            [peer.text_seconds for _, peer in runs],
        ),
        BenchRow(
            f"image side, {images:,} images",
            [spent(ours, "image_seconds") for ours, _ in runs],
            [peer.image_seconds for _, peer in runs],
        ),
    )


def _largest_difference(ours: OurRun, peer: PeerRun) -> float:
    """Between any two numbers; an image whose two best scores are tied up to rounding moves an accuracy by 1 / n.

    Raises:
        UserError: if our result lacks a number.
    """
    pairs = number_pairs(peer.metrics, ours.result)
    lacking = [pair for pair in pairs if pair.ours is None]
    if lacking:
        why = ours.result["failed"].get(lacking[0].task, "")
        raise UserError(f"{lacking[0].task}: our result has no {lacking[0].metric} ({why})")
    return max(abs(pair.ours - pair.theirs) for pair in pairs if pair.ours is not None)
