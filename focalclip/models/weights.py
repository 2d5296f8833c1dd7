"""FocalNet weights between code bases: the authors' (microsoft/FocalNet), timm's and transformers'.

The ``from_`` and ``to_`` pairs translate state dicts; :func:`from_official` builds the whole tower. Our names are
timm's; shapes differ where timm has 1x1 convolutions. Whatever has no place in a FocalNet is an error.
"""

import pickle
import re
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from focalclip.errors import UserError
from focalclip.models.focalnet import FocalNet, FocalNetConfig
from focalclip.models.variants import FOCALNETS

Weights = dict[str, Tensor]
# Pairs (our prefix, their prefix); the first that fits a name renames it. {prev} is {i} - 1: the authors and
# transformers keep the downsampling at the end of the stage before.
Rules = list[tuple[str, str]]

_BLOCK = "layers.{i}.blocks.{j}."
_OFFICIAL: Rules = [
    ("stem.", "patch_embed."),
    ("layers.{i}.downsample.", "layers.{prev}.downsample."),
    (_BLOCK + "ls1.gamma", _BLOCK + "gamma_1"),
    (_BLOCK + "ls2.gamma", _BLOCK + "gamma_2"),
    (_BLOCK + "modulation.norm.", _BLOCK + "modulation.ln."),
    (_BLOCK, _BLOCK),
    ("norm.", "norm."),
    ("head.fc.", "head."),
]
_HF_BLOCK = "encoder.stages.{i}.layers.{j}."
_TRANSFORMERS: Rules = [
    ("stem.proj.", "embeddings.patch_embeddings.projection."),
    ("stem.norm.", "embeddings.norm."),
    ("layers.{i}.downsample.proj.", "encoder.stages.{prev}.downsample.projection."),
    ("layers.{i}.downsample.norm.", "encoder.stages.{prev}.downsample.norm."),
    (_BLOCK + "ls1.gamma", _HF_BLOCK + "gamma_1"),
    (_BLOCK + "ls2.gamma", _HF_BLOCK + "gamma_2"),
    (_BLOCK + "modulation.f.", _HF_BLOCK + "modulation.projection_in."),
    (_BLOCK + "modulation.h.", _HF_BLOCK + "modulation.projection_context."),
    (_BLOCK + "modulation.proj.", _HF_BLOCK + "modulation.projection_out."),
    (_BLOCK + "modulation.norm.", _HF_BLOCK + "modulation.layernorm."),
    (_BLOCK, _HF_BLOCK),
    ("norm.", "layernorm."),
    ("head.fc.", "classifier."),
]
_MATRIX = re.compile(r"(modulation\.(f|h|proj)|mlp\.fc[12])\.weight$")
_HF_CONV = re.compile(r"modulation\.projection_context\.weight$")
# Their authors' configurations set normalize_modulator, timm does not, and the weights cannot tell.
_DISPUTED = ("focalnet_large_fl4", "focalnet_xlarge_fl4")


def from_timm(weights: Mapping[str, Tensor]) -> Weights:
    """State dict of timm's ``focalnet`` as a state dict of ours."""
    return {name: _as_matrix(name, x) for name, x in weights.items()}


def to_timm(weights: Mapping[str, Tensor]) -> Weights:
    """State dict of our FocalNet as a state dict of timm's ``focalnet``."""
    return {name: x[..., None, None] if _MATRIX.search(name) else x for name, x in weights.items()}


def from_transformers(weights: Mapping[str, Tensor], *, post_norm: bool = False) -> Weights:
    """State dict of transformers' ``FocalNetModel`` or ``FocalNetForImageClassification`` as a state dict of ours.

    Args:
        weights: theirs.
        post_norm: their config's ``use_post_layernorm``; the names are the same either way.

    Raises:
        UserError: if a name is not one of a FocalNet, such as the decoder of masked image modelling.
    """
    unprefixed = {name.removeprefix("focalnet."): x for name, x in weights.items()}
    return _from_theirs(unprefixed, _TRANSFORMERS, post_norm, "transformers' FocalNet")


def to_transformers(weights: Mapping[str, Tensor]) -> Weights:
    """State dict of our FocalNet as one of ``FocalNetModel`` or, with a head, ``FocalNetForImageClassification``."""
    rules = _with_post_norm(_TRANSFORMERS)
    theirs = _rename(weights, rules, "a FocalNet")
    theirs = {name: x[..., None, None] if _HF_CONV.search(name) else x for name, x in theirs.items()}
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
    implied = _implied_config(_from_theirs(weights, _OFFICIAL, False, where), where)
    config = _with_flags(implied, flags, post_norm, normalize_modulator, where)
    with torch.device("meta"):
        tower = FocalNet(config)
    ours = _from_theirs(weights, _OFFICIAL, config.use_post_norm, where)
    _check_same(tower.state_dict(), ours, where)
    tower.load_state_dict(ours, assign=True)
    return tower.float()


