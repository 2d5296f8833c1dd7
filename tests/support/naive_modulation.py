"""Focal modulation and its ablations as loops over positions, levels and kernel taps, from a module's weights alone."""

import math

import torch
from torch import Tensor, nn


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def affine(layer: nn.Linear, x: Tensor) -> Tensor:
    """A linear map, position by position, of (H, W, C)."""
    rows = [torch.stack([layer.weight @ position + layer.bias for position in row]) for row in x]
    return torch.stack(rows)


def window(x: Tensor, i: int, j: int, radius: int) -> list[tuple[int, int]]:
    """Offsets from position (i, j) that lie within ``radius`` and inside the map."""
    height, width = x.shape[:2]
    steps = range(-radius, radius + 1)
    return [(di, dj) for di in steps for dj in steps if 0 <= i + di < height and 0 <= j + dj < width]


def naive_convolution(x: Tensor, kernel: Tensor) -> Tensor:
    """Depthwise, zeros outside: ``x`` (H, W, C), ``kernel`` (C, k, k)."""
    radius, new = kernel.shape[-1] // 2, torch.zeros_like(x)
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            for di, dj in window(x, i, j, radius):
                new[i, j] += kernel[:, di + radius, dj + radius] * x[i + di, j + dj]
    return new


def naive_pooling(x: Tensor, size: int) -> Tensor:
    """The mean over the positions of the window that lie inside the map."""
    new = torch.zeros_like(x)
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            inside = window(x, i, j, size // 2)
            new[i, j] = sum(x[i + di, j + dj] for di, dj in inside) / len(inside)
    return new


def naive_modulation(
    module: nn.Module,
    x: Tensor,
    *,
    gated: list[int | None],
    divisor: int = 1,
    pools: tuple[int, ...] = (),
    add: bool = False,
) -> Tensor:
    """One sample (H, W, C).

    Args:
        module: where the weights are.
        x: the sample.
        gated: of each context Z^1 to Z^{L+1}, the number of its gate; -1: weight 1; None: it is left out.
        divisor: of the sum of contexts.
        pools: window sizes of average pooling in place of the convolutions.
        add: the context is added to the query, not multiplied.
    """
    dim = x.shape[-1]
    mixed = affine(module.f, x)
    q, context, gates = mixed[..., :dim], mixed[..., dim : 2 * dim], mixed[..., 2 * dim :]
    contexts = []
    levels = pools or [layer[0].weight[:, 0] for layer in module.focal_layers]
    for level in levels:
        context = gelu(naive_pooling(context, level) if pools else naive_convolution(context, level))
        contexts.append(context)
    height, width = x.shape[:2]
    contexts.append(gelu(sum(context[i, j] for i in range(height) for j in range(width)) / (height * width)))
    total = torch.zeros_like(x)
    for z, gate in zip(contexts, gated, strict=True):
        if gate is not None:
            total = total + (z if gate == -1 else z * gates[..., gate, None])
    modulator = affine(module.h, total / divisor)
    product = q + modulator if add else q * modulator
    if isinstance(module.norm, nn.LayerNorm):
        mean, var = product.mean(-1, keepdim=True), product.var(-1, keepdim=True, unbiased=False)
        product = (product - mean) / (var + 1e-5).sqrt() * module.norm.weight + module.norm.bias
    return affine(module.proj, product)
