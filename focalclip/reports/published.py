"""Results held against what others published for the same weights (``reference.yaml``), cell by cell."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import yaml
from pydantic import Field

from focalclip.base.errors import UserError
from focalclip.base.strict import Strict, from_dict

if TYPE_CHECKING:
    from focalclip.evaluation.result import Result

Trust = Literal["read", "quoted", "recalled", "derived"]


@dataclass(frozen=True)
class Source:
    """Where numbers were read."""

    title: str
    url: str
    trust: Trust


@dataclass(frozen=True)
class Cell:
    """One published number, a fraction in [0, 1]."""

    value: float
    source: Source
    remark: str = ""
    """Why it is not the same measurement as ELEVATER's; empty where nothing is known against it."""


@dataclass(frozen=True)
class Row:
    """One published model."""

    name: str
    data: str
    """What it was trained on."""
    mean: Cell
    """Of the 20 tasks."""
    tasks: dict[str, Cell]


def published_rows() -> list[Row]:
    """All rows, in the order of the file."""
    text = (files("focalclip.reports") / "published.yaml").read_text(encoding="utf-8")
    content = yaml.safe_load(text)
    sources = {key: Source(**values) for key, values in content["sources"].items()}

    def cell(number: float, source: str, remark: str = "") -> Cell:
        return Cell(number / 100, sources[source], remark)

    return [
        Row(row["name"], row["data"], cell(*row["mean"]), {task: cell(*cells) for task, cells in row["tasks"].items()})
        for row in content["rows"]
    ]


def rows_beside(result: "Result") -> list[Row]:
    """The rows that a result may be read beside: ELEVATER's, under whatever protocol; none for other benchmarks.

    A task of the same name in another benchmark may have other images: the demo's MNIST is a half of MNIST.
    """
    return published_rows() if result.benchmark == "elevater" else []


FILE = "reference.yaml"

SCORE = "score"  # the benchmark's mean, among the names of tasks

Verdict = Literal["pass", "fail", "missing", "not comparable", "weak"]


class ReferenceCell(Strict):
    """One published number."""

    task: str
    """Id in the registry, or ``score`` for the benchmark's mean."""
    value: float
    """In percent."""
    tolerance: float | None = Field(None, gt=0)
    """In points; null for weak cells alone."""
    metric: str = "accuracy"
    """A result counts that has it as its metric or beside it."""
    protocols: tuple[str, ...] = ("clip_benchmark", "datacomp", "elevater")
    """Protocols under which the task gives this number."""
    n: int | None = None
    """Test images; null where all test sets in use are the same."""
    weak: bool = False
    """Shown, and never failed."""
    source: str | None = None
    """Key of ``sources``; null: the model's."""


class Reference(Strict):
    """A model's published numbers."""

    title: str
    source: str
    """Key of ``sources`` for cells that name none."""
    cells: tuple[ReferenceCell, ...]


class ReferenceFile(Strict):
    """All of ``reference.yaml``."""

    sources: dict[str, str]
    references: dict[str, Reference]


class Comparison(NamedTuple):
    """One cell against a result."""

    cell: ReferenceCell
    verdict: Verdict
    value: float | None
    """The result's, in percent; None where there is none."""
    remark: str
    """Why there is no verdict on the value; empty where there is."""


@cache
def published() -> ReferenceFile:
    """The numbers that come with focalclip."""
    path = files("focalclip.reports") / FILE
    return from_dict(ReferenceFile, yaml.safe_load(path.read_text(encoding="utf-8")), FILE)


def compare(reference: Reference, result: Mapping[str, Any]) -> list[Comparison]:
    """Every cell of the result's protocol against the result (the JSON of an evaluation), task by task.

    Where a task has a cell for each of several test sets, that of the result's own counts.

    Raises:
        UserError: if the reference has no number under the result's protocol.
    """
    protocol = result["protocol"]
    asked = [cell for cell in reference.cells if protocol in cell.protocols]
    if not asked:
        known = sorted({name for cell in reference.cells for name in cell.protocols})
        raise UserError(f"{reference.title} has no numbers under the protocol {protocol}; use {' or '.join(known)}")
    comparisons = []
    for task in dict.fromkeys(cell.task for cell in asked):
        cells = [cell for cell in asked if cell.task == task]
        comparisons.append(_compare_score(cells[0], result) if task == SCORE else _compare_task(cells, result))
    return comparisons


def _compare_task(cells: list[ReferenceCell], result: Mapping[str, Any]) -> Comparison:
    task = result["tasks"].get(cells[0].task)
    if task is None:
        why = result.get("failed", {}).get(cells[0].task) or "not in the result"
        return Comparison(cells[0], "weak" if cells[0].weak else "missing", None, why)
    fitting = [cell for cell in cells if cell.n in (None, task["n"])]
    if not fitting:
        sizes = " or ".join(f"{cell.n:,}" for cell in cells)
        verdict = "weak" if all(cell.weak for cell in cells) else "not comparable"
        return Comparison(cells[0], verdict, None, f"{task['n']:,} test images, the reference has {sizes}")
    cell = fitting[0]
    value = task["value"] if task["metric"] == cell.metric else task.get(cell.metric)
    if value is None:
        why = f"metric {task['metric']}, the reference has {cell.metric}"
        return Comparison(cell, "weak" if cell.weak else "not comparable", None, why)
    return _judge(cell, value)


def _compare_score(cell: ReferenceCell, result: Mapping[str, Any]) -> Comparison:
    if result["n_tasks"] != result["n_tasks_expected"]:
        why = f"mean of {result['n_tasks']} of {result['n_tasks_expected']} tasks"
        return Comparison(cell, "missing", None, why)
    return _judge(cell, result["score"])


def _judge(cell: ReferenceCell, fraction: float) -> Comparison:
    value = 100 * fraction
    if cell.weak or cell.tolerance is None:
        return Comparison(cell, "weak", value, "")
    # half a unit of the published last digit: 27.43 stands for any number that rounds to it
    return Comparison(cell, "pass" if abs(value - cell.value) <= cell.tolerance + 0.005 else "fail", value, "")
