"""Tasks and benchmarks as typed records; one small YAML file per data set in ``tasks/``.

A task file states the data set as ELEVATER has it: sizes, class names in its label order, prompts, metric, and where
the data may come from. ELEVATER, OpenAI, torchvision and the wds mirrors order the classes of at least nine data sets
differently, so a data folder's labels are joined to these names by name (``names.join``), never by position. A task
without names takes the data folder's own names and prompts.

Sources: names and prompts, ELEVATER toolkit, ``vision_benchmark/datasets/prompts.py`` (MIT); sizes, its
``resources/datasets/vision_datasets.json`` and, beyond ELEVATER, DataComp's ``tasklist.yml``; what differs under
clip_benchmark, the JSON files of CLIP_benchmark 1.6.2.
"""

import difflib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import Field, field_validator, model_validator

from focalclip.base.errors import UserError
from focalclip.base.files import is_inside, is_plain_name, user_path
from focalclip.base.strict import Strict, from_dict, load_yaml
from focalclip.data.folders import NAMES, TYPE, splits_of
from focalclip.data.reader import folders_in
from focalclip.evaluation.metrics import find_metric
from focalclip.evaluation.protocols import (
    PROTOCOLS,
    Candidates,
    DataSource,
    Override,
    Protocol,
    Resize,
    Scores,
    lines_sha256,
    load_protocol,
    shipped_list,
)


