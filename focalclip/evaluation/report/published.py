"""Published numbers to stand beside a result, each with its source; see ``published.yaml``."""

from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Literal

import yaml

if TYPE_CHECKING:
    from focalclip.evaluation.report.records import Result

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
    text = (files("focalclip.evaluation.report") / "published.yaml").read_text(encoding="utf-8")
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
