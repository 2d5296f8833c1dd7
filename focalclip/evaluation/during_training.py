"""A benchmark measured over and over while a model trains: a fixed part of each task, on all ranks, nothing kept."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from focalclip.evaluation.registry.tasks import load_benchmark
from focalclip.evaluation.report import Result
from focalclip.evaluation.zeroshot import Opened, evaluate


class Evaluator:
    """Measures what it is called with on the same images each time.

    Args:
        benchmark: as for :func:`~focalclip.evaluation.zeroshot.evaluate`.
        max_images: so many evenly spaced images of each task; None for all.
        batch_size: images, and prompts, per forward pass.
        data_root: where the data is.
        tasks: ids of the tasks to run; None for all.

    Raises:
        UserError: if there is no such benchmark or data folder.
    """

    def __init__(
        self,
        benchmark: str | Path,
        *,
        max_images: int | None,
        batch_size: int = 256,
        data_root: str | Path | None = None,
        tasks: Sequence[str] | None = None,
    ) -> None:
        self._benchmark = load_benchmark(benchmark, data_root)
        self._options: dict[str, Any] = {"max_images": max_images, "batch_size": batch_size, "tasks": tasks}
        self._opened: dict[str, Opened] = {}

    def __call__(self, model: Any) -> Result:
        """Measure; all ranks call this together. Modes and random generators are as before afterwards."""
        return evaluate(model, self._benchmark, progress=False, opened=self._opened, **self._options)