class Task(Strict):
    """One data set and how it is scored."""

    id: str
    """Name in results and on the command line."""
    title: str = ""
    """Name in prose."""
    version: int = Field(1, ge=1)
    """Raised whenever a change here could change a number."""
    metric: str = "accuracy"
    """One of :data:`focalclip.evaluation.metrics.METRICS`, which also says what kind of labels it needs."""
    scores: Scores = "softmax"
    """What ranks the images for mAP: ``softmax`` over the classes of 100 x cosine, or the ``cosine`` itself."""
    candidates: Candidates = "occurring"
    """Classes that mean_per_class chooses among: those with an image, as ELEVATER does, or all, as CLIP_benchmark."""
    resize: Resize = "model"
    """``model``: its own preprocessing. ``squash``: the whole picture is resized to the model's square before it.
    ``resize256_crop224``: the shorter side is resized to 256/224 of the model's side, then the centre is cropped."""
    classes: int | None = Field(None, ge=2)
    """Number of classes the data must have; null: any number."""
    sizes: dict[str, dict[str, int | None]] = Field(default_factory=dict)
    """Images per split (train, val, test) and known source. Data of a listed split must have one of its sizes, and the
    result says which; null: a source whose size is not known. A split that is not listed may have any size."""
    data: DataSource = "elevater"
    """The source of ``sizes`` whose images the protocol is defined on."""
    chance: float | None = Field(None, ge=0, le=1)
    """Score of guessing; null: 1 / classes, one half for ``roc_auc``, or random scores on the labels for mAP and F1."""
    names: tuple[str, ...] | None = None
    """Class names in label order, or a shipped list (see ``protocols.shipped_list``); null: the data's."""
    templates: tuple[str, ...] | None = None
    """Prompts with ``{c}`` where the name goes, or a shipped list; null: the data's."""
    codes: tuple[str, ...] | None = None
    """Other identifiers of the classes that data folders use, one per name: WordNet ids, country codes."""
    aliases: tuple[tuple[str, ...], ...] = ()
    """Groups of spellings of one class."""
    folders: tuple[str, ...] = ()
    """Accepted local folder names, besides ``id``; each also with ``wds_`` before it and ``_test`` behind."""
    hub: str | None = None
    """Data set repository in the wds layout on the Hugging Face hub; null: there is none."""
    source: str | None = None
    """Where the data is, if not in a folder of one of those names or on that hub repository: ``hf:REPOSITORY``,
    ``hf:REPOSITORY:FOLDER``, ``hf:FOLDER`` under the data root, or ``torchvision:NAME``; null: look for it."""
    halved_for_probes: bool = False
    """The data has no train split: of each class every other test image trains probes, and the rest tests them."""
    in_score: bool = True
    """Whether the benchmark's mean holds it (ImageNet-1K is shown beside ELEVATER's 20)."""
    differences: tuple[str, ...] = ()
    """Where the wds mirror and ELEVATER differ in their images."""
    note: str | None = None
    """Where the protocol has no rule for the task: what is done."""
    protocols: dict[str, Override] = Field(default_factory=dict)
    """What other protocols change."""
    obtain: str = ""
    """How to get data that no mirror has."""

    @field_validator("names", "templates", "codes", mode="before")
    @classmethod
    def _look_up(cls, value: Any, info: Any) -> Any:
        return shipped_list(info.field_name, value) if isinstance(value, str) else value

    @field_validator("id")
    @classmethod
    def _id_is_a_name(cls, value: str) -> str:
        if not is_plain_name(value):
            raise ValueError("is not the name of one folder; take / and .. out of it")
        return value

    @field_validator("folders")
    @classmethod
    def _folders_lie_inside(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if outside := [name for name in value if not is_inside(name)]:
            raise ValueError(f"{outside[0]!r} leads out of the data root; name a folder in it")
        return value

    @field_validator("metric")
    @classmethod
    def _metric_is_known(cls, value: str) -> str:
        return find_metric(value).name

    @model_validator(mode="after")
    def _lists_fit(self) -> Self:
        for field_name in ("names", "codes"):
            count = len(getattr(self, field_name) or ())
            if count and count != self.classes:
                raise ValueError(f"{field_name} has {count} entries, classes is {self.classes}; make them agree")
        for template in self.templates or ():
            if "{c}" not in template:
                raise ValueError(f"templates: {template!r} has no {{c}} where the class name goes")
        for protocol in self.protocols:
            if protocol not in PROTOCOLS:
                raise ValueError(f"protocols: there is no {protocol!r}; known: {', '.join(PROTOCOLS)}")
        return self

    def find(self, data_root: Path) -> Path | None:
        """The task's folder under ``data_root``, if one of its accepted names is there."""
        return next((path for name in self.folder_names if (path := data_root / name).is_dir()), None)

    @property
    def folder_names(self) -> tuple[str, ...]:
        """Every accepted local folder name, the likeliest first: of a task with a mirror the mirror's."""
        names = tuple(dict.fromkeys((*self.folders, self.id)))
        if self.hub is None:
            return tuple(form.format(name) for name in names for form in ("{}", "wds_{}", "wds_{}_test"))
        return tuple(form.format(name) for form in ("wds_{}", "{}", "wds_{}_test") for name in names)

    def which_set(self, size: int, split: str = "test") -> str:
        """The known data of this split and size, such as ``elevater, wds``; ``unchecked`` where this is unknown.

        Raises:
            UserError: if the sizes of all sources are known and this is not one of them.
        """
        known = self.sizes.get(split, {})
        matches = [source for source, images in known.items() if images == size]
        if matches or None in known.values() or not known:
            return ", ".join(matches) or "unchecked"
        expected = " or ".join(f"{images:,} ({source})" for source, images in known.items())
        raise UserError(
            f"the data has {size:,} {split} images, expected {expected}; download it again or correct the split"
        )

    def under(self, protocol: Protocol) -> Self:
        """The task with a protocol's metric, scores, resize, names and templates.

        Raises:
            UserError: if the task file renames a class that the task does not have.
        """
        rule: dict[str, Any] = {"metric": protocol.metrics.get(self.metric, self.metric)}
        fixed = ("scores", "resize", "candidates", "data")
        rule |= {name: value for name in fixed if (value := getattr(protocol, name))}
        for name in (protocol.follows, protocol.name):
            override = self.protocols.get(name or "")
            if override is None:
                continue
            rule |= {name: value for name in ("resize", "names", "templates") if (value := getattr(override, name))}
            rule["names"] = self._respelt(rule.get("names", self.names), override.respelt)
            rule["note"] = override.note or rule.get("note")
        return self.model_copy(update=rule)

    def statement(self, class_names: Sequence[str], templates: Sequence[str]) -> dict[str, Any]:
        """What the protocol fixed, JSON-ready, for the result.

        Args:
            class_names: as used in prompts, in label order.
            templates: as used.
        """
        return {
            "metric": self.metric,
            "scores": "100 x cosine" if self.scores == "cosine" else "softmax(100 x cosine)",
            "candidates": self.candidates,
            "resize": self.resize,
            "names_sha256": lines_sha256(class_names),
            "templates_sha256": lines_sha256(templates),
        }

    def _respelt(self, names: tuple[str, ...] | None, respelt: dict[str, str]) -> tuple[str, ...] | None:
        unknown = [name for name in respelt if name not in (names or ())]
        if unknown:
            raise UserError(
                f"{self.id}: respelt names {unknown[0]!r}, which is not one of its class names; correct the task file"
            )
        return names if names is None else tuple(respelt.get(name, name) for name in names)


@dataclass(frozen=True)
class Benchmark:
    """Tasks whose mean is the score."""

    name: str
    protocol: str
    """One of :data:`~focalclip.evaluation.protocols.PROTOCOLS`; the tasks have it applied."""
    tasks: tuple[Task, ...]
    data_root: Path | None = None
    """Where the tasks' folders are; None: the hub."""
    absent: dict[str, str] = field(default_factory=dict)
    """Tasks known to be absent, and why."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Tasks of the published score that cannot be measured here, and why: the mean is not of them."""
    has_other_protocol: bool = False
    """Whether the protocol is another than the benchmark's own."""
    places: dict[str, Path] = field(default_factory=dict)
    """Folders of tasks that were found by looking at the folder, by id: these and no others are theirs."""

    @property
    def expected(self) -> int:
        """Number of tasks that the published score is the mean of."""
        return sum(task.in_score for task in self.tasks) + len(self.left_out)

    @property
    def upright(self) -> bool:
        """Whether its protocol turns pictures as their EXIF orientation says."""
        return load_protocol(self.protocol).upright

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
    """Name in the result and of its file; null: the YAML file's name."""
    data_root: str = "."
    """Folder that holds the tasks' folders, relative to the YAML file."""
    tasks: tuple[Task, ...] = Field(min_length=1)

    @field_validator("name")
    @classmethod
    def _name_is_a_name(cls, value: str | None) -> str | None:
        if value is not None and not is_plain_name(value):
            raise ValueError("cannot be the name of a file; take / and .. out of it")
        return value

    @field_validator("tasks")
    @classmethod
    def _each_once(cls, value: tuple[Task, ...]) -> tuple[Task, ...]:
        ids = [task.id for task in value]
        if twice := [name for name in ids if ids.count(name) > 1]:
            raise ValueError(f"two tasks have the id {twice[0]!r}; give each its own")
        return value


class BenchmarkFile(Strict):
    """An entry of ``tasks/benchmarks.yaml``."""

    protocol: str
    tasks: tuple[str, ...] | None = None
    beside: tuple[str, ...] = ()
    left_out: dict[str, str] = Field(default_factory=dict)


def registered_benchmarks() -> dict[str, BenchmarkFile]:
    """The named benchmarks."""
    content = yaml.safe_load((_folder() / "benchmarks.yaml").read_text(encoding="utf-8"))
    return {name: from_dict(BenchmarkFile, entry, f"benchmarks.yaml: {name}") for name, entry in content.items()}


@cache
def registered_tasks(name: str) -> tuple[Task, ...]:
    """The registry's tasks of a benchmark, as ELEVATER has them, those outside the score last."""
    benchmark = registered_benchmarks()[name]
    if benchmark.tasks is None:
        tasks = _read_tasks(name)
    else:
        known = _read_tasks("elevater") | _read_tasks("vtab_plus")
        tasks = {task_id: known[task_id] for task_id in benchmark.tasks}
    placed = [task.model_copy(update={"in_score": task.id not in benchmark.beside}) for task in tasks.values()]
    return tuple(sorted(placed, key=lambda task: (not task.in_score, task.id)))


def _folder() -> Any:
    return files("focalclip.evaluation") / "tasks"


@cache
def _read_tasks(folder: str) -> dict[str, Task]:
    paths = [path for path in (_folder() / folder).iterdir() if path.name.endswith(".yaml")]
    contents = {path.name: yaml.safe_load(path.read_text(encoding="utf-8")) for path in paths}
    return {content["id"]: from_dict(Task, content, name) for name, content in contents.items()}


def load_benchmark(source: str | Path, data_root: str | Path | None = None, protocol: str | None = None) -> Benchmark:
    """A benchmark by name, from a folder of wds task folders (or a single one), or from a YAML file of tasks.

    Args:
        source: ``elevater``, ``datacomp``, ``vtab_plus``, ``demo``, a folder, or a YAML file.
        data_root: where the data of a named benchmark or of a YAML file is. Without it ``demo`` uses the default
            corpus, which is built if need be, and the other names the hub.
        protocol: how to measure; None: the benchmark's own, and ``wds`` for a folder or a file.

    Raises:
        UserError: if there is no such benchmark or protocol, or ``data_root`` is not a folder.
    """
    root = None if data_root is None else user_path(data_root)
    if root is not None and not root.is_dir():
        raise UserError(f"--data-root {root}: no such folder; it should hold one folder per task, such as wds_vtab-dtd")
    benchmark = _find(source, root)
    chosen = load_protocol(protocol or benchmark.protocol)
    return replace(
        benchmark,
        protocol=chosen.name,
        has_other_protocol=chosen.name != benchmark.protocol,
        tasks=tuple(task.under(chosen) for task in benchmark.tasks),
    )


def _find(source: str | Path, root: Path | None) -> Benchmark:
    """The benchmark before any protocol is applied to its tasks."""
    named = registered_benchmarks()
    if str(source) == "demo":
        return _demo(root)
    if str(source) in named:
        entry = named[str(source)]
        return Benchmark(str(source), entry.protocol, registered_tasks(str(source)), root, left_out=entry.left_out)
    path = user_path(source)
    if path.is_dir():
        return _from_folder(path, root)
    if path.suffix in (".yaml", ".yml"):
        content = load_yaml(TaskFile, path)
        beside = path.parent / user_path(content.data_root)
        return Benchmark(content.name or path.stem, "wds", content.tasks, root or beside)
    raise UserError(
        f"--benchmark {source}: not one of {', '.join(named)}, nor a folder of wds tasks, nor a YAML file of tasks"
    )


def _demo(root: Path | None) -> Benchmark:
    tasks = registered_tasks("demo")
    if root is not None:
        return Benchmark("demo", "demo", tasks, root)
    from focalclip.data.corpus.emoji import ensure_corpus

    corpus = ensure_corpus()
    return Benchmark("demo", "demo", tasks, Path(corpus.tasks), dict(corpus.skipped))


def _from_folder(path: Path, root: Path | None) -> Benchmark:
    """Every subfolder with class names is a task, or the folder itself; the metric follows from the kind of labels."""
    if root is not None:
        raise UserError(f"--data-root goes with a named benchmark; {path} is itself the folder of tasks")
    below = [path / name for name in folders_in(path)]
    folders = [path] if _is_task(path) else [place for place in below if _is_task(place)]
    if not folders:
        places = (path, *below)
        if pairs := [place for place in places if _type_of(place) == "retrieval"]:
            raise UserError(
                f"--benchmark {path}: a retrieval set, which has no classes; run eval/retrieval.py --data {pairs[0]}"
            )
        raise UserError(
            f"--benchmark {path}: no classnames.txt in it or in a folder under it, so it holds no wds task"
            " (expected classnames.txt, zeroshot_classification_templates.txt and test/0.tar); tasks in other layouts,"
            " such as a folder per class, are named in a YAML file with their prompts (docs/evaluation-data.md)"
        )
    # the names that the user sees: a link's own, not its target's
    found = {folder.name if folder != path else _own_name(path): folder for folder in folders}
    tasks = [Task(id=name, metric=_metric_of(folder)) for name, folder in found.items()]
    return Benchmark(_own_name(path), "wds", tuple(tasks), path, places=found)


def _own_name(folder: Path) -> str:
    """The last part of a path, also of ``.`` and ``a/..``; a link's own name."""
    return Path(os.path.abspath(folder)).name or "tasks"  # noqa: PTH100 (resolve follows links)


def _is_task(folder: Path) -> bool:
    """Whether a folder is a task of classes, if an incomplete one, which is then named as such."""
    return (folder / NAMES).is_file() or (bool(splits_of(folder)) and _type_of(folder) != "retrieval")


def _metric_of(folder: Path) -> str:
    return "map_11point" if _type_of(folder) == "multilabel" else "accuracy"


def _type_of(folder: Path) -> str:
    kind = folder / TYPE
    return kind.read_text(encoding="utf-8", errors="replace").strip() if kind.is_file() else ""
