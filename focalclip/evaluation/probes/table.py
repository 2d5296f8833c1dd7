"""The result of probes as text."""

from collections.abc import Sequence

from focalclip.evaluation.probes.result import ZERO_SHOT, ProbeResult, Row, TaskProbes
from focalclip.evaluation.registry.tasks import METRIC_TITLES
from focalclip.printed import aligned, listing, model_heading, percent, span

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
        listing("data differs from the protocol", differences),
        listing("damaged images, left out", broken),
        listing("failed: the data is not right", result.failed),
        listing("missing: not evaluated for lack of data", result.missing),
    ]
    heading = model_heading(f"probes {result.benchmark}", result.model)
    return "\n\n".join(part for part in [heading, *blocks, *notes] if part)


def _task_block(name: str, task: TaskProbes) -> str:
    title = f"{name}: {METRIC_TITLES[task.metric]}, chance {percent(task.chance)}%, {task.classes:,} classes"
    title += f", {task.n_train:,} training and {task.n:,} test images" + ("" if task.in_score else " (not in the mean)")
    return title + "\n" + _grid([_cells(row) for row in task.rows])


def _cells(row: Row) -> tuple[str, ...]:
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
