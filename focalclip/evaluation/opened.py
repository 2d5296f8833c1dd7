"""A task whose data was read, checked, and joined to the protocol's class names and prompts."""

from dataclasses import dataclass

import numpy as np

from focalclip.evaluation.data import TaskData, open_task
from focalclip.evaluation.names import departures, join
from focalclip.evaluation.task import Benchmark, Task


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
    """Where the data departs from the protocol, in sentences."""


def open_checked(task: Task, benchmark: Benchmark, max_images: int | None = None, split: str = "test") -> Opened:
    """Open one split of a task; with ``max_images`` an evenly spaced part of it, the same each time.

    Raises:
        Unavailable: if the data is not there, saying what to do.
        UserError: if it is not the task's, or not whole.
    """
    found = open_task(task, benchmark.data_root, benchmark.absent, split)
    data, known = join(task, found, split), task.which_set(len(found.entries), split)
    told = departures(task, found, known)
    if max_images is not None and max_images < len(data.entries):
        data = data.subset(np.linspace(0, len(data.entries) - 1, max_images).round().astype(int))
        told, known = (f"{max_images:,} images alone, evenly spaced (max_images)", *told), f"a part of {known}"
    return Opened(task, data, known, told)
