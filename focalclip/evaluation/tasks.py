"""Tasks and benchmarks as typed records; one small YAML file per data set in ``tasks/``.

Class names and prompts are not in the registry: they come with the data folder, whose labels they belong to. ELEVATER,
OpenAI, torchvision and the wds mirrors order the classes of at least nine data sets differently, so a list joined to
labels by position must be the list of the folder that holds those labels.
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Literal

import yaml
from pydantic import Field

from focalclip.config import Strict, from_dict, load_yaml
from focalclip.errors import UserError

Metric = Literal["accuracy", "mean_per_class", "map_11point", "roc_auc"]
METRIC_TITLES: dict[Metric, str] = {
    "accuracy": "accuracy",
    "mean_per_class": "mean per class",
    "map_11point": "11-point mAP",
    "roc_auc": "ROC AUC",
}
REGISTERED = ("elevater", "demo")


class Task(Strict):
    """One data set and how it is scored."""

    id: str
    """Name in results and on the command line."""
    title: str = ""
    """Name in prose."""
    version: int = Field(1, ge=1)
    """Raised whenever a change here could change a number."""
    metric: Metric = "accuracy"
    """``map_11point`` needs multi-label data, the others need one label per image; ``roc_auc`` needs two classes."""
    classes: int | None = Field(None, ge=2)
    """Number of classes the data must have; null: whatever it has."""
    test_sizes: dict[str, int] = Field(default_factory=dict)
    """Known test sets and their sizes; the data must have one of these sizes, and the result says which. Empty: any."""
    chance: float | None = Field(None, ge=0, le=1)
    """Score of guessing; null: 1 / classes, one half for ``roc_auc``, or random scores on the labels for mAP."""
    folders: tuple[str, ...] = ()
    """Accepted local folder names, besides ``id``; each also with ``wds_`` before it and ``_test`` behind."""
    hub: str | None = None
    """Data set repository in the wds layout on the Hugging Face hub; null: there is none."""
    source: str | None = None
    """Where the data is, if not in a folder of one of those names or on that hub repository: ``hf:REPOSITORY``,
    ``hf:REPOSITORY:FOLDER``, ``hf:FOLDER`` under the data root, or ``torchvision:NAME``; null: look for it."""
    names: tuple[str, ...] | None = None
    """Class names in the order of ELEVATER's labels; null: the data's own."""
    templates: tuple[str, ...] | None = None
    """Prompts with ``{c}`` for the class name; null: the data's own."""
    resize: Literal["model", "squash"] = "model"
    """``squash``: the whole picture is resized to the model's square before the model's own preprocessing."""
    in_score: bool = True
    """Whether the benchmark's mean holds it (ImageNet-1K is shown beside ELEVATER's 20)."""
    differences: tuple[str, ...] = ()
    """Where the wds mirror departs from the protocol."""
    obtain: str = ""
    """How to get data that no mirror holds."""

    def find(self, data_root: Path) -> Path | None:
        """The task's folder under ``data_root``, if one of its accepted names is there."""
        return next((path for name in self.folder_names if (path := data_root / name).is_dir()), None)

    @property
    def folder_names(self) -> tuple[str, ...]:
        """Every accepted local folder name, the likeliest first."""
        names = dict.fromkeys((*self.folders, self.id))
        return tuple(form.format(name) for form in ("wds_{}", "{}", "wds_{}_test") for name in names)

    def which_test_set(self, size: int) -> str:
        """The known test sets of this size, such as ``elevater, wds``; ``unchecked`` where none is known.

        Raises:
            UserError: if sizes are known and this is none of them.
        """
        if not self.test_sizes:
            return "unchecked"
        matches = [name for name, known in self.test_sizes.items() if known == size]
        if not matches:
            known = " or ".join(f"{n:,} ({name})" for name, n in self.test_sizes.items())
            raise UserError(f"the data has {size:,} test images, expected {known}; download it again or mend the split")
        return ", ".join(matches)


