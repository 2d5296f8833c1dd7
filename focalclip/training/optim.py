"""AdamW's parameter groups and the learning-rate schedule."""

import math

import torch
from torch import nn

from focalclip.config import OptimConfig


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups: matrices and kernels decay; biases, norms, layer scales and the temperature (all 1-D) do not.

    The groups of the FocalNet authors' and of open_clip's training code.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def create_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW in one fused kernel (as quick as DeepSpeed's own on a CPU, and nothing to compile)."""
    groups = parameter_groups(model, config.weight_decay)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def lr_factor(config: OptimConfig, step: int, total_steps: int) -> float:
    """Learning rate of 0-based ``step`` over the peak: linear warm-up, then a cosine that reaches ``min_lr``."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, total_steps - 1 - config.warmup_steps)
    floor = config.min_lr / config.lr
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
