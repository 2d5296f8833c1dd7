"""open_clip models with random weights made from a seed, in folders that every library reads through ``local-dir:``."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from focalclip.evaluation.features.model import weights_sha256

WEIGHTS, CONFIG = "open_clip_model.safetensors", "open_clip_config.json"  # open_clip's names
PREPROCESSING = {
    "mean": [0.48145466, 0.4578275, 0.40821073],  # OpenAI's
    "std": [0.26862954, 0.26130258, 0.27577711],
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}


def write_model(folder: Path, model_config: dict[str, Any], seed: int = 0, gain: float = 1.0) -> str:
    """Write an open_clip model with random weights for ``local-dir:FOLDER``; returns the SHA-256 of its weights.

    Args:
        folder: is created.
        model_config: ``embed_dim``, ``vision_cfg`` and ``text_cfg``, as in open_clip's model configurations.
        seed: of the weights.
        gain: of the weight matrices; 1 keeps the scale of what goes through.
    """
    import open_clip
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    model: Any = open_clip.CLIP(**model_config)
    _randomise(model, seed, gain)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / WEIGHTS)
    config = {"model_cfg": model_config, "preprocess_cfg": PREPROCESSING}
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    return weights_sha256(model)


def _randomise(model: Any, seed: int, gain: float) -> None:
    """Fill every parameter with uniform numbers: matrices keep the scale of their input, the rest lies near its use."""
    import torch

    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.ndim == 0:
                continue  # the temperature
            noise = torch.from_numpy(2 * rng.random(parameter.shape, dtype=np.float32) - 1)
            if parameter.ndim > 1:
                parameter.copy_(noise * (gain * (3 / parameter[0].numel()) ** 0.5))  # the variance of noise is 1/3
            else:
                parameter.copy_(noise * 0.3 + (0.0 if name.endswith("bias") else 0.7))
