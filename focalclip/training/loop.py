"""The training loop, on one page."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from focalclip.base.ranks import Interrupted, together
from focalclip.config import RunConfig
from focalclip.data.loader import Batch, TrainLoader
from focalclip.training.checkpoint import TrainState
from focalclip.training.log import TrainLog
from focalclip.training.step import Loss, Stepper
from focalclip.training.stop import StopRequest


@dataclass
class Trainer:
    """The parts of a run that the loop uses."""

    config: RunConfig
    engine: Any
    loss: Loss
    loader: TrainLoader
    state: TrainState
    total_steps: int
    log: TrainLog
    stop: StopRequest
    save: Callable[["Trainer"], bool]
    """Writes a checkpoint and the model; false, with nothing written, where they are not finite."""
    roll_back: Callable[["Trainer", str], None]
    """Returns to the last checkpoint for the reason given."""
    evaluate: Callable[["Trainer"], None]
    """Measures what is due at the step that was just done, if anything."""


def train(run: Trainer) -> bool:
    """Train until ``total_steps`` are done or a stop is agreed; save in either case.

    A step whose gradient is not finite is skipped and counted; after ``train.max_skipped_steps`` in a row, or where the
    weights themselves are not finite, the run returns to its last checkpoint and goes on with the data that follow. A
    loader that fails on one rank stops all; its fault stays in ``run.loader``.

    Returns:
        Whether the run is finished; not so if a stop came while the last step was measured.
    """
    run.engine.train()
    with closing(iter(run.loader)) as batches:  # ends the loader's processes, also after an error
        first = together(lambda: [next(batches)] if run.state.step < run.total_steps else [])
        return _train(run, itertools.chain(first, batches))


def _train(run: Trainer, batches: Iterator[Batch]) -> bool:
    take_step = Stepper(run.engine, run.loss, run.config)
    stopped = is_cut_short = run.state.step > 0 and not _evaluated(run)  # what a stop kept from being measured
    while run.state.step < run.total_steps and not stopped:
        result = take_step(batches, run.state.step)
        run.state.step += 1
        run.state.samples += run.config.data.batch_size
        run.log.step(run.state, result)
        stopped = run.stop.agreed(is_faulty=run.loader.fault is not None)
        is_end = stopped or run.state.step == run.total_steps
        is_saving = is_end or run.state.step % run.config.train.save_every == 0
        fault = _save(run, is_end) if is_saving else _fault(run)
        if fault:
            run.roll_back(run, fault)
        elif (not stopped or run.state.step == run.total_steps) and not _evaluated(run):
            stopped = is_cut_short = True
            is_saved = is_saving and not run.state.skipped_in_a_row
            if not is_saved and (fault := _save(run, is_end=True)):
                run.roll_back(run, fault)
    return run.state.step == run.total_steps and not is_cut_short


def _evaluated(run: Trainer) -> bool:
    """Measure what is due; false if a request to stop came in between."""
    try:
        run.evaluate(run)
    except Interrupted:
        return False
    return True


def _fault(run: Trainer) -> str | None:
    """Why the run cannot go on from here, by what has been read from the device so far."""
    skipped = run.state.skipped_in_a_row
    if skipped > run.config.train.max_skipped_steps:
        return f"{skipped} steps in a row had a loss or gradient that is not finite"
    return None


def _save(run: Trainer, is_end: bool) -> str | None:
    """Save, or say why the run cannot go on from here.

    While steps are being skipped only an end is saved: the checkpoint before may be the one to return to, which later
    ones must not push out.
    """
    run.log.settle(run.state)
    if fault := _fault(run):
        return fault
    is_wanted = is_end or not run.state.skipped_in_a_row
    return "the weights are not finite" if is_wanted and not run.save(run) else None
