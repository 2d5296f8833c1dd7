"""A result as CSV (everything), Markdown and LaTeX (what a paper shows)."""

import csv
import io
import re
from typing import TYPE_CHECKING, Any

from focalclip.evaluation.registry.tasks import METRIC_TITLES
from focalclip.printed import percent, signed, span

if TYPE_CHECKING:
    from focalclip.evaluation.report.records import Result, TaskResult

MEAN = "mean"
_COLUMNS = (
    "benchmark", "protocol", "model", "weights_sha256", "task", "metric", "value", "low", "high", "chance",
    "above_chance", "in_score", "n", "classes", "templates", "broken", "test_set", "accuracy", "top5", "majority",
    "ece", "ece_equal_mass", "ece_own_scale", "own_scale", "ece_fitted_scale", "fitted_scale", "images_per_second",
    "cached_images", "seconds", "task_sha256",
)  # fmt: skip


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
        name, METRIC_TITLES[task.metric], f"{task.n:,}", percent(task.value), span(task.interval),
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


_LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}


def _escape_latex(text: str) -> str:
    text = re.sub(r"[\\~^&%$#_{}]", lambda match: _LATEX.get(match[0], "\\" + match[0]), text)
    return re.sub(r"^([+-])(?=[\d.])", r"$\1$", text)  # a sign, not a hyphen
