"""FocalNet image tower (https://arxiv.org/abs/2203.11926).

Modules are named as in timm's ``focalnet``, so weights travel with the fewest renames. Differences: activations are
channels-last (B, H, W, C) inside, projections are ``nn.Linear`` instead of 1x1 convolutions, and there is no
classification head unless one is asked for.
"""

import math

import torch
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from focalclip.base.errors import UserError
from focalclip.models.focalnet.blocks import WIDE_STEM_PADDING, Block, LayerScale, PatchEmbed, UniCLBlock
from focalclip.models.focalnet.config import FocalNetConfig, Init
from focalclip.models.focalnet.rivals import RelativePositionBias


class Stage(nn.Module):
    """Downsampling (except in the first stage), then blocks of one width."""

    def __init__(self, config: FocalNetConfig, stage: int) -> None:
        super().__init__()
        self.activation_checkpointing = config.activation_checkpointing
        self.downsample: nn.Module = nn.Identity()
        if stage > 0:
            dim = config.dims[stage]
            self.downsample = PatchEmbed(
                config.dims[stage - 1],
                dim,
                stride=2,
                use_overlap=config.use_overlap,
                fill=bool(config.detector_stages),
            )
        block = {"focal": Block, "unicl": UniCLBlock}[config.block]
        self.blocks = nn.ModuleList(
            block(config, stage=stage, index=index, drop_path=rate)
            for index, rate in enumerate(config.stage_drop_paths[stage])
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
        in_channels: of the images.
    """

    def __init__(self, config: FocalNetConfig) -> None:
        super().__init__()
        self.config = config
        self.in_channels = config.in_channels
        self.map_stages = config.detector_stages or tuple(range(config.num_stages))
        self.feature_dims = [config.dims[i] for i in self.map_stages]
        self.num_features = self.feature_dims[-1]
        self.strides = [config.patch_size * 2**i for i in self.map_stages]
        is_detector = bool(config.detector_stages)
        has_wide_stem = config.block == "unicl" or (is_detector and config.use_overlap)
        self.stem = PatchEmbed(
            config.in_channels,
            config.embed_dim,
            stride=config.patch_size,
            use_overlap=config.use_overlap,
            padding=WIDE_STEM_PADDING if has_wide_stem else None,
            fill=is_detector,
        )
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(Stage(config, stage) for stage in range(config.num_stages))
        self.norm = nn.Identity() if is_detector else nn.LayerNorm(self.num_features)
        self.norms = nn.ModuleDict({str(i): nn.LayerNorm(config.dims[i]) for i in config.detector_stages})
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
        """The last stage's map after the final LayerNorm, (B, D, h, w); a detector's last map, after its own."""
        if self.norms:
            return self.feature_maps(images)[-1]
        x = self._embed(images)
        for stage in self.layers:
            x = stage(x)
        return self.norm(x).permute(0, 3, 1, 2)

    def feature_maps(self, images: Tensor) -> list[Tensor]:
        """Each stage's output (B, C_i, H_i, W_i), finest first, before the final LayerNorm.

        Of a detector's backbone those that the detector takes, after the LayerNorm of each.
        """
        x, maps = self._embed(images), []
        for i, stage in enumerate(self.layers):
            x = stage(x)
            if i in self.map_stages:
                maps.append((self.norms[str(i)](x) if self.norms else x).permute(0, 3, 1, 2))
        return maps

    def depth_groups(self) -> list[list[str]]:
        """Names of parameters from the stem up, as timm groups them for layer-wise decay.

        The stem; then one group for each block, which has the downsampling before it; the last has the norm behind it.
        """
        blocks = [(i, j) for i, depth in enumerate(self.config.depths) for j in range(depth)]
        groups: list[list[str]] = [[] for _ in range(1 + len(blocks))]
        for name, _ in self.named_parameters():
            part = name.split(".")
            if part[0] == "layers":
                place = (int(part[1]), 0 if part[2] == "downsample" else int(part[3]))
                groups[1 + blocks.index(place)].append(name)
            else:
                groups[0 if part[0] == "stem" else -1].append(name)
        return groups

    def _embed(self, images: Tensor) -> Tensor:
        """The stem's output (B, H, W, C)."""
        if not self.config.use_overlap and not self.norms:
            images = _at_least(images, self.strides[-1])
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
        relative position biases (of attention)     N(0, 0.02)           N(0, 0.02)      N(0, 0.02)
        =========================================== ==================== =============== =======================

        N is truncated at +-2. "official": the authors' code re-initialises Linear layers alone, and its ``h`` is a
        convolution; "timm": 3x3 depthwise kernels start ten times smaller; "fan_in": for narrow nets, where a
        standard deviation of 0.02 makes each branch nearly zero. On the meta device there is nothing to initialise.
        """
        if self.stem.norm.weight.is_meta:
            return
        for name, module in self.named_modules():
            if isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, LayerScale):
                module.gamma.fill_(module.start)
            elif isinstance(module, RelativePositionBias):
                nn.init.trunc_normal_(module.table, std=0.02)  # Swin's
            elif isinstance(module, nn.Linear | nn.Conv2d):
                is_official_h = init == "official" and name.endswith("modulation.h")
                is_default_conv = init != "timm" and isinstance(module, nn.Conv2d)
                init_affine(module, init, use_uniform=is_official_h or is_default_conv)


@fx.wrap
def _at_least(images: Tensor, side: int) -> Tensor:
    """``images`` (B, 3, H, W); a UserError if they are smaller than ``side``."""
    height, width = images.shape[-2:]
    if min(height, width) < side:
        raise UserError(f"images of {height}x{width} pixels are too small; this FocalNet needs {side}")
    return images


def init_affine(module: nn.Linear | nn.Conv2d, init: Init, *, use_uniform: bool) -> None:
    """Initialise one weight and its bias by a column of the table in :meth:`FocalNet.init_weights`.

    Args:
        module: a linear map or a convolution.
        init: the column.
        use_uniform: draw from U(+-1/sqrt(fan_in)), PyTorch's default for convolutions.
    """
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
