"""A contrastive loss that goes wrong at chosen steps, and runs that train with it in this process."""

from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor

from focalclip.cli.pretrain import parse, training_shards
from focalclip.config import OptimConfig
from focalclip.losses import LOSSES
from focalclip.losses.contrastive import contrastive_loss
from focalclip.training import engine
from focalclip.training.optim import OPTIMIZERS, OptimizerEntry, parameter_groups
from focalclip.training.run import run_training
from focalclip.training.stop import StopRequest

calls, spikes, kind = 0, (), ""


class _NanGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * float("nan")


def spiky(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """Calls are counted from 1."""
    global calls
    calls += 1
    loss = contrastive_loss(image, text, scale)
    if calls in spikes:
        loss = {"gradient": _NanGradient.apply, "loss": lambda x: x + float("inf")}[kind](loss)
    return loss


def momentum(model: torch.nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """SGD, which has no kernel that skips a step."""
    return torch.optim.SGD(parameter_groups(model, config), lr=config.lr, momentum=0.9)


def train(argv: list[str], at: Collection[int], what: str = "gradient") -> str:
    """Train in this process; what is raised is returned as text."""
    global calls, spikes, kind
    calls, spikes, kind = 0, at, what
    LOSSES["spiky"] = "spiky_loss:spiky"
    OPTIMIZERS["momentum"] = OptimizerEntry("spiky_loss:momentum")
    config, resume = parse([*argv, "--loss.name", "spiky"])
    engine.set_up()
    try:
        with StopRequest(engine.device()) as stop:
            run_training(config, training_shards(config), resume, stop)
    except Exception as error:  # noqa: BLE001
        return f"{type(error).__name__}: {error}"
    return ""


def weights(run_dir: Path) -> dict[str, Tensor]:
    """The exported weights of a run."""
    from safetensors.torch import load_file

    return load_file(run_dir / "model" / "open_clip_model.safetensors")
