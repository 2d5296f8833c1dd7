"""What mixes positions in a block: focal modulation, its ablations (the paper's tables 12 to 14) and its rivals.

A mixer is a module from (B, H, W, C) to the same shape. Beside its code stand two formulas, ``expected_parameters()``
and ``expected_multiply_adds(height, width)`` of one picture, in linear maps, convolutions and attention; tests count
both in the built module.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from focalclip.models.focalnet.ablations import (
    Additive,
    LastLevel,
    NoGates,
    NoGlobal,
    Pooling,
    SingleLevel,
    SqueezeExcitation,
)
from focalclip.models.focalnet.modulation import FocalModulation
from focalclip.models.focalnet.rivals import (
    DepthwiseConvolution,
    FocalAttention,
    GlobalAttention,
    PoolFormerPooling,
    WindowAttention,
)


@dataclass(frozen=True)
class Place:
    """All that a mixer may depend on."""

    dim: int
    """Channels C."""
    block: int = 0
    """Index of the block in its stage."""
    num_levels: int = 2
    """Focal levels L without the global one."""
    window: int = 3
    """Kernel size of the first focal level."""
    use_norm: bool = False
    normalize: bool = False
    dropout: float = 0.0


def _focal(mixer: type[FocalModulation]) -> Callable[[Place], Any]:
    return lambda place: mixer(
        place.dim,
        num_levels=place.num_levels,
        window=place.window,
        use_norm=place.use_norm,
        normalize=place.normalize,
        dropout=place.dropout,
    )


FOCAL: dict[str, Callable[[Place], Any]] = {
    "focal_modulation": _focal(FocalModulation),
    "additive": _focal(Additive),
    "no_global": _focal(NoGlobal),
    "last_level": _focal(LastLevel),
    "no_gates": _focal(NoGates),
    "single_level": _focal(SingleLevel),
    "pooling": _focal(Pooling),
    "squeeze_excitation": _focal(SqueezeExcitation),
}

MIXERS: dict[str, Callable[[Place], Any]] = {
    **FOCAL,
    "poolformer": lambda place: PoolFormerPooling(),  # noqa: ARG005 - it has neither weights nor channels
    "depthwise_convolution": lambda place: DepthwiseConvolution(place.dim, dropout=place.dropout),
    "window_attention": lambda place: WindowAttention(place.dim, is_shifted=False, dropout=place.dropout),
    "shifted_window_attention": lambda place: WindowAttention(
        place.dim, is_shifted=place.block % 2 == 1, dropout=place.dropout
    ),
    "global_attention": lambda place: GlobalAttention(place.dim, dropout=place.dropout),
    "focal_attention": lambda place: FocalAttention(place.dim, dropout=place.dropout),
}

NEED_LEVELS = ("no_global", "last_level", "no_gates", "single_level")


def build_mixer(name: str, place: Place) -> Any:
    """The mixer of this name, with fresh weights."""
    return MIXERS[name](place)
