"""FocalNet weights between code bases: the authors' (microsoft/FocalNet), timm's and transformers'.

The ``from_`` and ``to_`` pairs translate state dicts; :func:`from_official` builds the whole tower. Our names are
timm's; shapes differ where timm has 1x1 convolutions. Whatever has no place in a FocalNet is an error.
"""

import pickle
import re
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from focalclip.errors import UserError, first_line
from focalclip.models.focalnet import OVERLAP, FocalNet, FocalNetConfig
from focalclip.models.variants import FOCALNETS
from focalclip.models.weight_names import (
    MATRIX,
    OFFICIAL,
    TRANSFORMERS,
    Weights,
    as_conv,
    as_matrix,
    some,
    to_ours,
    to_theirs,
)

# Published configurations disagree on normalize_modulator (the authors' set it, timm's do not); weights cannot tell.
_DISPUTED = ("focalnet_large_fl4", "focalnet_xlarge_fl4")


def from_timm(weights: Mapping[str, Tensor]) -> Weights:
    """State dict of timm's ``focalnet`` as a state dict of ours."""
    return {name: as_matrix(name, x) for name, x in weights.items()}


def to_timm(weights: Mapping[str, Tensor]) -> Weights:
    """State dict of our FocalNet as a state dict of timm's ``focalnet``."""
    return {name: as_conv(x) if MATRIX.search(name) else x for name, x in weights.items()}


def from_transformers(weights: Mapping[str, Tensor], *, post_norm: bool = False) -> Weights:
    """State dict of transformers' ``FocalNetModel`` or ``FocalNetForImageClassification`` as a state dict of ours.

    Args:
        weights: theirs.
        post_norm: their config's ``use_post_layernorm``; the names are the same either way.

    Raises:
        UserError: if a name is not one of a FocalNet, such as the decoder of masked image modelling.
    """
    unprefixed = {name.removeprefix("focalnet."): x for name, x in weights.items()}
    return to_ours(unprefixed, TRANSFORMERS, post_norm=post_norm, where="the given weights")


def to_transformers(weights: Mapping[str, Tensor]) -> Weights:
    """State dict of our FocalNet as one of ``FocalNetModel`` or, with a head, ``FocalNetForImageClassification``."""
    theirs = to_theirs(weights, TRANSFORMERS)
    if "head.fc.weight" not in weights:
        return theirs
    return {name if name.startswith("classifier.") else f"focalnet.{name}": x for name, x in theirs.items()}


def from_official(
    source: str | Path | Mapping[str, Any],
    *,
    post_norm: bool | None = None,
    normalize_modulator: bool | None = None,
    with_head: bool = False,
    **flags: Any,
) -> FocalNet:
    """Build a FocalNet from weights of the authors, in float32 on the CPU.

    Width, depths, focal levels and windows, patch embedding, layer scale and the norm in the modulation follow from
    the weights. Two flags do not; left out, they are those of the named variant with this architecture, else False.

    Args:
        source: a ``.pth`` or ``.safetensors`` file, or its content; weights may stand under the key ``model``.
        post_norm: blocks normalise after modulation and MLP (today's ``use_postln`` of the authors' code).
        normalize_modulator: must be given for large_fl4 and xlarge_fl4, on which published sources disagree.
        with_head: keep the classification head; the tower then returns logits.
        **flags: other fields of :class:`FocalNetConfig`, such as ``drop_path``; what the weights imply must agree.

    Raises:
        UserError: if the file cannot be read safely or whole, is no FocalNet of the authors, contradicts a flag, or
            has missing, unexpected or misshapen weights.
    """
    weights = _read(source) if isinstance(source, str | Path) else dict(source)
    where = str(source) if isinstance(source, str | Path) else "the given weights"
    weights = _unwrap(weights, where)
    if not with_head:
        weights = {name: x for name, x in weights.items() if not name.startswith("head.")}
    implied = _implied_config(to_ours(weights, OFFICIAL, post_norm=False, where=where), where)
    config = _with_flags(implied, flags, post_norm, normalize_modulator, where)
    with torch.device("meta"):
        tower = FocalNet(config)
    ours = to_ours(weights, OFFICIAL, post_norm=config.use_post_norm, where=where)
    _check_same(tower.state_dict(), ours, where)
    tower.load_state_dict(ours, assign=True)
    return tower.float()


def _read(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint file without running any code in it."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise UserError(f"{path}: damaged or truncated ({error}); copy it again") from None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"{path}: not a file of plain tensors, and nothing else is unpickled; "
            "save its state dict alone, best as .safetensors"
        ) from None
    except Exception as error:  # noqa: BLE001 - on damaged bytes the unpickler fails in every way there is
        raise UserError(f"{path}: damaged or truncated ({first_line(error)}); copy it again") from None
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: holds a {type(content).__name__}, not a state dict; save model.state_dict()")
    return dict(content)


