"""The image tower alone, as timm and transformers have it: a plain FocalNet that gives pooled features."""

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from focalclip.config import ImageTowerConfig
from focalclip.errors import UserError
from focalclip.export.trained import Trained
from focalclip.models.clip import FocalCLIP
from focalclip.models.focalnet import FocalNet, FocalNetConfig
from focalclip.models.registries.timm_registry import needs_focalclip
from focalclip.models.towers import TIMM
from focalclip.models.weights import to_timm, to_transformers

WEIGHTS = "model.safetensors"


def write_timm(trained: Trained, folder: Path) -> list[str]:
    """Write ``config.json`` and ``model.safetensors``, which ``timm.create_model("local-dir:FOLDER")`` loads strictly.

    Raises:
        UserError: if timm has no such tower.
    """
    import timm

    image, tower = trained.model.config.image, trained.model.visual.trunk
    name = image.name.removeprefix(TIMM)
    if not timm.is_model(name):
        raise UserError(f"--format timm: timm cannot build {name}; use --format open_clip or onnx")
    weights = tower.trunk.state_dict() if image.name.startswith(TIMM) else to_timm(tower.state_dict())
    save(weights, folder / WEIGHTS)
    config = {
        "architecture": name,
        "num_classes": 0,
        "num_features": tower.num_features,
        "global_pool": "avg",
        "pretrained_cfg": _timm_pretrained_cfg(image),
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return [f"timm builds {name} only after `import focalclip`."] if needs_focalclip(name) else []


def _timm_pretrained_cfg(image: ImageTowerConfig) -> dict[str, Any]:
    modes = {"shortest": "center", "squash": "squash", "longest": "border"}
    return {
        "input_size": [3, image.image_size, image.image_size],
        "fixed_input_size": False,
        "interpolation": image.interpolation,
        "crop_pct": 1.0,
        "crop_mode": modes[image.resize_mode],
        "mean": list(image.mean),
        "std": list(image.std),
        "num_classes": 0,
        "first_conv": "stem.proj",
        "classifier": "head.fc",
    }


def timm_usage(trained: Trained, folder: str) -> str:
    """Python that loads the tower."""
    name = trained.model.config.image.name.removeprefix(TIMM)
    ours = "import focalclip  # registers the tower with timm\n" if needs_focalclip(name) else ""
    return f"""{ours}import timm

tower = timm.create_model("local-dir:{folder}", pretrained=True)  # hf-hub:ORG/NAME from the hub
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(tower))
features = tower.eval()(transform(picture)[None])  # (1, {trained.model.visual.trunk.num_features})"""


def why_not_transformers(tower: Any) -> str | None:
    """What transformers' FocalNet cannot hold of this tower, in one clause; None if it holds all of it."""
    if not isinstance(tower, FocalNet):
        return "the tower is no FocalNet"
    config = tower.config
    if config.use_overlap and config.patch_size != 4:
        return f"it has overlapping stems of stride 4 alone, not {config.patch_size}"
    return next((f"it has no {name}={getattr(config, name)}" for name in _changed(config, _TRANSFORMERS_FIELDS)), None)


_TRANSFORMERS_FIELDS = {
    "embed_dim", "depths", "focal_levels", "focal_windows", "mlp_ratio", "patch_size", "use_overlap", "use_post_norm",
    "use_post_norm_in_modulation", "normalize_modulator", "layer_scale", "dropout", "drop_path", "in_channels",
    "num_classes", "activation_checkpointing", "init",
}  # fmt: skip


def _changed(config: FocalNetConfig, known: set[str]) -> list[str]:
    """Fields outside ``known`` that differ from their defaults."""
    default = FocalNetConfig()
    names = [field.name for field in fields(config) if field.name not in known]
    return [name for name in names if getattr(config, name) != getattr(default, name)]


def write_transformers_tower(model: FocalCLIP, folder: Path) -> None:
    """Write what ``transformers.FocalNetModel.from_pretrained(FOLDER)`` loads, with its image processor.

    Raises:
        UserError: if transformers' FocalNet cannot hold the tower.
    """
    import transformers

    tower = model.visual.trunk
    if reason := why_not_transformers(tower):
        raise UserError(f"transformers cannot hold {model.config.image.name}: {reason}")
    c = replace(tower.config, drop_path=0.0)
    config = transformers.FocalNetConfig(
        image_size=model.config.image.image_size, patch_size=c.patch_size, num_channels=c.in_channels,
        embed_dim=c.embed_dim, use_conv_embed=c.use_overlap, hidden_sizes=list(c.dims), depths=list(c.depths),
        focal_levels=list(c.stage_levels), focal_windows=list(c.stage_windows), mlp_ratio=c.mlp_ratio,
        hidden_dropout_prob=c.dropout, drop_path_rate=0.0, use_layerscale=c.layer_scale is not None,
        layerscale_value=c.layer_scale or 1e-4, use_post_layernorm=c.use_post_norm,
        use_post_layernorm_in_modulation=c.use_post_norm_in_modulation, normalize_modulator=c.normalize_modulator,
        encoder_stride=tower.strides[-1],
    )  # fmt: skip
    config.architectures = ["FocalNetModel"]
    config.save_pretrained(folder)
    save(to_transformers(tower.state_dict()), folder / WEIGHTS)
    image_processor(model.config.image).save_pretrained(folder)


def image_processor(image: ImageTowerConfig) -> Any:
    """The image processor of transformers that makes of a picture what ``model.preprocess`` makes of it.

    Raises:
        UserError: if it has no such resize.
    """
    from transformers import CLIPImageProcessorPil  # Pillow's resize, as in training; torchvision's differs slightly

    side = image.image_size
    if image.resize_mode == "longest":
        raise UserError("--format transformers: its image processor has no resize_mode=longest; export to open_clip")
    square = {"height": side, "width": side}
    return CLIPImageProcessorPil(
        size=square if image.resize_mode == "squash" else {"shortest_edge": side},
        do_center_crop=image.resize_mode == "shortest",
        crop_size=square,
        image_mean=list(image.mean),
        image_std=list(image.std),
        resample={"bilinear": 2, "bicubic": 3}[image.interpolation],  # Pillow's numbers
    )


def save(weights: dict[str, Tensor], path: Path) -> None:
    """Write safetensors in float32."""
    from safetensors.torch import save_file

    plain = {name: x.detach().float().cpu().contiguous() for name, x in weights.items()}
    save_file(plain, path, metadata={"format": "pt"})
