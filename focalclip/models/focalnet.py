"""FocalNet image tower (https://arxiv.org/abs/2203.11926).

Modules are named as in timm's ``focalnet``, so weights travel with the fewest renames. Differences: activations are
channels-last (B, H, W, C) inside, projections are ``nn.Linear`` instead of 1x1 convolutions, and there is no
classification head unless one is asked for.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from focalclip.errors import UserError
from focalclip.models.focal_modulation import FocalModulation

Init = Literal["official", "timm", "fan_in"]
# (kernel size, padding) of overlapping patch embeddings by stride: the authors' for 4 and 2.
OVERLAP = {4: (7, 2), 2: (3, 1)}


@dataclass(frozen=True)
class FocalNetConfig:
    """What decides a FocalNet.

    Raises:
        UserError: if a value is out of range or the per-stage tuples differ in length.
    """

    embed_dim: int = 96
    """Channels of the first stage; each later stage doubles them."""
    depths: tuple[int, ...] = (2, 2, 6, 2)
    """Blocks per stage."""
    focal_levels: int | tuple[int, ...] = 2
    """Focal levels L without the global one; one number for all stages or one per stage."""
    focal_windows: int | tuple[int, ...] = 3
    """Kernel size of the first focal level (odd); one number for all stages or one per stage."""
    mlp_ratio: float = 4.0
    patch_size: int = 4
    """Stride of the stem in pixels: 4 in the hierarchical nets, 16 in the isotropic ones."""
    use_overlap: bool = False
    """Overlapping patch embeddings: kernel 7 at stride 4, 3 at stride 2, instead of kernels as wide as the stride."""
    use_post_norm: bool = False
    """LayerNorm after modulation and MLP, before the residual sum, instead of before them."""
    use_post_norm_in_modulation: bool = False
    """LayerNorm inside the modulation, before its output projection."""
    normalize_modulator: bool = False
    """Divide the gated sum of contexts by the number of levels, the global one included."""
    layer_scale: float | None = None
    """Start of the learned per-channel scale of both residual branches; None: no such scale."""
    dropout: float = 0.0
    """Dropout after the stem and after every output projection."""
    drop_path: float = 0.0
    """Stochastic depth: rate of the last block; it grows linearly from 0 at the first."""
    in_channels: int = 3
    num_classes: int = 0
    """Outputs of a linear head on the pooled features; 0: no head."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass instead of keeping its activations."""
    init: Init = "official"
    """See :meth:`FocalNet.init_weights`."""

    def __post_init__(self) -> None:
        if not self.depths or min(self.embed_dim, *self.depths) < 1:
            raise UserError(f"embed_dim={self.embed_dim}, depths={self.depths}: each must be at least 1")
        if self.patch_size < 1 or (self.use_overlap and self.patch_size not in OVERLAP):
            raise UserError(
                f"patch_size={self.patch_size} must be at least 1, and 2 or 4 where use_overlap=True; choose another"
            )
        for field in ("focal_levels", "focal_windows"):
            value = getattr(self, field)
            if not isinstance(value, int) and len(value) != self.num_stages:
                raise UserError(f"{field}={value} has not one entry for each of the {self.num_stages} stages")
        if min(self.stage_levels) < 0 or any(window % 2 == 0 for window in self.stage_windows):
            raise UserError(
                f"focal_levels={self.focal_levels}, focal_windows={self.focal_windows}: "
                "levels must not be negative and windows must be odd"
            )
        for field in ("dropout", "drop_path"):
            if not 0 <= getattr(self, field) < 1:
                raise UserError(f"{field}={getattr(self, field)} must be at least 0 and below 1")
        if self.init not in get_args(Init):
            raise UserError(f"init={self.init!r} is none of {', '.join(get_args(Init))}")

    @property
    def num_stages(self) -> int:
        """Number of stages."""
        return len(self.depths)

    @property
    def dims(self) -> tuple[int, ...]:
        """Channels of each stage."""
        return tuple(self.embed_dim * 2**i for i in range(self.num_stages))

    @property
    def stage_levels(self) -> tuple[int, ...]:
        """``focal_levels`` with one entry per stage."""
        return (self.focal_levels,) * self.num_stages if isinstance(self.focal_levels, int) else self.focal_levels

    @property
    def stage_windows(self) -> tuple[int, ...]:
        """``focal_windows`` with one entry per stage."""
        return (self.focal_windows,) * self.num_stages if isinstance(self.focal_windows, int) else self.focal_windows

    @property
    def stage_drop_paths(self) -> tuple[tuple[float, ...], ...]:
        """Stochastic depth rate of each block of each stage."""
        last = sum(self.depths) - 1
        rates = iter(self.drop_path * block / max(last, 1) for block in range(last + 1))
        return tuple(tuple(next(rates) for _ in range(depth)) for depth in self.depths)


