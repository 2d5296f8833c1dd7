"""A probe result for people: a table for the terminal, and a plot of values over shots (matplotlib, when called)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from focalclip.base.terminal import aligned, listing, model_heading, percent, span
from focalclip.evaluation.metrics import METRICS
from focalclip.evaluation.probes.result import METHODS, ZERO_SHOT, ProbeResult, ProbeRow, Shots, TaskProbes

_HEADINGS = ("shots", "method", "value %", "95% interval", "strength", "n train")

_PANELS_PER_ROW = 4

_COLOURS = dict(zip(METHODS, ("#4c72b0", "#dd8452", "#c44e52", "#55a868"), strict=True))

_ZERO_SHOT_COLOUR = "0.2"


def probe_table(result: ProbeResult) -> str:
    """A block for each task, one for their mean, and what is missing with what to do."""
    blocks = [_task_block(name, task) for name, task in result.tasks.items()]
    if result.num_scored > 1:
        title = f"mean of {result.num_scored} of {result.expected} tasks"
        blocks.append(title + "\n" + _grid([(*_cells(row)[:4], "", "") for row in result.means]))
    broken = {name: f"{len(task.broken)}: {task.broken[0]} ..." for name, task in result.tasks.items() if task.broken}
    differences = {name: "; ".join(task.differences) for name, task in result.tasks.items() if task.differences}
    notes = [
        listing("data differs from the protocol", differences),
        listing("damaged images, left out", broken),
        listing("failed: the data is not right", result.failed),
        listing("missing: not evaluated for lack of data", result.missing),
    ]
    heading = model_heading(f"probes {result.benchmark}", result.model)
    return "\n\n".join(part for part in [heading, *blocks, *notes] if part)


def _task_block(name: str, task: TaskProbes) -> str:
    title = f"{name}: {METRICS[task.metric].title}, chance {percent(task.chance)}%, {task.classes:,} classes"
    title += f", {task.n_train:,} training and {task.n:,} test images" + ("" if task.in_score else " (not in the mean)")
    return title + "\n" + _grid([_cells(row) for row in task.rows])


def _cells(row: ProbeRow) -> tuple[str, ...]:
    trained = "" if row.method == ZERO_SHOT else f"{row.n_train:,.0f}"
    return str(row.shots), row.method, percent(row.value), span(row.interval), _strengths(row.strengths), trained


def _strengths(values: Sequence[float]) -> str:
    """The only one, or the smallest and the largest over the seeds."""
    shown = list(dict.fromkeys(f"{value:.2g}" for value in sorted(values)))
    return " - ".join(shown if len(shown) < 2 else [shown[0], shown[-1]])


def _grid(rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns under their headings, without those that are empty."""
    used = [i for i in range(len(_HEADINGS)) if any(row[i] for row in rows)]
    return "\n".join(aligned([[row[i] for i in used] for row in [_HEADINGS, *rows]], left=(1,)))


def write_plot(result: ProbeResult, path: Path) -> Path:
    """Draw values with their 95% intervals over the numbers of shots; zero-shot is at 0 shots.

    Args:
        result: of at least one task.
        path: the picture; its ending names the format.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels: list[tuple[str, list[ProbeRow], float | None]] = [
        (f"{name}\n{METRICS[task.metric].title}", task.rows, task.chance) for name, task in result.tasks.items()
    ]
    if result.num_scored > 1:
        panels.insert(0, (f"mean of {result.num_scored} tasks\n", result.means, None))
    columns = min(_PANELS_PER_ROW, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(max(4.6, 3.2 * columns), 2.9 * rows + 0.9), dpi=150, layout="constrained")
    grid: Any = figure.subplots(rows, columns, squeeze=False).flat
    for panel, (title, values, chance) in zip(grid, panels, strict=False):
        _draw(panel, title, values, chance)
    for unused in list(grid)[len(panels) :]:
        unused.set_axis_off()
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8, frameon=False)
    model = result.model.get("source") or f"weights {str(result.model.get('sha256'))[:12]}"
    figure.suptitle(f"Probes of {model}, 95% intervals", fontsize=10)
    FigureCanvasAgg(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def _draw(panel: Any, title: str, rows: Sequence[ProbeRow], chance: float | None) -> None:
    shots: list[Shots] = list(dict.fromkeys(row.shots for row in rows))
    methods = list(dict.fromkeys(row.method for row in rows))
    for number, method in enumerate(methods):
        shown = [row for row in rows if row.method == method]
        # beside each other, so that no interval hides another
        shift = 0.0 if method == ZERO_SHOT else 0.09 * (number - len(methods) / 2)
        places = [shots.index(row.shots) + shift for row in shown]
        colour = _COLOURS.get(method, _ZERO_SHOT_COLOUR)
        values = [100 * row.value for row in shown]
        errors = [[100 * abs(row.value - row.interval[side]) for row in shown] for side in (0, 1)]
        panel.errorbar(
            places, values, yerr=errors, fmt="o-", color=colour, label=method, markersize=3.5, linewidth=1.2, capsize=2,
        )  # fmt: skip
        if method == ZERO_SHOT:
            panel.axhline(values[0], color=colour, linestyle="--", linewidth=0.8)
    if chance is not None:
        panel.axhline(100 * chance, color="0.6", linestyle=":", linewidth=1)
        panel.annotate("chance", (1, 100 * chance), xycoords=("axes fraction", "data"), ha="right", va="bottom",
                       fontsize=7, color="0.5")  # fmt: skip
    panel.set_title(title, fontsize=9)
    panel.set_xticks(range(len(shots)), [str(k) for k in shots], fontsize=8)
    panel.set_xlabel("training images per class", fontsize=8)
    panel.set_ylabel("%", fontsize=8)
    panel.tick_params(axis="y", labelsize=8)
    panel.grid(axis="y", color="0.92", linewidth=0.8)
    panel.set_axisbelow(True)
