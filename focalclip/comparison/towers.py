"""The towers that are compared: each within 5% of ``focalnet_pico``'s parameters, for pictures of 32 pixels.

Where the family has stages, widths are 24, 48, 96 and 192 at strides 2, 4, 8 and 16, as in ``focalnet_pico``, and most
blocks stand in the last stage; blocks with fewer parameters than FocalNet's come in larger numbers. Within its blocks a
family keeps its own standard: position embeddings, norms, layer scales, heads.
"""

from dataclasses import dataclass, field
from typing import Any

REFERENCE = "focalnet_pico"
IMAGE_SIZE = 32
TOLERANCE = 0.05  # of the reference's parameters


@dataclass(frozen=True)
class Tower:
    """One row of the comparison."""

    title: str
    """What it is, for the report."""
    image: dict[str, Any] = field(default_factory=dict)
    """Settings of ``model.image`` that make it; all others are those of the base configuration."""


def _vit(patch_size: int) -> dict[str, Any]:
    # ViT-Ti's width and heads, as many layers as the parameters allow
    options = {"img_size": IMAGE_SIZE, "patch_size": patch_size, "embed_dim": 192, "depth": 5, "num_heads": 3}
    return {"name": "timm:vit_tiny_patch16_224", "options": options}


_SWIN = {
    # Pairs of blocks, whose second shifts its windows; windows of 4 divide the maps of 16, 8 and 4 positions.
    "name": "timm:swin_tiny_patch4_window7_224",
    "options": {
        "img_size": IMAGE_SIZE, "patch_size": 2, "window_size": 4, "embed_dim": 24, "depths": [2, 2, 4, 4],
        "num_heads": [1, 2, 3, 6],
    },
}  # fmt: skip

_FAMILIES = {
    "focalnet": Tower("FocalNet, depths 1-1-2-4"),
    "swin": Tower("Swin, depths 2-2-4-4, windows of 4", _SWIN),
    "vit-patch4": Tower("ViT, 5 layers of 192, patches of 4", _vit(4)),
    "vit-patch8": Tower("ViT, 5 layers of 192, patches of 8", _vit(8)),
    "convnext": Tower("ConvNeXt, depths 1-1-4-6", {"name": "timm:convnext_pico_patch2"}),
    "poolformer": Tower("PoolFormer, depths 1-1-4-6", {"name": "timm:poolformer_pico_patch2"}),
}

# Mixers without projections leave a block two thirds of its parameters.
_MIXER_DEPTHS = {"poolformer": [1, 1, 4, 6], "depthwise_convolution": [1, 1, 3, 6]}
_MIXERS = (
    "additive", "no_global", "last_level", "no_gates", "single_level", "pooling", "squeeze_excitation", "poolformer",
    "depthwise_convolution", "window_attention", "shifted_window_attention", "global_attention", "focal_attention",
)  # fmt: skip


def _mixer(name: str) -> Tower:
    image: dict[str, Any] = {"mixer": name}
    depths = _MIXER_DEPTHS.get(name)
    title = f"FocalNet's blocks with the mixer {name}"
    if depths:
        title, image["options"] = f"{title}, depths {'-'.join(map(str, depths))}", {"depths": depths}
    return Tower(title, image)


TOWERS: dict[str, Tower] = _FAMILIES | {f"mixer-{name.replace('_', '-')}": _mixer(name) for name in _MIXERS}
