"""What a comparison found: one row per tower, means and intervals over seeds; as Markdown, JSON and a plot."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from focalclip.base.errors import UserError
from focalclip.base.files import write_json, write_text
from focalclip.base.terminal import signed
from focalclip.evaluation.metrics.intervals import half_interval
from focalclip.studies.towers.plan import TOWERS, Plan, StepCost
from focalclip.studies.towers.runs import Run

SCORE = "score"

BASELINE = "focalnet"  # the tower that the others are held against


@dataclass(frozen=True)
class TowerRow:
    """One tower."""

    tower: str
    steps: int = 0
    cost: StepCost | None = None
    values: dict[str, dict[int, float]] = field(default_factory=dict)
    """Fractions in [0, 1] by task (and ``score``, their mean) and seed."""
    chance: dict[str, float] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()
    """What failed, and what is not there yet."""

    def mean(self, task: str) -> float:
        """Over seeds; below all others where there is no value."""
        return fmean(self.values[task].values()) if self.values.get(task) else -math.inf

    def half(self, task: str) -> float | None:
        """Half the 95% interval of the mean over seeds; None for fewer than two."""
        return half_interval(list(self.values.get(task, {}).values()))

    def minus(self, other: "TowerRow | None", task: str) -> list[float]:
        """Differences to another row on the seeds that both have, since these share the order of all data."""
        if other is None or other.tower == self.tower:
            return []
        mine, theirs = self.values.get(task, {}), other.values.get(task, {})
        return [mine[seed] - theirs[seed] for seed in mine if seed in theirs]

    def to_json(self, plan: Plan, baseline: "TowerRow | None" = None) -> dict[str, Any]:
        """JSON-ready; everything about this tower, and its differences to ``baseline``."""
        scores: dict[str, dict[str, Any]] = {}
        for task, seeds in self.values.items():
            scores[task] = _summary(list(seeds.values())) | {"chance": self.chance.get(task), "seeds": seeds}
            if differences := self.minus(baseline, task):
                scores[task][f"minus_{BASELINE}"] = _summary(differences)
        batch = plan.base.data.batch_size
        cost: dict[str, Any] = {} if self.cost is None else {
            "parameters": self.cost.parameters,
            "multiply_adds": self.cost.multiply_adds,
            "seconds_per_step": self.cost.seconds,
            "images_per_second": batch / self.cost.seconds,
            "steps": self.steps,
            "samples": self.steps * batch,
        }  # fmt: skip
        tower = TOWERS[self.tower]
        row = {"tower": self.tower, "title": tower.title, "image": tower.image}
        return row | cost | {"scores": scores, "remarks": list(self.remarks)}


def _summary(values: Sequence[float]) -> dict[str, Any]:
    mean, half = fmean(values), half_interval(values)
    return {"mean": mean, "interval": None if half is None else [mean - half, mean + half]}


def collect(plan: Plan, runs: Sequence[Run]) -> list[TowerRow]:
    """One row for each tower of ``runs``, best score first; those without a result last.

    Raises:
        UserError: if a result cannot be read.
    """
    rows = [_row(plan, tower, [run for run in runs if run.tower == tower]) for tower in {run.tower: 0 for run in runs}]
    return sorted(rows, key=lambda row: -row.mean(SCORE))


def _row(plan: Plan, tower: str, runs: Sequence[Run]) -> TowerRow:
    if tower not in plan.costs:
        return TowerRow(tower, remarks=(f"failed: {plan.failed.get(tower, 'not measured yet')}",))
    values: dict[str, dict[int, float]] = {}
    chance: dict[str, float] = {}
    remarks = []
    for run in runs:
        if run.result is None:
            remarks.append(f"seed {run.seed}: " + (f"failed: {run.failure}" if run.failure else "not finished"))
            continue
        result = _read(run.result)
        values.setdefault(SCORE, {})[run.seed] = result["score"]
        for task, numbers in result["tasks"].items():
            values.setdefault(task, {})[run.seed] = numbers["value"]
            chance[task] = numbers["chance"]
        remarks += [f"seed {run.seed}: {task} is missing" for task in [*result["missing"], *result["failed"]]]
    return TowerRow(tower, plan.steps(tower), plan.costs[tower], values, chance, tuple(remarks))


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (ValueError, RecursionError):
        raise UserError(f"{path}: not an evaluation result; remove it and run the comparison again") from None


def tasks_of(rows: Sequence[TowerRow]) -> list[str]:
    """``score`` and every task that any tower was measured on."""
    names = sorted({task for row in rows for task in row.values} - {SCORE})
    return [SCORE, *names]


def markdown(plan: Plan, rows: Sequence[TowerRow], seeds: Sequence[int]) -> str:
    """The table, with what is equal in it above and what is missing in it below."""
    tasks = tasks_of(rows)
    costs = ["parameters M", "multiply-adds M", "ms per step", "images/s", "steps", "samples k"]
    baseline = _baseline(rows)
    head = ["tower", f"{SCORE} %", f"{SCORE} - {BASELINE}'s", *(f"{task} %" for task in tasks[1:]), *costs]
    lines = [_line(head), _line(["---", *["---:"] * (len(head) - 1)])]
    for row in rows:
        score, *others = (_percent(row, task) for task in tasks)
        lines.append(_line([row.tower, score, _against(row, baseline), *others, *_costs(row, plan)]))
    remarks = [f"- {row.tower}: {remark}" for row in rows for remark in row.remarks]
    parts = [
        _explanation(plan, seeds),
        "\n".join(lines),
        "\n".join(f"- {row.tower}: {TOWERS[row.tower].title}" for row in rows),
        "\n".join(["Not in the table:", *remarks]) if remarks else "",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _explanation(plan: Plan, seeds: Sequence[int]) -> str:
    is_cpu = plan.device == "cpu"
    unit = "CPU seconds of one thread" if is_cpu else f"seconds on {plan.device}"
    intervals = "one seed, so no interval"
    if len(seeds) > 1:
        intervals = f"mean ± half the 95% t-interval over seeds; differences to {BASELINE} are taken seed by seed"
    return (
        f"{plan.seconds:g} {unit} of training for each tower and seed; seeds {', '.join(map(str, seeds))}; batches of "
        f"{plan.base.data.batch_size}. Zero-shot accuracy: {intervals}. Parameters and multiply-adds are the image "
        f"tower's, milliseconds and images per second ({'CPU time' if is_cpu else 'clock'}) those of training the "
        "whole model."
    )


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _percent(row: TowerRow, task: str) -> str:
    if not row.values.get(task):
        return "failed" if any("failed" in remark for remark in row.remarks) else ""
    half = row.half(task)
    return f"{100 * row.mean(task):.1f}" + ("" if half is None else f" ± {100 * half:.1f}")


def _against(row: TowerRow, baseline: TowerRow | None) -> str:
    """Mean difference of the scores in points, with its interval."""
    if not (differences := row.minus(baseline, SCORE)):
        return ""
    half = half_interval(differences)
    return signed(fmean(differences)) + ("" if half is None else f" ± {100 * half:.1f}")


def _baseline(rows: Sequence[TowerRow]) -> TowerRow | None:
    return next((row for row in rows if row.tower == BASELINE), None)


def _costs(row: TowerRow, plan: Plan) -> list[str]:
    if row.cost is None:
        return [""] * 6
    batch = plan.base.data.batch_size
    return [
        f"{row.cost.parameters / 1e6:.2f}", f"{row.cost.multiply_adds / 1e6:.1f}", f"{1000 * row.cost.seconds:.0f}",
        f"{batch / row.cost.seconds:,.0f}", f"{row.steps:,}", f"{row.steps * batch / 1000:,.0f}",
    ]  # fmt: skip


def write(plan: Plan, rows: Sequence[TowerRow], seeds: Sequence[int], folder: Path) -> list[Path]:
    """Write ``table.md`` and ``results.json``; returns their paths."""
    baseline = _baseline(rows)
    result = {
        "what": "towers", "device": plan.device, "seconds": plan.seconds, "seeds": list(seeds),
        "base": plan.base.model_dump(mode="json"), "rows": [row.to_json(plan, baseline) for row in rows],
    }  # fmt: skip
    return [write_text(folder / "table.md", markdown(plan, rows, seeds)), write_json(folder / "results.json", result)]


_OURS, _OTHERS = "#c44e52", "#4c72b0"


def write_plot(plan: Plan, rows: Sequence[TowerRow], path: Path) -> bool:
    """Draw means with 95% intervals, and every seed as a dot.

    Returns:
        Whether there was anything to draw.
    """
    shown = [row for row in rows if row.values.get(SCORE)]
    if not shown:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tasks = tasks_of(shown)
    figure = Figure(figsize=(1.8 + 2.3 * len(tasks), 1.6 + 0.32 * len(shown)), dpi=150, layout="constrained")
    panels: Any = figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
    for panel, task in zip(panels, tasks, strict=True):
        _draw(panel, shown, task)
    panels[0].set_yticks(range(len(shown)), [row.tower for row in shown], fontsize=9)
    panels[0].set_ylim(len(shown) - 0.4, -0.6)  # the best on top
    unit = "CPU seconds of one thread" if plan.device == "cpu" else f"seconds on {plan.device}"
    seeds = max(len(row.values[SCORE]) for row in shown)
    what = f"mean over {seeds} seeds with 95% t-interval; dots: seeds" if seeds > 1 else "one seed"
    figure.suptitle(f"Equal parameters, {plan.seconds:g} {unit} of training: {what}", fontsize=10)
    FigureCanvasAgg(figure)
    figure.savefig(path)
    return True


def _draw(panel: Any, rows: Sequence[TowerRow], task: str) -> None:
    """One panel; the line of chance is in it where the towers come near."""
    for y, row in enumerate(rows):
        values = [100 * value for value in row.values.get(task, {}).values()]
        if not values:
            continue
        colour = _OURS if row.tower == BASELINE else _OTHERS
        half = row.half(task)
        panel.errorbar(
            100 * row.mean(task), y, xerr=None if half is None else 100 * half,
            fmt="|", color=colour, markersize=10, markeredgewidth=2, elinewidth=1.2, capsize=2.5,
        )  # fmt: skip
        panel.plot(values, [y] * len(values), "o", color=colour, markerfacecolor="white", markersize=4, zorder=3)
    title = task
    chances = [100 * row.chance[task] for row in rows if task in row.chance]
    if chances:
        title = f"{task}\n(chance {chances[0]:.2g}%)"
        limits = panel.get_xlim()
        panel.axvline(chances[0], color="0.5", linestyle=":", linewidth=1)
        panel.set_xlim(limits)
    panel.set_title(title, fontsize=9)
    panel.set_xlabel("%", fontsize=8)
    panel.tick_params(axis="x", labelsize=8)
    panel.tick_params(axis="y", length=0)
    panel.grid(axis="both", color="0.92", linewidth=0.8)
    panel.set_axisbelow(True)
