"""The training loop, on one page."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch

from focalclip.base.ranks import Interrupted, together
from focalclip.config import RunConfig
from focalclip.data.loader import Batch, TrainLoader
from focalclip.training.checkpoint import TrainState
from focalclip.training.engine import seed_step
from focalclip.training.log import TrainLog
from focalclip.training.step import Loss, micro_step
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
    save: Callable[["Trainer"], None]
    evaluate: Callable[["Trainer"], None]


def train(run: Trainer) -> bool:
    """Train until ``total_steps`` are done or a stop is agreed; save in either case.

    A loader that fails on one rank stops all; its fault stays in ``run.loader``.

    Returns:
        Whether the run is finished.
    """
    run.engine.train()
    with closing(iter(run.loader)) as batches:  # ends the loader's processes, also after an error
        first = together(lambda: [next(batches)] if run.state.step < run.total_steps else [])
        return _train(run, itertools.chain(first, batches))


def _train(run: Trainer, batches: Iterator[Batch]) -> bool:
    stopped = False
    while run.state.step < run.total_steps and not stopped:
        seed_step(run.config.seed, run.state.step)
        lr = run.engine.get_lr()[0]
        losses = []
        for _ in range(run.config.train.accumulation):
            batch = next(batches)
            for message in batch.faults:
                run.log.fault(message)
            loss, scale = micro_step(run.engine, batch, run.loss, run.config)
            losses.append(loss)
        run.state.step += 1
        run.state.samples += run.config.data.batch_size
        run.log.step(
            run.state,
            loss=torch.stack(losses).mean(),
            scale=scale,
            lr=lr,
            grad_norm=run.engine.get_global_grad_norm(),
        )
        stopped = run.stop.agreed()
        is_saved = stopped or run.state.step % run.config.train.save_every == 0 or run.state.step == run.total_steps
        if is_saved:
            _save(run)
        if _is_evaluation_due(run) and not stopped:
            try:
                run.evaluate(run)
            except Interrupted:
                stopped = True
                if not is_saved:
                    _save(run)
    return run.state.step == run.total_steps


def _save(run: Trainer) -> None:
    run.log.settle(run.state)
    run.save(run)


def _is_evaluation_due(run: Trainer) -> bool:
    """Not after the last step: the whole benchmark follows it."""
    every = run.config.eval.every
    return every is not None and run.state.step % every == 0 and run.state.step < run.total_steps
