"""Depthwise convolution, by another way where PyTorch's is slow on CPUs."""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F


class DepthwiseConv(nn.Conv2d):
    """Depthwise convolution of odd size that keeps height and width.

    Args:
        dim: channels C.
        kernel_size: k, odd.
        bias: add one number per channel.
    """

    def __init__(self, dim: int, kernel_size: int, *, bias: bool = True) -> None:
        super().__init__(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim, bias=bias)

    def forward(self, input: Tensor) -> Tensor:
        """Any (B, C, H, W) to the same shape and dtype."""
        return _depthwise(input, self.weight, self.bias)


@fx.wrap
def _depthwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The convolution; what it decides by the input's place and size stays one node of a traced graph."""
    padding = weight.shape[-1] // 2
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.conv2d(x, weight, bias, padding=padding, groups=len(weight))
    # In 32 bits at least: on CPUs the bf16 backward pass of 5x5 kernels takes 15 times as long (torch 2.15).
    dtype = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast("cpu", enabled=False):
        wide = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        if _is_slow(weight.shape[-1], *x.shape[-2:]):
            return _tap_by_tap(*wide).to(x.dtype)
        return F.conv2d(*wide, padding=padding, groups=len(weight)).to(x.dtype)


def _is_slow(kernel_size: int, height: int, width: int) -> bool:
    """Whether oneDNN has no quick backward pass for such a map (torch 2.15: 2 to 10 times that of the way below)."""
    return max(height, width) <= (2 if kernel_size == 3 else 4)


def _tap_by_tap(x: Tensor, kernels: Tensor, bias: Tensor | None) -> Tensor:
    """Depthwise convolution of tiny maps, one position after another; returns (B, C, H, W), channels last.

    Args:
        x: (B, C, H, W).
        kernels: (C, 1, k, k), k odd; positions outside of the map count as zero.
        bias: (C,) or None.
    """
    batch, dim, height, width = x.shape
    taps = F.pad(kernels.flatten(1), (0, 1))  # the last one, zero, is what positions further apart than k have
    numbers = torch.from_numpy(_tap_numbers(height, width, kernels.shape[-1]))
    weights = taps[:, numbers].permute(1, 2, 0).contiguous()  # from, to, C
    positions = x.permute(2, 3, 0, 1).flatten(0, 1)[:, :, None]  # from, B, 1, C
    out = positions[0] * weights[0]
    for position, weight in zip(positions[1:], weights[1:], strict=True):
        out = torch.addcmul(out, position, weight)
    out = out if bias is None else out + bias
    return out.view(batch, height, width, dim).permute(0, 3, 1, 2)


@lru_cache
def _tap_numbers(height: int, width: int, kernel_size: int) -> np.ndarray:
    """The tap of a kernel, row by row, that carries position p to position q: (H W, H W) for p, q.

    An array: a tensor kept from a call in inference mode could not be trained with later.
    """
    y, x = np.divmod(np.arange(height * width), width)
    dy, dx = (at[:, None] - at + kernel_size // 2 for at in (y, x))
    is_within = (dy >= 0) & (dy < kernel_size) & (dx >= 0) & (dx < kernel_size)
    return np.where(is_within, dy * kernel_size + dx, kernel_size**2)
