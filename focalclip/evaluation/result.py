"""The result of an evaluation: numbers, where they come from, and the answers behind them; read without torch."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from focalclip.base.errors import UserError
from focalclip.base.files import is_plain_name, user_path, why_not_writable, write_json
from focalclip.evaluation.metrics import METRICS, find_metric
from focalclip.evaluation.metrics.calibration import reliability
from focalclip.evaluation.metrics.intervals import Interval, mean_interval
from focalclip.evaluation.predictions import Predictions


@dataclass(frozen=True)
class TaskResult:
    """One task's numbers (fractions in [0, 1]) and where they come from."""

    metric: str
    value: float
    interval: Interval
    """95%: Wilson's for a share of images that are right, else the bootstrap over images."""
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
    """Where the data differs from the protocol."""
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
    """Of everything besides the data that determines the numbers (see ``finished``)."""
    stated: dict[str, Any] = field(default_factory=dict)
    """What the protocol fixed: metric, scores, candidates, resize, and hashes of names and prompts."""
    label_warning: str = ""
    """Class names that may be swapped (see ``label_check``); empty where nothing is suspicious."""
    calibration: dict[str, float] = field(default_factory=dict)
    """See :func:`calibration_errors`; empty for multi-label data."""
    part_of: int | None = None
    """Images of the test set, where only a part of them was evaluated (``max_images``): then it is no result."""
    predictions: Predictions | None = field(default=None, repr=False, compare=False)
    """The answers, in a separate file; None where they were not kept."""

    def __post_init__(self) -> None:
        if self.predictions is not None and not self.calibration:
            object.__setattr__(self, "calibration", calibration_errors(self.predictions))

    @property
    def is_partial(self) -> bool:
        """Whether only a part of the images was evaluated."""
        return is_part({"part_of": self.part_of, "test_set": self.test_set})

    @property
    def above_chance(self) -> float:
        """Value minus chance."""
        return self.value - self.chance

    @property
    def guess(self) -> float:
        """What guessing gives at best: chance, or, for a share of images, always answering the commonest class."""
        is_share = METRICS[self.metric].correct is not None
        return max(self.chance, self.extras.get("majority", 0.0)) if is_share else self.chance

    @property
    def beats_guessing(self) -> bool:
        """Whether the whole interval is above it."""
        return self.interval[0] > self.guess

    def to_json(self) -> dict[str, Any]:
        """JSON-ready; the extras are keys beside the metric."""
        names = [f.name for f in fields(self) if f.name not in ("extras", "predictions")]
        return {name: getattr(self, name) for name in names} | {"above_chance": self.above_chance} | self.extras

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "TaskResult":
        """The record that :meth:`to_json` wrote, without its predictions.

        Raises:
            ValueError: if the metric is not known.
        """
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        values.pop("above_chance", None)
        known = {f.name for f in fields(cls)}
        extras = {name: values.pop(name) for name in list(values) if name not in known}
        find_metric(values["metric"])
        return cls(extras=extras, **values)


@dataclass(frozen=True)
class Result:
    """A benchmark's numbers for one model."""

    benchmark: str
    protocol: str
    expected: int
    """Tasks that the full score is the mean of."""
    tasks: dict[str, TaskResult] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    """Tasks whose data is missing, and what to do."""
    failed: dict[str, str] = field(default_factory=dict)
    """Tasks whose data is faulty, and why."""
    model: dict[str, Any] = field(default_factory=dict)
    """source, sha256, and sizes and costs of the model (``features.model.describe``)."""
    versions: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def is_partial(self) -> bool:
        """Whether of any task only a part of the images was evaluated; such numbers are for a quick look alone."""
        return any(task.is_partial for task in self.tasks.values())

    @property
    def scored(self) -> list[TaskResult]:
        """The tasks that the score is the mean of."""
        return [task for task in self.tasks.values() if task.in_score]

    @property
    def score(self) -> float | None:
        """Unweighted mean over the tasks that could be evaluated; None without any."""
        return sum(task.value for task in self.scored) / len(self.scored) if self.scored else None

    @property
    def score_interval(self) -> Interval | None:
        """95% for the sampling of images only; see ``intervals.mean_interval``."""
        tasks = self.scored
        return mean_interval([task.value for task in tasks], [task.interval for task in tasks]) if tasks else None

    @property
    def score_above_chance(self) -> float | None:
        """Mean of the tasks' values minus chance; None without any."""
        return sum(task.above_chance for task in self.scored) / len(self.scored) if self.scored else None

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
            "score_above_chance": self.score_above_chance,
            "n_tasks": len(self.scored),
            "n_tasks_expected": self.expected,
            "partial": self.is_partial,
            "tasks": {name: task.to_json() for name, task in self.tasks.items()},
            "missing": self.missing,
            "failed": self.failed,
            "model": self.model,
            "versions": self.versions,
            "seconds": self.seconds,
        }

    def write(self, path: str | Path) -> Path:
        """Write the JSON atomically, and beside it ``NAME.predictions/TASK.npz``."""
        path = user_path(path)
        for name, task in self.tasks.items():
            if task.predictions is not None:
                task.predictions.save(predictions_file(path, name))
        return write_json(path, self.to_json())

    @classmethod
    def read(cls, path: str | Path) -> "Result":
        """Read what :meth:`write` wrote, with the predictions beside it; a warning names those that are damaged.

        Raises:
            UserError: if it is no result, or predictions beside it are not of this result.
        """
        path = user_path(path)
        try:
            content = json.loads(path.read_text())
            tasks = {name: TaskResult.from_json(values) for name, values in content["tasks"].items()}
            if names := [name for name in tasks if not is_plain_name(name)]:
                raise ValueError(f"{names[0]!r} is not the name of a task")
            expected = content["n_tasks_expected"]
            values = {f.name: content[f.name] for f in fields(cls) if f.name in content and f.name != "tasks"}
        except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: no zero-shot result can be read ({_reason(error)}); evaluate again") from None
        files = {name: predictions_file(path, name) for name in tasks}
        tasks = {name: _with_predictions(task, files[name]) for name, task in tasks.items()}
        return cls(tasks=tasks, expected=expected, **values)


