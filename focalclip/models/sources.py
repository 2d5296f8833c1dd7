"""Trained models by source: a run directory, an exported folder, or another library's model."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from focalclip.config import ImageTowerConfig
from focalclip.errors import UserError
from focalclip.models import store
from focalclip.models.encoder import ImageEncoder
from focalclip.models.towers import TIMM, create_image_tower

OPEN_CLIP = "open_clip:"
Device = str | torch.device | None


def load(source: str | Path, device: Device = None) -> Any:
    """Load a trained two-tower model in evaluation mode.

    Args:
        source: a run directory, an exported folder, or ``open_clip:NAME[/PRETRAINED]``.
        device: where to put it; None for the CPU.

    Returns:
        A model with ``encode_image``, ``encode_text``, ``preprocess`` and ``tokenizer``.

    Raises:
        UserError: if there is no model at ``source``, or it cannot be read whole.
    """
    name = str(source)
    if name.startswith(OPEN_CLIP):
        return OpenClipModel(name.removeprefix(OPEN_CLIP)).to(device).eval()
    return store.read(_exported_folder(name)).to(device)


def load_image_encoder(source: str | Path, device: Device = None, dtype: torch.dtype | None = None) -> ImageEncoder:
    """Load an image tower, frozen: evaluation mode, no gradients, no activations kept.

    Args:
        source: a run directory, an exported folder, ``timm:NAME`` (with timm's published weights), or a FocalNet
            ``.pth`` of the authors.
        device: where to put it; None for the CPU.
        dtype: of its parameters; None for float32.

    Returns:
        ``encoder(images) -> (B, D)``, also ``.feature_maps(images)``, ``.strides`` and ``.preprocess(picture)``.

    Raises:
        UserError: if there is no image tower at ``source``.
    """
    name = str(source)
    if name.startswith(TIMM):
        encoder = ImageEncoder(create_image_tower(name, pretrained=True), _timm_preprocessing(name))
    elif name.endswith((".pth", ".pt")):
        from focalclip.models.weights import from_official

        encoder = ImageEncoder(from_official(name), ImageTowerConfig(image_size=224))
    else:
        model = store.read(_exported_folder(name))
        encoder = ImageEncoder(model.visual.trunk, model.config.image)
    return encoder.to(device=device, dtype=dtype)


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


class OpenClipModel(nn.Module):
    """A model of open_clip behind our interface."""

    def __init__(self, name: str) -> None:
        super().__init__()
        import open_clip

        architecture, _, pretrained = name.partition("/")
        try:
            made = open_clip.create_model_and_transforms(architecture, pretrained=pretrained or None)
        except (RuntimeError, OSError, ValueError) as error:
            raise UserError(f"open_clip:{name}: open_clip cannot load it: {str(error).splitlines()[0]}") from None
        self.model: Any = made[0]
        self.preprocess = made[2]
        self.tokenizer = open_clip.get_tokenizer(architecture)

    def encode_image(self, images: Tensor, normalize: bool = False) -> Tensor:
        """Embed normalised images (B, 3, H, W) as (B, D)."""
        return self.model.encode_image(images, normalize=normalize)

    def encode_text(self, tokens: Tensor, normalize: bool = False) -> Tensor:
        """Embed tokens (B, L) as (B, D)."""
        return self.model.encode_text(tokens, normalize=normalize)


def _exported_folder(source: str) -> Path:
    """``source`` itself, or the ``model`` folder of the run directory that it is."""
    folder = Path(source)
    if not folder.is_dir():
        raise UserError(
            f"{source}: no such folder; give a run directory, an exported folder or open_clip:NAME[/PRETRAINED]"
        )
    if (folder / "model").is_dir():
        return folder / "model"
    if (folder / "config.yaml").is_file():
        raise UserError(f"{source}: this run has no model yet; train it further with scripts/pretrain.py --resume")
    return folder


def _timm_preprocessing(name: str) -> ImageTowerConfig:
    """The preprocessing that timm states for its weights, in our terms."""
    import timm

    data: Any = timm.data.resolve_data_config(model=timm.create_model(name.removeprefix(TIMM), pretrained=False))
    return ImageTowerConfig(
        name=name,
        image_size=data["input_size"][-1],
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
        interpolation="bilinear" if data["interpolation"] == "bilinear" else "bicubic",
    )
