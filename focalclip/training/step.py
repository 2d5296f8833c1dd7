"""One optimiser step: forward, loss and backward of each micro-batch, then the optimiser if the gradient is finite."""

import inspect
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from focalclip.base.errors import SharedError, UserError
from focalclip.base.strict import nearest, options_of
from focalclip.config import LossConfig, RunConfig, TowerOptimConfig
from focalclip.data.loader import Batch
from focalclip.data.samples import Ignored
from focalclip.losses import LOSSES
from focalclip.models.draws import sample_draws
from focalclip.models.preprocess import normalize
from focalclip.names import find
from focalclip.training.engine import device, finish_step, input_dtype, running_statistics, seed_step

Loss = Callable[..., Tensor]
"""From the model's outputs by name, the labels (b,) and the identities of the pairs (b,), which may be left out, to the
0-dim loss of the global batch."""

_PASSED = ("labels", "ids", "group")  # keyword-only parameters of a loss that are not options


def create_loss(config: LossConfig, outputs: Collection[str]) -> Loss:
    """The loss that ``config`` names, bound to its options and to the outputs that its signature asks for.

    Args:
        config: name and options.
        outputs: names of the model's outputs.

    Raises:
        UserError: if there is no such loss, an option does not suit it, or it needs an output that the model lacks.
    """
    if config.name not in LOSSES:
        raise UserError(f"loss.name: {config.name} is not a loss{nearest(config.name, LOSSES)}")
    function = find(LOSSES[config.name])
    options = options_of(function, config.options, "loss.options", reserved=_PASSED)
    parameters = inspect.signature(function).parameters
    inputs = [name for name, parameter in parameters.items() if parameter.kind is not parameter.KEYWORD_ONLY]
    missing = [name for name in inputs if name not in outputs]
    if missing:
        raise UserError(
            f"loss.name: {config.name} needs {', '.join(missing)}, which the model does not return (it returns "
            f"{', '.join(outputs)}); choose another loss or another model"
        )

    def loss(named: dict[str, Tensor], labels: Tensor, ids: Tensor | None = None) -> Tensor:
        known = {"labels": labels, "ids": ids}
        passed = {name: value for name, value in known.items() if name in parameters}
        return function(**{name: named[name] for name in inputs}, **passed, **options)

    return loss


@dataclass(frozen=True)
class StepResult:
    """What one step has done; tensors are detached and on the device."""

    loss: Tensor
    """0-dim: mean over the micro-batches."""
    scale: Tensor
    """[1]: of the cosines."""
    lr: float
    grad_norm: Tensor
    """0-dim: norm of the whole gradient before clipping; not finite where the step was skipped."""
    faults: list[str]
    """Broken samples that were replaced on this rank."""
    ignored: list[Ignored]
    """Parts of this rank's samples that were left out of them."""


class Stepper:
    """Takes optimiser steps; one whose loss or gradient is not finite changes nothing, running statistics included.

    Args:
        engine: DeepSpeed's.
        loss: see :func:`create_loss`.
        config: of the run.
    """

    def __init__(self, engine: Any, loss: Loss, config: RunConfig) -> None:
        self._engine, self._loss, self._config = engine, loss, config
        self._statistics = running_statistics(engine.module)

    def __call__(self, batches: Iterator[Batch], step: int) -> StepResult:
        """Take step number ``step``, counted from 0, with the next micro-batches; all ranks call this together.

        Raises:
            SharedError: if no loss scale is left at which fp16 holds the gradient.
        """
        lr = self._engine.get_lr()[0]
        optim = self._config.optim
        if not optim.image == optim.text == TowerOptimConfig():  # the first group may have a rate of its own
            lr *= optim.lr / self._engine.lr_scheduler.base_lrs[0]
        before = [x.clone() for x in self._statistics]
        losses, scale, faults, ignored = [], None, [], []
        seed_step(self._config.seed, step)
        for _ in range(self._config.train.accumulation):
            batch = next(batches)
            faults += batch.faults
            ignored += batch.ignored
            self._announce(batch)
            with sample_draws(self._config.seed, step, batch.positions.to(device())):
                loss, scale = micro_step(self._engine, batch, self._loss, self._config)
            losses.append(loss)
        assert scale is not None
        grad_norm = finish_step(self._engine)
        was_applied = grad_norm.isfinite()
        for now, then in zip(self._statistics, before, strict=True):
            now.copy_(torch.where(was_applied, now, then))
        return StepResult(torch.stack(losses).mean(), scale, lr, grad_norm, faults, ignored)

    def _announce(self, batch: Batch) -> None:
        """Tell the caches of locked towers which inputs are next."""
        model = self._engine.module
        for cache, rows in ((model.visual.cache, batch.images), (model.text_cache, batch.tokens)):
            if cache is not None:
                cache.announce(rows)


def micro_step(engine: Any, batch: Batch, loss: Loss, config: RunConfig) -> tuple[Tensor, Tensor]:
    """Forward, loss over the global micro-batch, backward, the optimiser where due.

    Returns:
        Loss (0-dim) and scale of the cosines ([1]), both detached.

    Raises:
        SharedError: if no loss scale is left at which fp16 holds the gradient.
    """
    image_config = config.model.image
    images = normalize(batch.images.to(device()), image_config.mean, image_config.std, input_dtype(config))
    outputs = engine(images, batch.tokens.to(device()))
    value = loss(outputs, batch.labels.to(device()), batch.ids.to(device()))
    # times 1, or NaN where the loss is not finite: its gradient may be finite and must be skipped, too
    engine.backward(value * (1 + 0 * value.detach()))
    try:
        engine.step()
    except Exception as error:
        if "loss scale already at minimum" not in str(error):
            raise
        raise SharedError(
            "train.precision=fp16: the gradient overflows at every loss scale; use bf16, or a lower optim.lr"
        ) from None
    return value.detach(), outputs["scale"].detach()
