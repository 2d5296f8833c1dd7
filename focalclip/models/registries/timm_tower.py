"""Timm's FocalNet with what timm's options cannot say: another stride of the stem, and blocks that it does not have."""

from dataclasses import replace
from typing import Any

import torch
from timm.models import focalnet as timm_focalnet
from torch import Tensor, nn
from torch.nn import functional as F

from focalclip.models.focalnet import FocalNet, FocalNetConfig
from focalclip.models.weights.names import MATRIX


def tower_class(config: FocalNetConfig) -> Any:
    """A class built as timm's FocalNet is; names and shapes of its weights follow timm's."""
    if config.patch_size == 4 and config.block == "focal":
        return timm_focalnet.FocalNet

    class TimmFocalNet(timm_focalnet.FocalNet):
        def __init__(self, in_chans: int = 3, drop_path_rate: float = 0.0, **options: Any) -> None:
            super().__init__(in_chans=in_chans, drop_path_rate=drop_path_rate, **options)
            ours: Any = FocalNet(replace(config, in_channels=in_chans, drop_path=drop_path_rate, init="timm"))
            self.stem.proj = ours.stem.proj  # same names and shapes; only stride, kernel and padding differ
            for info in self.feature_info:
                info["reduction"] = info["reduction"] // 4 * config.patch_size
            if config.block != "focal":
                for theirs, stage in zip(self.layers, ours.layers, strict=True):
                    theirs.blocks = nn.ModuleList(_as_timms(block) for block in stage.blocks)

    return TimmFocalNet


def _as_timms(block: Any) -> nn.Module:
    """A block of ours between timm's channels-first layers, its matrices stored as 1x1 convolutions."""
    block.register_forward_pre_hook(lambda _, args: (args[0].permute(0, 2, 3, 1),))
    block.register_forward_hook(lambda _, __, out: out.permute(0, 3, 1, 2))
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear) and MATRIX.search(f"{name}.weight"):
            module.weight = nn.Parameter(module.weight.detach()[..., None, None])
            module.__class__ = _ConvShapedLinear
    return block


class _ConvShapedLinear(nn.Linear):
    """Linear map whose weight has the shape of a 1x1 convolution."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, torch.flatten(self.weight, 1), self.bias)
