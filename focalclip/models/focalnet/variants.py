"""Named FocalNets: all that the paper and its summaries describe, under timm's names where timm has them.

SRF and LRF (small and large receptive field) are 2 and 3 focal levels.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

from focalclip.base.errors import UserError
from focalclip.base.strict import nearest
from focalclip.models.focalnet.config import FocalNetConfig
from focalclip.models.focalnet.network import FocalNet


@dataclass(frozen=True)
class Variant:
    """One named FocalNet."""

    config: FocalNetConfig
    source: str
    """Where it is described; tables are those of arXiv:2203.11926 (the version with COCO 64.3)."""
    weights: str = "none"
    """Which weights were published, and by whom."""


_SIZES = {
    "tiny": FocalNetConfig(embed_dim=96, depths=(2, 2, 6, 2)),
    "small": FocalNetConfig(embed_dim=96, depths=(2, 2, 18, 2)),
    "base": FocalNetConfig(embed_dim=128, depths=(2, 2, 18, 2)),
}

_LEVELS = {"srf": 2, "lrf": 3}

# The models with published ImageNet-22K weights: overlapping patches, post-norm, layer scale. The authors' files
# disagree on normalize_modulator for the 4-level ones; as in timm, it is off unless asked for.
_LARGE = FocalNetConfig(depths=(2, 2, 18, 2), use_overlap=True, use_post_norm=True, layer_scale=1e-4)

_HUGE = replace(_LARGE, embed_dim=352, use_post_norm_in_modulation=True)

_UNICL = replace(
    _LARGE, embed_dim=128, focal_levels=3, layer_scale=1e-6, normalize_modulator=True, block="unicl"
)  # drop path 0.1 in K-LITE's configuration: a matter of training


def _small_nets() -> Iterator[tuple[str, Variant]]:
    # For pictures of 32 to 96 pixels: patches of 2, so that all four stages see more than one position.
    config, source = FocalNetConfig(patch_size=2, use_overlap=True), "focalclip, for small pictures"
    yield "focalnet_pico", Variant(replace(config, embed_dim=24, depths=(1, 1, 2, 4)), source)
    yield "focalnet_nano", Variant(replace(config, embed_dim=32, depths=(1, 2, 2, 4)), source)


def _hierarchical() -> Iterator[tuple[str, Variant]]:
    published = "ImageNet-1K: authors, timm, transformers"
    for size, config in _SIZES.items():
        for field, levels in _LEVELS.items():
            yield f"focalnet_{size}_{field}", Variant(replace(config, focal_levels=levels), "Table 1", published)
    for size, config in _SIZES.items():
        for field, levels in _LEVELS.items():
            source = "Table 2" if field == "srf" else "Table 2, with LRF"
            overlapped = replace(config, focal_levels=levels, use_overlap=True)
            yield f"focalnet_{size}_{field}_overlap", Variant(overlapped, source)


def _deeper_and_thinner() -> Iterator[tuple[str, Variant]]:
    # Table 3 does not say so, but its parameter counts (25.1, 38.2, 85.1 M) are those of overlapping patches alone
    # (25.14, 38.16, 85.09 M; plain ones: 24.28, 37.29, 83.15 M), and so are the sizes of its detectors in Table 20.
    for size, embed_dim, depths in (
        ("tiny", 64, (3, 3, 16, 3)),
        ("small", 64, (4, 4, 28, 4)),
        ("base", 96, (4, 4, 28, 4)),
    ):
        config = FocalNetConfig(embed_dim=embed_dim, depths=depths, focal_levels=2, use_overlap=True)
        yield f"focalnet_{size}_deep", Variant(config, "Table 3")


def _isotropic() -> Iterator[tuple[str, Variant]]:
    """One stage on patches of 16 pixels, as wide and deep as the ViT of the same name."""
    config = FocalNetConfig(depths=(12,), focal_levels=3, patch_size=16)
    gone = "none any more (the authors' files went offline)"
    yield "focalnet_tiny_iso", Variant(replace(config, embed_dim=192), "Table 16", gone)
    yield "focalnet_small_iso", Variant(replace(config, embed_dim=384), "Table 16", gone)
    # Its weights were made when the authors' use_postln meant a LayerNorm in the modulation of a pre-norm block; since
    # 2022-11 it means post-norm blocks. Its names agree with the former alone.
    base = replace(config, embed_dim=768, layer_scale=1e-4, use_post_norm_in_modulation=True)
    yield "focalnet_base_iso", Variant(base, "Table 16", "ImageNet-1K: a copy in the authors' Hugging Face space")


def _large() -> Iterator[tuple[str, Variant]]:
    # The paper gives the L of 384 pixels kernels 3, 5, 7; its README, its files, timm and its weights have 5, 7, 9.
    for size, embed_dim in (("large", 192), ("xlarge", 256)):
        config = replace(_LARGE, embed_dim=embed_dim)
        published = "ImageNet-22K: authors, timm"
        for levels, window in ((3, 5), (4, 3)):
            levelled = replace(config, focal_levels=levels, focal_windows=window)
            yield f"focalnet_{size}_fl{levels}", Variant(levelled, "the authors' README", published)
    for levels in (3, 4):
        huge = replace(_HUGE, focal_levels=levels)
        yield f"focalnet_huge_fl{levels}", Variant(huge, "the authors' README", "ImageNet-22K: timm")
    yield "focalnet_base_unicl", Variant(_UNICL, "K-LITE's unicl_focal_base.yaml (not the paper's FocalNet)")


VARIANTS: dict[str, Variant] = dict(
    variant for family in (_small_nets, _hierarchical, _deeper_and_thinner, _isotropic, _large) for variant in family()
)

FOCALNETS: dict[str, FocalNetConfig] = {name: variant.config for name, variant in VARIANTS.items()}


def create_focalnet(name: str, **overrides: Any) -> FocalNet:
    """Build the named FocalNet with freshly initialised weights.

    Args:
        name: a key of :data:`FOCALNETS`.
        overrides: fields of :class:`FocalNetConfig` that differ from the named variant.

    Raises:
        UserError: if the name or an override is unknown, or a value is out of range.
    """
    if name not in FOCALNETS:
        raise UserError(f"{name} is not a FocalNet variant{nearest(name, FOCALNETS)}")
    known = [field.name for field in fields(FocalNetConfig)]
    for override in overrides:
        if override not in known:
            raise UserError(f"{override} is not an option of a FocalNet{nearest(override, known)}")
    return FocalNet(replace(FOCALNETS[name], **overrides))
