"""Named FocalNets: the paper's hierarchical models under timm's names, and two small ones for small pictures."""

from dataclasses import fields, replace
from typing import Any

from focalclip.errors import UserError
from focalclip.models.focalnet import FocalNet, FocalNetConfig

# The models with published ImageNet-22K weights: overlapping patches, post-norm, layer scale. The authors' files
# disagree on normalize_modulator for the 4-level ones; as in timm, it is off unless asked for.
_LARGE = FocalNetConfig(depths=(2, 2, 18, 2), use_overlap=True, use_post_norm=True, layer_scale=1e-4)
_HUGE = replace(_LARGE, embed_dim=352, use_post_norm_in_modulation=True)


def _isotropic(embed_dim: int, **options: Any) -> FocalNetConfig:
    """One stage on patches of 16 pixels, as wide and deep as the ViT of the same name (paper, section 4.1)."""
    return FocalNetConfig(embed_dim=embed_dim, depths=(12,), focal_levels=3, patch_size=16, **options)


FOCALNETS: dict[str, FocalNetConfig] = {
    # For pictures of 32 to 96 pixels: patches of 2, so that all four stages see more than one position.
    "focalnet_pico": FocalNetConfig(patch_size=2, embed_dim=24, depths=(1, 1, 2, 4), use_overlap=True),
    "focalnet_nano": FocalNetConfig(patch_size=2, embed_dim=32, depths=(1, 2, 2, 4), use_overlap=True),
    "focalnet_tiny_srf": FocalNetConfig(embed_dim=96, depths=(2, 2, 6, 2), focal_levels=2),
    "focalnet_tiny_lrf": FocalNetConfig(embed_dim=96, depths=(2, 2, 6, 2), focal_levels=3),
    "focalnet_small_srf": FocalNetConfig(embed_dim=96, depths=(2, 2, 18, 2), focal_levels=2),
    "focalnet_small_lrf": FocalNetConfig(embed_dim=96, depths=(2, 2, 18, 2), focal_levels=3),
    "focalnet_base_srf": FocalNetConfig(embed_dim=128, depths=(2, 2, 18, 2), focal_levels=2),
    "focalnet_base_lrf": FocalNetConfig(embed_dim=128, depths=(2, 2, 18, 2), focal_levels=3),
    "focalnet_tiny_iso": _isotropic(192),
    "focalnet_small_iso": _isotropic(384),
    "focalnet_base_iso": _isotropic(768, layer_scale=1e-4, use_post_norm_in_modulation=True),
    "focalnet_large_fl3": replace(_LARGE, embed_dim=192, focal_levels=3, focal_windows=5),
    "focalnet_large_fl4": replace(_LARGE, embed_dim=192, focal_levels=4),
    "focalnet_xlarge_fl3": replace(_LARGE, embed_dim=256, focal_levels=3, focal_windows=5),
    "focalnet_xlarge_fl4": replace(_LARGE, embed_dim=256, focal_levels=4),
    "focalnet_huge_fl3": replace(_HUGE, focal_levels=3),
    "focalnet_huge_fl4": replace(_HUGE, focal_levels=4),
}


def create_focalnet(name: str, **overrides: Any) -> FocalNet:
    """Build the named FocalNet with freshly initialised weights.

    Args:
        name: a key of :data:`FOCALNETS`.
        overrides: fields of :class:`FocalNetConfig` that differ from the named variant.

    Raises:
        UserError: if the name or an override is unknown, or a value is out of range.
    """
    if name not in FOCALNETS:
        raise UserError(f"{name} is not a FocalNet variant; known are {', '.join(FOCALNETS)}")
    known = [field.name for field in fields(FocalNetConfig)]
    for override in overrides:
        if override not in known:
            raise UserError(f"{override} is not an option of a FocalNet; known are {', '.join(known)}")
    return FocalNet(replace(FOCALNETS[name], **overrides))
