"""What mixes positions in a block: focal modulation, its ablations (the paper's tables 12 to 14) and its rivals.

A mixer is a module from (B, H, W, C) to the same shape. Its docstring gives its parameters and its multiply-adds per
position, in linear maps, convolutions and attention; tests count both in the built module.
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
class MixerSpec:
    """What a mixer is built from."""

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


def _focal(mixer: type[FocalModulation]) -> Callable[[MixerSpec], Any]:
    return lambda spec: mixer(
        spec.dim,
        num_levels=spec.num_levels,
        window=spec.window,
        use_norm=spec.use_norm,
        normalize=spec.normalize,
        dropout=spec.dropout,
    )


FOCAL: dict[str, Callable[[MixerSpec], Any]] = {
    "focal_modulation": _focal(FocalModulation),
    "additive": _focal(Additive),
    "no_global": _focal(NoGlobal),
    "last_level": _focal(LastLevel),
    "no_gates": _focal(NoGates),
    "single_level": _focal(SingleLevel),
    "pooling": _focal(Pooling),
    "squeeze_excitation": _focal(SqueezeExcitation),
}

MIXERS: dict[str, Callable[[MixerSpec], Any]] = {
    **FOCAL,
    "poolformer": lambda spec: PoolFormerPooling(),  # noqa: ARG005 - it has neither weights nor channels
    "depthwise_convolution": lambda spec: DepthwiseConvolution(spec.dim, dropout=spec.dropout),
    "window_attention": lambda spec: WindowAttention(spec.dim, is_shifted=False, dropout=spec.dropout),
    "shifted_window_attention": lambda spec: WindowAttention(
        spec.dim, is_shifted=spec.block % 2 == 1, dropout=spec.dropout
    ),
    "global_attention": lambda spec: GlobalAttention(spec.dim, dropout=spec.dropout),
    "focal_attention": lambda spec: FocalAttention(spec.dim, dropout=spec.dropout),
}

NEED_LEVELS = ("no_global", "last_level", "no_gates", "single_level")


def build_mixer(name: str, spec: MixerSpec) -> Any:
    """The mixer of this name, with fresh weights."""
    return MIXERS[name](spec)
