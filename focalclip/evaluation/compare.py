"""Two results on the same images: paired tests and intervals of their differences."""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from focalclip.base.errors import UserError, require
from focalclip.base.files import write_json
from focalclip.evaluation.metrics import METRICS
from focalclip.evaluation.metrics.definitions import Floats
from focalclip.evaluation.metrics.intervals import Interval, bootstrap_draws, percentile_interval
from focalclip.evaluation.predictions import Predictions
from focalclip.evaluation.result import Result, TaskResult, find_results

PAIRED_DRAWS = 2000  # the smallest p-value of the bootstrap is then 0.001


def mcnemar_exact(only_a: int, only_b: int) -> float:
    """Two-sided p-value of McNemar's exact test (McNemar, 1947): a fair coin for every image that only one gets right.

    Args:
        only_a: images that only the first model gets right.
        only_b: images that only the second gets right.
    """
    from scipy.special import bdtr

    return min(1.0, 2 * float(bdtr(min(only_a, only_b), only_a + only_b, 0.5)))


def paired_draws(a: Callable[[Floats], Floats], b: Callable[[Floats], Floats], n: int, name: str) -> Floats:
    """Bootstrap draws of ``b - a``, both on the same resampled images.

    Args:
        a: statistic of the first model: weights (draws, n) to (draws,).
        b: the same of the second.
        n: number of images.
        name: of the task. Each has its own draws: common draws would correlate tasks of equal size, and the
            interval of their mean would be too wide or too narrow.

    Returns:
        (PAIRED_DRAWS,).
    """
    return bootstrap_draws(lambda w: b(w) - a(w), n, PAIRED_DRAWS, seed=(0, zlib.crc32(name.encode())))


