"""What other code bases call the weights of a FocalNet, as tables of prefixes.

Ours are timm's names, with matrices where timm has 1x1 convolutions.
"""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import Tensor

from focalclip.base.errors import UserError

Weights = dict[str, Tensor]


# Pairs (our prefix, their prefix); the first that fits a name renames it. {prev} is {i} - 1: the authors and
# transformers keep the downsampling at the end of the stage before.
Rules = list[tuple[str, str]]


class Dialect(NamedTuple):
    """How one code base names the weights of a FocalNet."""

    owner: str
    stem: str
    """A name that every FocalNet of theirs has, and none in the other dialects."""
    rules: Rules
    base: str = ""
    """Prefix of all names but the head's in a model with a head."""
    implies_post_norm: bool = False
    """Whether post-norm blocks have other names than pre-norm ones."""
    image_towers: tuple[str, ...] = ()
    """Prefixes of the image tower in models that hold other parts: two towers, or a detector."""


_BLOCK = "layers.{i}.blocks.{j}."


_HF_BLOCK = "encoder.stages.{i}.layers.{j}."


_OFFICIAL: Rules = [
    ("stem.", "patch_embed."),
    ("layers.{i}.downsample.", "layers.{prev}.downsample."),
    (_BLOCK + "ls1.gamma", _BLOCK + "gamma_1"),
    (_BLOCK + "ls2.gamma", _BLOCK + "gamma_2"),
    (_BLOCK + "modulation.norm.", _BLOCK + "modulation.ln."),
    (_BLOCK, _BLOCK),
    ("norm.", "norm."),
    ("norms.{i}.", "norm{i}."),
    ("head.fc.", "head."),
]


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


_TIMM: Rules = [(name, name) for name in ("stem.", "layers.{i}.downsample.", _BLOCK, "norm.", "head.fc.")]


# microsoft/klite, image_encoder/focal.py. It has no name for what it lacks, a norm in the modulation.
_KLITE: Rules = [
    (_BLOCK + "modulation.f.", _BLOCK + "attn.pre_conv."),
    (_BLOCK + "modulation.h.", _BLOCK + "attn.v."),
    (_BLOCK + "modulation.proj.", _BLOCK + "attn.proj."),
    (_BLOCK + "modulation.focal_layers.", _BLOCK + "attn.pool_layers."),
    *(rule for rule in _OFFICIAL if "modulation" not in rule[0]),
]


OFFICIAL = Dialect("official", "patch_embed.proj.weight", _OFFICIAL, image_towers=("backbone.", "backbone.0."))


TIMM = Dialect("timm", "stem.proj.weight", _TIMM, implies_post_norm=True)


TRANSFORMERS = Dialect("transformers", "embeddings.patch_embeddings.projection.weight", _TRANSFORMERS, base="focalnet.")


KLITE = Dialect(
    "klite",
    "layers.0.blocks.0.attn.pre_conv.weight",
    _KLITE,
    implies_post_norm=True,
    image_towers=("image_encoder.", "visual."),
)


DIALECTS = (KLITE, OFFICIAL, TIMM, TRANSFORMERS)  # K-LITE's stem has the authors' name: it is looked for first


_BLOCK_NORM = re.compile(r"^(layers\.\d+\.blocks\.\d+\.norm[12])\.")


# Matrices for us, 1x1 convolutions for timm; the authors and transformers have a convolution for h alone.
MATRIX = re.compile(r"(modulation\.(f|h|proj)|mlp\.fc[12])\.weight$")


def to_ours(weights: Mapping[str, Tensor], dialect: Dialect, *, where: str) -> Weights:
    """Our state dict from theirs; pre-norm where their names do not imply it, see :func:`as_post_norm`.

    Args:
        weights: theirs.
        dialect: what they call things.
        where: source of the weights, for the message.

    Raises:
        UserError: if a name is not one of theirs.
    """
    unprefixed = {name.removeprefix(dialect.base): x for name, x in weights.items()}
    ours = _rename(unprefixed, [(theirs, ours) for ours, theirs in dialect.rules], where)
    return {name: as_matrix(name, x) for name, x in ours.items()}


def as_post_norm(ours: Mapping[str, Tensor]) -> Weights:
    """Our state dict of pre-norm blocks as one of post-norm blocks."""
    return {_BLOCK_NORM.sub(r"\1_post.", name): x for name, x in ours.items()}


def to_theirs(weights: Mapping[str, Tensor], dialect: Dialect) -> Weights:
    """Their state dict (of the authors or transformers) from ours.

    Raises:
        UserError: if a name is not one of ours.
    """
    shaped = {name: as_conv(x) if name.endswith("modulation.h.weight") else x for name, x in weights.items()}
    return _rename(shaped, _post_norm_rules(dialect.rules) + dialect.rules, "the given weights")


def _post_norm_rules(rules: Rules) -> Rules:
    block = next(theirs for ours, theirs in rules if ours == _BLOCK)
    return [(f"{_BLOCK}norm{n}_post.", f"{block}norm{n}.") for n in (1, 2)]


def _rename(weights: Mapping[str, Tensor], rules: Rules, where: str) -> Weights:
    """Rename by the first rule (from, to) whose prefix fits, or raise UserError."""
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
        raise UserError(
            f"{where}: no part of a FocalNet: {some(unknown)}; the weights are another model's, or more than a tower's"
        )
    return renamed


def as_matrix(name: str, x: Tensor) -> Tensor:
    """The weight of a 1x1 convolution as that of our linear layer of this name."""
    return x[:, :, 0, 0] if MATRIX.search(name) and x.shape[2:] == (1, 1) else x


def as_conv(x: Tensor) -> Tensor:
    """The weight of a linear layer as that of a 1x1 convolution."""
    return x[..., None, None]


def some(names: Iterable[str]) -> str:
    """The first few names, and how many more."""
    ordered = sorted(names)
    return ", ".join(ordered[:5]) + (f" and {len(ordered) - 5} more" if len(ordered) > 5 else "")
