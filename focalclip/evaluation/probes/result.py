"""Probes as records: what is asked for, each run, means over seeds and tasks, the JSON, the journal of finished runs.

Importing this needs no torch.
"""

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from focalclip.base.errors import UserError
from focalclip.base.files import write_json
from focalclip.evaluation.metrics.intervals import half_interval

METHODS: dict[str, str] = {
    "ridge": "ridge regression in closed form, the cheapest",
    "logistic": "logistic regression by L-BFGS",
    "language": "the same, regularised towards the zero-shot text classifier: ELEVATER's language-initialised head",
    "knn": "20 nearest neighbours by cosine, temperature 0.07",
}

ZERO_SHOT = "zero-shot"  # the method of the zero-shot row, which has 0 shots

FORMAT = 2  # of the journal; raised whenever a change to the probes could change a number: older lines are ignored then

Shots = int | Literal["full"]
"""Training images per class, or all of them."""

RunKey = tuple[Shots, str, int]
"""Shots, method and seed."""


@dataclass(frozen=True)
class ProbeSettings:
    """Which probes are trained; the defaults are ELEVATER's shots and seeds, and every method."""

    shots: Sequence[Shots] = (5, 20, 50, "full")
    """Training images per class."""
    methods: Sequence[str] = tuple(METHODS)
    """Keys of :data:`METHODS`."""
    seeds: Sequence[int] = (0, 1, 2)
    """Of the draws of training images. ``full`` uses only the first: nothing is drawn there but the held-out part."""
    tasks: Sequence[str] | None = None
    """Ids of the benchmark's tasks; None for all."""
    batch_size: int = 256
    """Images, and prompts, per forward pass."""

    def keys(self) -> list[RunKey]:
        """Every probe of one task, in the order in which they are trained."""
        return [
            (shots, method, seed)
            for shots, method in product(self.shots, self.methods)
            for seed in (self.seeds[:1] if shots == "full" else self.seeds)
        ]


@dataclass(frozen=True)
class ProbeRun:
    """One probe, scored once on the test images; fractions in [0, 1]."""

    shots: Shots
    method: str
    seed: int
    value: float
    interval: tuple[float, float]
    """95% for the sampling of test images."""
    strength: float | None
    held_out_value: float | None
    n_train: int
    seconds: float

    @property
    def key(self) -> RunKey:
        """Identifies it among the runs of its task."""
        return self.shots, self.method, self.seed


@dataclass(frozen=True)
class ProbeRow:
    """The runs of a task that differ in nothing but the seed."""

    shots: Shots
    method: str
    value: float
    """Mean over seeds."""
    interval: tuple[float, float]
    strengths: tuple[float, ...] = ()
    n_train: float = 0
    """Mean over seeds."""
    seeds: tuple[int, ...] = ()


def summarise(runs: Sequence[ProbeRun]) -> ProbeRow:
    """Mean over seeds and its 95% interval, for both the draw of training images and the sampling of test images.

    The seeds share the test images, whose noise therefore does not average out: the half-width is the root of the sum
    of squares of the t-interval over seeds and of the mean half-width of the seeds' own intervals. A single run has its
    own interval.
    """
    first, values = runs[0], [run.value for run in runs]
    interval = first.interval
    if (spread := half_interval(values)) is not None:
        half = math.hypot(spread, fmean((run.interval[1] - run.interval[0]) / 2 for run in runs))
        interval = max(0.0, fmean(values) - half), min(1.0, fmean(values) + half)
    return ProbeRow(
        first.shots,
        first.method,
        fmean(values),
        interval,
        tuple(run.strength for run in runs if run.strength is not None),
        fmean(run.n_train for run in runs),
        tuple(run.seed for run in runs),
    )


@dataclass(frozen=True)
class TaskProbes:
    """A task's probes and the data that they were trained and scored on."""

    metric: str
    chance: float
    zero_shot: float
    zero_shot_interval: tuple[float, float]
    n: int
    """Test images that were scored."""
    n_train: int
    """Images of the whole train split."""
    classes: int
    in_score: bool
    version: int
    """Of the task's definition."""
    test_set: str
    differences: tuple[str, ...]
    broken: tuple[str, ...]
    """Unreadable images of both splits."""
    task_sha256: str
    """Of names, prompts, keys, labels and images of the test split."""
    train_sha256: str
    folder: str
    runs: tuple[ProbeRun, ...] = ()

    @property
    def rows(self) -> list[ProbeRow]:
        """Zero-shot, then one row for each number of shots and method, in the order of the runs."""
        groups: dict[tuple[Shots, str], list[ProbeRun]] = {}
        for run in self.runs:
            groups.setdefault((run.shots, run.method), []).append(run)
        zero_shot = ProbeRow(0, ZERO_SHOT, self.zero_shot, self.zero_shot_interval)
        return [zero_shot, *(summarise(runs) for runs in groups.values())]

    def to_json(self) -> dict[str, Any]:
        """JSON-ready: the rows first, then every run."""
        values = asdict(self)
        runs = values.pop("runs")
        return values | {"probes": [asdict(row) for row in self.rows[1:]], "runs": runs}


