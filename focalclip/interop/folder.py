"""Exported folders: written so that open_clip reads them, and read back strictly.

    FOLDER/open_clip_config.json         architecture and preprocessing in open_clip's terms
    FOLDER/open_clip_model.safetensors   weights under open_clip's and timm's names
    FOLDER/focalclip.json                our own model configuration and the provenance of the weights

The normalisation before the image projection is folded into the projection, so the export is a plain
``timm tower + linear`` model. Towers that timm does not name need ``import focalclip`` before open_clip builds them;
the configuration then says so under ``requires``. Where the name does not tell the whole tower (``options``, another
mixer) open_clip cannot build it, so ``open_clip_config.json`` is left out. A Hugging Face text tower travels in the
folder with its tokenizer, where :func:`read` finds both. open_clip asks the hub for its architecture if the model was
trained under a hub name; otherwise it looks in the working directory, so it has to be started inside the folder.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from focalclip.base.errors import UserError
from focalclip.base.strict import from_dict
from focalclip.config import ModelConfig
from focalclip.interop.register import needs_focalclip
from focalclip.models.clip import FocalCLIP
from focalclip.models.norm import GlobalBatchNorm, fold_into
from focalclip.models.weights import from_timm, to_timm
from focalclip.names import TIMM, TRANSFORMERS


def write_weights(weights: dict[str, Tensor], path: Path) -> None:
    """Write safetensors in float32."""
    from safetensors.torch import save_file

    plain = {name: x.detach().float().cpu().contiguous() for name, x in weights.items()}
    save_file(plain, path, metadata={"format": "pt"})


CONFIG, WEIGHTS, OURS = "open_clip_config.json", "open_clip_model.safetensors", "focalclip.json"

FORMAT = 1
TOWER_WEIGHTS = "model.safetensors"  # of an image tower alone, as timm and transformers name it


def save(model: FocalCLIP, folder: str | Path, provenance: dict[str, Any] | None = None) -> Path:
    """Write an exported folder, whole or not at all.

    Args:
        model: the model; its weights are written in float32.
        folder: where to; an exported folder already there is replaced.
        provenance: whatever tells where the weights come from (steps, data, results), stored in ``focalclip.json``.

    Returns:
        The folder.

    Raises:
        UserError: if ``folder`` exists and is not an exported folder.
    """
    folder = Path(folder)
    if folder.exists() and not (folder / OURS).is_file():
        raise UserError(f"{folder}: exists and is not an exported model; remove it or choose another folder")
    new, old = folder.with_name(f".{folder.name}.new.tmp"), folder.with_name(f".{folder.name}.old.tmp")
    for leftover in (new, old):  # of a process that was killed in here
        shutil.rmtree(leftover, ignore_errors=True)
    new.mkdir(parents=True)
    write_files(model, new, provenance)
    if folder.exists():
        folder.rename(old)  # never a half-removed folder under the model's name
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
    return folder


def write_files(model: FocalCLIP, folder: Path, provenance: dict[str, Any] | None = None) -> None:
    """Write the files of an exported folder into ``folder``, which is there already."""
    from safetensors.torch import save_file

    config = exported_config(model.config)
    ours = {"format": FORMAT, "model": config.model_dump(mode="json"), "provenance": provenance or {}}
    if config.image.is_as_named:
        (folder / CONFIG).write_text(json.dumps(_open_clip_config(config), indent=2) + "\n")
    (folder / OURS).write_text(json.dumps(ours, indent=2) + "\n")
    weights = {name: x.detach().float().cpu().contiguous() for name, x in _open_clip_weights(model).items()}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    if config.text.name.startswith(TRANSFORMERS):
        model.text.config.save_pretrained(folder)  # pyrefly: ignore
        model.tokenizer.tokenizer.save_pretrained(folder)  # pyrefly: ignore


def read(folder: str | Path) -> FocalCLIP:
    """Load an exported folder strictly, in evaluation mode on the CPU.

    Raises:
        UserError: if a file is missing or damaged, or if the weights are not exactly those of the configuration.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    for name in (OURS, WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(f"{folder}: {name} is missing, so this is not a whole exported model; export it again")
    ours = _read_json(folder / OURS)
    if ours.get("format") != FORMAT:
        raise UserError(
            f"{folder / OURS}: format {ours.get('format')!r} is not {FORMAT}; use the focalclip that wrote it"
        )
    config = from_dict(ModelConfig, ours.get("model", {}), str(folder / OURS))
    if config.text.name.startswith(TRANSFORMERS):
        text = config.text.model_copy(update={"name": f"{TRANSFORMERS}{folder}"})
        config = config.model_copy(update={"text": text})
    model = FocalCLIP(config)
    try:
        weights = load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{folder / WEIGHTS}: cannot be read ({error}); copy or export it again") from None
    _load_strictly(model, our_weights(weights, model), folder / WEIGHTS)
    return model.eval()


def provenance(folder: str | Path) -> dict[str, Any]:
    """What :func:`save` was told of the weights."""
    return _read_json(Path(folder) / OURS).get("provenance", {})


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); export the model again") from None