def find_results(a: str | Path, b: str | Path) -> tuple[Path, Path]:
    """The two JSON files; of run directories, those of the one benchmark that both were evaluated on.

    Raises:
        UserError: if there is none, or more than one choice.
    """
    choices = [result_files(source) for source in (a, b)]
    common = [name for name in choices[0] if name in choices[1]]
    if len(choices[0]) == len(choices[1]) == 1:
        return next(iter(choices[0].values())), next(iter(choices[1].values()))
    for i, j in ((0, 1), (1, 0)):
        if len(choices[i]) == 1 and (name := next(iter(choices[i]))) in choices[j]:
            return choices[0][name], choices[1][name]
    if len(common) == 1:
        return choices[0][common[0]], choices[1][common[0]]
    names = ", ".join(common) or "none in common"
    raise UserError(f"--compare {a} {b}: several results ({names}); name the files, such as {a}/eval/NAME.json")


def result_files(source: str | Path) -> dict[str, Path]:
    """The results that a path stands for, by name: the file itself, or the zero-shot ones in a run's ``eval``.

    Evaluations of a part of the images are no results of a run.

    Raises:
        UserError: if there is none.
    """
    source = user_path(source)
    if source.is_file():
        return {source.stem: source}
    paths = sorted([*source.glob("eval/*.json"), *source.glob("*.json")])
    found = {path.stem: path for path in paths if _is_result(path)}
    if not found:
        raise UserError(f"{source}: neither a result's JSON nor a run directory with one in eval/; evaluate it first")
    return found


def _is_result(path: Path) -> bool:
    """Whether a file in a run's folder is a whole zero-shot result; probes and retrieval write theirs there too."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return False
    tasks = content.get("tasks") if isinstance(content, dict) else None
    if not isinstance(tasks, dict) or not all("in_score" in task and "interval" in task for task in tasks.values()):
        return False
    return not any(is_part(task) for task in tasks.values())


def is_part(task: Mapping[str, Any]) -> bool:
    """Whether a task's JSON is of a part of the images; older results say it in the name of the test set alone."""
    return task.get("part_of") is not None or str(task.get("test_set", "")).startswith("a part of ")


def writable(outputs: Sequence[Path]) -> list[Path]:
    """Those of a result's files that can be written; each of the others is named on stderr.

    Raises:
        UserError: if none of them can be.
    """
    reasons = {path: why_not_writable(path) for path in outputs}
    kept = [path for path, reason in reasons.items() if reason is None]
    for path, reason in reasons.items():
        if reason and not kept:
            raise UserError(f"{path}: cannot be written ({reason}); name a file elsewhere with --output")
        if reason:
            print(f"{path}: cannot be written ({reason}); the result goes to {kept[0]} alone", file=sys.stderr)
    return kept


def calibration_errors(predictions: Predictions) -> dict[str, float]:
    """Expected calibration errors of the top answer; empty for multi-label data, whose softmax is no probability.

    ``ece`` and ``ece_equal_mass`` are at ELEVATER's scale 100, ``ece_own_scale`` at the model's (``own_scale``),
    ``ece_fitted_scale`` at the one that suits these answers best (``fitted_scale``).
    """
    if predictions.multilabel:
        return {}
    correct = predictions.top_correct()
    errors = {"ece_equal_mass": reliability(predictions.probabilities()[:, 0], correct, equal_mass=True).ece}
    for i, name in enumerate(("ece", "ece_own_scale", "ece_fitted_scale")):
        scale = float(predictions.scales[i])
        if scale == scale:  # NaN: the model has none
            errors[name] = reliability(predictions.probabilities(i)[:, 0], correct).ece
            errors |= {name.removeprefix("ece_"): scale} if i else {}
    return errors


def predictions_folder(path: Path) -> Path:
    """Where the answers behind a result's JSON are."""
    return path.with_suffix(".predictions")


def predictions_file(path: Path, task: str) -> Path:
    """Where the answers of one task are."""
    return predictions_folder(path) / f"{task}.npz"


def _with_predictions(task: TaskResult, path: Path) -> TaskResult:
    """The record with the answers, which must give its number again; without them where the file is damaged."""
    if not path.is_file():
        return task
    try:
        predictions = Predictions.load(path)
    except UserError as error:
        print(f"warning: {error}", file=sys.stderr)
        return task
    if predictions.task_sha256 != task.task_sha256 or abs(float(predictions.statistic()[0]) - task.value) > 1e-9:
        raise UserError(f"{path}: these answers do not belong to the result beside it; evaluate again")
    return replace(task, predictions=predictions)


def _reason(error: Exception) -> str:
    if isinstance(error, (TypeError, AttributeError)):
        return "unexpected structure"
    return f"no {error}" if isinstance(error, KeyError) else str(error)
