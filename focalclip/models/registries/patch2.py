"""ConvNeXt and PoolFormer of timm on patches of 2 pixels instead of 4, registered with timm under names of our own.

Timm's options cannot say it, and of a picture of 32 pixels a first stage of stride 4 leaves one position to the last,
where nothing is left to mix. Widths are those of ``focalnet_pico``, depths give as many parameters.
"""

from typing import Any

from timm.layers import GroupNorm1
from timm.models import convnext, metaformer
from timm.models._builder import build_model_with_cfg
from timm.models._registry import generate_default_cfgs, register_model
from torch import nn

_WIDTHS, _DEPTHS = (24, 48, 96, 192), (1, 1, 4, 6)

default_cfgs = generate_default_cfgs(
    {"convnext_pico_patch2": convnext._cfg(), "poolformer_pico_patch2": metaformer._cfg()}
)  # timm looks for them in the module of a model's function


class ConvNeXt(convnext.ConvNeXt):
    """Patches of 2 pixels that do not overlap, as ConvNeXt's of 4 do not."""

    def __init__(self, in_chans: int = 3, **options: Any) -> None:
        super().__init__(in_chans=in_chans, **options)
        theirs: Any = self.stem[0]
        self.stem[0] = _stem(self, nn.Conv2d(in_chans, theirs.out_channels, kernel_size=2, stride=2))


class PoolFormer(metaformer.MetaFormer):
    """Kernels of 3 pixels at stride 2, where PoolFormer has 7 at 4; FocalNet pico's stem is the same."""

    def __init__(self, in_chans: int = 3, **options: Any) -> None:
        super().__init__(in_chans=in_chans, **options)
        width = self.stem.conv.out_channels
        self.stem.conv = _stem(self, nn.Conv2d(in_chans, width, kernel_size=3, stride=2, padding=1))


def _stem(tower: Any, conv: nn.Conv2d) -> nn.Conv2d:
    """``conv`` initialised as both families initialise theirs; the strides of the tower's maps are noted as halved."""
    nn.init.trunc_normal_(conv.weight, std=0.02)
    nn.init.zeros_(conv.bias)  # pyrefly: ignore[bad-argument-type]
    for info in tower.feature_info:
        info["reduction"] //= 2
    return conv


@register_model
def convnext_pico_patch2(pretrained: bool = False, **options: Any) -> Any:
    """ConvNeXt for small pictures, its blocks as in timm's ``convnext_tiny``."""
    plan = {"dims": _WIDTHS, "depths": _DEPTHS}
    return _build(ConvNeXt, "convnext_pico_patch2", pretrained, plan | options)


@register_model
def poolformer_pico_patch2(pretrained: bool = False, **options: Any) -> Any:
    """PoolFormer for small pictures, its blocks as in timm's ``poolformer_s12``."""
    plan = {
        "dims": _WIDTHS, "depths": _DEPTHS, "downsample_norm": None, "mlp_act": nn.GELU, "mlp_bias": True,
        "norm_layers": GroupNorm1, "layer_scale_init_values": 1e-5, "res_scale_init_values": None,
        "use_mlp_head": False,
    }  # fmt: skip
    return _build(PoolFormer, "poolformer_pico_patch2", pretrained, plan | options)


def _build(kind: type[nn.Module], name: str, pretrained: bool, options: dict[str, Any]) -> Any:
    stages = options.pop("out_indices", tuple(range(len(options["depths"]))))
    features = {"flatten_sequential": True, "out_indices": stages}
    return build_model_with_cfg(kind, name, pretrained, feature_cfg=features, **options)
