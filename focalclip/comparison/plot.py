"""The comparison as one picture: a panel for each task, a line for each tower, best score on top."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from focalclip.comparison.plan import Plan
from focalclip.comparison.report import BASELINE, SCORE, Row, tasks_of

_OURS, _OTHERS = "#c44e52", "#4c72b0"


def write_plot(plan: Plan, rows: Sequence[Row], path: Path) -> bool:
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


def _draw(panel: Any, rows: Sequence[Row], task: str) -> None:
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
