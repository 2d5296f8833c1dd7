"""Optimisers, parameter groups and learning-rate schedules, and the tables that look them up by name.

An optimiser is a function ``(model, config, *, options...) -> torch.optim.Optimizer``. It forms its own parameter
groups (see :func:`parameter_groups`), because some optimisers treat matrices, embeddings and vectors differently. A
schedule is a function ``(progress, floor, *, options...) -> float``: the learning rate over the peak after the warm-up,
at ``progress`` from 0 to 1, where ``floor`` is ``min_lr`` over the peak. ``optim.options`` and
``optim.schedule_options`` set their keyword-only parameters. docs/extending.md adds one of each as complete examples.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from focalclip.base.errors import UserError
from focalclip.base.strict import nearest, options_of
from focalclip.config import OptimConfig
from focalclip.names import find


@dataclass(frozen=True)
class OptimizerEntry:
    """How an optimiser is built.

    Attributes:
        build: ``module:function``, see the top of this file.
        ignores: settings of ``optim`` that it does not use; to change one is an error.
    """

    build: str
    ignores: tuple[str, ...] = ()


OPTIMIZERS = {
    "adamw": OptimizerEntry("focalclip.training.optim:adamw"),
}

SCHEDULES = {
    "cosine": "focalclip.training.optim:cosine",
}


def check(config: OptimConfig) -> None:
    """Refuse unknown names, unknown options and settings without effect before anything is built.

    Raises:
        UserError: naming the setting and the remedy.
    """
    _optimizer(config)
    _schedule(config)


def create_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """The optimiser that ``config`` names, over the trainable parameters of ``model``.

    Raises:
        UserError: as :func:`check` does.
    """
    build, options = _optimizer(config)
    return build(model, config, **options)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups: matrices and kernels decay; biases, norms, layer scales and the logit scale (all 1-D) do not.

    The groups of the FocalNet authors' and of open_clip's training code.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def adamw(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW in one fused kernel (as quick as DeepSpeed's own on a CPU, and nothing to compile)."""
    groups = parameter_groups(model, config.weight_decay)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def create_schedule(config: OptimConfig, total_steps: int) -> Callable[[int], float]:
    """Learning rate over the peak by 0-based step: linear warm-up, then the schedule that ``config`` names.

    Raises:
        UserError: as :func:`check` does.
    """
    schedule, options = _schedule(config)
    floor, warmup = config.min_lr / config.lr, config.warmup(total_steps)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = (step - warmup) / max(1, total_steps - 1 - warmup)
        return schedule(min(1.0, progress), floor, **options)

    return factor


def cosine(progress: float, floor: float) -> float:
    """Half a period of a cosine, from 1 to ``floor``."""
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def _optimizer(config: OptimConfig) -> tuple[Any, dict[str, Any]]:
    """The function that builds the optimiser, and its options."""
    entry = OPTIMIZERS.get(config.name)
    if entry is None:
        raise UserError(f"optim.name: {config.name} is not an optimiser{nearest(config.name, OPTIMIZERS)}")
    try:
        config.refuse_ignored(f"optim.name={config.name}", *entry.ignores)
    except ValueError as error:
        raise UserError(f"optim: {error}") from None
    build = find(entry.build)
    return build, options_of(build, config.options, "optim.options")


def _schedule(config: OptimConfig) -> tuple[Any, dict[str, Any]]:
    """The schedule's function, and its options."""
    if config.schedule not in SCHEDULES:
        raise UserError(f"optim.schedule: {config.schedule} is not a schedule{nearest(config.schedule, SCHEDULES)}")
    schedule = find(SCHEDULES[config.schedule])
    return schedule, options_of(schedule, config.schedule_options, "optim.schedule_options")
