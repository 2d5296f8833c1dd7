"""Zero-shot classification over the tasks of a benchmark (ELEVATER's protocol, see ``scoring`` and ``classifier``)."""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from focalclip.base.errors import UserError, first_line
from focalclip.base.machine import peak_memory, versions
from focalclip.base.ranks import cache_turn, gather_objects, is_main, main_only
from focalclip.evaluation.data import TaskData, Unavailable
from focalclip.evaluation.features.cache import FeatureCache, open_cache
from focalclip.evaluation.features.images import encode_images, images_sha256
from focalclip.evaluation.features.model import DualEncoder, describe, device_and_dtype, evaluating, known_weights
from focalclip.evaluation.features.texts import ClassPrompts, class_matrix
from focalclip.evaluation.finished import Finished, settings_sha256
from focalclip.evaluation.metrics.calibration import learned_scale
from focalclip.evaluation.metrics.label_check import check_labels
from focalclip.evaluation.opened import Opened, open_checked
from focalclip.evaluation.predictions import Predictions
from focalclip.evaluation.protocols import statement
from focalclip.evaluation.result import Result, TaskResult
from focalclip.evaluation.scoring import score
from focalclip.evaluation.task import Benchmark, Task, load_benchmark

T = TypeVar("T")


def evaluate(
    model: DualEncoder,
    benchmark: str | Path | Benchmark,
    data_root: str | Path | None = None,
    batch_size: int = 256,
    device: str | torch.device | None = None,
    tasks: Sequence[str] | None = None,
    progress: bool = True,
    *,
    source: str = "",
    cache_dir: str | Path | None = None,
    class_prompts: ClassPrompts | None = None,
    max_images: int | None = None,
    outputs: Sequence[Path] = (),
    fresh: bool = False,
    opened: dict[str, Opened] | None = None,
    keep_all: bool = False,
) -> Result:
    """Measure a model zero-shot; its modes are as before afterwards, so that training can go on.

    Where there are several ranks, all call this together: they share the images and prompts of each task, and the
    numbers are those of one process. Only the main rank prints and writes.

    Args:
        model: anything with ``encode_image``, ``encode_text``, ``tokenizer`` and ``preprocess``.
        benchmark: ``elevater``, ``demo``, a folder of wds tasks, a YAML file of tasks, or a :class:`Benchmark`.
        data_root: where the data is; see :func:`~focalclip.evaluation.task.load_benchmark`.
        batch_size: images, and prompts, per forward pass.
        device: where to move the model first; None leaves it where it is.
        tasks: ids of the tasks to run; None for all.
        progress: show a bar and one line per finished task, on stderr.
        source: the model's name in the result.
        cache_dir: where features are kept by content (see ``features.cache``); None: nowhere.
        class_prompts: whole prompts by class name instead of templates; the result's protocol says so.
        max_images: so many of each task's images alone, evenly spaced; the result says so.
        outputs: files that the result is written to, and whose finished tasks are taken over if nothing has changed.
        fresh: measure those, too, anew.
        opened: keeps what was read of each task's data for the next call; for evaluations during training.
        keep_all: keep the scores of all classes for every image, as a submission to ELEVATER's server needs them.

    Returns:
        What was measured, what is missing (with what to do) and what failed (with why). One task's faulty data never
        stops the others.

    Raises:
        UserError: if there is no such benchmark, task or data folder.
    """
    full = benchmark if isinstance(benchmark, Benchmark) else load_benchmark(benchmark, data_root)
    chosen = full.select(tasks)
    if device is not None and hasattr(model, "to"):
        model.to(device)
    weights = known_weights(model)
    run = _Run(
        model=model, benchmark=chosen, weights=weights, batch_size=batch_size, class_prompts=class_prompts,
        max_images=max_images, progress=progress and is_main(), opened={} if opened is None else opened,
        missing=dict(full.left_out) if tasks is None else {}, cache=open_cache(model, cache_dir, weights),
        finished=Finished(outputs, fresh=fresh),
        keep_all=keep_all, protocol=full.protocol if class_prompts is None else f"{full.protocol}, class prompts",
    )  # fmt: skip
    start = Result(
        benchmark=full.name,
        protocol=run.protocol,
        expected=full.expected,
        model=({"source": source} if source else {}) | {"sha256": weights or "unknown"} | describe(model),
        versions=versions(),
    )
    return run.all_tasks(start)


