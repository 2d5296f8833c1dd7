"""Prompt ensemble to class matrix: the text side of zero-shot classification (CLIP, section 3.1.4; ELEVATER).

All prompts of a task are tokenised at once, equal ones are encoded once, and they go through the tower in full batches
whatever class they belong to. Where a text tower says how many tokens of a prompt decide its embedding
(``text_lengths``), prompts of about equal length share a batch, which is cut behind the longest: most prompts have
about 10 of 77 tokens. Under causal attention with the embedding taken at the end of the text this changes nothing,
since no token attends to later ones.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from focalclip.base.errors import UserError, faults_named
from focalclip.base.ranks import gather_objects, is_main, rank, together, world_size
from focalclip.evaluation.features.cache import FeatureCache
from focalclip.evaluation.features.model import device_and_dtype

ClassPrompts = Mapping[str, Sequence[str]]
"""Whole prompts by class name, in place of templates (as in CuPL, arXiv:2209.03320)."""


def prompts_by_class(
    class_names: Sequence[str], templates: Sequence[str], class_prompts: ClassPrompts | None = None
) -> list[list[str]]:
    """Every prompt of every class: the templates with ``{c}`` replaced by the name, or the class's own prompts.

    Raises:
        UserError: if a class has no prompts where the others have.
    """
    if class_prompts is None:
        return [[template.replace("{c}", name) for template in templates] for name in class_names]
    missing = [name for name in class_names if not class_prompts.get(name)]
    if missing:
        raise UserError(
            f"class prompts: none for {len(missing)} of {len(class_names)} classes ({missing[0]!r} ...); give some for "
            "each class by its name in the data, or leave them away"
        )
    return [list(class_prompts[name]) for name in class_names]


def class_matrix(
    model: Any,
    class_names: Sequence[str],
    templates: Sequence[str],
    batch_size: int = 256,
    *,
    class_prompts: ClassPrompts | None = None,
    cache: FeatureCache | None = None,
    label: str = "",
) -> Tensor:
    """One unit vector per class: the normalised mean of its normalised prompt embeddings.

    Whatever the precision of the text tower, the rest is float32. All ranks call this together.

    Args:
        model: in evaluation mode, without gradients (see ``model.evaluating``).
        class_names: C names.
        templates: prompts with ``{c}`` in place of the name.
        batch_size: prompts per forward pass.
        class_prompts: whole prompts by class name, instead of templates.
        cache: where class vectors are looked up by content, and stored.
        label: text of the progress bar; empty: no bar.

    Returns:
        float32 (C, D) on the CPU.

    Raises:
        UserError: if a class has no prompts in ``class_prompts``, or the model's text features are not finite.
    """
    prompts = prompts_by_class(class_names, templates, class_prompts)
    key = cache.text_key(prompts, batch_size) if cache else ""
    # What the main rank remembers counts for all: another machine's cache may hold other things, and ranks that encode
    # wait for those that would not.
    if kept := gather_objects(cache.get(key) if cache and is_main() else None)[0]:
        return torch.from_numpy(kept["classes"])
    place = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompt for own in prompts for prompt in own))}
    unique = encode_prompts(model, list(place), batch_size, label)
    means = [unique[[place[prompt] for prompt in own]].mean(dim=0) for own in prompts]
    classes = F.normalize(torch.stack(means), dim=-1)
    if cache and is_main():
        cache.put(key, classes=classes.numpy())
    return classes


def encode_prompts(model: Any, prompts: Sequence[str], batch_size: int = 256, label: str = "") -> Tensor:
    """Unit-length text embeddings, float32 (len(prompts), D) on the CPU; ranks share the batches.

    Raises:
        UserError: if they are not finite, or all texts have the same tokens.
    """
    tokens = together(lambda: faults_named(lambda: _tokens(model, list(prompts))))
    lengths = model.text_lengths(tokens) if hasattr(model, "text_lengths") else None
    order = torch.arange(len(prompts)) if lengths is None else lengths.argsort(stable=True)
    batches = order.split(batch_size)

    mine = range(rank(), len(batches), world_size())

    def encode(rows: Tensor) -> np.ndarray:
        return _encode(model, tokens[rows], None if lengths is None else int(lengths[rows].max()))

    with tqdm(
        mine, label, unit=" batches of prompts", leave=False, disable=None if label and is_main() else True
    ) as bar:
        own = together(lambda: faults_named(lambda: {i: encode(batches[i]) for i in bar}))
    by_batch = {i: embeds for share in gather_objects(own) for i, embeds in share.items()}
    in_order = torch.from_numpy(np.concatenate([by_batch[i] for i in range(len(batches))]))
    return in_order[order.argsort()]


def _tokens(model: Any, prompts: list[str]) -> Tensor:
    """Tokens (len(prompts), L).

    Raises:
        UserError: if the tokenizer does not tell prompts apart.
    """
    tokens = model.tokenizer(prompts)
    if len(set(prompts)) > 1 and bool((tokens == tokens[0]).all()):
        raise UserError(
            f"the tokenizer makes the same tokens of all {len(prompts):,} texts ({prompts[0]!r} ...); is its vocabulary"
            " there?"
        )
    return tokens


def _encode(model: Any, tokens: Tensor, longest: int | None) -> np.ndarray:
    """One batch (b, L) to unit vectors (b, D)."""
    device, _ = device_and_dtype(model)
    embeds = F.normalize(model.encode_text(tokens[:, :longest].to(device)).float().cpu(), dim=-1)
    if not bool(torch.isfinite(embeds).all()):
        raise UserError("the model's text features hold NaN or infinity; evaluate weights from before the divergence")
    return embeds.numpy()
