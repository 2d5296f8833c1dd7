"""The result of an evaluation: as JSON, as a table, on disk."""

import json
import math
import os
import textwrap
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from focalclip.evaluation.intervals import Z95
from focalclip.evaluation.tasks import METRIC_TITLES, Metric

WIDTH = 110  # columns of the printed text


@dataclass(frozen=True)
class TaskResult:
    """One task's numbers (fractions in [0, 1]) and where they come from."""

    metric: Metric
    value: float
    interval: tuple[float, float]
    """95%: Wilson for accuracy, bootstrap over images otherwise."""
    n: int
    """Images that were scored."""
    chance: float
    classes: int
    templates: int
    extras: dict[str, float]
    in_score: bool
    version: int
    """Of the task's definition."""
    test_set: str
    """Which known test set this is, by its size."""
    differences: tuple[str, ...]
    """Where the data departs from the protocol."""
    broken: tuple[str, ...]
    """Damaged images, by name; they are not in n."""
    task_sha256: str
    """Of names, prompts, keys, labels and images."""
    folder: str
    seconds: float
    images_per_second: float | None
    """Of the images that were encoded; None where all came from the cache."""
    cached_images: int = 0
    text_seconds: float = 0.0
    image_seconds: float = 0.0
    prompts: int = 0
    """Of all classes together."""
    settings_sha256: str = ""
    """Of all that decides the numbers besides the data (see ``finished``)."""

    def to_json(self) -> dict[str, Any]:
        """JSON-ready; the extras stand beside the metric."""
        values = asdict(self)
        return values | values.pop("extras")


@dataclass(frozen=True)
class Result:
    """A benchmark's numbers for one model."""

    benchmark: str
    protocol: str
    expected: int
    """Tasks that the full score is the mean of."""
    tasks: dict[str, TaskResult] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    """Tasks whose data is not there, and what to do."""
    failed: dict[str, str] = field(default_factory=dict)
    """Tasks whose data is there and not right, and why."""
    model: dict[str, Any] = field(default_factory=dict)
    """source, sha256, precision, device."""
    versions: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def scored(self) -> list[TaskResult]:
        """The tasks that the score is the mean of."""
        return [task for task in self.tasks.values() if task.in_score]

    @property
    def score(self) -> float | None:
        """Unweighted mean over the tasks that could be evaluated; None without any."""
        return sum(task.value for task in self.scored) / len(self.scored) if self.scored else None

    @property
    def score_interval(self) -> tuple[float, float] | None:
        """95% for the sampling of images alone, from the tasks' intervals; the tasks themselves are taken as given."""
        if self.score is None:
            return None
        errors = [(task.interval[1] - task.interval[0]) / (2 * Z95) for task in self.scored]
        half = Z95 * math.sqrt(sum(error**2 for error in errors)) / len(errors)
        return self.score - half, self.score + half

    def with_source(self, source: str) -> "Result":
        """The same result with the model's source noted."""
        return replace(self, model={"source": source} | self.model)

    def to_json(self) -> dict[str, Any]:
        """The result as JSON-ready values; fractions in [0, 1]."""
        return {
            "benchmark": self.benchmark,
            "protocol": self.protocol,
            "score": self.score,
            "score_interval": self.score_interval,
            "n_tasks": len(self.scored),
            "n_tasks_expected": self.expected,
            "tasks": {name: task.to_json() for name, task in self.tasks.items()},
            "missing": self.missing,
            "failed": self.failed,
            "model": self.model,
            "versions": self.versions,
            "seconds": self.seconds,
        }

    def write(self, path: str | Path) -> Path:
        """Write the JSON, whole or not at all."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps(self.to_json(), indent=2, allow_nan=False) + "\n")
        temporary.replace(path)
        return path

    def table(self) -> str:
        """The result as text: tasks, score, and what is missing with what to do."""
        parts = [self._heading(), _grid(self.tasks) if self.tasks else "", self._score_line(), *self._remarks()]
        return "\n\n".join(part for part in parts if part)

    def _heading(self) -> str:
        model = self.model
        names = [f"zero-shot {self.benchmark}", str(model.get("source", "")), f"weights {model.get('sha256', '')[:12]}"]
        return " · ".join([name for name in names if name] + [f"{model.get('precision')} on {model.get('device')}"])

    def _score_line(self) -> str:
        if self.score is None or self.score_interval is None:
            return f"no score: 0 of {self.expected} tasks evaluated"
        half = (self.score_interval[1] - self.score_interval[0]) / 2
        return f"score {_percent(self.score)} ± {_percent(half)}: mean of {len(self.scored)} of {self.expected} tasks"

    def _remarks(self) -> list[str]:
        broken = {name: _some(t.broken, t.n + len(t.broken)) for name, t in self.tasks.items() if t.broken}
        differences = {name: "; ".join(t.differences) for name, t in self.tasks.items() if t.differences}
        return [
            _listing("data differs from the protocol", differences),
            _listing("damaged images, left out", broken),
            _listing("failed: the data is not right", self.failed),
            _listing("missing: not evaluated for lack of data (how to download it: --help)", self.missing),
        ]


def _grid(tasks: dict[str, TaskResult]) -> str:
    """One aligned line per task; those beside the score come last and are marked."""
    rows = [("task", "metric", "value %", "95% interval", "chance %", "top-5 %", "n")]
    for name, task in sorted(tasks.items(), key=lambda item: not item[1].in_score):
        low, high = task.interval
        rows.append(
            (
                name if task.in_score else f"({name})",
                METRIC_TITLES[task.metric],
                _percent(task.value),
                f"{_percent(low)} - {_percent(high)}",
                _percent(task.chance),
                _percent(task.extras["top5"]) if "top5" in task.extras else "",
                f"{task.n:,}",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    lines.insert(1, "-" * len(lines[0]))
    if any(not task.in_score for task in tasks.values()):
        lines.append("(in brackets: beside the score, not in it)")
    return "\n".join(line.rstrip() for line in lines)


def _some(broken: tuple[str, ...], total: int, shown: int = 3) -> str:
    """How many, and the first few by name; all of them are in the JSON."""
    return f"{len(broken)} of {total:,}: " + ", ".join(broken[:shown]) + (" ..." if broken[shown:] else "")


def _percent(fraction: float) -> str:
    """One decimal; two below one percent, where chance levels are."""
    return f"{100 * fraction:.1f}" if fraction >= 0.01 or fraction == 0 else f"{100 * fraction:.2f}"


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
