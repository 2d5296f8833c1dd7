"""Finished tasks survive a killed run: a repeated command reuses those for which nothing has changed.

A result is written to ``FILE.part`` after each task and to ``FILE`` at the end, each whole or not at all; so what
stands in ``FILE`` is always complete, and the previous result stays until the new one is.
"""

import hashlib
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from focalclip.base import __version__
from focalclip.base.errors import UserError
from focalclip.base.ranks import is_main
from focalclip.evaluation.features.texts import ClassPrompts
from focalclip.evaluation.result import Result, TaskResult, predictions_folder
from focalclip.evaluation.task import Task


def settings_sha256(
    weights: str,
    precision: str,
    protocol: str,
    task: Task,
    *,
    batch_size: int,
    class_prompts: ClassPrompts | None,
    max_images: int | None,
) -> str:
    """Hash of all that decides a task's numbers besides its data; only a finished task of the same is reused."""
    prompts = class_prompts and {name: list(own) for name, own in class_prompts.items()}
    model = [__version__, weights, precision]
    parts = [model, protocol, task.model_dump(mode="json"), batch_size, prompts, max_images]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class Finished:
    """Results on disk, which only the main rank reads and writes.

    Args:
        outputs: files that the result is written to.
        fresh: ignore what is there, so that finished tasks are re-evaluated.
    """

    def __init__(self, outputs: Sequence[Path], *, fresh: bool = False) -> None:
        self.outputs = tuple(outputs)
        self._tasks: dict[tuple[str, str], TaskResult] = {}
        for path in () if fresh or not is_main() else [form for output in outputs for form in (output, _part(output))]:
            for name, task in _read(path).items():
                self._tasks[name, task.settings_sha256] = task

    def find(self, task_id: str, settings: str) -> TaskResult | None:
        """The finished task with these settings; its ``task_sha256`` shows whether its data is the same."""
        return self._tasks.get((task_id, settings))

    def write_part(self, result: Result) -> None:
        """Keep what is done so far."""
        for output in self.outputs if result.tasks else ():
            result.write(_part(output))

    def write(self, result: Result) -> None:
        """Write the whole result; without any task, an earlier one stays."""
        for output in self.outputs if result.tasks else ():
            result.write(output)
            _part(output).unlink(missing_ok=True)
            shutil.rmtree(predictions_folder(_part(output)), ignore_errors=True)


def _part(output: Path) -> Path:
    return output.with_name(f"{output.name}.part")


def _read(path: Path) -> dict[str, TaskResult]:
    if not path.is_file():
        return {}
    try:
        return Result.read(path).tasks
    except UserError:
        print(f"{path}: not a result of this version; its tasks are measured again", file=sys.stderr)
        return {}
