"""Batches of one rank, without end, from any global position."""

import errno
import mmap
import os
import signal
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import count
from multiprocessing.connection import wait
from multiprocessing.reduction import DupFd
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from focalclip.base.errors import MachineError, UserError, first_line, memory_error, system_error
from focalclip.config import DataConfig
from focalclip.data.index import usable_shards
from focalclip.data.mixing import Segment, mixture
from focalclip.data.order import uniform_draws
from focalclip.data.samples import Ignored, TrainSamples
from focalclip.data.shards import source_numbers
from focalclip.data.transforms import augment_batch

_GRACE_SECONDS = 30  # how long a worker outlives SIGTERM, for the training process to save and leave


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank."""

    images: Tensor
    """uint8 (b, 3, S, S), not normalised."""
    tokens: Tensor
    """int64 (b, L)."""
    labels: Tensor
    """int64 (b,): class numbers, -1 where a sample has none; different sources have different ones."""
    positions: Tensor
    """int64 (b,): global positions."""
    ids: Tensor
    """int64 (b,): numbers within the whole data of the samples that were loaded: a pair that stands in a batch twice,
    because of an epoch's border or in the place of a broken sample, has one number."""
    faults: list[str]
    """``shard.tar: key: reason`` for each broken sample that was replaced."""
    ignored: list[Ignored] = field(default_factory=list)
    """Parts of sound samples that could not be used, such as a class number that is a word."""

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory; DataLoader calls this."""
        tensors = {f.name: value for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)}
        return replace(self, **{name: tensor.pin_memory() for name, tensor in tensors.items()})


@dataclass(frozen=True)
class Dealing:
    """Which positions each micro-batch of a rank takes.

    The state of the data is one integer, the number of samples consumed by all ranks together: ``start``. Global batch
    k takes the G = ``data.batch_size`` positions from ``start + k * G`` on. They are dealt in order: micro-batch a of A
    takes the a-th of A equal parts, and of that part rank r of W the r-th of W. So a micro-batch gathered over all
    ranks holds the same samples in the same order on any number of ranks, and one rank yields A batches per step.
    """

    rank: int = 0
    """This process."""
    world_size: int = 1
    """Number of processes."""
    accumulation: int = 1
    """Micro-batches per step."""
    start: int = 0
    """Samples consumed so far, by all ranks together."""
    segments: tuple[Segment, ...] = ()
    """Of a run that goes on with weighted sources: since which position it has had which weights."""

    def positions(self, batch_size: int, micro_batch: int) -> range:
        """Positions of this rank's micro-batch, counted from the first of ``start`` on; batches of ``batch_size``."""
        size = batch_size // (self.world_size * self.accumulation)
        first = self.start + (micro_batch * self.world_size + self.rank) * size
        return range(first, first + size)


class TrainLoader:
    """Training batches of one rank; iterating yields them for ever.

    Args:
        shards: Files of :func:`focalclip.data.prepared.training_shards`; a plain list is of one source. Missing indexes
            are built, by every process that finds them missing: let one process build a loader first.
        data: Batch size, workers, window, captions and augmentation.
        image_size: Side of the images in pixels.
        tokenize: From captions to int64 tokens (len(captions), L). It runs in the workers, so it must be picklable
            where processes are not forked.
        seed: Seed of order, captions and augmentation.
        dealing: Which part of each global batch this rank takes, and from where on.

    Raises:
        UserError: if the batch cannot be dealt evenly or is larger than the data, or a shard cannot be used.
    """

    def __init__(
        self,
        shards: Sequence[Path],
        data: DataConfig,
        image_size: int,
        tokenize: Callable[[list[str]], Tensor],
        seed: int,
        dealing: Dealing = Dealing(),
    ):
        parts = dealing.world_size * dealing.accumulation
        if data.batch_size % parts:
            raise UserError(
                f"data.batch_size={data.batch_size} is not divisible by {dealing.world_size} ranks times "
                f"train.accumulation={dealing.accumulation}; use a multiple of {parts}"
            )
        self.usable = usable_shards(shards, data.key_rule, data.max_bad_shards)
        """The shards that are trained on, and what is wrong with the others."""
        self.counts = counts = self.usable.counts
        """Samples per usable shard, int64."""
        number_of = dict(zip(shards, source_numbers(shards), strict=True))
        numbers = [number_of[shard] for shard in self.usable.shards]
        self.sources = [0 if data.label_space == "number" else source for source, _ in numbers]
        """Number of the source that gives each usable shard's class numbers their meaning."""
        self.entries = [entry for _, entry in numbers]
        """Number of the entry of ``data.train`` that each usable shard belongs to."""
        files = list(zip(self.usable.shards, counts.tolist(), self.entries, strict=True))
        self.mixture = mixture(files, data, seed, dealing.segments, dealing.start)
        """The order of samples, and what it says of the sources."""
        self.num_samples = sum(self.mixture.counts)
        """Samples per epoch: all but those that ``data.val`` holds out."""
        if data.batch_size > self.num_samples:
            without = f" without data.val={data.val_fraction:g}" if data.val_fraction else ""
            raise UserError(
                f"data.batch_size={data.batch_size} is larger than the {self.num_samples} samples of data.train"
                f"{without}; a batch would hold samples twice; use a smaller one"
            )
        samples = TrainSamples(self.usable.shards, counts, self.mixture.order, data, image_size, numbers)
        self._batches = _MicroBatches(samples, dealing, data, image_size, tokenize, seed)
        self._workers = data.workers
        self._ahead = 2 * dealing.accumulation
        self.fault: UserError | None = None
        """Why no further batch can be had; those fetched before are still to come."""

    def raise_fault(self) -> None:
        """Raise :attr:`fault` if there is one."""
        if self.fault is not None:
            raise self.fault

    def __iter__(self) -> Generator[Batch]:
        """Batches from ``start`` on; close the iterator to end its processes at once.

        Those of the next two steps are fetched before one is given out. So ranks that agree on :attr:`fault` at every
        step, one step late, stop together before one of them lacks a batch.

        Raises:
            UserError: if the data turn out to be unusable, or a loader process has ended, and no batch is left.
        """
        loader = DataLoader(
            self._batches,
            batch_size=None,  # an item is a whole batch already
            sampler=count(),
            num_workers=self._workers,
            collate_fn=_seal if self._workers else _as_is,
            worker_init_fn=_outlive_signals,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # it draws a seed for the workers, or the process's generator would move
        )
        with _Source(loader) as source:
            batches = deque(source.next() for _ in range(self._ahead))
            while True:
                try:
                    if self.fault is None:
                        batches.append(source.next())
                except UserError as fault:
                    self.fault = fault
                if not batches:
                    self.raise_fault()
                yield batches.popleft()