def _from_theirs(weights: Mapping[str, Tensor], rules: Rules, post_norm: bool, where: str) -> Weights:
    rules = _with_post_norm(rules) if post_norm else rules
    ours = _rename(weights, [(theirs, ours) for ours, theirs in rules], where)
    return {name: _as_matrix(name, x) for name, x in ours.items()}


def _with_post_norm(rules: Rules) -> Rules:
    """Rules for a post-norm net: we, like timm, tell the two norms of a block apart by name, others do not."""
    block = next(theirs for ours, theirs in rules if ours == _BLOCK)
    return [(f"{_BLOCK}norm{n}_post.", f"{block}norm{n}.") for n in (1, 2)] + rules


def _rename(weights: Mapping[str, Tensor], rules: Iterable[tuple[str, str]], where: str) -> Weights:
    """Rename by the first rule (from, to) whose prefix fits.

    Raises:
        UserError: if no rule fits a name.
    """
    compiled = [(re.compile(re.sub(r"\\{(\w+)\\}", r"(?P<\1>\\d+)", re.escape(old))), new) for old, new in rules]
    renamed, unknown = {}, []
    for name, x in weights.items():
        for pattern, new in compiled:
            if match := pattern.match(name):
                index = {key: int(value) for key, value in match.groupdict().items()}
                index |= {"i": index["prev"] + 1} if "prev" in index else {"prev": index.get("i", 0) - 1}
                renamed[new.format(**index) + name[match.end() :]] = x
                break
        else:
            unknown.append(name)
    if unknown:
        raise UserError(f"{where}: {_some(unknown)} not part of a FocalNet; are these the weights of another model?")
    return renamed


def _as_matrix(name: str, x: Tensor) -> Tensor:
    """The weight of a 1x1 convolution as that of a linear layer."""
    return x[:, :, 0, 0] if _MATRIX.search(name) and x.shape[2:] == (1, 1) else x


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
    except (RuntimeError, EOFError, OSError) as error:
        raise UserError(f"{path}: damaged or truncated ({str(error).splitlines()[0]}); copy it again") from None
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
        raise UserError(f"{where}: not a FocalNet of the authors: no {absent[0]}; it begins with {_some(inner)}")
    return dict(inner)


def _implied_config(ours: Weights, where: str) -> FocalNetConfig:
    """What names and shapes tell: all but post-norm and the normalised modulator."""
    blocks = [re.match(r"layers\.(\d+)\.blocks\.(\d+)\.", name) for name in ours]
    indices = {(int(m[1]), int(m[2])) for m in blocks if m}
    num_stages = 1 + max(stage for stage, _ in indices)
    embed_dim, in_channels, kernel_size, _ = ours["stem.proj.weight"].shape
    if kernel_size not in (4, 7):
        raise UserError(
            f"{where}: patches of {kernel_size} pixels; only hierarchical FocalNets (4, or 7 overlapping) are known"
        )
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
        use_overlap=kernel_size == 7,
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
    variant = next((name for name, config in FOCALNETS.items() if _same_shapes(config, implied)), None)
    if variant in _DISPUTED and normalize is None:
        raise UserError(
            f"{where}: give normalize_modulator: the authors' configuration of {variant} sets it, timm's does not"
        )
    if post_norm is None:
        post_norm = variant is not None and FOCALNETS[variant].use_post_norm
    return replace(implied, **flags, use_post_norm=post_norm, normalize_modulator=bool(normalize))


def _same_shapes(variant: FocalNetConfig, implied: FocalNetConfig) -> bool:
    """Whether two configurations differ at most in what weights cannot tell, and in the head."""
    free = {"use_post_norm": False, "normalize_modulator": False, "num_classes": 0}
    return replace(variant, **free) == replace(implied, **free)


def _check_same(own: Mapping[str, Tensor], given: Mapping[str, Tensor], where: str) -> None:
    missing, unexpected = own.keys() - given.keys(), given.keys() - own.keys()
    wrong = [name for name in own.keys() & given.keys() if own[name].shape != given[name].shape]
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": wrong}
    if any(problems.values()):
        listed = "; ".join(f"{len(names)} {what}: {_some(names)}" for what, names in problems.items() if names)
        raise UserError(f"{where}: not the weights of a whole FocalNet ({listed}); get the file again")


def _some(names: Iterable[str]) -> str:
    """The first few names, and how many more."""
    ordered = sorted(names)
    return ", ".join(ordered[:5]) + (f" and {len(ordered) - 5} more" if len(ordered) > 5 else "")
