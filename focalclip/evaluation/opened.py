"""A task's data: read, checked, and joined to the protocol's class names by name, never by position.

Whatever order a data folder lists its classes in, its labels become the protocol's. Class orders differ between
ELEVATER, OpenAI, torchvision and TensorFlow Datasets for at least nine of ELEVATER's data sets; joined by position,
Oxford Pets has been reported at 9.9% and Caltech-101 at 2.9% (openai/CLIP issue 346).
"""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from focalclip.base.errors import UserError
from focalclip.evaluation.data import TaskData, open_task
from focalclip.evaluation.metrics import METRICS
from focalclip.evaluation.task import Benchmark, Task

_SHOWN = 5  # names per list in a message


@dataclass(frozen=True)
class Opened:
    """What a measurement begins with."""

    task: Task
    """With the protocol applied."""
    data: TaskData
    """With the protocol's names, prompts and label order."""
    test_set: str
    """Which known data it is, by its size."""
    differences: tuple[str, ...]
    """Where the data differs from the protocol, in sentences."""
    part_of: int | None = None
    """Images of the whole split, where ``data`` is only a part of them."""


def open_checked(task: Task, benchmark: Benchmark, max_images: int | None = None, split: str = "test") -> Opened:
    """Open one split of a task; with ``max_images`` an evenly spaced part of it, the same each time.

    Raises:
        Unavailable: if the data is not there, saying what to do.
        UserError: if it is not the task's, or not whole.
    """
    place = benchmark.places.get(task.id)
    opened = join(task, open_task(task, benchmark.data_root, benchmark.absent, split, place), split)
    data = opened.data
    if max_images is None or max_images >= len(data.entries):
        return opened
    return Opened(
        task,
        data.subset(np.linspace(0, len(data.entries) - 1, max_images).round().astype(int)),
        f"a part of {opened.test_set}",
        (f"{max_images:,} images only, evenly spaced (max_images)", *opened.differences),
        part_of=len(data.entries),
    )


def join(task: Task, data: TaskData, split: str = "test") -> Opened:
    """Check data as read, and give it the task's names, prompts and label order; its own where the task has none.

    Args:
        task: with its protocol applied.
        data: one split, as read.
        split: which one.

    Raises:
        UserError: if the number of classes or images, the kind of labels, or a name does not fit the task.
    """
    test_set = _check(task, data, split)
    templates = task.templates or tuple(data.templates)
    if not templates:
        raise UserError(f"{data.folder} has no prompts, and the task {task.id} has none either; write templates for it")
    if task.names is None:
        joined, place = replace(data, templates=templates), None
    else:
        place = places(task, data)
        labels = place[data.labels] if not data.multilabel else np.zeros_like(data.labels)
        if data.multilabel:
            labels[:, place] = data.labels
        joined = replace(data, class_names=task.names, templates=templates, labels=labels)
    return Opened(task, joined, test_set, _protocol_differences(task, data, test_set, place))


def _check(task: Task, data: TaskData, split: str) -> str:
    """Refuse data that is not the task's; return which known data it is.

    Raises:
        UserError: if the number of classes, of images, or the kind of labels is another.
    """
    classes, metric = len(data.class_names), METRICS[task.metric]
    if task.classes not in (None, classes):
        raise UserError(f"{data.folder} has {classes} class names, the task has {task.classes}; wrong folder?")
    if data.multilabel != (metric.labels == "multilabel"):
        kind = "several labels" if data.multilabel else "one label"
        raise UserError(f"{data.folder} has {kind} per image, which {task.metric} cannot score; wrong folder?")
    if metric.labels == "binary" and classes != 2:
        raise UserError(f"{task.metric} needs 2 classes, {data.folder} has {classes}; choose another metric")
    return task.which_set(len(data.entries), split)


def places(task: Task, data: TaskData) -> np.ndarray:
    """The task's label of each class of the data: int64 (C,), a permutation.

    A name matches where the spelling is equal, else where it differs in case, accents, spaces and punctuation alone,
    else by code (WordNet id, country code), else by alias. Equal names, such as ImageNet's two missiles, are taken in
    order.

    Raises:
        UserError: naming the classes without a match, or one with several.
    """
    names = task.names or ()
    place = np.full(len(data.class_names), -1, dtype=np.int64)
    groups = {name_key(spelling): i for i, group in enumerate(task.aliases) for spelling in group}
    passes = [
        (list(data.class_names), list(names)),
        ([name_key(name) for name in data.class_names], [name_key(name) for name in names]),
        (list(data.class_names), list(task.codes or ())),
        ([groups.get(name_key(name)) for name in data.class_names], [groups.get(name_key(name)) for name in names]),
    ]
    for theirs, ours in passes:
        _fill(place, theirs, ours, names)
    if (place < 0).any():
        missing = [name for name, where in zip(data.class_names, place, strict=True) if where < 0]
        empty = [name for i, name in enumerate(names) if i not in place]
        raise UserError(
            f"{data.folder}: class names do not fit {task.id}: {_some(missing)} in the data, {_some(empty)} in the"
            " task; rename them in classnames.txt (their order does not matter)"
        )
    return place


def _protocol_differences(task: Task, data: TaskData, test_set: str, place: np.ndarray | None) -> tuple[str, ...]:
    """Where the data, before it is joined, differs from the protocol, in sentences for the result.

    Args:
        task: with its protocol applied.
        data: as read.
        test_set: which known data it is.
        place: the task's label of each class of the data; None where the task has no names.
    """
    as_defined = test_set == "elevater" if task.data == "elevater" else "wds" in test_set.split(", ")
    sentences = [] if as_defined else list(task.differences)
    sentences += [task.note] if task.note else []
    if task.names is not None and place is not None:
        moved = int((place != np.arange(len(task.names))).sum())
        respelt = len(set(data.class_names) - set(task.names))
        if moved:
            sentences.append(f"the data numbers {moved} of {len(task.names)} classes otherwise: joined by name")
        if respelt:
            sentences.append(f"the data spells {respelt} of {len(task.names)} names otherwise: the protocol's are used")
    if task.templates is not None and data.templates and tuple(data.templates) != task.templates:
        ours, theirs = len(task.templates), len(data.templates)
        sentences.append(f"the protocol's {ours} prompts are used instead of the data's {theirs}")
    return tuple(sentences)


def _fill(
    place: np.ndarray, theirs: Sequence[str | int | None], ours: Sequence[str | int | None], names: Sequence[str]
) -> None:
    """Assign to each class of the data without a place the first free one with the same entry; modifies ``place``."""
    free: dict[str | int | None, list[int]] = {}
    taken = set(place[place >= 0].tolist())
    for i, entry in enumerate(ours):
        if entry is not None and i not in taken:
            free.setdefault(entry, []).append(i)
    for j, entry in enumerate(theirs):
        if place[j] < 0 and free.get(entry):
            spellings = {names[i] for i in free[entry]}
            if len(spellings) > 1:
                raise UserError(
                    f"class {entry!r} of the data may be any of {_some(sorted(spellings))}; spell it as one"
                )
            place[j] = free[entry].pop(0)


def name_key(name: str) -> str:
    """Letters and digits only, without case and accents; the name itself where nothing would be left."""
    plain = unicodedata.normalize("NFKD", name).casefold()
    return "".join(character for character in plain if character.isalnum()) or name


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(repr(name) for name in names[:_SHOWN]) + more