class _Source:
    """The iterator of a DataLoader, whose failures become UserErrors, and only where it is asked for a batch.

    DataLoader notices the end of a process in a signal's handler, and raises wherever the program just is: in a step of
    the optimiser, or while a checkpoint is written. So that handler is kept for the wait for a batch.
    """

    def __init__(self, loader: DataLoader) -> None:
        self._iterator: Any = iter(loader)
        self._workers = getattr(self._iterator, "_workers", [])
        self._is_heard = bool(self._workers) and threading.current_thread() is threading.main_thread()
        self._handler = signal.getsignal(signal.SIGCHLD)  # DataLoader's, if there are workers

    def __enter__(self) -> "_Source":
        self._hear(signal.SIG_DFL)
        return self

    def __exit__(self, *_: object) -> None:
        """End the processes: they only read. DataLoader would let each finish its batch first."""
        for worker in self._workers:
            worker.kill()
        for worker in self._workers:
            worker.join()
        self._iterator = None
        self._hear(self._handler)

    def next(self) -> Batch:
        try:
            batch = self._wait()
        except (RuntimeError, EOFError, OSError) as error:
            self._raise_if_one_has_ended(seconds=1)  # a process that ends takes batches with it that it has announced
            if "ancdata" in str(error):  # how multiprocessing says that no descriptor is left to receive a batch
                error = OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            if isinstance(error, OSError):
                raise system_error(error) from None
            raise
        if isinstance(batch, UserError):
            raise batch
        return batch

    def _wait(self) -> "Batch | UserError":
        try:
            self._hear(self._handler)
            self._raise_if_one_has_ended()
            batch = next(self._iterator)
            return batch.open() if isinstance(batch, _Sealed) else batch
        finally:
            self._hear(signal.SIG_DFL)

    def _hear(self, handler: Any) -> None:
        if self._is_heard:
            signal.signal(signal.SIGCHLD, handler)

    def _raise_if_one_has_ended(self, seconds: float = 0) -> None:
        ending = wait([worker.sentinel for worker in self._workers], seconds)
        for worker in self._workers:
            worker.join(1 if worker.sentinel in ending else 0)
            if (status := worker.exitcode) is not None:
                how = signal.Signals(-status).name if status < 0 else f"status {status}"
                raise MachineError(
                    f"data.workers: loader process {worker.pid} has ended ({how}), most often for lack of memory; "
                    "use fewer data.workers or a smaller data.batch_size, and continue with --resume"
                )


class _Sealed:
    """A batch as a worker hands it over: the images in a file in memory, all else by value.

    The file is written here. In the queue's own thread, where multiprocessing shares tensors, a failure (no memory or
    no file descriptor is left) would lose the batch, and the training process would wait for ever. Writing costs half
    of what the page faults of fresh shared memory do, and /dev/shm, which containers keep small, is not used.
    """

    def __init__(self, batch: Batch) -> None:
        self._shape = batch.images.shape
        self._rest: dict[str, Any] = {f.name: getattr(batch, f.name) for f in fields(batch) if f.name != "images"}
        for name, value in self._rest.items():
            if isinstance(value, Tensor):
                self._rest[name] = value.numpy()
        with _memory_file() as file:
            file.write(batch.images.numpy().data)
            file.flush()
            self._images = DupFd(file.fileno())

    def open(self) -> Batch:
        file = self._images.detach()
        try:
            images = torch.frombuffer(mmap.mmap(file, self._shape.numel()), dtype=torch.uint8).view(self._shape)
        finally:
            os.close(file)
        rest: dict[str, Any] = {
            k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in self._rest.items()
        }
        return Batch(images, **rest)

    def pin_memory(self) -> Batch:
        """DataLoader calls this."""
        return self.open().pin_memory()


