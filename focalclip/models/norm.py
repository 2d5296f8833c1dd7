"""Batch normalisation over the global batch, on any device and number of ranks."""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from focalclip.base.ranks import world_size
from focalclip.losses.exchange import sum_with_grad


class GlobalBatchNorm(nn.Module):
    """Normalise each of C features by its mean and variance over the batch of all ranks, without learned scale.

    The pooled features of a narrow, freshly initialised tower all point in nearly the same direction; a contrastive
    loss cannot tell pictures apart until that common part is gone. torch's ``SyncBatchNorm`` needs a GPU, and plain
    ``BatchNorm1d`` would keep other statistics on every rank. As a linear projection follows, :func:`fold_into` removes
    the layer at export without changing the output.

    Attributes:
        running_mean, running_var: (C,) float32 statistics used in evaluation, equal on every rank.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, num_features: int, *, momentum: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (b, C) in float32; returns (b, C) in the dtype of ``x``."""
        if not self.training:
            mean, var = self.running_mean, self.running_var
            return ((x.float() - mean) * torch.rsqrt(var + self.eps)).to(x.dtype)
        features = x.float()
        n = x.shape[0] * world_size()
        mean = sum_with_grad(features.sum(0)) / n
        centred = features - mean
        var = sum_with_grad(centred.square().sum(0)) / n
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * (n / max(n - 1, 1)), self.momentum)
        return (centred * torch.rsqrt(var + self.eps)).to(x.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Self:
        super()._apply(fn, *args, **kwargs)
        # Engines cast whole modules to 16 bits, in which a running average with momentum 0.1 stops moving.
        self.running_mean, self.running_var = self.running_mean.float(), self.running_var.float()
        return self


@torch.no_grad()
def unfold_from(weight: Tensor, bias: Tensor, norm: GlobalBatchNorm) -> tuple[Tensor, Tensor]:
    """The reverse of :func:`fold_into`: weight (D, C) and bias (D,) of the projection behind ``norm``."""
    return weight * torch.sqrt(norm.running_var + norm.eps), bias + weight @ norm.running_mean


@torch.no_grad()
def fold_into(norm: GlobalBatchNorm, projection: nn.Linear) -> tuple[Tensor, Tensor]:
    """Weight (D, C) and bias (D,) of the one linear layer that equals evaluation-mode ``norm`` then ``projection``."""
    scale = torch.rsqrt(norm.running_var + norm.eps)
    weight = projection.weight * scale
    return weight, projection.bias - weight @ norm.running_mean