def bootstrap_p(draws: Floats) -> float:
    """Two-sided p-value of "no difference": twice the share of draws on the opposite side of zero, never quite 0."""
    draws = draws[~np.isnan(draws)]
    far = min(int((draws <= 0).sum()), int((draws >= 0).sum()))
    return min(1.0, 2 * (far + 1) / (len(draws) + 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted for how many there are (Holm, 1979): the chance of any false alarm among them is kept."""
    adjusted, running = [0.0] * len(p_values), 0.0
    for place, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        running = max(running, min(1.0, (len(p_values) - place) * p_values[i]))
        adjusted[i] = running
    return adjusted


@dataclass(frozen=True)
class TaskDifference:
    """Of one task, or of the mean over those in both results; fractions, B minus A."""

    a: float
    b: float
    difference: float
    interval: Interval
    """95%, paired bootstrap over the images."""
    p: float
    """Two-sided: chance of a difference as large between equally good models."""
    test: Literal["McNemar exact", "paired bootstrap"]
    n: int
    metric: str = ""
    p_holm: float | None = None
    """``p``, adjusted for the number of tasks that were compared; None for the mean, which is one question."""
    only_a: int | None = None
    """Images that only A gets right; None where the metric does not count images."""
    only_b: int | None = None


@dataclass(frozen=True)
class ResultComparison:
    """What ``--compare A B`` shows."""

    a: dict[str, Any]
    """File, source and weights hash of A."""
    b: dict[str, Any]
    benchmark: str
    score: TaskDifference | None
    """Mean over the tasks of the score that both have."""
    tasks: dict[str, TaskDifference]
    only_a: tuple[str, ...]
    """Tasks that only A has."""
    only_b: tuple[str, ...]
    refused: dict[str, str]
    """Tasks that cannot be compared, and why."""
    beside: tuple[str, ...]
    """Compared tasks that are not in the mean."""

    def to_json(self) -> dict[str, Any]:
        """JSON-ready; fractions in [0, 1], differences are B minus A."""
        return asdict(self)

    def write(self, path: str | Path) -> Path:
        """Write the JSON."""
        return write_json(path, self.to_json())


def compare(a: str | Path, b: str | Path, progress: bool = True) -> ResultComparison:
    """Compare two results on the images of every task that both have.

    Args:
        a: a result's JSON, or a run directory.
        b: likewise; where one run directory holds several results, the other's name decides.
        progress: show a bar on stderr.

    Raises:
        UserError: if a result cannot be read, or they have no task in common.
    """
    require("comparing", "eval", "scipy")
    path_a, path_b = find_results(a, b)
    first, second = Result.read(path_a), Result.read(path_b)
    shared = [name for name in first.tasks if name in second.tasks]
    if not shared:
        raise UserError(f"--compare {a} {b}: the results have no task in common; compare two results of one benchmark")
    differences, draws, refused = {}, {}, {}
    for name in tqdm(shared, desc="comparing", unit=" tasks", leave=False, disable=None if progress else True):
        try:
            differences[name], draws[name] = _compare_task(name, first.tasks[name], second.tasks[name])
        except UserError as reason:
            refused[name] = str(reason)
    adjusted = holm([difference.p for difference in differences.values()])
    differences = {
        name: TaskDifference(**asdict(difference) | {"p_holm": p})
        for (name, difference), p in zip(differences.items(), adjusted, strict=True)
    }
    scored = [name for name in differences if first.tasks[name].in_score]
    return ResultComparison(
        a=_identity(path_a, first),
        b=_identity(path_b, second),
        benchmark=first.benchmark,
        score=_mean([differences[name] for name in scored], [draws[name] for name in scored]) if scored else None,
        tasks=differences,
        only_a=tuple(name for name in first.tasks if name not in second.tasks),
        only_b=tuple(name for name in second.tasks if name not in first.tasks),
        refused=refused,
        beside=tuple(name for name in differences if name not in scored),
    )


def _compare_task(name: str, first: TaskResult, second: TaskResult) -> tuple[TaskDifference, np.ndarray]:
    a, b = _pair(first, second)
    metric, answers = METRICS[a.metric], (a.answers, b.answers)
    first_statistic, second_statistic = (partial(metric.definition, side) for side in answers)
    draws = paired_draws(first_statistic, second_statistic, a.n, name)
    values = [metric.value(side) for side in answers]
    counts: dict[str, int] = {}
    if metric.correct or metric.labels == "single":
        right_a, right_b = (metric.correct(side) for side in answers) if metric.correct else (a.correct, b.correct)
        counts = {"only_a": int((right_a & ~right_b).sum()), "only_b": int((right_b & ~right_a).sum())}
    difference = TaskDifference(
        a=values[0],
        b=values[1],
        difference=values[1] - values[0],
        interval=percentile_interval(draws),
        p=mcnemar_exact(**counts) if metric.correct else bootstrap_p(draws),
        test="McNemar exact" if metric.correct else "paired bootstrap",
        n=a.n,
        metric=metric.title,
        **counts,
    )
    return difference, draws


def _pair(first: TaskResult, second: TaskResult) -> tuple[Predictions, Predictions]:
    """The answers of both, which must be about the same things."""
    a, b = first.predictions, second.predictions
    if a is None or b is None:
        raise UserError(f"the answers of {'A' if a is None else 'B'} were not kept beside its JSON; evaluate it again")
    if a.metric != b.metric or a.ranking != b.ranking:
        raise UserError(f"A has {a.metric} ({a.ranking}), B has {b.metric} ({b.ranking}); evaluate with one protocol")
    if a.images_sha256 != b.images_sha256 or a.entries != b.entries:
        raise UserError(f"other images ({a.entries:,} in A, {b.entries:,} in B); evaluate both on the same data")
    if not np.array_equal(a.places, b.places):
        raise UserError(f"{a.n:,} images could be read for A, {b.n:,} for B; evaluate both on one machine")
    if not np.array_equal(a.labels, b.labels):
        raise UserError("other labels for the same images; evaluate both on the same data and class names")
    return a, b


def _mean(differences: Sequence[TaskDifference], draws: Sequence[np.ndarray]) -> TaskDifference:
    """Each task's images are drawn on their own; the draws of the mean are the means of the draws."""
    means = np.mean(draws, axis=0)
    a, b = (float(np.mean(values)) for values in ([d.a for d in differences], [d.b for d in differences]))
    n = sum(difference.n for difference in differences)
    return TaskDifference(a, b, b - a, percentile_interval(means), bootstrap_p(means), "paired bootstrap", n)


def _identity(path: Path, result: Result) -> dict[str, Any]:
    return {"file": str(path), "source": result.model.get("source", ""), "sha256": result.model.get("sha256", "")}
