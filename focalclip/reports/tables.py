"""A result as text for a terminal, CSV (everything), Markdown and LaTeX (what a paper shows); a comparison as text."""

import csv
import io
import re
import textwrap
from typing import TYPE_CHECKING, Any

from focalclip.base.terminal import WIDTH, aligned, listing, model_heading, percent, signed, some, span
from focalclip.evaluation.metrics import METRICS

if TYPE_CHECKING:
    from focalclip.evaluation.compare import ResultComparison, TaskDifference
    from focalclip.evaluation.result import Result, TaskResult

MEAN = "mean"

_COLUMNS = (
    "benchmark", "protocol", "model", "weights_sha256", "task", "metric", "value", "low", "high", "chance",
    "above_chance", "in_score", "n", "classes", "templates", "broken", "test_set", "accuracy", "top5", "majority",
    "ece", "ece_equal_mass", "ece_own_scale", "own_scale", "ece_fitted_scale", "fitted_scale", "images_per_second",
    "cached_images", "seconds", "task_sha256",
)  # fmt: skip

_LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}


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
    part = " of a part of the images, which is no result" if result.is_partial else ""
    return (
        f"score{part} {percent(score)} (95% interval {span(interval)}),"
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
                METRICS[task.metric].title,
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


def comparison_table(comparison: "ResultComparison") -> str:
    """A comparison as text: a line per task, the mean, what could not be compared."""
    head = [f"A  {_describe(comparison.a)}", f"B  {_describe(comparison.b)}"]
    rows = [("task", "metric", "A %", "B %", "B - A", "95% interval", "p", "p (Holm)", "only A", "only B", "n")]
    rows += [
        _difference_row(f"({name})" if name in comparison.beside else name, d) for name, d in comparison.tasks.items()
    ]
    if comparison.score:
        rows.append(_difference_row(f"mean of {len(comparison.tasks) - len(comparison.beside)}", comparison.score))
    lines = aligned(rows, left=(0, 1)) if comparison.tasks else ["no task can be compared"]
    if comparison.score:
        lines.insert(-1, lines[1])
    remarks = [
        "B - A in points, paired on the same images. p: McNemar's exact test for accuracy, else the paired"
        f" bootstrap. p (Holm): adjusted for {len(comparison.tasks)} tasks; look at this one in search of any"
        " difference."
    ]
    remarks += ["(in brackets: beside the mean, not in it)"] if comparison.beside else []
    remarks += [f"only in A: {', '.join(comparison.only_a)}"] if comparison.only_a else []
    remarks += [f"only in B: {', '.join(comparison.only_b)}"] if comparison.only_b else []
    remarks += [f"not compared: {name}: {why}" for name, why in comparison.refused.items()]
    notes = [textwrap.fill(remark, WIDTH, break_on_hyphens=False) for remark in remarks]
    return "\n\n".join(["\n".join(head), "\n".join(lines), "\n".join(notes)])


def _describe(identity: dict[str, Any]) -> str:
    parts = [identity["source"], f"weights {identity['sha256'][:12]}", identity["file"]]
    return " · ".join(part for part in parts if part)


def _difference_row(name: str, d: "TaskDifference") -> tuple[str, ...]:
    return (
        name, d.metric, percent(d.a), percent(d.b), signed(d.difference),
        f"{signed(d.interval[0])} to {signed(d.interval[1])}", _p(d.p), "" if d.p_holm is None else _p(d.p_holm),
        _count(d.only_a), _count(d.only_b), f"{d.n:,}",
    )  # fmt: skip


def _count(number: int | None) -> str:
    return "" if number is None else f"{number:,}"


def _p(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else f"{p:.0e}"


def csv_table(result: "Result") -> str:
    """One line per task and one for the mean, as fractions in full precision; for spreadsheets and data frames."""
    common = {
        "benchmark": result.benchmark, "protocol": result.protocol, "model": result.model.get("source", ""),
        "weights_sha256": result.model.get("sha256", ""),
    }  # fmt: skip
    text = io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS, restval="", lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    for name, task in result.tasks.items():
        low, high = task.interval
        own = {"task": name, "low": low, "high": high, "broken": len(task.broken)}
        writer.writerow(common | task.to_json() | task.calibration | own | {"broken": len(task.broken)})
    if result.score_interval is not None:
        low, high = result.score_interval
        mean = {"value": result.score, "low": low, "high": high, "above_chance": result.score_above_chance}
        writer.writerow(common | mean | {"task": MEAN, "metric": f"mean of {len(result.scored)} of {result.expected}"})
    return text.getvalue()


def table_rows(result: "Result") -> list[tuple[str, ...]]:
    """The table of a paper: head, tasks of the score, their mean, then the tasks beside it."""
    tasks = result.tasks.items()
    rows = [("task", "metric", "n", "value %", "95% interval", "chance %", "above chance")]
    rows += [_row(name, task) for name, task in tasks if task.in_score]
    if result.score is not None and result.score_interval is not None and result.score_above_chance is not None:
        name, above = f"mean of {len(result.scored)} of {result.expected}", signed(result.score_above_chance)
        rows.append((name, "", "", percent(result.score), span(result.score_interval), "", above))
    return rows + [_row(f"{name} (beside the mean)", task) for name, task in tasks if not task.in_score]


def _row(name: str, task: "TaskResult") -> tuple[str, ...]:
    return (
        name, METRICS[task.metric].title, f"{task.n:,}", percent(task.value), span(task.interval),
        percent(task.chance), signed(task.above_chance),
    )  # fmt: skip


def caption(result: "Result") -> str:
    """What the table shows, and of which model."""
    model: dict[str, Any] = result.model
    parts = [f"zero-shot {result.benchmark}, protocol {result.protocol}", str(model.get("source", "model"))]
    parts += [f"weights {model['sha256'][:12]}"] if model.get("sha256") else []
    parts += [f"{model['precision']} on {model['device']}"] if model.get("precision") else []
    return ", ".join(parts)


def markdown_table(result: "Result") -> str:
    """For a README or an issue."""
    head, *rows = [[_escape_markdown(cell) for cell in row] for row in table_rows(result)]
    rules = ["---", "---", *["---:"] * (len(head) - 2)]
    mean = [i for i, row in enumerate(rows) if row[0].startswith("mean of ")]
    rows = [[f"**{c}**" if i in mean and c else c for c in row] for i, row in enumerate(rows)]
    lines = [f"| {' | '.join(row)} |" for row in [head, rules, *rows]]
    remarks = [f"- {name}: {'; '.join(t.differences)}" for name, t in result.tasks.items() if t.differences]
    remarks += [f"- {name}: {len(t.broken)} damaged images left out" for name, t in result.tasks.items() if t.broken]
    absent = [*result.missing, *result.failed]
    remarks += [f"- not evaluated: {', '.join(absent)}"] if absent else []
    parts = [caption(result), "\n".join(lines), "\n".join(remarks)]
    return "\n\n".join(part for part in parts if part) + "\n"


def latex_table(result: "Result") -> str:
    r"""A ``booktabs`` table: ``\usepackage{booktabs}`` and ``\input`` the file."""
    head, *rows = [[_escape_latex(cell.replace(" - ", "--")) for cell in row] for row in table_rows(result)]
    lines = [f"% {caption(result)}", r"\begin{tabular}{llrrrrr}", r"\toprule", _latex_line(head), r"\midrule"]
    for row in rows:
        if row[0].startswith("mean of "):
            lines += [r"\midrule", _latex_line([rf"\textbf{{{cell}}}" if cell else "" for cell in row])]
        else:
            lines.append(_latex_line(row))
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def _latex_line(cells: list[str]) -> str:
    return " & ".join(cells) + r" \\"


def _escape_markdown(text: str) -> str:
    return re.sub(r"([\\|*_`<>])", r"\\\1", text)


def _escape_latex(text: str) -> str:
    text = re.sub(r"[\\~^&%$#_{}]", lambda match: _LATEX.get(match[0], "\\" + match[0]), text)
    return re.sub(r"^([+-])(?=[\d.])", r"$\1$", text)  # a sign, not a hyphen