@dataclass(frozen=True)
class Benchmark:
    """Tasks whose mean is the score."""

    name: str
    protocol: str
    """``elevater``, ``demo``, or ``wds`` for a folder or a file of tasks."""
    tasks: tuple[Task, ...]
    data_root: Path | None = None
    """Where the tasks' folders are; None: the hub."""
    absent: dict[str, str] = field(default_factory=dict)
    """Tasks known to be absent, and why."""

    def select(self, ids: Sequence[str] | None) -> "Benchmark":
        """The benchmark with only these tasks run.

        Raises:
            UserError: if an id is not in the benchmark.
        """
        known = [task.id for task in self.tasks]
        for name in ids or ():
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
                raise UserError(f"--tasks: {self.name} has no task {name!r}; {hint}")
        return self if ids is None else replace(self, tasks=tuple(task for task in self.tasks if task.id in ids))


class TaskFile(Strict):
    """A user's own benchmark: a YAML file of tasks."""

    name: str | None = None
    """Name in the result; null: the file's name."""
    data_root: str = "."
    """Folder that holds the tasks' folders, relative to the YAML file."""
    tasks: tuple[Task, ...] = Field(min_length=1)


def registered_tasks(name: str) -> tuple[Task, ...]:
    """The registry's tasks of a benchmark, those outside the score last."""
    folder = files("focalclip.evaluation") / "tasks" / name
    paths = [path for path in folder.iterdir() if path.name.endswith(".yaml")]
    tasks = [from_dict(Task, yaml.safe_load(path.read_text(encoding="utf-8")), path.name) for path in paths]
    return tuple(sorted(tasks, key=lambda task: (not task.in_score, task.id)))


def load_benchmark(source: str | Path, data_root: str | Path | None = None) -> Benchmark:
    """A benchmark by name, from a folder of wds task folders (or a single one), or from a YAML file of tasks.

    ``data_root`` says where the data of a named benchmark or of a YAML file is. Without it ``demo`` uses the default
    corpus, which is built if need be, and ``elevater`` the hub.

    Raises:
        UserError: if there is no such benchmark, or ``data_root`` is not a folder.
    """
    root = None if data_root is None else Path(data_root)
    if root is not None and not root.is_dir():
        raise UserError(f"--data-root {root}: no such folder; it should hold one folder per task, such as wds_vtab-dtd")
    if str(source) == "elevater":
        return Benchmark("elevater", "elevater", registered_tasks("elevater"), root)
    if str(source) == "demo":
        return _demo(root)
    path = Path(source)
    if path.is_dir():
        return _from_folder(path, root)
    if path.suffix in (".yaml", ".yml"):
        content = load_yaml(TaskFile, path)
        return Benchmark(content.name or path.stem, "wds", content.tasks, root or path.parent / content.data_root)
    raise UserError(
        f"--benchmark {source}: not one of {', '.join(REGISTERED)}, nor a folder of wds tasks, nor a YAML file of tasks"
    )


def _demo(root: Path | None) -> Benchmark:
    tasks = registered_tasks("demo")
    if root is not None:
        return Benchmark("demo", "demo", tasks, root)
    from focalclip.data.emoji import ensure_corpus

    corpus = ensure_corpus()
    return Benchmark("demo", "demo", tasks, Path(corpus.tasks), dict(corpus.skipped))


def _from_folder(path: Path, root: Path | None) -> Benchmark:
    """Every subfolder with class names is a task, or the folder itself; the metric follows from the kind of labels."""
    if root is not None:
        raise UserError(f"--data-root goes with a named benchmark; {path} is itself the folder of tasks")
    alone = (path / "classnames.txt").is_file()
    folders = [path] if alone else sorted(child.parent for child in path.glob("*/classnames.txt"))
    if not folders:
        raise UserError(
            f"--benchmark {path}: no classnames.txt in it or in a folder under it, so it holds no wds task"
            " (expected classnames.txt, zeroshot_classification_templates.txt and test/0.tar)"
        )
    tasks = [Task(id=folder.resolve().name, metric=_metric_of(folder)) for folder in folders]
    return Benchmark(path.resolve().name, "wds", tuple(tasks), path.resolve().parent if alone else path)


def _metric_of(folder: Path) -> Metric:
    kind = folder / "dataset_type.txt"
    return "map_11point" if kind.is_file() and kind.read_text().strip() == "multilabel" else "accuracy"
