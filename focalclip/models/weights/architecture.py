"""Which FocalNet a set of weights belongs to: what their names and shapes imply, and what they leave open."""

import re
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from focalclip.base.errors import UserError
from focalclip.models.focalnet.config import OVERLAP, FocalNetConfig
from focalclip.models.focalnet.variants import FOCALNETS
from focalclip.models.weights.dialects import Weights

# Weights do not imply these, except that timm's and K-LITE's names imply the first.
_NOT_IN_WEIGHTS = ("use_post_norm", "normalize_modulator")

# Published configurations disagree on normalize_modulator (the authors' set it, timm's do not); weights cannot tell.
_DISPUTED = ("focalnet_large_fl4", "focalnet_xlarge_fl4")

_FREE = ("dropout", "drop_path", "activation_checkpointing", "init")  # of training alone, whatever the weights


def implied_config(ours: Weights, *, num_classes: int, where: str) -> FocalNetConfig:
    """What names and shapes of a state dict of ours imply.

    Raises:
        UserError: if they are not those of a FocalNet.
    """
    first = "layers.0.blocks.0."
    needed = ["stem.proj.weight", first + "modulation.f.weight", first + "mlp.fc1.weight"]
    if absent := [name for name in needed if name not in ours]:
        raise UserError(f"{where}: not the weights of a FocalNet: no {absent[0]} (timm's name); choose another file")
    blocks = [re.match(r"layers\.(\d+)\.blocks\.(\d+)\.", name) for name in ours]
    indices = {(int(m[1]), int(m[2])) for m in blocks if m}
    num_stages = 1 + max(stage for stage, _ in indices)
    embed_dim, in_channels, *kernel = ours["stem.proj.weight"].shape
    if len(kernel) != 2 or kernel[0] != kernel[1]:
        raise UserError(f"{where}: patches of {kernel} pixels; a FocalNet's are square")
    is_unicl = first + "dw1.weight" in ours
    overlapping = {size: stride for stride, (size, _) in OVERLAP.items()}  # no published net has patches of 3 or 7
    levels, windows = zip(*(_levels_and_window(ours, stage) for stage in range(num_stages)), strict=True)
    try:
        return FocalNetConfig(
            embed_dim=embed_dim,
            depths=tuple(sum(stage == i for stage, _ in indices) for i in range(num_stages)),
            focal_levels=levels[0] if len(set(levels)) == 1 else levels,
            focal_windows=windows[0] if len(set(windows)) == 1 else windows,
            mlp_ratio=ours[first + "mlp.fc1.weight"].shape[0] / embed_dim,
            patch_size=overlapping.get(kernel[0], kernel[0]),
            use_overlap=kernel[0] in overlapping,
            use_post_norm=is_unicl or first + "norm1_post.weight" in ours,
            use_post_norm_in_modulation=first + "modulation.norm.weight" in ours,
            normalize_modulator=is_unicl,
            layer_scale=1e-4 if first + "ls1.gamma" in ours else None,
            block="unicl" if is_unicl else "focal",
            detector_stages=tuple(sorted(int(m[1]) for name in ours if (m := re.match(r"norms\.(\d+)\.weight", name)))),
            in_channels=in_channels,
            num_classes=num_classes,
        )
    except UserError as error:
        raise UserError(f"{where}: the weights imply a FocalNet that cannot be: {error}") from None


def complete(
    implied: FocalNetConfig, flags: Mapping[str, Any], *, where: str, implies_post_norm: bool
) -> tuple[FocalNetConfig, str | None]:
    """``implied`` with what the weights do not imply: as given, else as in the variant of this architecture.

    Returns:
        The configuration, and the name of that variant or None.

    Raises:
        UserError: if a flag is unknown, contradicts the weights, or must be given.
    """
    known = sorted({field.name for field in fields(FocalNetConfig)} - set(_NOT_IN_WEIGHTS))
    open_flags = () if implied.block == "unicl" else _NOT_IN_WEIGHTS[implies_post_norm:]  # UniCL's has one setting
    for name, value in flags.items():
        if name not in (*known, *_NOT_IN_WEIGHTS):
            raise UserError(
                f"{name} is not a flag of weights; known are post_norm, normalize_modulator, {', '.join(known)}"
            )
        in_weights = getattr(implied, name)
        agrees = (value is None) == (in_weights is None) if name == "layer_scale" else value == in_weights
        if name not in (*_FREE, *open_flags) and not agrees:
            raise UserError(f"{where}: {name}={value} contradicts the weights, which imply {in_weights}; leave it out")
    variant = variant_of(replace(implied, detector_stages=()))
    if variant in _DISPUTED and "normalize_modulator" not in flags:
        raise UserError(
            f"{where}: give normalize_modulator, on which published configurations of {variant} disagree: "
            "the authors' True or timm's False"
        )
    usual = FOCALNETS[variant] if variant else FocalNetConfig()
    config = replace(implied, **({name: getattr(usual, name) for name in open_flags} | dict(flags)))
    return config, None if config.detector_stages else variant


def check_published(config: FocalNetConfig, name: str, num_classes: int) -> None:
    """Raise UserError unless the published weights of the variant ``name`` fit a net that was asked for under it."""
    if config.num_classes not in (0, num_classes):
        raise UserError(
            f"{name}: num_classes={config.num_classes}, but the published weights have a head of {num_classes}; "
            "leave it out and put a head of your own on the features"
        )
    if variant_of(config) != name or config.use_post_norm != FOCALNETS[name].use_post_norm:
        raise UserError(f"{name}: these options make another network of it than the one with published weights")


def variant_of(config: FocalNetConfig) -> str | None:
    """Name of the variant with this architecture, or None."""
    return next((name for name, variant in FOCALNETS.items() if _shapes(variant) == _shapes(config)), None)


def _shapes(config: FocalNetConfig) -> dict[str, Any]:
    """What weights imply of a configuration, without the head."""
    free = {*_FREE, *_NOT_IN_WEIGHTS, "num_classes"}
    implied = {field.name: getattr(config, field.name) for field in fields(config) if field.name not in free}
    return implied | {"layer_scale": config.layer_scale is not None}


def _levels_and_window(ours: Weights, stage: int) -> tuple[int, int]:
    """Focal levels of a stage and the kernel size of its first one (3 where it has none)."""
    kernels = [x for name, x in ours.items() if name.startswith(f"layers.{stage}.blocks.0.modulation.focal_layers.")]
    return len(kernels), min((x.shape[-1] for x in kernels), default=3)
