"""A task's data joined to its class names by name, never by position.

Whatever order a data folder lists its classes in, its labels become the protocol's. Class orders differ between
ELEVATER, OpenAI, torchvision and TensorFlow Datasets for at least nine of ELEVATER's data sets; joined by position,
Oxford Pets has scored 9.9% and Caltech-101 2.9% for somebody (openai/CLIP issue 346).
"""

import unicodedata
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from focalclip.base.errors import UserError
from focalclip.evaluation.data import TaskData
from focalclip.evaluation.task import MULTILABEL_METRICS, Task

_SHOWN = 5  # names per list in a message


def check_task(task: Task, data: TaskData, split: str = "test") -> str:
    """Refuse data that is not the task's; return which known data it is.

    Raises:
        UserError: if the number of classes, of images, or the kind of labels is another.
    """
    classes = len(data.class_names)
    if task.classes not in (None, classes):
        raise UserError(f"{data.folder} has {classes} class names, the task has {task.classes}; wrong folder?")
    if data.multilabel != (task.metric in MULTILABEL_METRICS):
        kind = "several labels" if data.multilabel else "one label"
        raise UserError(f"{data.folder} has {kind} per image, which {task.metric} cannot score; wrong folder?")
    if task.metric == "roc_auc" and classes != 2:
        raise UserError(f"roc_auc needs 2 classes, {data.folder} has {classes}; choose another metric")
    return task.which_set(len(data.entries), split)


def join(task: Task, data: TaskData, split: str = "test") -> TaskData:
    """The data with the task's names, prompts and label order; with its own where the task has none.

    Raises:
        UserError: if the number of classes or images, the kind of labels, or a name does not fit the task.
    """
    check_task(task, data, split)
    templates = task.templates or tuple(data.templates)
    if not templates:
        raise UserError(f"{data.folder} has no prompts, and the task {task.id} has none either; write templates for it")
    if task.names is None:
        return replace(data, templates=templates)
    place = places(task, data)
    if data.multilabel:
        labels = np.zeros_like(data.labels)
        labels[:, place] = data.labels
    else:
        labels = place[data.labels]
    return replace(data, class_names=task.names, templates=templates, labels=labels)


def places(task: Task, data: TaskData) -> np.ndarray:
    """The task's label of each class of the data: int64 (C,), a permutation.

    A name fits where it is spelt alike, else where it differs in case, accents, spaces and punctuation alone, else by
    code (WordNet id, country code), else by alias. Equal names, such as ImageNet's two missiles, are taken in order.

    Raises:
        UserError: naming the classes that fit nowhere, or one that fits several.
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


def departures(task: Task, data: TaskData, known: str) -> tuple[str, ...]:
    """Where the data, before it is joined, departs from the protocol, in sentences for the result.

    Args:
        task: with its protocol applied.
        data: as read, before :func:`join`.
        known: which known data it is (``task.which_set``).
    """
    as_defined = known == "elevater" if task.data == "elevater" else "wds" in known.split(", ")
    told = [] if as_defined else list(task.differences)
    told += [task.note] if task.note else []
    if task.names is not None:
        moved = int((places(task, data) != np.arange(len(task.names))).sum())
        respelt = len(set(data.class_names) - set(task.names))
        if moved:
            told.append(f"the data numbers {moved} of {len(task.names)} classes otherwise: joined by name")
        if respelt:
            told.append(f"the data spells {respelt} of {len(task.names)} names otherwise: the protocol's are used")
    if task.templates is not None and data.templates and tuple(data.templates) != task.templates:
        told.append(f"the data's {len(data.templates)} prompts gave way to the protocol's {len(task.templates)}")
    return tuple(told)


def _fill(
    place: np.ndarray, theirs: Sequence[str | int | None], ours: Sequence[str | int | None], names: Sequence[str]
) -> None:
    """Give each class of the data that has no place yet the first free one with the same entry; changes ``place``."""
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
    """Letters and digits alone, without case and accents; the name itself where nothing would be left."""
    plain = unicodedata.normalize("NFKD", name).casefold()
    return "".join(character for character in plain if character.isalnum()) or name


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(repr(name) for name in names[:_SHOWN]) + more
