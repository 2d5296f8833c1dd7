"""Zero-shot classification over the tasks of a benchmark (ELEVATER's protocol, see ``scoring`` and ``classifier``)."""

import platform
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import focalclip
from focalclip.errors import UserError
from focalclip.evaluation.classifier import class_matrix
from focalclip.evaluation.datasets import Unavailable, locate, read_task_folder
from focalclip.evaluation.features import encode_images
from focalclip.evaluation.model import DualEncoder, device_and_dtype, evaluating, weights_sha256
from focalclip.evaluation.report import Result, TaskResult
from focalclip.evaluation.scoring import check_task, score
from focalclip.evaluation.tasks import Benchmark, Task, load_benchmark


def evaluate(
    model: DualEncoder,
    benchmark: str | Path | Benchmark,
    data_root: str | Path | None = None,
    batch_size: int = 256,
    device: str | torch.device | None = None,
    tasks: Sequence[str] | None = None,
    progress: bool = True,
) -> Result:
    """Measure a model zero-shot; its modes are as before afterwards, so that training can go on.

    Args:
        model: anything with ``encode_image``, ``encode_text``, ``tokenizer`` and ``preprocess``.
        benchmark: ``elevater``, ``demo``, a folder of wds tasks, a YAML file of tasks, or a :class:`Benchmark`.
        data_root: where the data is; see :func:`~focalclip.evaluation.tasks.load_benchmark`.
        batch_size: images, and prompts, per forward pass.
        device: where to move the model first; None leaves it where it is.
        tasks: ids of the tasks to run; None for all.
        progress: show a bar and one line per finished task, on stderr.

    Returns:
        What was measured, what is missing (with what to do) and what failed (with why). One task's faulty data never
        stops the others.

    Raises:
        UserError: if there is no such benchmark, task or data folder.
    """
    start = time.perf_counter()
    full = benchmark if isinstance(benchmark, Benchmark) else load_benchmark(benchmark, data_root)
    chosen = full.select(tasks)
    if device is not None:
        model.to(device)  # pyrefly: ignore[missing-attribute]
    results: dict[str, TaskResult] = {}
    missing: dict[str, str] = {}
    failed: dict[str, str] = {}
    for i, task in enumerate(chosen.tasks, start=1):
        label = f"{task.id} ({i} of {len(chosen.tasks)})"
        try:
            folder = locate(task, chosen.data_root, chosen.absent)
            with evaluating(model):
                results[task.id] = _evaluate_task(model, task, folder, batch_size, label, progress)
        except Unavailable as reason:
            missing[task.id] = str(reason)
        except UserError as error:
            failed[task.id] = str(error)
        if progress and task.id not in missing:
            print(f"{label}: {_outcome(results.get(task.id))}", file=sys.stderr)
    where, precision = device_and_dtype(model)
    return Result(
        benchmark=full.name,
        protocol=full.protocol,
        expected=sum(task.in_score for task in full.tasks),
        tasks=results,
        missing=missing,
        failed=failed,
        model={"sha256": weights_sha256(model), "precision": _name(precision), "device": _name(where)},
        versions=versions(),
        seconds=round(time.perf_counter() - start, 3),
    )


def _evaluate_task(
    model: DualEncoder, task: Task, folder: Path, batch_size: int, label: str, progress: bool
) -> TaskResult:
    start = time.perf_counter()
    data = read_task_folder(folder)
    test_set = check_task(task, data)
    classes = class_matrix(model, data.class_names, data.templates, batch_size)
    images = encode_images(
        model, data.entries, batch_size=batch_size, resize=task.resize, label=label, progress=progress
    )
    labels = data.labels[images.readable]
    result = score(task, images.embeds, classes, labels)
    return TaskResult(
        metric=task.metric,
        value=result.value,
        interval=result.interval,
        n=len(labels),
        chance=result.chance,
        classes=len(data.class_names),
        templates=len(data.templates),
        extras=result.extras,
        in_score=task.in_score,
        version=task.version,
        test_set=test_set,
        differences=() if test_set == "elevater" else task.differences,
        broken=images.broken,
        task_sha256=data.digest(images.sha256),
        folder=str(folder),
        seconds=round(time.perf_counter() - start, 3),
        images_per_second=round(len(data.entries) / images.seconds, 1),
    )


def _outcome(result: TaskResult | None) -> str:
    if result is None:
        return "failed, see below"
    speed = f"{result.n:,} images in {result.seconds:.1f} s, {result.images_per_second:,.0f} images/s"
    return f"{100 * result.value:.1f}% ({speed})"


def _name(value: Any) -> str:
    return str(value).removeprefix("torch.")


def versions() -> dict[str, str]:
    """Of everything that could change a number."""
    return {
        "focalclip": focalclip.__version__,
        "torch": torch.__version__,
        "open_clip": version("open_clip_torch"),
        "python": platform.python_version(),
    }
