"""Optimisers, parameter groups and learning-rate schedules, and the tables that look them up by name.

An optimiser is a function ``(model, config, *, options...) -> torch.optim.Optimizer``. It forms its own parameter
groups (see :func:`parameter_groups`), because some optimisers treat matrices, embeddings and vectors differently. The
learning rate of each is that of its tower. A
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
from focalclip.config import OptimConfig, TowerOptimConfig
from focalclip.models.clip import FocalCLIP
from focalclip.models.lock import TOWERS, depth_groups
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
    optimizer = build(model, config, **options)
    for group in optimizer.param_groups:  # one that takes all parameters takes those of locked towers too
        group["params"] = [p for p in group["params"] if p.requires_grad]
    _check_rates(optimizer, model, config)
    return optimizer


@dataclass(frozen=True)
class Part:
    """Parameters that are trained alike.

    Attributes:
        name: such as ``image``, ``image group 3`` or ``text projection``.
        parameters: by name, whole.
        lr: peak learning rate; 0 where they are locked.
        weight_decay: of them.
        is_locked: whether they stay as they are.
    """

    name: str
    parameters: dict[str, nn.Parameter]
    lr: float
    weight_decay: float
    is_locked: bool = False


def parts(model: nn.Module, config: OptimConfig) -> list[Part]:
    """All parameters of ``model`` by what they are trained with: tower, depth, and whether they decay.

    Matrices and kernels decay; biases, norms, layer scales and the logit scale (all 1-D) do not, as in the FocalNet
    authors' and in open_clip's training code. With ``layer_decay`` d, the groups 0 to L - 1 of a tower (see
    :func:`~focalclip.models.lock.depth_groups`) have the rate of its projection, ``lr``, times d^(L - i): timm's
    ``param_groups_layer_decay`` where the projection is the head.
    """
    places = _places(model)
    found: dict[tuple[Any, ...], dict[str, nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        tower, depth, below = places.get(name, ("", None, 0))
        own = getattr(config, tower) if tower else TowerOptimConfig()
        label = name if not tower else f"{tower} projection" if depth is None else tower
        lr = config.lr if own.lr is None else own.lr
        if not parameter.requires_grad:
            found.setdefault((label, 0.0, 0.0, True), {})[name] = parameter
            continue
        if own.layer_decay is not None and depth is not None:
            label, lr = f"{tower} group {depth}", lr * own.layer_decay ** (below - depth)
        decay = config.weight_decay if own.weight_decay is None else own.weight_decay
        found.setdefault((label, lr, decay if parameter.ndim > 1 else 0.0, False), {})[name] = parameter
    return [Part(label, parameters, *rest) for (label, *rest), parameters in found.items()]


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict]:
    """The trained :func:`parts`, those that decay first; parts with the same ``lr`` and ``weight_decay`` are one group.

    So there are two groups where no tower has settings of its own.
    """
    trained = [part for part in parts(model, config) if not part.is_locked]
    rates = {name: part for part in trained for name in part.parameters}
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups: dict[tuple[float, float, bool], list[nn.Parameter]] = {}
    for name, parameter in sorted(named, key=lambda item: item[1].ndim <= 1):
        groups.setdefault((rates[name].lr, rates[name].weight_decay, parameter.ndim <= 1), []).append(parameter)
    return [{"params": found, "lr": lr, "weight_decay": decay} for (lr, decay, _), found in groups.items()]


def _places(model: Any) -> dict[str, tuple[str, int | None, int]]:
    """Tower of each parameter, its depth (None: behind the groups), and how many groups the tower has."""
    if not isinstance(model, FocalCLIP):
        return {}
    places: dict[str, tuple[str, int | None, int]] = {}
    for tower, prefix in TOWERS.items():
        groups = depth_groups(model, tower)
        whole = prefix.split(".")[0] + "."  # with the projection
        places |= {name: (tower, None, 0) for name, _ in model.named_parameters() if name.startswith(whole)}
        places |= {f"{prefix}{name}": (tower, i, len(groups)) for i, group in enumerate(groups) for name in group}
    return places


def _check_rates(optimizer: torch.optim.Optimizer, model: nn.Module, config: OptimConfig) -> None:
    """Raise UserError unless each tower has the learning rate that its section says."""
    found = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for part in parts(model, config):
        if not part.is_locked and any(found.get(id(p)) != part.lr for p in part.parameters.values()):
            if config.image == config.text == TowerOptimConfig():
                return  # an optimiser may have rates of its own for some matrices
            raise UserError(
                f"optim.name={config.name}: it does not train {part.name} at lr={part.lr:g}, as optim.image and "
                "optim.text say; leave them out, or choose another optimiser"
            )


def adamw(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW in one fused kernel (as quick as DeepSpeed's own on a CPU, and nothing to compile)."""
    groups = parameter_groups(model, config)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def table(model: nn.Module, config: OptimConfig) -> str:
    """The :func:`parts` as lines: name, tensors, parameters, peak learning rate, weight decay, locked or not."""
    rows: list[tuple[str, ...]] = [("parameters", "tensors", "numbers", "lr", "weight decay", "")]
    for part in parts(model, config):
        numbers = f"{sum(p.numel() for p in part.parameters.values()):,}"
        rates = ("-", "-", "locked") if part.is_locked else (f"{part.lr:.4g}", f"{part.weight_decay:.4g}", "")
        rows.append((part.name, str(len(part.parameters)), numbers, *rates))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for name, *numbers, note in rows:
        cells = [name.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(numbers, widths[1:-1], strict=True))]
        lines.append("  ".join([*cells, note]).rstrip())
    return "\n".join(lines)


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