@dataclass(frozen=True)
class ProbeResult:
    """A benchmark's probes for one model."""

    benchmark: str
    protocol: str
    expected: int
    """Tasks that a full mean is over."""
    tasks: dict[str, TaskProbes] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    """Tasks whose data is absent, and what to do."""
    failed: dict[str, str] = field(default_factory=dict)
    """Tasks whose data is faulty, and why."""
    model: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def means(self) -> list[ProbeRow]:
        """Unweighted means over the scored tasks that have the row, zero-shot first."""
        scored = [task.rows for task in self.tasks.values() if task.in_score]
        return [_mean_of(list(group)) for group in zip(*_in_all(scored), strict=True)] if scored else []

    @property
    def num_scored(self) -> int:
        """Tasks that the means are over."""
        return sum(task.in_score for task in self.tasks.values())

    def with_source(self, source: str) -> "ProbeResult":
        """The same result with the model's source recorded."""
        return replace(self, model={"source": source} | self.model)

    def to_json(self) -> dict[str, Any]:
        """JSON-ready; fractions in [0, 1]."""
        named = ("shots", "method", "value", "interval")
        means = [{name: getattr(row, name) for name in named} for row in self.means]
        return {
            "benchmark": self.benchmark,
            "protocol": self.protocol,
            "scores": means,
            "n_tasks": self.num_scored,
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
        return write_json(path, self.to_json())


def _in_all(tasks: Sequence[Sequence[ProbeRow]]) -> list[list[ProbeRow]]:
    """The rows of each task that every task has, in one order."""
    names = [{(row.shots, row.method): row for row in rows} for rows in tasks]
    common = [name for name in names[0] if all(name in other for other in names)]
    return [[rows[name] for name in common] for rows in names]


def _mean_of(rows: Sequence[ProbeRow]) -> ProbeRow:
    """Mean over tasks; its interval is for the draws within tasks, the tasks themselves are taken as given."""
    value = fmean(row.value for row in rows)
    half = math.hypot(*((row.interval[1] - row.interval[0]) / 2 for row in rows)) / len(rows)
    return ProbeRow(rows[0].shots, rows[0].method, value, (value - half, value + half))


@dataclass(frozen=True)
class Origin:
    """What decides a probe's number besides shots, method and seed."""

    model_sha256: str
    protocol: str
    task: str
    version: int
    metric: str
    resize: str
    train_sha256: str
    test_sha256: str
    format: int = FORMAT


class Journal:
    """A file of finished probes that is only ever added to; where it cannot be, that is said once and nothing is kept.

    Args:
        path: JSON lines; created at the first addition. None: nothing is known and nothing kept.

    Raises:
        UserError: if the file holds nothing but something else; damaged lines among others get a warning.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._known: dict[Origin, dict[RunKey, ProbeRun]] = {}
        if path is None or not path.exists():
            return
        whole, _, cut = path.read_bytes().rpartition(b"\n")
        if cut:  # a process was killed while it wrote
            path.write_bytes(whole + b"\n" if whole else b"")
        lines, damaged = whole.split(b"\n") if whole else [], []
        for number, line in enumerate(lines, start=1):
            try:
                values: dict[str, Any] = json.loads(line)
                origin, run = values["origin"], values["run"]
                if origin["format"] == FORMAT:
                    self._note(Origin(**origin), ProbeRun(**run | {"interval": tuple(run["interval"])}))
            except (ValueError, KeyError, TypeError, RecursionError):
                damaged.append(number)
        if damaged and len(damaged) == len(lines):
            raise UserError(f"{path}: line {damaged[0]} is no finished probe; remove the file")
        if damaged:
            print(
                f"warning: {path}: {len(damaged)} damaged lines, the first being line {damaged[0]}; these probes are "
                "trained again",
                file=sys.stderr,
            )

    def runs(self, origin: Origin) -> dict[RunKey, ProbeRun]:
        """The finished probes of this origin."""
        return self._known.get(origin, {})

    def add(self, origin: Origin, run: ProbeRun) -> None:
        """Keep a finished probe."""
        self._note(origin, run)
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(json.dumps({"origin": asdict(origin), "run": asdict(run)}) + "\n")
        except OSError as error:
            print(f"{self.path}: cannot be written ({error.strerror}); finished probes are not kept", file=sys.stderr)
            self.path = None

    def _note(self, origin: Origin, run: ProbeRun) -> None:
        self._known.setdefault(origin, {})[run.key] = run
