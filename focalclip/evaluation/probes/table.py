"""The result of probes as text."""

import textwrap
from collections.abc import Sequence

from focalclip.evaluation.probes.result import ZERO_SHOT, ProbeResult, Row, TaskProbes
from focalclip.evaluation.registry.tasks import METRIC_TITLES

_WIDTH = 110
_HEADINGS = ("shots", "method", "value %", "95% interval", "strength", "n train")


def table(result: ProbeResult) -> str:
    """A block for each task, one for their mean, and what is missing with what to do."""
    blocks = [_task_block(name, task) for name, task in result.tasks.items()]
    if result.num_scored > 1:
        title = f"mean of {result.num_scored} of {result.expected} tasks"
        blocks.append(title + "\n" + _grid([(*_cells(row)[:4], "", "") for row in result.means]))
    broken = {name: f"{len(task.broken)}: {task.broken[0]} ..." for name, task in result.tasks.items() if task.broken}
    differences = {name: "; ".join(task.differences) for name, task in result.tasks.items() if task.differences}
    notes = [
        _listing("data differs from the protocol", differences),
        _listing("damaged images, left out", broken),
        _listing("failed: the data is not right", result.failed),
        _listing("missing: not evaluated for lack of data", result.missing),
    ]
    return "\n\n".join(part for part in [_heading(result), *blocks, *notes] if part)


def _heading(result: ProbeResult) -> str:
    model = result.model
    names = [f"probes {result.benchmark}", str(model.get("source", "")), f"weights {str(model.get('sha256'))[:12]}"]
    return " · ".join([name for name in names if name] + [f"{model.get('precision')} on {model.get('device')}"])


def _task_block(name: str, task: TaskProbes) -> str:
    title = f"{name}: {METRIC_TITLES[task.metric]}, chance {_percent(task.chance)}%, {task.classes:,} classes"
    title += f", {task.n_train:,} training and {task.n:,} test images" + ("" if task.in_score else " (not in the mean)")
    return title + "\n" + _grid([_cells(row) for row in task.rows])


def _cells(row: Row) -> tuple[str, ...]:
    low, high = row.interval
    interval = f"{_percent(low)} - {_percent(high)}"
    trained = "" if row.method == ZERO_SHOT else f"{row.n_train:,.0f}"
    return str(row.shots), row.method, _percent(row.value), interval, _strengths(row.strengths), trained


def _strengths(values: Sequence[float]) -> str:
    """The only one, or the smallest and the largest over the seeds."""
    shown = list(dict.fromkeys(f"{value:.2g}" for value in sorted(values)))
    return " - ".join(shown if len(shown) < 2 else [shown[0], shown[-1]])


def _grid(rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns under their headings, without those that are empty."""
    used = [i for i in range(len(_HEADINGS)) if any(row[i] for row in rows)]
    lines = [[row[i] for i in used] for row in [_HEADINGS, *rows]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(used))]
    text = [
        "  ".join(
            cell.ljust(w) if i == 1 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    return "\n".join(["-" * len(text[0]), *(line.rstrip() for line in text)])


def _percent(fraction: float) -> str:
    """One decimal; two below one percent, where chance levels are."""
    return f"{100 * fraction:.1f}" if fraction >= 0.01 or fraction == 0 else f"{100 * fraction:.2f}"


def _listing(title: str, items: dict[str, str]) -> str:
    """A title, and one hanging paragraph per item; empty without items."""
    lines = [textwrap.fill(f"  {name}: {text}", _WIDTH, subsequent_indent="    ") for name, text in items.items()]
    return "\n".join([f"{title}:", *lines]) if lines else ""