def _unwrap(weights: Mapping[str, Any], where: str) -> Weights:
    """The state dict under ``model``, checked to be the authors' FocalNet."""
    inner = weights.get("model", weights)
    if not isinstance(inner, Mapping) or not all(isinstance(x, Tensor) for x in inner.values()):
        raise UserError(f"{where}: expected named tensors, at the top or under the key 'model'")
    if "stem.proj.weight" in inner:
        raise UserError(f"{where}: these are timm's names; use from_timm and load_state_dict")
    if any(name.removeprefix("focalnet.").startswith("embeddings.patch_embeddings.") for name in inner):
        raise UserError(f"{where}: these are transformers' names; use from_transformers and load_state_dict")
    needed = ["patch_embed.proj.weight", "layers.0.blocks.0.modulation.f.weight", "layers.0.blocks.0.mlp.fc1.weight"]
    if absent := [name for name in needed if name not in inner]:
        raise UserError(f"{where}: not a FocalNet of the authors: no {absent[0]}; it begins with {some(inner)}")
    return dict(inner)


def _implied_config(ours: Weights, where: str) -> FocalNetConfig:
    """What names and shapes tell: all but post-norm and the normalised modulator."""
    blocks = [re.match(r"layers\.(\d+)\.blocks\.(\d+)\.", name) for name in ours]
    indices = {(int(m[1]), int(m[2])) for m in blocks if m}
    num_stages = 1 + max(stage for stage, _ in indices)
    embed_dim, in_channels, *kernel = ours["stem.proj.weight"].shape
    if len(kernel) != 2 or kernel[0] != kernel[1]:
        raise UserError(f"{where}: patches of {kernel} pixels; a FocalNet's are square")
    kernel_size = kernel[0]
    overlapping = {kernel: stride for stride, (kernel, _) in OVERLAP.items()}  # no published net has patches of 3 or 7
    levels, windows = [], []
    for stage in range(num_stages):
        kernels = [
            x for name, x in ours.items() if name.startswith(f"layers.{stage}.blocks.0.modulation.focal_layers.")
        ]
        levels.append(len(kernels))
        windows.append(min((x.shape[-1] for x in kernels), default=3))
    first = "layers.0.blocks.0."
    return FocalNetConfig(
        embed_dim=embed_dim,
        depths=tuple(sum(stage == i for stage, _ in indices) for i in range(num_stages)),
        focal_levels=levels[0] if len(set(levels)) == 1 else tuple(levels),
        focal_windows=windows[0] if len(set(windows)) == 1 else tuple(windows),
        mlp_ratio=ours[first + "mlp.fc1.weight"].shape[0] / embed_dim,
        patch_size=overlapping.get(kernel_size, kernel_size),
        use_overlap=kernel_size in overlapping,
        use_post_norm_in_modulation=first + "modulation.norm.weight" in ours,
        layer_scale=1e-4 if first + "ls1.gamma" in ours else None,
        in_channels=in_channels,
        num_classes=ours["head.fc.weight"].shape[0] if "head.fc.weight" in ours else 0,
    )


def _with_flags(
    implied: FocalNetConfig, flags: Mapping[str, Any], post_norm: bool | None, normalize: bool | None, where: str
) -> FocalNetConfig:
    """``implied`` completed by what the weights cannot tell."""
    free = {"dropout", "drop_path", "activation_checkpointing", "init", "layer_scale"}
    known = {field.name for field in fields(FocalNetConfig)} - {"use_post_norm", "normalize_modulator"}
    for name, value in flags.items():
        if name not in known:
            raise UserError(f"{name} is not a flag of from_official; known are post_norm, {', '.join(sorted(known))}")
        told = getattr(implied, name)
        if (name not in free and value != told) or (name == "layer_scale" and (value is None) != (told is None)):
            raise UserError(f"{where}: {name}={value} contradicts the weights, which imply {told}; leave it out")
    variant = variant_of(implied)
    if variant in _DISPUTED and normalize is None:
        raise UserError(
            f"{where}: give normalize_modulator, on which published configurations of {variant} disagree: "
            "the authors' True or timm's False"
        )
    if post_norm is None:
        post_norm = variant is not None and FOCALNETS[variant].use_post_norm
    return replace(implied, **flags, use_post_norm=post_norm, normalize_modulator=bool(normalize))


def variant_of(config: FocalNetConfig) -> str | None:
    """Name of the variant with this architecture, or None."""
    return next((name for name, variant in FOCALNETS.items() if _same_shapes(variant, config)), None)


def _same_shapes(one: FocalNetConfig, other: FocalNetConfig) -> bool:
    """Whether two configurations differ at most in what weights cannot tell, and in the head."""
    default = FocalNetConfig()
    free = ("use_post_norm", "normalize_modulator", "num_classes", "dropout", "drop_path", "activation_checkpointing")
    same: dict[str, Any] = {name: getattr(default, name) for name in (*free, "init")}
    return replace(one, **same) == replace(other, **same)


def _check_same(own: Mapping[str, Tensor], given: Mapping[str, Tensor], where: str) -> None:
    missing, unexpected = own.keys() - given.keys(), given.keys() - own.keys()
    wrong = [name for name in own.keys() & given.keys() if own[name].shape != given[name].shape]
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": wrong}
    if any(problems.values()):
        listed = "; ".join(f"{len(names)} {what}: {some(names)}" for what, names in problems.items() if names)
        raise UserError(f"{where}: not the weights of a whole FocalNet ({listed}); get the file again")