@dataclass(frozen=True)
class _Run:
    """One model's way through a benchmark."""

    model: Any
    benchmark: Benchmark
    weights: str | None
    batch_size: int
    class_prompts: ClassPrompts | None
    max_images: int | None
    progress: bool
    opened: dict[str, Opened]
    cache: FeatureCache | None
    finished: Finished
    protocol: str
    missing: dict[str, str]
    keep_all: bool = False
    failed: dict[str, str] = field(default_factory=dict)

    def all_tasks(self, result: Result) -> Result:
        """``result`` with every task in its place; what is done is kept after each."""
        start, count = time.perf_counter(), len(self.benchmark.tasks)
        for i, task in enumerate(self.benchmark.tasks, start=1):
            label = f"{task.id} ({i} of {count})"
            done = self._task(task, label)
            if done is not None:
                result = replace(result, tasks=result.tasks | {task.id: done})
            result = replace(
                result,
                missing=dict(self.missing),
                failed=dict(self.failed),
                model=result.model | peak_memory(device_and_dtype(self.model)[0]),
                seconds=round(time.perf_counter() - start, 3),
            )
            main_only(partial(self.finished.write_part, result))
        main_only(partial(self.finished.write, result))
        return result

    def _task(self, task: Task, label: str) -> TaskResult | None:
        """The task's result, measured or taken over; None if it is missing or failed."""
        try:
            opened = self.opened.get(task.id) or self._open(task)
            self.opened[task.id] = opened
            settings = self._settings(task)
            done = _from_main(lambda: self._take_over(opened, settings))
            if done is not None:
                self._say(f"{label}: {100 * done.value:.1f}% (measured before; --fresh measures it anew)")
                return done
            with evaluating(self.model):
                done = self._measure(opened, settings, label)
        except Unavailable as reason:
            self.missing[task.id] = str(reason)
            return None
        except UserError as error:
            self.failed[task.id] = str(error)
            self._say(f"{label}: failed, see below")
            return None
        self._say(f"{label}: {_outcome(done)}")
        return done

    def _open(self, task: Task) -> Opened:
        """The task's data on all ranks; what has to be downloaded is there before the ranks that would only wait ask.

        Files that are damaged on the way are removed, so a second process must not be reading them meanwhile.
        """
        work = partial(open_checked, task, self.benchmark, self.max_images)
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
            self.model, data.class_names, data.templates, self.batch_size,
            class_prompts=self.class_prompts, cache=self.cache, label=f"{label}, prompts" if self.progress else "",
        )  # fmt: skip
        text_seconds = time.perf_counter() - start
        images = encode_images(
            self.model, data.entries, batch_size=self.batch_size, resize=task.resize, label=label,
            progress=self.progress, cache=self.cache,
        )  # fmt: skip
        labels = data.labels[images.readable]
        result = score(task, images.embeds, classes, labels)
        predictions = Predictions.of(task, data, images, classes, learned_scale(self.model), self.keep_all)
        encoded = len(data.entries) - images.num_cached
        return TaskResult(
            metric=task.metric,
            value=result.value,
            interval=result.interval,
            n=len(labels),
            chance=result.chance,
            classes=len(data.class_names),
            templates=0 if self.class_prompts else len(data.templates),
            extras=result.extras,
            in_score=task.in_score,
            version=task.version,
            test_set=opened.test_set,
            differences=opened.differences,
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
            stated=statement(task, data.class_names, data.templates),
            label_warning=check_labels(predictions.best, labels, data.class_names).warning,
            predictions=predictions,
        )

    def _settings(self, task: Task) -> str:
        """Empty where the model cannot tell its weights, so that nothing is taken over."""
        if self.weights is None:
            return ""
        precision = str(device_and_dtype(self.model)[1])
        return settings_sha256(
            self.weights, precision, self.protocol, task,
            batch_size=self.batch_size, class_prompts=self.class_prompts, max_images=self.max_images,
        )  # fmt: skip

    def _take_over(self, opened: Opened, settings: str) -> TaskResult | None:
        """The finished task, if its data, images included, is the same."""
        done = self.finished.find(opened.task.id, settings) if settings else None
        if done is None:
            return None
        if self.keep_all and (done.predictions is None or not done.predictions.has_all):
            return None
        label = f"{opened.task.id}, reading" if self.progress else ""
        digest = images_sha256(opened.data.entries, self.cache, label)
        return done if done.task_sha256 == opened.data.digest(digest) else None

    def _num_prompts(self, data: TaskData) -> int:
        if self.class_prompts is None:
            return len(data.class_names) * len(data.templates)
        return sum(len(self.class_prompts[name]) for name in data.class_names)

    def _say(self, message: str) -> None:
        if self.progress:
            print(message, file=sys.stderr)


def _agreed(work: Callable[[], T]) -> T:
    """Do ``work`` on all ranks; where it fails on any, all raise the same."""
    result, fault = None, None
    try:
        result = work()
    except (Unavailable, UserError) as error:
        fault = error
    except OSError as error:
        fault = UserError(f"{first_line(error)}; see that the data can be read")
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
        self._options: dict[str, Any] = {"max_images": max_images, "batch_size": batch_size, "tasks": tasks}
        self._opened: dict[str, Opened] = {}

    def __call__(self, model: Any) -> Result:
        """Measure; all ranks call this together. Modes and random generators are as before afterwards."""
        return evaluate(model, self._benchmark, progress=False, opened=self._opened, **self._options)
