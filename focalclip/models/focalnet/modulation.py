"""Focal modulation, the operator that takes the place of self-attention (https://arxiv.org/abs/2203.11926, section 3).

Channels come last, so that every projection is a plain matrix product and the depthwise convolutions see, through a
permuted view, the channels-last layout that is the quickest on CPUs as well as GPUs.
"""

import operator
from collections.abc import Iterator
from functools import reduce
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from focalclip.models.focalnet.depthwise import DepthwiseConv


class ModulationParts(NamedTuple):
    """What focal modulation computes on its way, channels last."""

    q: Tensor
    """q(x), (B, H, W, C)."""
    contexts: tuple[Tensor, ...]
    """Z^1 to Z^{L+1}, (B, H, W, C) each and (B, 1, 1, C) the global one; empty unless asked for."""
    gates: Tensor
    """G, raw, (B, H, W, L + 1)."""
    modulator: Tensor
    """h(Z^out), (B, H, W, C)."""


class FocalModulation(nn.Module):
    """Each position is modulated by a gated sum of its surroundings at growing focal levels.

    In the paper's symbols, for input x and focal levels l = 1..L::

        q(x), Z^0, G = f(x)                                     one linear map (eq. 4)
        Z^l     = GELU(DWConv_{k_l}(Z^{l-1}))                   hierarchical contextualisation (eq. 4)
        Z^{L+1} = GELU(mean over positions of Z^L)              global level
        Z^out   = sum_{l=1..L+1} G^l * Z^l                      gated aggregation (eq. 5)
        y       = proj(q(x) * h(Z^out))                         modulation (eq. 6), then the output projection

    The gates G are raw outputs of ``f``, one number per position and level: no softmax, and they may be negative.

    Parameters are ``4 C^2 + C (L + 1) + C sum(k^2)`` weights and ``4 C + L + 1`` biases; the norm adds ``2 C``. Each
    position costs ``4 C^2 + C (L + 1) + C sum(k^2)`` multiply-adds in linear maps and convolutions. The paper has
    ``3 C^2 + C (2 L + 3) + C sum(k^2)``: without ``proj``, which the authors' code and every published weight have, and
    with the products by gates and q.

    Args:
        dim: channels C.
        num_levels: focal levels L (0: the global level alone).
        window: kernel size of the first level; level l has ``window + 2 l``, l = 0..L-1.
        use_norm: LayerNorm on q * h(Z), before ``proj``.
        normalize: divide Z^out by L + 1.
        dropout: rate after ``proj``.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_levels: int,
        window: int = 3,
        use_norm: bool = False,
        normalize: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.split_sizes = [dim, dim, num_levels + 1]
        self.divisor = num_levels + 1 if normalize else 1
        self.kernel_sizes = [window + 2 * level for level in range(num_levels)]
        self.f = nn.Linear(dim, sum(self.split_sizes))
        self.focal_layers = nn.ModuleList(_focal_level(dim, kernel_size) for kernel_size in self.kernel_sizes)
        self.h = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim) if use_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Modulate ``x`` (B, H, W, C); the result has its shape."""
        parts = self.parts(x)
        return self.dropout(self.proj(self.norm(self.modulate(parts.q, parts.modulator))))

    def parts(self, x: Tensor, *, keep_contexts: bool = False) -> ModulationParts:
        """The terms of the equations above for ``x`` (B, H, W, C).

        Args:
            x: input of the operator.
            keep_contexts: return the contexts too; without, each is released as soon as it has been added.
        """
        q, context, gates = self.f(x).split(self.split_sizes, dim=-1)  # the paper's q(x), Z^0, G
        contexts = self.contexts(context)
        kept = tuple(contexts) if keep_contexts else ()
        modulator = self.h(self.aggregate(iter(kept) if keep_contexts else contexts, gates / self.divisor))
        return ModulationParts(q, kept, gates, modulator)

    def contexts(self, context: Tensor) -> Iterator[Tensor]:
        """Z^1 to Z^{L+1} from Z^0, (B, H, W, C) each and (B, 1, 1, C) the last."""
        context = context.permute(0, 3, 1, 2)  # a channels-last view: nothing is copied
        for focal_layer in self.focal_layers:
            context = focal_layer(context)
            yield context.permute(0, 2, 3, 1)
        yield F.gelu(context.mean((2, 3)))[:, None, None]

    def aggregate(self, contexts: Iterator[Tensor], gates: Tensor) -> Tensor:
        """Z^out, the sum of the contexts weighted by their gates (B, H, W, L + 1)."""
        parts = gates.split(1, dim=-1)  # taken by number: a traced tensor has no length
        weighted = (context * parts[level] for level, context in enumerate(contexts))
        return reduce(operator.add, weighted)

    def modulate(self, q: Tensor, modulator: Tensor) -> Tensor:
        """What the context does to the query."""
        return q * modulator


def _focal_level(dim: int, kernel_size: int) -> nn.Sequential:
    """Depthwise convolution (no bias) and GELU; a Sequential because published weights call the kernel ``0.weight``."""
    return nn.Sequential(DepthwiseConv(dim, kernel_size, bias=False), nn.GELU())
