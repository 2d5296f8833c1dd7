"""Focal modulation with one thing changed: the ablations of the paper's tables 12 to 14, at the same widths.

Parameters and multiply-adds follow :class:`~focalclip.models.focalnet.modulation.FocalModulation`'s formulas with
the number of gates and the kernels that each class names: ``4 C^2 + C gates + C sum(k^2)`` weights, ``4 C + gates``
biases.
"""

import operator
from collections.abc import Iterator
from functools import reduce
from typing import Any

from torch import Tensor, nn

from focalclip.models.focalnet.modulation import FocalModulation


class Additive(FocalModulation):
    """y = proj(q + h(Z^out)): the context is added to the query (table 13). L + 1 gates, L kernels."""

    def modulate(self, q: Tensor, modulator: Tensor) -> Tensor:
        """The sum."""
        return q + modulator


class _OtherGates(FocalModulation):
    """Focal modulation whose ``f`` has another number of gates than L + 1."""

    def __init__(self, dim: int, *, num_gates: int, normalize: bool, num_contexts: int, **options: Any) -> None:
        super().__init__(dim, normalize=normalize, **options)
        self.split_sizes = [dim, dim, num_gates]
        self.divisor = num_contexts if normalize else 1
        self.f = nn.Linear(dim, sum(self.split_sizes))


class NoGlobal(_OtherGates):
    """Z^out without the global level (table 13, "no global pool"). L gates, L kernels."""

    def __init__(self, dim: int, *, num_levels: int, **options: Any) -> None:
        super().__init__(dim, num_gates=num_levels, num_contexts=num_levels, num_levels=num_levels, **options)

    def contexts(self, context: Tensor) -> Iterator[Tensor]:
        """Z^1 to Z^L."""
        *local, _ = super().contexts(context)
        return iter(local)


class LastLevel(_OtherGates):
    """Z^out = G^L * Z^L, the widest local level alone (table 13, "top level only"). 1 gate, L kernels.

    The paper's table does not say whether its top level is this one or the global one, nor whether it is gated.
    """

    def __init__(self, dim: int, **options: Any) -> None:
        super().__init__(dim, num_gates=1, num_contexts=1, **options)

    def contexts(self, context: Tensor) -> Iterator[Tensor]:
        """Z^L."""
        *_, last, _ = super().contexts(context)
        return iter([last])


class NoGates(_OtherGates):
    """Z^out = Z^1 + ... + Z^{L+1} (table 13, "no gating"). No gates, L kernels."""

    def __init__(self, dim: int, *, num_levels: int, **options: Any) -> None:
        super().__init__(dim, num_gates=0, num_contexts=num_levels + 1, num_levels=num_levels, **options)

    def aggregate(self, contexts: Iterator[Tensor], gates: Tensor) -> Tensor:  # noqa: ARG002 - there are none
        """The plain sum, or mean if normalised."""
        return reduce(operator.add, contexts) / self.divisor


class SingleLevel(FocalModulation):
    """One level as wide as the L levels together, kernel 1 + sum(k_l - 1) (table 14, "1 (13)"). 2 gates, 1 kernel."""

    def __init__(self, dim: int, *, num_levels: int, window: int, **options: Any) -> None:
        receptive_field = 1 + sum(window + 2 * level - 1 for level in range(num_levels))
        super().__init__(dim, num_levels=1, window=receptive_field, **options)


class Pooling(FocalModulation):
    """Average pooling over the same windows for convolutions (table 12, "pooling aggregator"). L + 1 gates, no kernel.

    The paper does not give its windows. Padding is not counted into the averages; the GELU of each level stays.
    """

    def __init__(self, dim: int, **options: Any) -> None:
        super().__init__(dim, **options)
        self.focal_layers = nn.ModuleList(
            nn.Sequential(nn.AvgPool2d(k, stride=1, padding=k // 2, count_include_pad=False), nn.GELU())
            for k in self.kernel_sizes
        )
        self.kernel_sizes = []


class SqueezeExcitation(FocalModulation):
    """L = 0, the gated global mean alone modulates (table 12, "global pooling aggregator"). 1 gate, no kernel."""

    def __init__(self, dim: int, *, num_levels: int, window: int, **options: Any) -> None:  # noqa: ARG002 - it has none
        super().__init__(dim, num_levels=0, **options)
