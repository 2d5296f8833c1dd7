"""FocalNet weights between code bases: the authors' (microsoft/FocalNet, microsoft/klite), timm's and transformers'.

:func:`from_official`, :func:`from_timm`, :func:`from_transformers` and :func:`from_klite` build the FocalNet that
weights imply; :func:`load_focalnet` finds out from the names which of them applies. The ``state_dict_from_`` and
``to_`` functions translate dictionaries. Our names are timm's; shapes differ where timm has 1x1 convolutions. Whatever
has no place in a FocalNet is an error.
"""

import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from focalclip.base.errors import UserError, first_line
from focalclip.models.focalnet import FocalNet
from focalclip.models.weights.architecture import complete, implied_config
from focalclip.models.weights.dialects import (
    DIALECTS,
    KLITE,
    MATRIX,
    OFFICIAL,
    TIMM,
    TRANSFORMERS,
    Dialect,
    Weights,
    as_conv,
    as_post_norm,
    some,
    to_ours,
    to_theirs,
)

Source = str | Path | Mapping[str, Any]

_WRAPPERS = ("model", "state_dict")  # of the authors' files, and of those of most training loops

_GIVEN = "the given weights"

_HEAD = "head.fc."


def read_weights(source: Source) -> tuple[Weights, str]:
    """Named tensors of a file of torch.save or safetensors, or its content, and what messages call them.

    Raises:
        UserError: if the file cannot be read safely or whole, or holds no named tensors.
    """
    if isinstance(source, Mapping):
        content, where = source, _GIVEN
    else:
        content, where = _read(Path(source)), str(source)
    inner = next((content[name] for name in _WRAPPERS if name in content), content)
    if not isinstance(inner, Mapping) or not inner or not all(isinstance(x, Tensor) for x in inner.values()):
        raise UserError(f"{where}: expected named tensors, at the top or under the key {' or '.join(_WRAPPERS)}")
    return dict(inner), where


def recognise(weights: Weights, where: str) -> tuple[Dialect, Weights]:
    """Whose names these are, and the weights without the prefix that all names have in common, which is told.

    Raises:
        UserError: if no code base calls a FocalNet's weights so, or some names do not have the prefix.
    """
    for dialect in DIALECTS:
        for stem in (dialect.base + dialect.stem, dialect.stem):
            if anchor := next((name for name in weights if f".{name}".endswith(f".{stem}")), None):
                prefix = anchor.removesuffix(stem)
                is_part = prefix.removeprefix("module.") in dialect.image_towers
                return dialect, _without_prefix(weights, prefix, is_part, where)
    raise UserError(f"{where}: not the weights of a FocalNet: no patch embedding; they begin with {some(weights)}")


def _without_prefix(weights: Weights, prefix: str, is_part: bool, where: str) -> Weights:
    """Names without ``vision.``, ``module.backbone.`` or the like; other names are left out if it ``is_part``."""
    if not prefix:
        return weights
    others = [name for name in weights if not name.startswith(prefix)]
    if others and not is_part:
        raise UserError(
            f"{where}: beside the weights under {prefix!r} there are others ({some(others)}); "
            f"pass on those under {prefix!r} alone"
        )
    rest = f"; {len(others):,} others are left out: {some(others)}" if others else ""
    warnings.warn(f"{where}: names are read without their prefix {prefix!r}{rest}", stacklevel=5)
    return {name.removeprefix(prefix): x for name, x in weights.items() if name.startswith(prefix)}


