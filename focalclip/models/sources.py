"""Trained models by source: a run directory, an exported folder, or another library's model."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from focalclip.config import ImageTowerConfig
from focalclip.errors import UserError, first_line
from focalclip.models import store
from focalclip.models.encoder import ImageEncoder, Preprocess
from focalclip.models.towers import TIMM, create_image_tower
from focalclip.preprocess import eval_transform

OPEN_CLIP = "open_clip:"
FILES = (".pth", ".pt", ".safetensors")
Device = str | torch.device | None


def load(source: str | Path, device: Device = None) -> Any:
    """Load a trained two-tower model in evaluation mode.

    Args:
        source: a run directory, an exported folder, ``open_clip:NAME/PRETRAINED``, ``open_clip:hf-hub:ORG/NAME`` or
            ``open_clip:local-dir:FOLDER``.
        device: where to put it; None for the CPU.

    Returns:
        A model with ``encode_image``, ``encode_text``, ``preprocess`` and ``tokenizer``.

    Raises:
        UserError: if there is no trained two-tower model at ``source``, or it cannot be read whole.
    """
    name = str(source)
    if name.startswith(OPEN_CLIP):
        return OpenClipModel(name.removeprefix(OPEN_CLIP)).to(device).eval()
    if name.startswith(TIMM) or name.endswith(FILES):
        raise UserError(
            f"{name}: an image tower without a text tower; load it with focalclip.load_image_encoder, "
            "or name a run directory, an exported folder or open_clip:NAME/PRETRAINED"
        )
    return store.read(_exported_folder(name, "open_clip:NAME/PRETRAINED")).to(device)


def load_image_encoder(
    source: str | Path, device: Device = None, dtype: torch.dtype | None = None, **flags: Any
) -> ImageEncoder:
    """Load an image tower, frozen: evaluation mode, no gradients, no activations kept.

    Args:
        source: a run directory, an exported folder, ``timm:NAME`` (with timm's published weights), or a FocalNet file
            (``.pth``, ``.pt`` or ``.safetensors``) of the authors.
        device: where to put it; None for the CPU.
        dtype: of its parameters; None for float32.
        **flags: for a file of the authors what its weights do not tell, such as ``normalize_modulator``; see
            :func:`~focalclip.models.weights.from_official`.

    Returns:
        ``encoder(images) -> (B, D)``, also ``.feature_maps(images)``, ``.strides`` and ``.preprocess(picture)``.

    Raises:
        UserError: if there is no trained image tower at ``source``, or a flag is not for it.
    """
    name = str(source)
    if name.startswith(OPEN_CLIP):
        raise UserError(
            f"{name}: only focalclip.load takes open_clip's models; use its encode_image, or timm:NAME here"
        )
    if name.endswith(FILES):
        from focalclip.models.weight_config import variant_of
        from focalclip.models.weights import from_official

        tower = from_official(name, **flags)
        variant = variant_of(tower.config)
        unknown = partial(eval_transform, ImageTowerConfig(image_size=224))
        encoder = ImageEncoder(tower, partial(_timm_preprocess, variant) if variant else unknown)
    elif flags:
        raise UserError(f"{name}: {', '.join(flags)} is for FocalNet files of the authors alone; leave it out")
    elif name.startswith(TIMM):
        tower = create_image_tower(name, pretrained=True)
        encoder = ImageEncoder(tower, partial(_timm_preprocess, name.removeprefix(TIMM)))
    else:
        model = store.read(_exported_folder(name, "timm:NAME, a FocalNet .pth"))
        encoder = ImageEncoder(model.visual.trunk, partial(eval_transform, model.config.image))
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

        architecture, pretrained = name, None
        if not name.startswith(("hf-hub:", "local-dir:")):
            architecture, _, pretrained = name.partition("/")
            tags = open_clip.list_pretrained_tags_by_model(architecture)
            if not pretrained and tags:
                raise UserError(
                    f"open_clip:{name}: say which weights, as open_clip:{architecture}/PRETRAINED with one of "
                    f"{', '.join(tags)}"
                )
            if not pretrained:
                raise UserError(
                    f"open_clip:{name}: open_clip has no weights of that name; see open_clip.list_pretrained()"
                )
        try:
            made: Any = open_clip.create_model_from_pretrained(architecture, pretrained=pretrained)
            self.tokenizer = open_clip.get_tokenizer(architecture)
        except (RuntimeError, OSError, ValueError) as error:
            raise UserError(f"open_clip:{name}: open_clip cannot load it: {first_line(error)}") from None
        self.model: Any = made[0]
        self.preprocess = made[1]

    def encode_image(self, images: Tensor, normalize: bool = False) -> Tensor:
        """Embed normalised images (B, 3, H, W) as (B, D)."""
        return self.model.encode_image(images, normalize=normalize)

    def encode_text(self, tokens: Tensor, normalize: bool = False) -> Tensor:
        """Embed tokens (B, L) as (B, D)."""
        return self.model.encode_text(tokens, normalize=normalize)


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
