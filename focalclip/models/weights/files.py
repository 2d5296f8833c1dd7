"""State dicts out of files: nothing but tensors is unpickled, and wrappers and prefixes around the names come off."""

import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from focalclip.errors import UserError, first_line
from focalclip.models.weights.names import DIALECTS, Dialect, Weights, some

_WRAPPERS = ("model", "state_dict")  # of the authors' files, and of those of most training loops


def read_weights(source: str | Path | Mapping[str, Any]) -> tuple[Weights, str]:
    """Named tensors of a ``.pth``, ``.pt`` or ``.safetensors`` file or its content, and what messages call them.

    Raises:
        UserError: if the file cannot be read safely or whole, or holds no named tensors.
    """
    if isinstance(source, Mapping):
        content, where = source, "the given weights"
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
                tower = {name: x for name, x in weights.items() if name.startswith(prefix)}
                return dialect, _without_prefix(tower if prefix in dialect.image_towers else weights, prefix, where)
    raise UserError(f"{where}: not the weights of a FocalNet: no patch embedding; they begin with {some(weights)}")


def _without_prefix(weights: Weights, prefix: str, where: str) -> Weights:
    """Names without ``vision.``, ``module.backbone.`` or the like."""
    if not prefix:
        return weights
    if others := [name for name in weights if not name.startswith(prefix)]:
        raise UserError(
            f"{where}: beside the weights under {prefix!r} there are others ({some(others)}); "
            f"pass on those under {prefix!r} alone"
        )
    warnings.warn(f"{where}: names are read without their prefix {prefix!r}", stacklevel=5)
    return {name.removeprefix(prefix): x for name, x in weights.items()}


def _read(path: Path) -> Mapping[str, Any]:
    """Read a checkpoint file without running any code in it."""
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
    except pickle.UnpicklingError as error:
        if not (refused := re.search(r"(?:GLOBAL|Unsupported class) (\S+)", str(error))):
            raise UserError(f"{path}: damaged, truncated or no file of torch.save; copy it again") from None
        raise UserError(
            f"{path}: not a file of plain tensors ({refused[1]}), and nothing else is unpickled; "
            "save its state dict alone, best as .safetensors"
        ) from None
    except Exception as error:  # noqa: BLE001 - on damaged bytes the unpickler fails in every way there is
        raise UserError(f"{path}: damaged or truncated ({first_line(error)}); copy it again") from None
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: holds a {type(content).__name__}, not a state dict; save model.state_dict()")
    return content
