"""A result as text on the terminal."""

from typing import TYPE_CHECKING

from focalclip.evaluation.registry.tasks import METRIC_TITLES
from focalclip.printed import aligned, listing, model_heading, percent, signed, some, span

if TYPE_CHECKING:
    from focalclip.evaluation.report.records import Result, TaskResult


def result_table(result: "Result") -> str:
    """Tasks, score, and what is missing with what to do."""
    heading = model_heading(_what(result), result.model)
    parts = [heading, _grid(result.tasks) if result.tasks else "", score_line(result), *_remarks(result)]
    return "\n\n".join(part for part in parts if part)


def score_line(result: "Result") -> str:
    """The score with its interval, and of how many tasks it is the mean."""
    score, interval, above = result.score, result.score_interval, result.score_above_chance
    if score is None or interval is None or above is None:
        return f"no score: 0 of {result.expected} tasks evaluated"
    return (
        f"score {percent(score)} (95% interval {span(interval)}),"
        f" {signed(above)} above chance: mean of {len(result.scored)} of {result.expected} tasks"
    )


def _what(result: "Result") -> str:
    """The protocol is named where it is not the benchmark's own."""
    protocol = "" if result.protocol == result.benchmark else f" · protocol {result.protocol}"
    return f"zero-shot {result.benchmark}{protocol}"


def _grid(tasks: dict[str, "TaskResult"]) -> str:
    """One aligned line per task; those beside the score come last and are marked."""
    rows = [("task", "metric", "value %", "95% interval", "chance %", "top-5 %", "ECE %", "n")]
    for name, task in sorted(tasks.items(), key=lambda item: not item[1].in_score):
        rows.append(
            (
                name if task.in_score else f"({name})",
                METRIC_TITLES[task.metric],
                percent(task.value) + (" " if task.beats_guessing else "*"),
                span(task.interval),
                percent(task.chance),
                percent(task.extras["top5"]) if "top5" in task.extras else "",
                percent(task.calibration["ece"]) if "ece" in task.calibration else "",
                f"{task.n:,}",
            )
        )
    lines = aligned(rows, left=(0, 1))
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
        listing("data differs from the protocol", differences),
        listing("names to look at", {name: t.label_warning for name, t in tasks.items() if t.label_warning}),
        listing("damaged images, left out", broken),
        listing("failed: the data is not right", result.failed),
        listing("missing: not evaluated for lack of data (how to download it: --help)", result.missing),
    ]
