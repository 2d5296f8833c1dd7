"""Zero-shot classification over the tasks of a benchmark under a protocol (see ``protocols`` and ``scoring``).

Finished tasks outlive a killed run: the same command reuses those whose data, weights and settings are unchanged.
"""

import hashlib
import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from focalclip.base import __version__
from focalclip.base.errors import UserError, faults_named, require, system_error, unforeseen
from focalclip.base.files import user_path
from focalclip.base.machine import peak_memory, versions
from focalclip.base.ranks import cache_turn, gather_objects, is_main, main_only, together
from focalclip.evaluation.data import TaskData, Unavailable
from focalclip.evaluation.features.cache import open_cache
from focalclip.evaluation.features.images import encode_images, images_sha256
from focalclip.evaluation.features.model import (
    DualEncoder,
    check_model,
    describe,
    device_and_dtype,
    evaluating,
    known_weights,
)
from focalclip.evaluation.features.texts import ClassPrompts, class_matrix
from focalclip.evaluation.metrics.calibration import learned_scale
from focalclip.evaluation.metrics.label_check import check_labels
from focalclip.evaluation.opened import Opened, open_checked
from focalclip.evaluation.result import Result, TaskResult, predictions_file, predictions_folder, writable
from focalclip.evaluation.scoring import predict
from focalclip.evaluation.task import Benchmark, Task, load_benchmark

T = TypeVar("T")


@dataclass(frozen=True)
class ZeroShotOptions:
    """What to measure of a benchmark, how, and where to keep it."""

    tasks: Sequence[str] | None = None
    """Ids of the tasks to run; None for all."""
    max_images: int | None = None
    """Evaluate only this many evenly spaced images of each task, as the result notes; None for all."""
    class_prompts: ClassPrompts | None = None
    """Whole prompts by class name instead of templates; the result's protocol notes it."""
    batch_size: int = 256
    """Images, and prompts, per forward pass."""
    device: str | torch.device | None = None
    """Where to move the model first; None leaves it where it is."""
    source: str = ""
    """The model's name in the result."""
    progress: bool = True
    """Show a bar and one line per finished task, on stderr."""
    cache_dir: str | Path | None = None
    """Where features are kept by content (see ``features.cache``); None: nowhere."""
    outputs: Sequence[Path] = ()
    """Files that the result is written to, and whose finished tasks are reused if nothing has changed."""
    fresh: bool = False
    """Re-evaluate finished tasks."""
    keep_all: bool = False
    """Keep the scores of all classes for every image, as a submission to ELEVATER's server needs them."""


def evaluate(
    model: DualEncoder,
    benchmark: str | Path | Benchmark,
    data_root: str | Path | None = None,
    options: ZeroShotOptions = ZeroShotOptions(),
    *,
    opened: dict[str, Opened] | None = None,
) -> Result:
    """Measure a model zero-shot; its modes are as before afterwards, so that training can go on.

    Where there are several ranks, all call this together: they share the images and prompts of each task, and the
    numbers are those of one process. Only the main rank prints and writes.

    Args:
        model: anything with ``encode_image``, ``encode_text``, ``tokenizer`` and ``preprocess``.
        benchmark: ``elevater``, ``demo``, a folder of wds tasks, a YAML file of tasks, or a :class:`Benchmark`.
        data_root: where the data is; see :func:`~focalclip.evaluation.task.load_benchmark`.
        options: what to measure, how, and where to keep it.
        opened: keeps what was read of each task's data for the next call; for evaluations during training.

    Returns:
        What was measured, what is missing (with what to do) and what failed (with why). One task's faulty data never
        stops the others.

    Raises:
        UserError: if there is no such benchmark, task or data folder.
    """
    require("evaluation", "eval", "scipy")
    full = benchmark if isinstance(benchmark, Benchmark) else load_benchmark(benchmark, data_root)
    if options.device is not None and hasattr(model, "to"):
        model.to(options.device)
    return _Run(model, full, options, {} if opened is None else opened).all_tasks()