def _memory_file() -> BinaryIO:
    """A nameless file, in memory where the system has such files."""
    if sys.platform == "linux":
        return os.fdopen(os.memfd_create("batch"), "wb")
    return tempfile.TemporaryFile()


class _MicroBatches(Dataset):
    """Micro-batches of one rank by number; a worker makes each whole, so colours and tokens are done batch by batch."""

    def __init__(
        self,
        samples: TrainSamples,
        dealing: Dealing,
        data: DataConfig,
        image_size: int,
        tokenize: Callable[[list[str]], Tensor],
        seed: int,
    ):
        self._samples = samples
        self._dealing = dealing
        self._batch_size = data.batch_size
        self._augments = [rules.augment for rules in data.of_entries()]
        self._image_size = image_size
        self._tokenize = tokenize
        self._seed = seed
        self._kept: Tensor | None = None

    def __getitem__(self, index: int) -> Batch | UserError:
        """Returns the user's errors: raised in a worker they would come out wrapped in a stack trace."""
        try:
            positions = self._dealing.positions(self._batch_size, index)
            return self._batch(positions.start, len(positions))
        except UserError as error:
            return error
        except (MemoryError, RuntimeError) as error:
            if (lack := memory_error(error)) is None:
                raise
            return lack

    def _pixels(self, size: int) -> Tensor:
        """Where the images of a batch are drawn; in a worker the same each time, as :class:`_Sealed` copies them."""
        if self._kept is not None and len(self._kept) == size:
            return self._kept
        pixels = torch.empty(size, 3, self._image_size, self._image_size, dtype=torch.uint8)
        self._kept = pixels if get_worker_info() is not None else None
        return pixels

    def _batch(self, first: int, size: int, check: Callable[[str], object] | None = None) -> Batch:
        draws = uniform_draws(self._seed, first, size)
        images = self._pixels(size)
        captions, labels, ids, entries, faults, ignored = [], [], [], [], [], {}
        for i, row in enumerate(draws.tolist()):
            sample, fault = self._samples.load(first + i, row, check)
            images[i] = sample.image
            captions.append(sample.caption)
            labels.append(sample.label)
            ids.append(sample.id)
            entries.append(sample.entry)
            if fault:
                faults.append(fault)
            elif sample.ignored:
                ignored[first + i] = sample.ignored
        try:
            tokens = self._tokenize(captions)
        except Exception as error:
            if isinstance(error, UserError):
                raise
            if check is None:  # find out whose caption it is
                return self._batch(first, size, lambda caption: self._tokenize([caption]))
            raise UserError(
                f"model.text.name: its tokenizer fails on captions that it takes one by one ({first_line(error)}); "
                "use another text tower"
            ) from None
        self._augment(images.numpy(), draws, np.array(entries))
        positions = torch.arange(first, first + size)
        parts = [part for position, reasons in ignored.items() for part in self._samples.ignored(position, reasons)]
        return Batch(images, tokens, torch.tensor(labels), positions, torch.tensor(ids), faults, parts)

    def _augment(self, images: np.ndarray, draws: np.ndarray, entries: np.ndarray) -> None:
        """Augment each image by the rules of its source, in place."""
        if all(augment == self._augments[0] for augment in self._augments):
            augment_batch(images, draws, self._augments[0])
            return
        for entry in np.unique(entries):
            chosen = np.flatnonzero(entries == entry)
            own = images[chosen]
            augment_batch(own, draws[chosen], self._augments[entry])
            images[chosen] = own


def _as_is(batch: Any) -> Any:
    """In the place of DataLoader's collation and conversion."""
    return batch


def _seal(batch: Any) -> "_Sealed | UserError":
    if isinstance(batch, UserError):
        return batch
    try:
        return _Sealed(batch)
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            return system_error(error)
        return MachineError(
            f"data.workers: a batch of {batch.images.nbytes / 2**20:.1f} MiB cannot be handed over "
            f"({error.strerror}); use fewer workers (0: the training process loads by itself) or a smaller "
            "data.batch_size"
        )


def _outlive_signals(_worker: int) -> None:
    """Ctrl-C, launchers and schedulers signal every process; a worker that died would take the checkpoint with it.

    A worker leaves when its training process closes it or ends; after SIGTERM it stays for a while longer at most. What
    ends in the middle of handing a batch over to a training process that was killed is no fault to be told.
    """
    usual = sys.excepthook

    def excepthook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not issubclass(kind, (ConnectionError, EOFError)):
            usual(kind, error, trace)

    sys.excepthook = excepthook
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_GRACE_SECONDS))
