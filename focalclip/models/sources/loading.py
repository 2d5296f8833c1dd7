"""Trained models by source: a run directory, an exported folder, a file, or another library's model."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from focalclip.config import ImageTowerConfig
from focalclip.errors import UserError
from focalclip.models.sources import store
from focalclip.models.sources.encoder import ImageEncoder, Preprocess
from focalclip.models.sources.open_clip_adapter import OPEN_CLIP, OpenClipModel, open_clip_encoder
from focalclip.models.sources.python_function import is_function, load_function
from focalclip.models.sources.transformers_adapter import load_transformers, transformers_encoder
from focalclip.models.text import HUGGING_FACE
from focalclip.models.towers import TIMM, create_image_tower
from focalclip.models.weights import load_focalnet
from focalclip.models.weights.architecture import variant_of
from focalclip.preprocess import eval_transform

FILES = (".pth", ".pt", ".safetensors")
Device = str | torch.device | None


def load(source: str | Path, device: Device = None) -> Any:
    """Load a trained two-tower model in evaluation mode.

    Args:
        source: a run directory, an exported folder, ``open_clip:NAME/PRETRAINED`` (a tag, or the path of a checkpoint),
            ``open_clip:hf-hub:ORG/NAME``, ``open_clip:local-dir:FOLDER``, CLIP, SigLIP or an export of ours as
            ``transformers:NAME_OR_FOLDER``, or ``package.module:function``, a function without arguments that returns
            any object with ``encode_image``, ``encode_text``, ``tokenizer`` and ``preprocess``.
        device: where to put it; None for the CPU.

    Returns:
        A model with ``encode_image``, ``encode_text``, ``preprocess`` and ``tokenizer``.

    Raises:
        UserError: if there is no trained two-tower model at ``source``, or it cannot be read whole.
    """
    name = str(source)
    if name.startswith(OPEN_CLIP):
        return OpenClipModel(name.removeprefix(OPEN_CLIP)).to(device).eval()
    if name.startswith(HUGGING_FACE):
        return load_transformers(name.removeprefix(HUGGING_FACE)).to(device).eval()
    if name.startswith(TIMM) or name.endswith(FILES):
        raise UserError(
            f"{name}: an image tower without a text tower; load it with focalclip.load_image_encoder, "
            "or name a run directory, an exported folder or open_clip:NAME/PRETRAINED"
        )
    if is_function(name) and not Path(name).exists():
        model = load_function(name)
        return model.to(device).eval() if isinstance(model, torch.nn.Module) else model
    return store.read(_exported_folder(name, "open_clip:NAME/PRETRAINED")).to(device)


def load_image_encoder(
    source: str | Path, device: Device = None, dtype: torch.dtype | None = None, **flags: Any
) -> ImageEncoder:
    """Load an image tower, frozen: evaluation mode, no gradients, no activations kept.

    Args:
        source: a run directory, an exported folder, ``timm:NAME`` (with timm's published weights),
            ``open_clip:NAME/PRETRAINED``, ``transformers:NAME_OR_FOLDER``, or a FocalNet file (``.pth``, ``.pt`` or
            ``.safetensors``) of the authors or of timm.
        device: where to put it; None for the CPU.
        dtype: of its parameters; None for float32.
        **flags: for a file what its weights do not tell, such as ``normalize_modulator``; see
            :func:`~focalclip.models.weights.from_official`.

    Returns:
        ``encoder(images) -> (B, D)``, also ``.feature_maps(images)``, ``.strides`` and ``.preprocess(picture)``.

    Raises:
        UserError: if there is no trained image tower at ``source``, or a flag is not for it.
    """
    name = str(source)
    if flags and not name.endswith(FILES):
        raise UserError(f"{name}: {', '.join(flags)} is for files of FocalNet weights alone; leave it out")
    return _encoder(name, flags).to(device=device, dtype=dtype)


def _encoder(name: str, flags: dict[str, Any]) -> ImageEncoder:
    if name.startswith(OPEN_CLIP):
        return open_clip_encoder(name.removeprefix(OPEN_CLIP))
    if name.startswith(HUGGING_FACE):
        return transformers_encoder(name.removeprefix(HUGGING_FACE))
    if name.startswith(TIMM):
        tower = create_image_tower(name, pretrained=True)
        return ImageEncoder(tower, partial(_timm_preprocess, name.removeprefix(TIMM)))
    if name.endswith(FILES):
        return _file_encoder(name, flags)
    model = store.read(_exported_folder(name, "timm:NAME, a FocalNet .pth"))
    return ImageEncoder(model.visual.trunk, partial(eval_transform, model.config.image))


def _file_encoder(path: str, flags: dict[str, Any]) -> ImageEncoder:
    """The FocalNet of a file; preprocessed as timm does for its variant, else at 224 pixels."""
    tower = load_focalnet(path, **flags)
    variant = variant_of(tower.config)
    unknown = partial(eval_transform, ImageTowerConfig(image_size=224))
    return ImageEncoder(tower, partial(_timm_preprocess, variant) if variant else unknown)


def newest_run(runs_dir: str | Path = "runs") -> Path:
    """The run directory whose exported model was written last.

    Raises:
        UserError: if there is none.
    """
    models = sorted(Path(runs_dir).glob(f"*/model/{store.OURS}"), key=lambda path: path.stat().st_mtime)
    if not models:
        raise UserError(
            f"{runs_dir}: no trained run here; train one with scripts/pretrain.py or name a model with --model"
        )
    return models[-1].parents[1]


def _exported_folder(source: str, others: str) -> Path:
    """``source`` itself, or the ``model`` folder of the run directory that it is."""
    folder = Path(source)
    if not folder.is_dir():
        raise UserError(f"{source}: no such folder; give a run directory, an exported folder or {others}")
    if (folder / "model").is_dir():
        return folder / "model"
    if (folder / "config.yaml").is_file():
        raise UserError(f"{source}: this run has no model yet; train it further with scripts/pretrain.py --resume")
    return folder


def _timm_preprocess(name: str) -> Preprocess:
    """The preprocessing that timm states for the published weights of ``name``: size, crop, interpolation, colours."""
    import timm
    from torchvision.transforms import Compose

    published: Any = timm.get_pretrained_cfg(name)
    options: Any = timm.data.resolve_data_config(pretrained_cfg=published.to_dict())
    return Compose([_to_rgb, timm.data.create_transform(**options)])


def _to_rgb(picture: Image.Image) -> Image.Image:
    return picture.convert("RGB")
