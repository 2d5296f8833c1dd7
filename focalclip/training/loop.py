"""The training loop, on one page."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from focalclip.config import RunConfig
from focalclip.data.loader import TrainLoader
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


def train(run: Trainer) -> bool:
    """Train until ``total_steps`` are done or a stop is agreed; save in either case.

    A step whose gradient is not finite is skipped and counted; after ``train.max_skipped_steps`` in a row, or where the
    weights themselves are not finite, the run returns to its last checkpoint and goes on with the data that follow.

    Returns:
        Whether the run is finished.
    """
    run.engine.train()
    take_step = Stepper(run.engine, run.loss, run.config)
    batches = iter(run.loader)
    stopped = False
    while run.state.step < run.total_steps and not stopped:
        result = take_step(batches, run.state.step)
        run.state.step += 1
        run.state.samples += run.config.data.batch_size
        run.log.step(run.state, result)
        stopped = run.stop.agreed()
        is_end = stopped or run.state.step == run.total_steps
        is_saving = is_end or run.state.step % run.config.train.save_every == 0
        if is_saving:
            run.log.settle(run.state)
        if run.state.skipped_in_a_row > run.config.train.max_skipped_steps:
            run.roll_back(run, f"{run.state.skipped_in_a_row} steps in a row had a loss or gradient that is not finite")
        elif is_saving and run.state.skipped_in_a_row and not is_end:
            pass  # the checkpoint before may be the one to return to: later ones must not push it out
        elif is_saving and not run.save(run):
            run.roll_back(run, "the weights are not finite")
        elif _is_evaluation_due(run) and not stopped:
            run.evaluate(run)
    return run.state.step == run.total_steps


def _is_evaluation_due(run: Trainer) -> bool:
    """Not after the last step: the whole benchmark follows it."""
    every = run.config.eval.every
    return every is not None and run.state.step % every == 0 and run.state.step < run.total_steps