class _Run:
    """One model's way through a benchmark.

    What is set in the constructor stays; ``result`` grows by a task at a time, and so does ``opened``.
    """

    def __init__(self, model: Any, benchmark: Benchmark, options: ZeroShotOptions, opened: dict[str, Opened]) -> None:
        self.model, self.options, self.opened = model, options, opened
        self.benchmark = benchmark.select(options.tasks)
        check_model(model)
        self.weights = known_weights(model)
        self.cache = open_cache(model, options.cache_dir, self.weights)
        self.finished = Finished(options.outputs, fresh=options.fresh)
        self.progress = options.progress and is_main()
        protocol = benchmark.protocol
        self.result = Result(
            benchmark=benchmark.name,
            protocol=protocol if options.class_prompts is None else f"{protocol}, class prompts",
            expected=benchmark.expected,
            missing=dict(benchmark.left_out) if options.tasks is None else {},
            model=({"source": options.source} if options.source else {})
            | {"sha256": self.weights or "unknown"}
            | describe(model),
            versions=versions(),
        )

    def all_tasks(self) -> Result:
        """Every task in its place; what is done is written after each."""
        start, count = time.perf_counter(), len(self.benchmark.tasks)
        for i, task in enumerate(self.benchmark.tasks, start=1):
            self._add(task, f"{task.id} ({i} of {count})")
            self.result = replace(
                self.result,
                model=self.result.model | peak_memory(device_and_dtype(self.model)[0]),
                seconds=round(time.perf_counter() - start, 3),
            )
            main_only(partial(self.finished.write_part, self.result))
        main_only(partial(self.finished.write, self.result))
        return self.result

    def _add(self, task: Task, label: str) -> None:
        """Add the task to the result: measured, reused, missing or failed."""
        result = self.result
        try:
            done = self._task(task, label)
        except Unavailable as reason:
            self.result = replace(result, missing=result.missing | {task.id: str(reason)})
        except Exception as error:  # noqa: BLE001 (no fault of one task ends the others)
            reason = str(error) if isinstance(error, UserError) else unforeseen(error)
            self.result = replace(result, failed=result.failed | {task.id: reason})
            self._say(f"{label}: failed, see below")
        else:
            self.result = replace(result, tasks=result.tasks | {task.id: done})

    def _task(self, task: Task, label: str) -> TaskResult:
        """The task's result, measured or reused.

        Raises:
            Unavailable: if its data is missing.
            UserError: if its data is faulty.
            Exception: any other, on all ranks: where ranks do different work they agree on it as a UserError.
        """
        opened = self.opened.get(task.id) or self._open(task)
        self.opened[task.id] = opened
        settings = self._settings(task)
        done = _from_main(lambda: self._reusable(opened, settings))
        if done is not None:
            self._say(f"{label}: {100 * done.value:.1f}% (measured before; --fresh measures it again)")
            return done
        with evaluating(self.model):
            done = self._measure(opened, settings, label)
        self._say(f"{label}: {_outcome(done)}")
        return done

    def _open(self, task: Task) -> Opened:
        """The task's data on all ranks; one rank of each machine downloads before the others read.

        Files that are damaged on the way are removed, so a second process must not be reading them meanwhile.
        """
        work = partial(open_checked, task, self.benchmark, self.options.max_images)
        if self.benchmark.data_root is not None and task.source is None:
            return _agreed(work)  # nothing is downloaded
        opened: Opened | None = None
        for turn in range(3):
            opened = _agreed(work if turn == cache_turn() else lambda before=opened: before)
        assert opened is not None
        return opened

    def _measure(self, opened: Opened, settings: str, label: str) -> TaskResult:
        task, data, start = opened.task, opened.data, time.perf_counter()
        classes = class_matrix(
            self.model, data.class_names, data.templates, self.options.batch_size,
            class_prompts=self.options.class_prompts, cache=self.cache,
            label=f"{label}, prompts" if self.progress else "",
        )  # fmt: skip
        text_seconds = time.perf_counter() - start
        images = encode_images(
            self.model, data.entries, batch_size=self.options.batch_size, resize=task.resize, label=label,
            progress=self.progress, cache=self.cache, upright=self.benchmark.upright,
        )  # fmt: skip
        own_scale = learned_scale(self.model)
        predictions, result = _agreed(
            lambda: predict(task, data, images, classes, own_scale, self.options.keep_all)  # reads some pictures
        )
        encoded = len(data.entries) - images.num_cached
        return TaskResult(
            metric=task.metric,
            value=result.value,
            interval=result.interval,
            n=predictions.n,
            chance=result.chance,
            classes=len(data.class_names),
            templates=0 if self.options.class_prompts else len(data.templates),
            extras=result.extras,
            in_score=task.in_score,
            version=task.version,
            test_set=opened.test_set,
            differences=opened.differences,
            part_of=opened.part_of,
            broken=images.broken,
            task_sha256=data.digest(images.sha256),
            folder=str(data.folder),
            seconds=round(time.perf_counter() - start, 3),
            images_per_second=round(encoded / images.seconds, 1) if encoded else None,
            cached_images=images.num_cached,
            text_seconds=round(text_seconds, 3),
            image_seconds=round(images.seconds, 3),
            prompts=self._num_prompts(data),
            settings_sha256=settings,
            stated=task.statement(data.class_names, data.templates),
            label_warning=check_labels(predictions.best, predictions.labels, data.class_names).warning,
            predictions=predictions,
        )

    def _settings(self, task: Task) -> str:
        """Empty where the hash of the weights is unknown, so that nothing is reused."""
        if self.weights is None:
            return ""
        precision = str(device_and_dtype(self.model)[1])
        return settings_sha256(
            self.weights, precision, self.result.protocol, task, batch_size=self.options.batch_size,
            class_prompts=self.options.class_prompts, max_images=self.options.max_images,
        )  # fmt: skip

    def _reusable(self, opened: Opened, settings: str) -> TaskResult | None:
        """The finished task, if its data, images included, is the same."""
        done = self.finished.find(opened.task.id, settings) if settings else None
        if done is None:
            return None
        if self.options.keep_all and (done.predictions is None or not done.predictions.has_all):
            return None
        label = f"{opened.task.id}, reading" if self.progress else ""
        digest = images_sha256(opened.data.entries, self.cache, label)
        return done if done.task_sha256 == opened.data.digest(digest) else None

    def _num_prompts(self, data: TaskData) -> int:
        prompts = self.options.class_prompts
        if prompts is None:
            return len(data.class_names) * len(data.templates)
        return sum(len(prompts[name]) for name in data.class_names)

    def _say(self, message: str) -> None:
        if self.progress:
            print(message, file=sys.stderr)


