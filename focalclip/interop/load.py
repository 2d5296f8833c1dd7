"""Trained models by source: a run directory, an exported folder, a file, another library's model, or a function."""

import importlib
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from focalclip import names
from focalclip.base.errors import UserError
from focalclip.base.files import home_expanded, user_path
from focalclip.config import ImageTowerConfig
from focalclip.interop import folder as store
from focalclip.interop.encoder import ImageEncoder
from focalclip.models.preprocess import eval_transform
from focalclip.models.text import text_entry
from focalclip.models.weights.convert import load_variant

_FILES = (".pth", ".pt", ".safetensors", ".bin", ".ckpt", ".tar")  # of weights: for messages where there is none

Device = str | torch.device | None

_FUNCTION = re.compile(r"([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):([A-Za-z_]\w*)")

_NEEDED = ("encode_image", "encode_text", "tokenizer", "preprocess")


def load(source: str | Path, device: Device = None) -> Any:
    """Load a trained two-tower model in evaluation mode.

    Args:
        source: a run directory, an exported folder, a name with a prefix of :data:`focalclip.names.SOURCES`
            (``open_clip:NAME/PRETRAINED`` with a tag or the path of a checkpoint, ``open_clip:hf-hub:ORG/NAME``,
            ``open_clip:local-dir:FOLDER``; CLIP, SigLIP or an export of ours as ``transformers:NAME_OR_FOLDER``), or
            ``package.module:function``, a function without arguments that returns any object with ``encode_image``,
            ``encode_text``, ``tokenizer`` and ``preprocess``.
        device: where to put it; None for the CPU.

    Returns:
        A model with ``encode_image``, ``encode_text``, ``preprocess`` and ``tokenizer``.

    Raises:
        UserError: if there is no trained two-tower model at ``source``, or it cannot be read whole.
    """
    name = home_expanded(str(source))
    prefix, rest = names.split(name)
    library = names.SOURCES.get(prefix)
    if library is not None and library.model is not None:
        return names.find(library.model)(rest).to(device).eval()
    if library is not None or is_weights_file(name):
        raise UserError(
            f"{name}: an image tower without a text tower; load it with focalclip.load_image_encoder, "
            f"or give one of: {names.sources('model')}"
        )
    if _FUNCTION.fullmatch(name) and not Path(name).exists():
        model = _load_function(name)
        return model.to(device).eval() if isinstance(model, torch.nn.Module) else model
    read = store.read(exported_folder(name, "model")).to(device)
    if text_entry(read.config.text).write_files:
        _ = read.tokenizer  # whose files may be missing, which is better known now
    return read


def load_image_encoder(
    source: str | Path,
    device: Device = None,
    dtype: torch.dtype | None = None,
    trainable: bool = False,
    **flags: Any,
) -> ImageEncoder:
    """Load an image tower, frozen: evaluation mode, no gradients, no activations kept.

    Args:
        source: a run directory, an exported folder, a name with a prefix of :data:`focalclip.names.SOURCES`
            (``timm:NAME`` with timm's published weights, ``open_clip:NAME/PRETRAINED``,
            ``transformers:NAME_OR_FOLDER``), or a file of FocalNet weights (torch.save's or safetensors, whatever its
            suffix) with the names of the authors, their detectors, K-LITE, timm or transformers.
        device: where to put it; None for the CPU.
        dtype: of its parameters; None for float32.
        trainable: for fine-tuning inside another model instead: training mode, all parameters with gradients.
        **flags: for a file what its weights do not imply, such as ``normalize_modulator``; see
            :func:`~focalclip.models.weights.from_official`.

    Returns:
        ``encoder(images) -> (B, D)``, also ``.feature_maps(images)``, ``.strides`` and ``.preprocess(picture)``.

    Raises:
        UserError: if there is no trained image tower at ``source``, or a flag is not for it.
    """
    name = home_expanded(str(source))
    if flags and not is_weights_file(name):
        raise UserError(f"{name}: {', '.join(flags)} is for files of FocalNet weights alone; leave it out")
    encoder = _encoder(name, flags).to(device=device, dtype=dtype)
    return encoder.unfreeze() if trainable else encoder


def is_weights_file(source: str) -> bool:
    """Whether a source is a file of weights, by what lies there; by its suffix where nothing does."""
    path = Path(source)
    return path.is_file() or (not path.exists() and source.endswith(_FILES) and not names.split(source)[0])


def newest_run(runs_dir: str | Path = "runs") -> Path:
    """The run directory whose exported model was written last.

    Raises:
        UserError: if there is none.
    """
    models = sorted(user_path(runs_dir).glob(f"*/model/{store.OURS}"), key=lambda path: path.stat().st_mtime)
    if not models:
        raise UserError(
            f"{runs_dir}: no trained run here; train one with scripts/pretrain.py or name a model with --model"
        )
    return models[-1].parents[1]


def _encoder(name: str, flags: dict[str, Any]) -> ImageEncoder:
    prefix, rest = names.split(name)
    if prefix:
        library = names.SOURCES[prefix]
        if library.encoder is None:
            raise UserError(f"{name}: {prefix} has no image encoders; give one of: {names.sources('encoder')}")
        return names.find(library.encoder)(rest)
    if is_weights_file(name):
        return _file_encoder(name, flags)
    model = store.read(exported_folder(name, "encoder"))
    return ImageEncoder(model.visual.trunk, partial(eval_transform, model.config.image))


def _file_encoder(path: str, flags: dict[str, Any]) -> ImageEncoder:
    """The FocalNet of a file; preprocessed as timm does for its variant, else at 224 pixels."""
    tower, variant = load_variant(path, **flags)
    if variant is None:
        return ImageEncoder(tower, partial(eval_transform, ImageTowerConfig(image_size=224), tower.in_channels))
    return ImageEncoder(tower, partial(names.find("focalclip.interop.timm:timm_preprocess"), variant))


def exported_folder(source: str, kind: str) -> Path:
    """``source`` itself, or the ``model`` folder of the run directory that it is.

    Args:
        source: a path.
        kind: what is wanted of it, for messages: see :func:`focalclip.names.sources`.

    Raises:
        UserError: if it is no folder, or a run without a model.
    """
    folder = Path(source)
    if not folder.is_dir():
        raise UserError(f"{source}: no such folder; give one of: {names.sources(kind)}")
    if (folder / "model").is_dir():
        return folder / "model"
    runs = sorted(str(child) for child in folder.iterdir() if (child / "config.yaml").is_file())
    if runs and not (folder / "config.yaml").is_file():
        raise UserError(f"{source}: is a folder of runs; name one of them: {', '.join(runs)}")
    if (folder / "config.yaml").is_file():
        raise UserError(f"{source}: this run has no model yet; train it further with scripts/pretrain.py --resume")
    return folder


def _load_function(source: str) -> Any:
    """Call the function; its module is looked for in the working directory too, as ``python -m`` does.

    Raises:
        UserError: if there is no such module or function, or what it returns lacks one of the four attributes.
    """
    module_name, _, function_name = source.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise UserError(f"{source}: no module {module_name} here or among the installed ones") from None
    function = getattr(module, function_name, None)
    if not callable(function):
        raise UserError(f"{source}: {module_name} has no function {function_name}")
    model = function()
    missing = [name for name in _NEEDED if not hasattr(model, name)]
    if missing:
        raise UserError(
            f"{source}: what it returns has no {', '.join(missing)}; see focalclip.evaluation.features.model"
        )
    return model
