"""Exported folders: written so that open_clip reads them, and read back strictly.

    FOLDER/open_clip_config.json         architecture and preprocessing in open_clip's terms
    FOLDER/open_clip_model.safetensors   weights under open_clip's and timm's names
    FOLDER/focalclip.json                our own model configuration, the provenance of the weights, and the SHA-256 of
                                         every file (its own included): what was damaged is not loaded

The normalisation before the image projection is folded into the projection, so the export is a plain
``timm tower + linear`` model. Towers that timm does not name need ``import focalclip`` before open_clip builds them;
the configuration then says so under ``requires``. Where the name does not give the whole tower (``options``, another
mixer) or timm has no such tower, open_clip cannot build it: ``open_clip_config.json`` is left out, and the weights keep
the tower's own names if timm has none for them. A Hugging Face text tower is stored in the folder with its tokenizer,
where :func:`read` finds both. open_clip looks up its architecture on the hub if the model was trained under a hub name;
otherwise it looks in the working directory, so it has to be started inside the folder.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from focalclip import names
from focalclip.base.errors import UserError
from focalclip.base.files import file_sha256, read_sealed_json, user_path, whole_folder, write_sealed_json
from focalclip.base.strict import from_dict
from focalclip.config import ModelConfig, TextTowerConfig
from focalclip.interop.register import needs_focalclip
from focalclip.models.clip import FocalCLIP
from focalclip.models.norm import GlobalBatchNorm, fold_into, unfold_from
from focalclip.models.text import text_entry
from focalclip.models.weights import load_strictly

CONFIG, WEIGHTS, OURS = "open_clip_config.json", "open_clip_model.safetensors", "focalclip.json"

FORMAT = 2

_UNSEALED = 1  # the format before, without hashes

TOWER_WEIGHTS = "model.safetensors"  # of an image tower alone, as timm and transformers name it

_TRUNK = "visual.trunk."

_FEATURE_NORM = "feature_norm"

_NO_START = {"pretrained": None, "lock": False, "unlocked_groups": 0}


def save(model: FocalCLIP, folder: str | Path, provenance: dict[str, Any] | None = None) -> Path:
    """Write an exported folder, whole or not at all.

    Args:
        model: the model; its weights are written in float32.
        folder: where to; an exported folder already there is replaced.
        provenance: where the weights come from (steps, data, results), stored in ``focalclip.json``.

    Returns:
        The folder.

    Raises:
        UserError: if ``folder`` exists and is not an exported folder.
    """
    folder = user_path(folder)
    if folder.exists() and not (folder / OURS).is_file():
        raise UserError(f"{folder}: exists and is not an exported model; remove it or choose another folder")
    with whole_folder(folder) as new:
        write_files(model, new, provenance)
    return folder


def write_files(model: FocalCLIP, folder: Path, provenance: dict[str, Any] | None = None) -> None:
    """Write the files of an exported folder into ``folder``, which exists already."""
    config = exported_config(model.config)
    if open_clip_builds(config):
        (folder / CONFIG).write_text(json.dumps(_open_clip_config(config), indent=2) + "\n")
    write_weights(_open_clip_weights(model), folder / WEIGHTS)
    if write_text_files := text_entry(config.text).write_files:
        names.find(write_text_files)(model, folder)
    files = {str(path.relative_to(folder)): file_sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    ours = {"format": FORMAT, "model": config.model_dump(mode="json"), "provenance": provenance or {}, "files": files}
    norm: Any = model.visual.norm
    if isinstance(norm, GlobalBatchNorm):  # what was folded, for a run that starts from here
        ours[_FEATURE_NORM] = {"mean": norm.running_mean.tolist(), "var": norm.running_var.tolist()}
    write_sealed_json(folder / OURS, ours)


def write_weights(weights: dict[str, Tensor], path: Path) -> None:
    """Write safetensors in float32.

    Raises:
        UserError: if a value is not finite.
    """
    from safetensors.torch import save_file

    plain = {name: x.detach().float().cpu().contiguous() for name, x in weights.items()}
    broken = [name for name, x in plain.items() if not x.isfinite().all()]
    if broken:
        raise UserError(f"{len(broken)} of {len(plain)} tensors are not finite ({broken[0]}, ...); nothing was written")
    save_file(plain, path, metadata={"format": "pt"})


def read(folder: str | Path, *, unfold: bool = False) -> FocalCLIP:
    """Load an exported folder strictly, in evaluation mode on the CPU.

    Args:
        folder: of :func:`save`.
        unfold: with the normalisation of features that the model was trained with, where it was and the folder tells
            its statistics, in front of the projection instead of folded into it.

    Raises:
        UserError: if a file is missing or damaged, or if the weights are not exactly those of the configuration.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    for name in (OURS, WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(f"{folder}: {name} is missing, so this is not a whole exported model; export it again")
    ours = _read_whole(folder)
    config = from_dict(ModelConfig, ours.get("model", {}), str(folder / OURS))
    if text_entry(config.text).write_files:
        config = config.model_copy(update={"text": _at(config.text, str(folder))})
    model = FocalCLIP(config)
    try:
        weights = load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{folder / WEIGHTS}: cannot be read ({error}); copy or export it again") from None
    remedy = "use the folder as it was exported"
    load_strictly(model, our_weights(weights, model), str(folder / WEIGHTS), remedy=remedy)
    if unfold and _FEATURE_NORM in ours:
        _unfold(model, ours[_FEATURE_NORM])
    return model.eval()


def _unfold(model: FocalCLIP, statistics: dict[str, list[float]]) -> None:
    """Put the normalisation of features back in front of the projection."""
    visual: Any = model.visual
    visual.norm = norm = GlobalBatchNorm(visual.proj.in_features)
    norm.running_mean, norm.running_var = (torch.tensor(statistics[name]) for name in ("mean", "var"))
    weight, bias = unfold_from(visual.proj.weight, visual.proj.bias, norm)
    with torch.no_grad():
        visual.proj.weight.copy_(weight)
        visual.proj.bias.copy_(bias)
    image = model.config.image.model_copy(update={"feature_norm": "batch"})
    model.config = model.config.model_copy(update={"image": image})


def provenance(folder: str | Path) -> dict[str, Any]:
    """The provenance that :func:`save` stored."""
    return _read_json(Path(folder) / OURS).get("provenance", {})


def exported_config(config: ModelConfig) -> ModelConfig:
    """The configuration of what is written: no normalisation (folded), nothing that only matters in training."""
    image = config.image.model_copy(
        update={"feature_norm": "none", "drop_path": 0.0, "activation_checkpointing": False} | _NO_START
    )
    text = config.text.model_copy(update=_NO_START)
    if text_entry(text).write_files and Path(names.split(text.name)[1]).is_dir():
        text = _at(text, ".")  # its files are in the exported folder
    return config.model_copy(update={"image": image, "text": text})


def open_clip_builds(config: ModelConfig) -> bool:
    """Whether open_clip can build both towers."""
    return config.image.is_as_named and text_entry(config.text).open_clip is not None


def our_weights(weights: dict[str, Tensor], model: FocalCLIP) -> dict[str, Tensor]:
    """The reverse of :func:`_open_clip_weights` (a folded normalisation stays folded)."""
    trunk = {name.removeprefix(_TRUNK): x for name, x in weights.items() if name.startswith(_TRUNK)}
    entry = names.image_tower_entry(model.config.image.name)
    if entry and entry.from_timm:
        trunk = names.find(entry.from_timm)(trunk)
    ours = {_TRUNK + name: x for name, x in trunk.items()}
    for name, x in weights.items():
        if not name.startswith(_TRUNK):
            ours[name.replace("visual.head.proj.", "visual.proj.")] = x.reshape(1) if name == "logit_scale" else x
    return ours


def _open_clip_weights(model: FocalCLIP) -> dict[str, Tensor]:
    """State dict under open_clip's names, the normalisation folded, ``logit_scale`` 0-dim."""
    visual: Any = model.visual
    trunk = visual.trunk.state_dict()
    entry = names.image_tower_entry(model.config.image.name)
    if entry and entry.to_timm:
        trunk = names.find(entry.to_timm)(trunk)
    if isinstance(visual.norm, GlobalBatchNorm):
        weight, bias = fold_into(visual.norm, visual.proj)
    else:
        weight, bias = visual.proj.weight, visual.proj.bias
    return {
        **{_TRUNK + name: x for name, x in trunk.items()},
        "visual.head.proj.weight": weight,
        "visual.head.proj.bias": bias,
        **{f"text.{name}": x for name, x in model.text.state_dict().items()},
        # open_clip applies no bound, which a training step may have exceeded
        "logit_scale": model.logit_scale.clamp(max=model.config.max_logit_scale).squeeze(0),
    }


def _open_clip_config(config: ModelConfig) -> dict[str, Any]:
    image, text = config.image, config.text
    prefix, tower = names.split(image.name)
    requires = {"requires": "import focalclip"} if needs_focalclip(tower) else {}
    return {
        **requires,  # for the reader; open_clip ignores it
        "model_cfg": {
            "embed_dim": config.embed_dim,
            "custom_text": True,
            "vision_cfg": {
                "image_size": image.image_size,
                "timm_model_name": tower,
                "timm_model_pretrained": False,
                "timm_pool": "" if prefix else "avg",  # towers of timm pool as timm has it, ours take the mean
                "timm_proj": "linear",
                "timm_proj_bias": True,
            },
            "text_cfg": {
                "context_length": text.context_length,
                **names.find(text_entry(text).open_clip or "")(text),
            },
        },
        "preprocess_cfg": {
            "mean": list(image.mean),
            "std": list(image.std),
            "interpolation": image.interpolation,
            "resize_mode": image.resize_mode,
        },
    }


def _at(config: TextTowerConfig, folder: str) -> TextTowerConfig:
    """A text tower whose files are in ``folder``."""
    return config.model_copy(update={"name": names.split(config.name)[0] + folder})


def _read_whole(folder: Path) -> dict[str, Any]:
    """``focalclip.json`` of a folder whose files are those that were written.

    Raises:
        UserError: naming the file that differs.
    """
    remedy = "copy or export the model again"
    try:
        ours = read_sealed_json(folder / OURS)
    except ValueError:
        ours = _read_json(folder / OURS)
        if ours.get("format") == _UNSEALED:
            return ours
        if isinstance(ours.get("format"), int) and ours["format"] > FORMAT:
            raise UserError(
                f"{folder / OURS}: format {ours['format']} is not {FORMAT}; use the focalclip that wrote it"
            ) from None
        raise UserError(f"{folder / OURS}: damaged: it differs from the hash in it; {remedy}") from None
    for name, digest in ours["files"].items():
        if not (folder / name).is_file():
            raise UserError(f"{folder}: {name} is missing, so this is not a whole exported model; export it again")
        if file_sha256(folder / name) != digest:
            raise UserError(f"{folder / name}: damaged or changed: it differs from its hash in {OURS}; {remedy}")
    return ours


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); export the model again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not the description of an exported model; export the model again")
    return content
