"""Prompt ensemble to class matrix: the text side of zero-shot classification (CLIP, section 3.1.4; ELEVATER)."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from focalclip.evaluation.model import device_and_dtype


def fill(class_names: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Every prompt of every class: class by class, ``{c}`` replaced by the name."""
    return [template.replace("{c}", name) for name in class_names for template in templates]


def class_matrix(model: Any, class_names: Sequence[str], templates: Sequence[str], batch_size: int = 256) -> Tensor:
    """One unit vector per class: the normalised mean of its normalised prompt embeddings.

    Equal prompts are encoded once. Whatever the precision of the text tower, the rest is float32.

    Returns:
        float32 (C, D) on the CPU.
    """
    prompts = fill(class_names, templates)
    place = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    unique = encode_prompts(model, list(place), batch_size)
    rows = torch.tensor([place[prompt] for prompt in prompts]).view(len(class_names), len(templates))
    return F.normalize(torch.stack([unique[row].mean(dim=0) for row in rows]), dim=-1)


def encode_prompts(model: Any, prompts: Sequence[str], batch_size: int = 256) -> Tensor:
    """Unit-length text embeddings, float32 (len(prompts), D) on the CPU."""
    device, _ = device_and_dtype(model)
    tokenizer = model.tokenizer
    blocks = [prompts[i : i + batch_size] for i in range(0, len(prompts), batch_size)]
    features = [model.encode_text(tokenizer(list(block)).to(device)).float().cpu() for block in blocks]
    return F.normalize(torch.cat(features), dim=-1)
