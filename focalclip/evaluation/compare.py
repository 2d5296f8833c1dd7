"""Two results on the same images: what differs by more than chance."""

import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from focalclip.base.errors import UserError
from focalclip.base.files import write_json
from focalclip.base.terminal import WIDTH, aligned, percent, signed
from focalclip.evaluation.metrics.intervals import Interval, percentile_interval
from focalclip.evaluation.metrics.paired import bootstrap_p, holm, mcnemar_exact, paired_draws
from focalclip.evaluation.predictions import Predictions
from focalclip.evaluation.result import Result, TaskResult, find_results
from focalclip.evaluation.task import METRIC_TITLES

SCORE = "score"


@dataclass(frozen=True)
class Difference:
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
    """Images that A alone gets right; None where the metric does not count images."""
    only_b: int | None = None


@dataclass(frozen=True)
class Comparison:
    """What ``--compare A B`` shows."""

    a: dict[str, Any]
    """File, source and weights hash of A."""
    b: dict[str, Any]
    benchmark: str
    score: Difference | None
    """Mean over the tasks of the score that both have."""
    tasks: dict[str, Difference]
    only_a: tuple[str, ...]
    """Tasks that A alone has."""
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
        return write_json(Path(path), self.to_json())

    def table(self) -> str:
        """As text: a line per task, the mean, what could not be compared."""
        head = [f"A  {_describe(self.a)}", f"B  {_describe(self.b)}"]
        rows = [("task", "metric", "A %", "B %", "B - A", "95% interval", "p", "p (Holm)", "only A", "only B", "n")]
        rows += [_row(f"({name})" if name in self.beside else name, d) for name, d in self.tasks.items()]
        if self.score:
            rows.append(_row(f"mean of {len(self.tasks) - len(self.beside)}", self.score))
        lines = aligned(rows, left=(0, 1)) if self.tasks else ["no task can be compared"]
        if self.score:
            lines.insert(-1, lines[1])
        remarks = [
            "B - A in points, paired on the same images. p: McNemar's exact test for accuracy, else the paired"
            f" bootstrap. p (Holm): adjusted for {len(self.tasks)} tasks; look at this one in search of any difference."
        ]
        remarks += ["(in brackets: beside the mean, not in it)"] if self.beside else []
        remarks += [f"only in A: {', '.join(self.only_a)}"] if self.only_a else []
        remarks += [f"only in B: {', '.join(self.only_b)}"] if self.only_b else []
        remarks += [f"not compared: {name}: {why}" for name, why in self.refused.items()]
        notes = [textwrap.fill(remark, WIDTH, break_on_hyphens=False) for remark in remarks]
        return "\n\n".join(["\n".join(head), "\n".join(lines), "\n".join(notes)])


def compare(a: str | Path, b: str | Path, progress: bool = True) -> Comparison:
    """Compare two results on the images of every task that both have.

    Args:
        a: a result's JSON, or a run directory.
        b: likewise; where one run directory holds several results, the other's name decides.
        progress: show a bar on stderr.

    Raises:
        UserError: if a result cannot be read, or they have no task in common.
    """
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
        name: Difference(**asdict(difference) | {"p_holm": p})
        for (name, difference), p in zip(differences.items(), adjusted, strict=True)
    }
    scored = [name for name in differences if first.tasks[name].in_score]
    return Comparison(
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


def _compare_task(name: str, first: TaskResult, second: TaskResult) -> tuple[Difference, np.ndarray]:
    a, b = _pair(first, second)
    draws = paired_draws(a.statistic, b.statistic, a.n, name)
    values = float(a.statistic()[0]), float(b.statistic()[0])
    counts: dict[str, int] = {}
    if not a.multilabel and a.metric != "roc_auc":
        counts = {"only_a": int((a.correct & ~b.correct).sum()), "only_b": int((b.correct & ~a.correct).sum())}
    exact = a.metric == "accuracy"
    difference = Difference(
        a=values[0],
        b=values[1],
        difference=values[1] - values[0],
        interval=percentile_interval(draws),
        p=mcnemar_exact(**counts) if exact else bootstrap_p(draws),
        test="McNemar exact" if exact else "paired bootstrap",
        n=a.n,
        metric=METRIC_TITLES[a.metric],
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


def _mean(differences: Sequence[Difference], draws: Sequence[np.ndarray]) -> Difference:
    """Each task's images are drawn on their own; the draws of the mean are the means of the draws."""
    means = np.mean(draws, axis=0)
    a, b = (float(np.mean(values)) for values in ([d.a for d in differences], [d.b for d in differences]))
    n = sum(difference.n for difference in differences)
    return Difference(a, b, b - a, percentile_interval(means), bootstrap_p(means), "paired bootstrap", n)


def _identity(path: Path, result: Result) -> dict[str, Any]:
    return {"file": str(path), "source": result.model.get("source", ""), "sha256": result.model.get("sha256", "")}


def _describe(identity: dict[str, Any]) -> str:
    parts = [identity["source"], f"weights {identity['sha256'][:12]}", identity["file"]]
    return " · ".join(part for part in parts if part)


def _row(name: str, d: Difference) -> tuple[str, ...]:
    return (
        name, d.metric, percent(d.a), percent(d.b), signed(d.difference),
        f"{signed(d.interval[0])} to {signed(d.interval[1])}", _p(d.p), "" if d.p_holm is None else _p(d.p_holm),
        _count(d.only_a), _count(d.only_b), f"{d.n:,}",
    )  # fmt: skip


def _count(number: int | None) -> str:
    return "" if number is None else f"{number:,}"


def _p(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else f"{p:.0e}"