def _read(path: Path) -> Mapping[str, Any]:
    """Read a checkpoint file without running any code in it."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if _is_safetensors(path):
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise UserError(f"{path}: damaged or truncated ({error}); copy it again") from None
    try:
        with path.open("rb") as file:  # of a path, torch would look at the suffix
            content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if not (refused := re.search(r"(?:GLOBAL|Unsupported class) (\S+)", str(error))):
            raise UserError(f"{path}: damaged, truncated or no file of torch.save; copy it again") from None
        raise UserError(
            f"{path}: not a file of plain tensors ({refused[1]}), and nothing else is unpickled; "
            "save its state dict alone, best as .safetensors"
        ) from None
    except RuntimeError as error:
        if "TorchScript" not in str(error):
            raise UserError(f"{path}: damaged or truncated ({first_line(error)}); copy it again") from None
        raise UserError(f"{path}: a program of TorchScript, and none is run; save its state dict alone") from None
    except Exception as error:  # noqa: BLE001 - on damaged bytes the unpickler fails in every way there is
        raise UserError(f"{path}: damaged or truncated ({first_line(error)}); copy it again") from None
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: holds a {type(content).__name__}, not a state dict; save model.state_dict()")
    return content


def _is_safetensors(path: Path) -> bool:
    """By content: a length of 8 bytes, then JSON. By suffix where it is neither that nor a file of torch.save."""
    with path.open("rb") as file:
        head = file.read(9)
    if head.startswith((b"PK", b"\x80")):  # a zip, or a pickle, which are torch's formats
        return False
    return head[8:] == b"{" or path.suffix == ".safetensors"


def load_strictly(
    module: nn.Module, weights: Mapping[str, Tensor], where: str, *, remedy: str = "get it again"
) -> None:
    """Put weights into a module, which may be on the meta device; it then takes the tensors themselves.

    Args:
        module: what they are for.
        weights: by the module's names.
        where: source of the weights, for the message.
        remedy: what to do about weights that do not fit, for the message.

    Raises:
        UserError: listing what is missing, unexpected or of another shape.
    """
    own = module.state_dict()
    wrong = [name for name in own.keys() & weights.keys() if own[name].shape != weights[name].shape]
    problems = {
        "missing": own.keys() - weights.keys(), "unexpected": weights.keys() - own.keys(), "of another shape": wrong
    }  # fmt: skip
    if any(problems.values()):
        listed = "; ".join(f"{len(names)} {what}: {some(names)}" for what, names in problems.items() if names)
        raise UserError(f"{where}: not the weights of this {type(module).__name__} ({listed}); {remedy}")
    module.load_state_dict(weights, assign=any(x.is_meta for x in own.values()))


def load_tower(tower: FocalNet, _: Any, weights: Mapping[str, Tensor], where: str) -> list[str]:
    """Load weights in the names of any dialect, or in ours, into a FocalNet that is built; a head is left out.

    What weights do not imply (post-norm in the authors' names, the normalised modulator) is as the tower has it.

    Returns:
        What was fitted to the tower: nothing, as a FocalNet has no positions.

    Raises:
        UserError: listing what is missing, unexpected or of another shape.
    """
    if {name: x.shape for name, x in weights.items()} != {name: x.shape for name, x in tower.state_dict().items()}:
        dialect, theirs = recognise(dict(weights), where)
        ours = to_ours(theirs, dialect, where=where)
        if tower.config.use_post_norm and not dialect.implies_post_norm:
            ours = as_post_norm(ours)
        weights = {name: x for name, x in ours.items() if not name.startswith(_HEAD)}
    load_strictly(tower, weights, where, remedy="name the network of these weights as model.image.name")
    return []


def state_dict_from_timm(weights: Mapping[str, Tensor]) -> Weights:
    """State dict of timm's ``focalnet`` as a state dict of ours.

    Raises:
        UserError: if a name is not one of a FocalNet.
    """
    return to_ours(weights, TIMM, where=_GIVEN)


def to_timm(weights: Mapping[str, Tensor]) -> Weights:
    """State dict of our FocalNet as a state dict of timm's ``focalnet``."""
    return {name: as_conv(x) if MATRIX.search(name) else x for name, x in weights.items()}


def state_dict_from_transformers(weights: Mapping[str, Tensor], *, post_norm: bool = False) -> Weights:
    """State dict of transformers' ``FocalNetModel`` or ``FocalNetForImageClassification`` as a state dict of ours.

    Args:
        weights: theirs.
        post_norm: their config's ``use_post_layernorm``; the names are the same either way.

    Raises:
        UserError: if a name is not one of a FocalNet, such as the decoder of masked image modelling.
    """
    ours = to_ours(weights, TRANSFORMERS, where=_GIVEN)
    return as_post_norm(ours) if post_norm else ours


def to_transformers(weights: Mapping[str, Tensor]) -> Weights:
    """State dict of our FocalNet as one of ``FocalNetModel`` or, with a head, ``FocalNetForImageClassification``."""
    theirs = to_theirs(weights, TRANSFORMERS)
    if _HEAD + "weight" not in weights:
        return theirs
    return {name if name.startswith("classifier.") else TRANSFORMERS.base + name: x for name, x in theirs.items()}


def to_official(weights: Mapping[str, Tensor]) -> Weights:
    """State dict of our FocalNet as one of the authors' ``FocalNet``; their files hold it under the key ``model``."""
    return to_theirs(weights, OFFICIAL)


def to_klite(weights: Mapping[str, Tensor]) -> Weights:
    """State dict of our UniCL FocalNet as one of K-LITE's image tower."""
    return to_theirs(weights, KLITE)


class Loaded(NamedTuple):
    """A FocalNet built from weights, and the named variant with its architecture, if there is one."""

    tower: FocalNet
    variant: str | None


def from_official(
    source: Source,
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
        source: a file of torch.save or safetensors, whatever its suffix, or its content; weights may stand under the
            key ``model`` or ``state_dict``, and their names may have one prefix in common (``vision.``,
            ``module.``). Of a detector (of mmdet or mmseg) the backbone is taken.
        post_norm: blocks normalise after modulation and MLP (today's ``use_postln`` of the authors' code).
        normalize_modulator: must be given for large_fl4 and xlarge_fl4, on which published sources disagree.
        with_head: keep the classification head; the tower then returns logits.
        **flags: other fields of :class:`FocalNetConfig`, such as ``drop_path``; what the weights imply must agree.

    Raises:
        UserError: if the file cannot be read safely or whole, is no FocalNet of the authors, contradicts a flag, or
            has missing, unexpected or misshapen weights.
    """
    return _build(source, with_head, _named(flags, post_norm, normalize_modulator), OFFICIAL).tower


def from_timm(
    source: Source,
    *,
    post_norm: bool | None = None,
    normalize_modulator: bool | None = None,
    with_head: bool = False,
    **flags: Any,
) -> FocalNet:
    """Build a FocalNet from weights of timm's ``focalnet``, in float32 on the CPU.

    Arguments and errors are those of :func:`from_official`; timm's names imply ``post_norm``.
    """
    return _build(source, with_head, _named(flags, post_norm, normalize_modulator), TIMM).tower


def from_transformers(
    source: Source,
    *,
    post_norm: bool | None = None,
    normalize_modulator: bool | None = None,
    with_head: bool = False,
    **flags: Any,
) -> FocalNet:
    """Build a FocalNet from weights of transformers' ``FocalNetModel`` or ``FocalNetForImageClassification``.

    Arguments and errors are those of :func:`from_official`. A folder holds a configuration beside the weights, which
    ``load_image_encoder("transformers:FOLDER")`` reads; here ``post_norm`` is their ``use_post_layernorm``.
    """
    return _build(source, with_head, _named(flags, post_norm, normalize_modulator), TRANSFORMERS).tower


def from_klite(
    source: Source,
    *,
    post_norm: bool | None = None,
    normalize_modulator: bool | None = None,
    with_head: bool = False,
    **flags: Any,
) -> FocalNet:
    """Build K-LITE's UniCL FocalNet (see :class:`~focalclip.models.focalnet.blocks.UniCLBlock`) from its weights.

    The names imply everything except whether gates pass a sigmoid (``USE_SIGMOID``, off in K-LITE's configuration);
    here they do not. Arguments and errors are those of :func:`from_official`; of a two-tower model the image tower is
    taken (``image_encoder.``, or ``visual.`` in older files).
    """
    return _build(source, with_head, _named(flags, post_norm, normalize_modulator), KLITE).tower


def load_focalnet(
    source: Source,
    *,
    post_norm: bool | None = None,
    normalize_modulator: bool | None = None,
    with_head: bool = False,
    **flags: Any,
) -> FocalNet:
    """Build a FocalNet from weights of the authors, K-LITE, timm or transformers, by the names of the weights.

    Arguments and errors are those of :func:`from_official`.
    """
    return _build(source, with_head, _named(flags, post_norm, normalize_modulator)).tower


def load_variant(
    source: Source,
    *,
    post_norm: bool | None = None,
    normalize_modulator: bool | None = None,
    with_head: bool = False,
    **flags: Any,
) -> Loaded:
    """What :func:`load_focalnet` builds, and which variant it is."""
    return _build(source, with_head, _named(flags, post_norm, normalize_modulator))


def _named(flags: dict[str, Any], post_norm: bool | None, normalize_modulator: bool | None) -> dict[str, Any]:
    """All flags by the names of :class:`~focalclip.models.focalnet.FocalNetConfig`."""
    not_in_weights = {"use_post_norm": post_norm, "normalize_modulator": normalize_modulator}
    if twice := flags.keys() & not_in_weights.keys():
        raise UserError(f"{', '.join(twice)} is not a flag of weights; it is called post_norm")
    return flags | {name: value for name, value in not_in_weights.items() if value is not None}


def _build(source: Source, with_head: bool, flags: dict[str, Any], expected: Dialect | None = None) -> Loaded:
    """The tower of weights in the names of ``expected``, or of any dialect."""
    weights, where = read_weights(source)
    dialect, weights = recognise(weights, where)
    if expected not in (None, dialect):
        raise UserError(f"{where}: these are {dialect.owner}'s names; use from_{dialect.owner} or load_focalnet")
    ours = to_ours(weights, dialect, where=where)
    num_classes = len(ours.get(_HEAD + "weight", ()))
    if with_head and not num_classes:
        raise UserError(f"{where}: with_head=True, but the weights have no classification head; leave it out")
    if flags.get("num_classes", kept := num_classes if with_head else 0) != kept:
        raise UserError(
            f"{where}: num_classes={flags['num_classes']} contradicts the weights, whose head has {num_classes}; "
            "with_head=True keeps it, and without it a head of your own takes the features"
        )
    implied = implied_config(ours, num_classes=kept, where=where)
    config, variant = complete(implied, flags, where=where, implies_post_norm=dialect.implies_post_norm)
    if config.use_post_norm and not dialect.implies_post_norm:
        ours = as_post_norm(ours)
    with torch.device("meta"):
        tower = FocalNet(config)
    kept_weights = {name: x for name, x in ours.items() if with_head or not name.startswith(_HEAD)}
    load_strictly(tower, kept_weights, where, remedy="get the file again")
    return Loaded(tower.float(), variant)