def _agreed(work: Callable[[], T]) -> T:
    """Do ``work`` on all ranks; if it fails on any, all raise the same error."""
    result, fault = None, None
    try:
        result = faults_named(work)
    except UserError as error:
        fault = error
    except OSError as error:
        fault = system_error(error)
    for other in gather_objects(fault):
        if other is not None:
            raise other
    return result  # pyrefly: ignore[bad-return]


def _from_main(work: Callable[[], T]) -> T:
    """What ``work`` gives on the main rank, on all ranks."""
    return gather_objects(_agreed(lambda: work() if is_main() else None))[0]  # pyrefly: ignore[bad-return]


def _outcome(result: TaskResult) -> str:
    if result.images_per_second is None:
        speed = "all from the cache"
    else:
        speed = f"{result.images_per_second:,.0f} images/s"
        speed += f", {result.cached_images:,} from the cache" if result.cached_images else ""
    return f"{100 * result.value:.1f}% ({result.n:,} images in {result.seconds:.1f} s, {speed})"


class Evaluator:
    """Measures what it is called with on the same images each time.

    Args:
        benchmark: as for :func:`~focalclip.evaluation.zeroshot.evaluate`.
        max_images: so many evenly spaced images of each task; None for all.
        batch_size: images, and prompts, per forward pass.
        data_root: where the data is.
        tasks: ids of the tasks to run; None for all.

    Raises:
        UserError: if there is no such benchmark or data folder.
    """

    def __init__(
        self,
        benchmark: str | Path,
        *,
        max_images: int | None,
        batch_size: int = 256,
        data_root: str | Path | None = None,
        tasks: Sequence[str] | None = None,
    ) -> None:
        self._benchmark = load_benchmark(benchmark, data_root)
        self._options = ZeroShotOptions(tasks=tasks, max_images=max_images, batch_size=batch_size, progress=False)
        self._opened: dict[str, Opened] = {}

    def __call__(self, model: Any) -> Result:
        """Measure; all ranks call this together. Modes and random generators are as before afterwards."""
        return evaluate(model, self._benchmark, options=self._options, opened=self._opened)


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
        outputs: files that the result is written to; see :func:`~focalclip.evaluation.result.writable`.
        fresh: ignore what is there, so that finished tasks are re-evaluated.
    """

    def __init__(self, outputs: Sequence[Path], *, fresh: bool = False) -> None:
        self.outputs = tuple(together(lambda: writable([user_path(path) for path in outputs]) if is_main() else []))
        self._unwritten: set[Path] = set()
        self._tasks: dict[tuple[str, str], TaskResult] = {}
        for path in () if fresh else [form for output in self.outputs for form in (output, _part(output))]:
            for name, task in _read(path).items():
                self._tasks[name, task.settings_sha256] = task

    def find(self, task_id: str, settings: str) -> TaskResult | None:
        """The finished task with these settings; its ``task_sha256`` shows whether its data is the same."""
        return self._tasks.get((task_id, settings))

    def write_part(self, result: Result) -> None:
        """Keep what is done so far; a file that cannot be written any more is named, and does not end the run."""
        for output in self.outputs if result.tasks else ():
            try:
                result.write(_part(output))
            except OSError as error:
                if output not in self._unwritten:
                    print(f"{_part(output)}: cannot be written ({error.strerror}); measuring goes on", file=sys.stderr)
                self._unwritten.add(output)

    def write(self, result: Result) -> None:
        """Write the whole result; without any task, an earlier one stays.

        Raises:
            OSError: the first, if a file cannot be written; the others are.
        """
        faults = []
        for output in self.outputs if result.tasks else ():
            try:
                result.write(output)
                _part(output).unlink(missing_ok=True)
                shutil.rmtree(predictions_folder(_part(output)), ignore_errors=True)
            except OSError as error:
                faults.append(error)
        if faults:
            raise faults[0]


def _part(output: Path) -> Path:
    return output.with_name(f"{output.name}.part")


def _read(path: Path) -> dict[str, TaskResult]:
    """The tasks of a result; without those whose answers are damaged, which are measured again."""
    if not path.is_file():
        return {}
    try:
        tasks = Result.read(path).tasks
    except UserError:
        print(f"{path}: not a result of this version; its tasks are measured again", file=sys.stderr)
        return {}
    return {
        name: task for name, task in tasks.items() if task.predictions or not predictions_file(path, name).is_file()
    }
