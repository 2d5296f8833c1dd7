"""Random draws inside a model: stochastic depth and dropout whose masks depend on the sample, not on who computes it.

A generator gives each process a stream, so masks would depend on the number of ranks, on the micro-batch and on all
that drew before. Here a mask is a function of (seed, step, global position of the sample, place in the model): a
counter-based generator, the finaliser of SplitMix64 (Steele, Lea and Flood 2014,
https://doi.org/10.1145/2660193.2660195) over these integers, equal on every device. :func:`sample_draws` sets the first
three; outside of it the modules draw from torch's generator, as everyone else's do.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_GOLDEN, _FIRST, _SECOND = (c - 2**64 for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))

_keys: Tensor | None = None  # of the samples in work, (b,); no thread's own, as a GPU's backward pass runs in another


@contextmanager
def sample_draws(seed: int, step: int, positions: Tensor) -> Iterator[None]:
    """Within this context, forward and backward passes over these samples draw by (seed, step, position).

    Args:
        seed: of the run.
        step: optimiser steps done.
        positions: global positions of the samples, int64 (b,), on the device of the model.
    """
    global _keys
    run = _mix(_mix(torch.tensor(seed, device=positions.device)) + step)
    _keys = _mix(_mix(run + positions))
    try:
        yield
    finally:
        _keys = None


def use_sample_draws(model: nn.Module) -> None:
    """Replace dropout and stochastic depth in ``model``, also those of timm and transformers, by the modules below.

    None of them has parameters, so names and weights stay. Each gets its place in the model, in the order of names.
    """
    for module in list(model.modules()):
        for name, child in module.named_children():
            rate: Any = getattr(child, "drop_prob", None)
            if type(child) is nn.Dropout:
                setattr(module, name, Dropout(child.p))
            elif type(child).__name__.endswith("DropPath") and rate is not None:
                setattr(module, name, DropPath(rate))
    for place, module in enumerate(m for m in model.modules() if isinstance(m, Dropout | DropPath)):
        module.place = place


class DropPath(nn.Module):
    """Stochastic depth: drop a residual branch for whole samples (https://arxiv.org/abs/1603.09382, section 3)."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate, self.place = rate, 0

    def forward(self, x: Tensor) -> Tensor:
        """While training, zero each sample with probability ``rate`` and scale the others by 1 / (1 - rate)."""
        if not self.training or self.rate == 0:
            return x
        shape = (x.shape[0],) + (1,) * (x.ndim - 1)
        return _drop(x, shape, self.rate, self.place)

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        return f"rate={self.rate:g}"


class Dropout(nn.Module):
    """``nn.Dropout`` of inputs whose first dimension is samples."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p, self.place = p, 0

    def forward(self, x: Tensor) -> Tensor:
        """While training, zero each element with probability ``p`` and scale the others by 1 / (1 - p)."""
        if not self.training or self.p == 0:
            return x
        return dropout(x, self.p, self.place)

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        return f"p={self.p:g}"


def dropout(x: Tensor, p: float, place: int) -> Tensor:
    """Zero each element of ``x``, whose first dimension is samples, with probability ``p``; scale the others.

    Args:
        x: (B, ...).
        p: probability, below 1.
        place: in the model; two places have different masks.
    """
    return _drop(x, x.shape, p, place)


def _drop(x: Tensor, shape: tuple[int, ...], rate: float, place: int) -> Tensor:
    """Zero parts of ``x``, which broadcast from ``shape``, with probability ``rate``; scale the others."""
    return x * (_kept(x, shape, rate, place) / (1 - rate))


def _kept(x: Tensor, shape: tuple[int, ...], rate: float, place: int) -> Tensor:
    """1 with probability 1 - ``rate``, else 0, in the dtype of ``x``.

    Where a tower folds parts of pictures into the first dimension (windows), those of one sample lie together.
    """
    if _keys is None or x.shape[0] % len(_keys):
        return x.new_empty(shape).bernoulli_(1 - rate)
    keys = _mix(_keys.to(x.device) + place)[:, None]
    count = torch.Size(shape).numel() // len(_keys)
    words = _mix(keys + torch.arange(count, device=x.device) * _GOLDEN)
    return (((words >> 40) & 0xFFFFFF) >= round(rate * 2**24)).to(x.dtype).reshape(shape)


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser, over int64 that wraps around."""
    x = x + _GOLDEN
    x = (x ^ ((x >> 30) & (2**34 - 1))) * _FIRST
    x = (x ^ ((x >> 27) & (2**37 - 1))) * _SECOND
    return x ^ ((x >> 31) & (2**33 - 1))