def exported_config(config: ModelConfig) -> ModelConfig:
    """The configuration of what is written: no normalisation (folded), nothing that only matters in training."""
    image = config.image.model_copy(
        update={"feature_norm": "none", "drop_path": 0.0, "activation_checkpointing": False}
    )
    text = config.text.model_copy(update={"pretrained": False})
    if text.name.startswith(TRANSFORMERS) and Path(text.name.removeprefix(TRANSFORMERS)).is_dir():
        text = text.model_copy(update={"name": f"{TRANSFORMERS}."})  # its files travel in the folder
    return config.model_copy(update={"image": image, "text": text})


def _open_clip_config(config: ModelConfig) -> dict[str, Any]:
    image, text = config.image, config.text
    if text.name.startswith(TRANSFORMERS):
        text_cfg: dict[str, Any] = {
            "hf_model_name": text.name.removeprefix(TRANSFORMERS), "hf_model_pretrained": False,
            "hf_tokenizer_name": ".",  # open_clip reads the tokenizer of a local folder from that folder
            "hf_proj_type": "linear", "hf_pooler_type": "mean_pooler",
        }  # fmt: skip
    else:
        text_cfg = {"width": text.width, "heads": text.heads, "layers": text.layers, "no_causal_mask": not text.causal}
    requires = {"requires": "import focalclip"} if needs_focalclip(image.name.removeprefix(TIMM)) else {}
    return {
        **requires,  # for the reader; open_clip passes over it
        "model_cfg": {
            "embed_dim": config.embed_dim,
            "custom_text": True,
            "vision_cfg": {
                "image_size": image.image_size,
                "timm_model_name": image.name.removeprefix(TIMM),
                "timm_model_pretrained": False,
                "timm_pool": "avg" if image.name.startswith("focalnet") else "",
                "timm_proj": "linear",
                "timm_proj_bias": True,
            },
            "text_cfg": {"context_length": text.context_length, **text_cfg},
        },
        "preprocess_cfg": {
            "mean": list(image.mean),
            "std": list(image.std),
            "interpolation": image.interpolation,
            "resize_mode": image.resize_mode,
        },
    }


def _open_clip_weights(model: FocalCLIP) -> dict[str, Tensor]:
    """State dict under open_clip's names, the normalisation folded, the temperature 0-dim."""
    visual: Any = model.visual
    timm_tower = model.config.image.name.startswith(TIMM)
    trunk = visual.trunk.trunk.state_dict() if timm_tower else to_timm(visual.trunk.state_dict())
    if isinstance(visual.norm, GlobalBatchNorm):
        weight, bias = fold_into(visual.norm, visual.proj)
    else:
        weight, bias = visual.proj.weight, visual.proj.bias
    return {
        **{f"visual.trunk.{name}": x for name, x in trunk.items()},
        "visual.head.proj.weight": weight,
        "visual.head.proj.bias": bias,
        **{f"text.{name}": x for name, x in model.text.state_dict().items()},
        # open_clip has no bound, which a step may have carried the parameter over
        "logit_scale": model.logit_scale.clamp(max=model.config.max_logit_scale).squeeze(0),
    }


def our_weights(weights: dict[str, Tensor], model: FocalCLIP) -> dict[str, Tensor]:
    """The reverse of :func:`_open_clip_weights` (a folded normalisation stays folded)."""
    trunk = {name.removeprefix("visual.trunk."): x for name, x in weights.items() if name.startswith("visual.trunk.")}
    rest = {name: x for name, x in weights.items() if not name.startswith("visual.trunk.")}
    if model.config.image.name.startswith(TIMM):
        ours = {f"visual.trunk.trunk.{name}": x for name, x in trunk.items()}
    else:
        ours = {f"visual.trunk.{name}": x for name, x in from_timm(trunk).items()}
    for name, x in rest.items():
        ours[name.replace("visual.head.proj.", "visual.proj.")] = x.reshape(1) if name == "logit_scale" else x
    return ours


def _load_strictly(model: nn.Module, weights: dict[str, Tensor], source: Path) -> None:
    own = model.state_dict()
    missing, unexpected = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    wrong = [name for name in own.keys() & weights.keys() if own[name].shape != weights[name].shape]
    if missing or unexpected or wrong:
        raise UserError(
            f"{source}: not the weights of this model: {len(missing)} missing {missing[:3]}, "
            f"{len(unexpected)} unexpected {unexpected[:3]}, {len(wrong)} of another shape {wrong[:3]}; "
            "use the folder as it was exported"
        )
    with torch.no_grad():
        model.load_state_dict(weights)
