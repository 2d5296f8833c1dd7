"""Published zero-shot numbers (``published.yaml``): shown beside a result, and checked against it number by number."""

from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import yaml
from pydantic import Field

from focalclip.base.errors import UserError
from focalclip.base.strict import Strict, from_dict
from focalclip.evaluation.result import is_part

if TYPE_CHECKING:
    from focalclip.evaluation.result import Result

FILE = "published.yaml"

SCORE = "score"  # the benchmark's mean, among the names of tasks

Verdict = Literal["pass", "fail", "missing", "not comparable", "weak"]


class PublishedSource(Strict):
    """Where numbers were read."""

    title: str
    url: str
    trust: Literal["read", "recalled", "derived"]


class PublishedNumber(Strict):
    """One published number."""

    task: str
    """Id in the registry, or ``score`` for the benchmark's mean."""
    value: float
    """In percent."""
    tolerance: float | None = Field(None, gt=0)
    """In points; null only for weak numbers."""
    metric: str = "accuracy"
    """A result counts that has it as its metric or beside it."""
    protocols: tuple[str, ...] = ("clip_benchmark", "datacomp", "elevater")
    """Protocols under which the task gives this number; none: no result is checked against it."""
    n: int | None = None
    """Test images; null where all test sets in use are the same."""
    weak: bool = False
    """Shown, and never failed."""
    source: str | None = None
    """Key of ``sources``; null: the model's."""
    on_page: bool = True
    """Whether a result's page may show it; of a task's numbers it shows the first such."""
    remark: str = ""
    """Why it is not the same measurement as ELEVATER's; empty where nothing is known against it."""


class PublishedModel(Strict):
    """A model's published numbers."""

    title: str
    label: str | None = None
    """Name on a result's page; null: not shown there."""
    data: str = ""
    """What it was trained on."""
    source: str
    """Key of ``sources`` for numbers that name none."""
    numbers: tuple[PublishedNumber, ...]

    def on_page(self) -> dict[str, PublishedNumber]:
        """The number that a page shows for each task, and for the mean (``score``)."""
        shown: dict[str, PublishedNumber] = {}
        for number in self.numbers:
            if number.on_page:
                shown.setdefault(number.task, number)
        return shown


class PublishedFile(Strict):
    """All of ``published.yaml``."""

    sources: dict[str, PublishedSource]
    models: dict[str, PublishedModel]

    def source_of(self, model: PublishedModel, number: PublishedNumber) -> PublishedSource:
        """Where a model's number was read."""
        return self.sources[number.source or model.source]


class NumberCheck(NamedTuple):
    """One published number against a result."""

    number: PublishedNumber
    verdict: Verdict
    value: float | None
    """The result's, in percent; None where there is none."""
    remark: str
    """Why there is no verdict on the value; empty where there is."""


@cache
def published() -> PublishedFile:
    """The numbers that come with focalclip."""
    path = files("focalclip.reports") / FILE
    return from_dict(PublishedFile, yaml.safe_load(path.read_text(encoding="utf-8")), FILE)


def models_beside(result: "Result") -> list[PublishedModel]:
    """The models that are shown beside a result: on ELEVATER, under any protocol; none for other benchmarks.

    A task of the same name in another benchmark may have other images: the demo's MNIST is a half of MNIST.
    """
    return [model for model in published().models.values() if model.label and result.benchmark == "elevater"]


def check(model: PublishedModel, result: Mapping[str, Any]) -> list[NumberCheck]:
    """Every number of the result's protocol against the result (the JSON of an evaluation), task by task.

    Where a task has a number for each of several test sets, that of the result's own counts.

    Raises:
        UserError: if nothing was published of the model under the result's protocol.
    """
    protocol = result["protocol"]
    asked = [number for number in model.numbers if protocol in number.protocols]
    if not asked:
        known = sorted({name for number in model.numbers for name in number.protocols})
        raise UserError(f"{model.title} has no numbers under the protocol {protocol}; use {' or '.join(known)}")
    checks = []
    for task in dict.fromkeys(number.task for number in asked):
        numbers = [number for number in asked if number.task == task]
        checks.append(_check_score(numbers[0], result) if task == SCORE else _check_task(numbers, result))
    return checks


def _check_task(numbers: Sequence[PublishedNumber], result: Mapping[str, Any]) -> NumberCheck:
    task = result["tasks"].get(numbers[0].task)
    if task is None:
        why = result.get("failed", {}).get(numbers[0].task) or "not in the result"
        return NumberCheck(numbers[0], "weak" if numbers[0].weak else "missing", None, why)
    if is_part(task):
        verdict = "weak" if all(number.weak for number in numbers) else "not comparable"
        return NumberCheck(numbers[0], verdict, None, "a part of the images")
    fitting = [number for number in numbers if number.n in (None, task["n"])]
    if not fitting:
        sizes = " or ".join(f"{number.n:,}" for number in numbers)
        verdict = "weak" if all(number.weak for number in numbers) else "not comparable"
        return NumberCheck(numbers[0], verdict, None, f"{task['n']:,} test images, the reference has {sizes}")
    number = fitting[0]
    value = task["value"] if task["metric"] == number.metric else task.get(number.metric)
    if value is None:
        why = f"metric {task['metric']}, the reference has {number.metric}"
        return NumberCheck(number, "weak" if number.weak else "not comparable", None, why)
    return _judge(number, value)


def _check_score(number: PublishedNumber, result: Mapping[str, Any]) -> NumberCheck:
    if result["n_tasks"] != result["n_tasks_expected"]:
        why = f"mean of {result['n_tasks']} of {result['n_tasks_expected']} tasks"
        return NumberCheck(number, "missing", None, why)
    if any(is_part(task) for task in result["tasks"].values()):
        return NumberCheck(number, "not comparable", None, "a part of the images")
    return _judge(number, result["score"])


def _judge(number: PublishedNumber, fraction: float) -> NumberCheck:
    value = 100 * fraction
    if number.weak or number.tolerance is None:
        return NumberCheck(number, "weak", value, "")
    # half a unit of the published last digit: 27.43 stands for any number that rounds to it
    return NumberCheck(number, "pass" if abs(value - number.value) <= number.tolerance + 0.005 else "fail", value, "")
