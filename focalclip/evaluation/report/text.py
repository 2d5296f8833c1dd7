"""A result as text on the terminal."""

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from focalclip.evaluation.registry.tasks import METRIC_TITLES

if TYPE_CHECKING:
    from focalclip.evaluation.report.records import Result, TaskResult

WIDTH = 110  # columns of the printed text


def result_table(result: "Result") -> str:
    """Tasks, score, and what is missing with what to do."""
    parts = [_heading(result), _grid(result.tasks) if result.tasks else "", score_line(result), *_remarks(result)]
    return "\n\n".join(part for part in parts if part)


def score_line(result: "Result") -> str:
    """The score with its interval, and of how many tasks it is the mean."""
    score, interval, above = result.score, result.score_interval, result.score_above_chance
    if score is None or interval is None or above is None:
        return f"no score: 0 of {result.expected} tasks evaluated"
    return (
        f"score {percent(score)} (95% interval {percent(interval[0])} - {percent(interval[1])}),"
        f" {signed(above)} above chance: mean of {len(result.scored)} of {result.expected} tasks"
    )


def percent(fraction: float) -> str:
    """One decimal; two below one percent, where chance levels are."""
    return f"{100 * fraction:.1f}" if abs(fraction) >= 0.01 or fraction == 0 else f"{100 * fraction:.2f}"


def signed(fraction: float) -> str:
    """Percentage points with their sign."""
    return f"{round(100 * fraction, 1) + 0.0:+.1f}"  # never -0.0


def grid(rows: Sequence[tuple[str, ...]], left: int = 1) -> list[str]:
    """Aligned lines with a rule under the first; the first ``left`` columns stand left, the others right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    lines.insert(1, "-" * len(lines[0]))
    return [line.rstrip() for line in lines]


def _heading(result: "Result") -> str:
    model = result.model
    names = [f"zero-shot {result.benchmark}", _protocol(result), str(model.get("source", ""))]
    names.append(f"weights {model.get('sha256', '')[:12]}")
    return " · ".join([name for name in names if name] + [f"{model.get('precision')} on {model.get('device')}"])


def _protocol(result: "Result") -> str:
    """Named where it is not the benchmark's own."""
    return "" if result.protocol == result.benchmark else f"protocol {result.protocol}"


def _grid(tasks: dict[str, "TaskResult"]) -> str:
    """One aligned line per task; those beside the score come last and are marked."""
    rows = [("task", "metric", "value %", "95% interval", "chance %", "top-5 %", "ECE %", "n")]
    for name, task in sorted(tasks.items(), key=lambda item: not item[1].in_score):
        low, high = task.interval
        rows.append(
            (
                name if task.in_score else f"({name})",
                METRIC_TITLES[task.metric],
                percent(task.value) + (" " if task.beats_guessing else "*"),
                f"{percent(low)} - {percent(high)}",
                percent(task.chance),
                percent(task.extras["top5"]) if "top5" in task.extras else "",
                percent(task.calibration["ece"]) if "ece" in task.calibration else "",
                f"{task.n:,}",
            )
        )
    lines = grid(rows, left=2)
    if any(not task.in_score for task in tasks.values()):
        lines.append("(in brackets: beside the score, not in it)")
    if not all(task.beats_guessing for task in tasks.values()):
        lines.append("* not above guessing: the interval holds chance, or always saying the commonest class")
    return "\n".join(lines)


def _remarks(result: "Result") -> list[str]:
    tasks = result.tasks
    broken = {name: some(t.broken, t.n + len(t.broken)) for name, t in tasks.items() if t.broken}
    differences = {name: "; ".join(t.differences) for name, t in tasks.items() if t.differences}
    return [
        _listing("data differs from the protocol", differences),
        _listing("names to look at", {name: t.label_warning for name, t in tasks.items() if t.label_warning}),
        _listing("damaged images, left out", broken),
        _listing("failed: the data is not right", result.failed),
        _listing("missing: not evaluated for lack of data (how to download it: --help)", result.missing),
    ]


def some(broken: tuple[str, ...], total: int, shown: int = 3) -> str:
    """How many, and the first few by name; all of them are in the JSON."""
    return f"{len(broken)} of {total:,}: " + ", ".join(broken[:shown]) + (" ..." if broken[shown:] else "")


def _listing(title: str, items: dict[str, str]) -> str:
    """A title, and one hanging paragraph per item; empty without items."""
    if not items:
        return ""
    width = max(len(name) for name in items) + 4
    lines = [
        textwrap.fill(
            text, max(WIDTH, width + 60), initial_indent=f"  {name}".ljust(width), subsequent_indent=" " * width,
            break_long_words=False, break_on_hyphens=False,
        )
        for name, text in items.items()
    ]  # fmt: skip
    return "\n".join([f"{title}:", *lines])