class PatchEmbed(nn.Module):
    """Strided convolution and LayerNorm: the stem (stride ``patch_size``) and the downsampling between stages (2)."""

    def __init__(self, in_dim: int, dim: int, *, stride: int, use_overlap: bool) -> None:
        super().__init__()
        kernel_size, padding = OVERLAP[stride] if use_overlap else (stride, 0)
        self.proj = nn.Conv2d(in_dim, dim, kernel_size, stride=stride, padding=padding)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to (B, H', W', C'); rows and columns that fill no window are dropped."""
        return self.norm(self.proj(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class Mlp(nn.Module):
    """Linear, GELU, Linear on every position."""

    def __init__(self, dim: int, hidden_dim: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Any leading dimensions; the last one is ``dim``."""
        return self.dropout(self.fc2(self.dropout(self.act(self.fc1(x)))))


class LayerScale(nn.Module):
    """Learned per-channel scale of a residual branch (https://arxiv.org/abs/2103.17239, section 2)."""

    def __init__(self, dim: int, start: float) -> None:
        super().__init__()
        self.start = start
        self.gamma = nn.Parameter(torch.full((dim,), start))

    def forward(self, x: Tensor) -> Tensor:
        """Scale the last dimension of ``x``."""
        return x * self.gamma


class DropPath(nn.Module):
    """Stochastic depth: drop a residual branch for whole samples (https://arxiv.org/abs/1603.09382, section 3)."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """While training, zero each sample with probability ``rate`` and scale the others by 1 / (1 - rate)."""
        if not self.training or self.rate == 0:
            return x
        keep = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(1 - self.rate)
        return x * (keep / (1 - self.rate))

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        return f"rate={self.rate:g}"


class Block(nn.Module):
    """Focal modulation and MLP, each in a residual branch.

    Pre-norm (default)::

        x = x + drop_path(ls1(modulation(norm1(x))))
        x = x + drop_path(ls2(mlp(norm2(x))))

    With ``use_post_norm`` the norm comes after the modulation or MLP, still inside the branch (the residual stream
    itself is never normalised), and is named ``norm1_post`` and ``norm2_post``.
    """

    def __init__(self, config: FocalNetConfig, *, stage: int, drop_path: float) -> None:
        super().__init__()
        dim = config.dims[stage]

        def norm(present: bool) -> nn.Module:
            return nn.LayerNorm(dim) if present else nn.Identity()

        def layer_scale() -> nn.Module:
            return nn.Identity() if config.layer_scale is None else LayerScale(dim, config.layer_scale)

        self.norm1 = norm(not config.use_post_norm)
        self.modulation = FocalModulation(
            dim,
            num_levels=config.stage_levels[stage],
            window=config.stage_windows[stage],
            use_norm=config.use_post_norm_in_modulation,
            normalize=config.normalize_modulator,
            dropout=config.dropout,
        )
        self.norm1_post = norm(config.use_post_norm)
        self.ls1 = layer_scale()
        self.norm2 = norm(not config.use_post_norm)
        self.mlp = Mlp(dim, int(dim * config.mlp_ratio), dropout=config.dropout)
        self.norm2_post = norm(config.use_post_norm)
        self.ls2 = layer_scale()
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same shape."""
        x = x + self.drop_path(self.ls1(self.norm1_post(self.modulation(self.norm1(x)))))
        return x + self.drop_path(self.ls2(self.norm2_post(self.mlp(self.norm2(x)))))


class Stage(nn.Module):
    """Downsampling (except in the first stage), then blocks of one width."""

    def __init__(self, config: FocalNetConfig, stage: int) -> None:
        super().__init__()
        self.activation_checkpointing = config.activation_checkpointing
        self.downsample: nn.Module = nn.Identity()
        if stage > 0:
            dim = config.dims[stage]
            self.downsample = PatchEmbed(config.dims[stage - 1], dim, stride=2, use_overlap=config.use_overlap)
        self.blocks = nn.ModuleList(
            Block(config, stage=stage, drop_path=rate) for rate in config.stage_drop_paths[stage]
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) of the stage before to (B, H', W', C') of this one."""
        x = self.downsample(x)
        for block in self.blocks:
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x


class FocalNet(nn.Module):
    """Hierarchical image tower: pooled features from ``tower(images)``, one map per stage from ``feature_maps``.

    Attributes:
        config: what it was built from.
        num_features: width D of the pooled features.
        feature_dims: channels of each feature map.
        strides: input pixels per position of each feature map.
    """

    def __init__(self, config: FocalNetConfig) -> None:
        super().__init__()
        self.config = config
        self.feature_dims = list(config.dims)
        self.num_features = config.dims[-1]
        self.strides = [config.patch_size * 2**i for i in range(config.num_stages)]
        self.stem = PatchEmbed(
            config.in_channels, config.embed_dim, stride=config.patch_size, use_overlap=config.use_overlap
        )
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(Stage(config, stage) for stage in range(config.num_stages))
        self.norm = nn.LayerNorm(self.num_features)
        self.head = nn.Sequential()  # without a head, the identity
        if config.num_classes:
            self.head.add_module("fc", nn.Linear(self.num_features, config.num_classes))  # timm's head.fc
        self.init_weights(config.init)

    def forward(self, images: Tensor) -> Tensor:
        """Pooled features (B, D) of normalised ``images`` (B, 3, H, W), or class logits where there is a head.

        Raises:
            UserError: if the images are smaller than the coarsest stride.
        """
        return self.head(self.forward_features(images).mean((2, 3)))

    def forward_features(self, images: Tensor) -> Tensor:
        """The last stage's map after the final LayerNorm, (B, D, h, w)."""
        x = self._embed(images)
        for stage in self.layers:
            x = stage(x)
        return self.norm(x).permute(0, 3, 1, 2)

    def feature_maps(self, images: Tensor) -> list[Tensor]:
        """Each stage's output (B, C_i, H_i, W_i), finest first, before the final LayerNorm."""
        x, maps = self._embed(images), []
        for stage in self.layers:
            x = stage(x)
            maps.append(x.permute(0, 3, 1, 2))
        return maps

    def _embed(self, images: Tensor) -> Tensor:
        """The stem's output (B, H, W, C)."""
        if min(images.shape[-2:]) < self.strides[-1] and not self.config.use_overlap:
            height, width = images.shape[-2:]
            raise UserError(f"images of {height}x{width} pixels are too small; this FocalNet needs {self.strides[-1]}")
        x = images.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
        return self.dropout(self.stem(x))

    @torch.no_grad()
    def init_weights(self, init: Init) -> None:
        """Initialise every parameter, for instance after building on the meta device and ``to_empty``.

        =========================================== ==================== =============== =======================
        tensor                                      official             timm            fan_in
        =========================================== ==================== =============== =======================
        f, proj, MLP and head weights               N(0, 0.02)           N(0, 0.02)      N(0, 1/sqrt(fan_in))
        their biases                                0                    0               0
        h weights                                   U(+-1/sqrt(fan_in))  N(0, 0.02)      N(0, 1/sqrt(fan_in))
        h biases                                    U(+-1/sqrt(fan_in))  0               0
        depthwise and patch embedding weights       U(+-1/sqrt(fan_in))  N(0, 0.02)      U(+-1/sqrt(fan_in))
        their biases                                U(+-1/sqrt(fan_in))  0               U(+-1/sqrt(fan_in))
        LayerNorm weight, bias                      1, 0                 1, 0            1, 0
        layer scale                                 ``layer_scale``      ``layer_scale`` ``layer_scale``
        =========================================== ==================== =============== =======================

        N is truncated at +-2. "official": the authors' code re-initialises Linear layers alone, and its ``h`` is a
        convolution; "timm": 3x3 depthwise kernels start ten times smaller; "fan_in": for narrow nets, where a
        standard deviation of 0.02 makes each branch nearly zero.
        """
        for name, module in self.named_modules():
            if isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, LayerScale):
                module.gamma.fill_(module.start)
            elif isinstance(module, nn.Linear | nn.Conv2d):
                is_official_h = init == "official" and name.endswith("modulation.h")
                is_default_conv = init != "timm" and isinstance(module, nn.Conv2d)
                _init_affine(module, init, use_uniform=is_official_h or is_default_conv)


def _init_affine(module: nn.Linear | nn.Conv2d, init: Init, *, use_uniform: bool) -> None:
    """Initialise one weight and its bias by a column of the table in :meth:`FocalNet.init_weights`."""
    bound = 1 / math.sqrt(module.weight[0].numel())
    if use_uniform:
        nn.init.uniform_(module.weight, -bound, bound)
    else:
        nn.init.trunc_normal_(module.weight, std=bound if init == "fan_in" else 0.02)
    if module.bias is None:
        return
    if use_uniform:
        nn.init.uniform_(module.bias, -bound, bound)
    else:
        nn.init.zeros_(module.bias)
