"""What a FocalNet looks at: gates, modulators and, with a text tower, the similarity of every position to a caption.

Which tensors, and how they are reduced, follows figures 5, 6 and 10 of https://arxiv.org/abs/2203.11926. Our towers and
timm's both call the operator ``layers.STAGE.blocks.BLOCK.modulation``. One forward pass records its input, from which
the operator then returns its parts.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from focalclip.base.errors import UserError
from focalclip.models.clip import FocalCLIP
from focalclip.models.focalnet.modulation import FocalModulation, ModulationParts

_MODULATION = re.compile(r"(?P<trunk>.*?)\.?layers\.(?P<stage>\d+)\.blocks\.(?P<block>\d+)\.modulation")


@dataclass(frozen=True)
class Explanation:
    """Maps of one block for a batch of B images, in float32 on the CPU.

    Attributes:
        stage, block: which block they are of, counted from 0.
        gates: (B, G, h, w), raw (they may be negative): the L focal levels from fine to coarse, then the global one.
        gate_names: for each gate what it weighs; only by number in the ablations that have other gates.
        modulator: (B, h, w), length over channels of the modulator h(Z), before it multiplies the query.
        kernels: for each focal level the mean over channels of its depthwise kernel, (k, k); none where it pools.
        similarity: (B, T, h', w') cosine of each position of the last map to each of T captions; T is 0 without any.
    """

    stage: int
    block: int
    gates: Tensor
    gate_names: list[str]
    modulator: Tensor
    kernels: list[Tensor]
    similarity: Tensor


def explain(
    model: nn.Module, images: Tensor, *, stage: int = -1, block: int = -1, text: str | Sequence[str] = ()
) -> Explanation:
    """Look into one block of a FocalNet while it sees ``images``.

    Args:
        model: a two-tower model, a frozen encoder, or an image tower, ours or timm's.
        images: (B, 3, H, W), preprocessed.
        stage: counted from 0; negative numbers count from the end.
        block: within the stage, likewise.
        text: captions to compare every position of the last map with, whatever the block; two-tower models only.

    Returns:
        The maps. The model is left as it was: no hooks, and every module in its mode.

    Raises:
        UserError: if the model has no focal modulation, there is no such stage or block, the block has no gates, or
            captions are given to a model without a text tower.
    """
    captions = [text] if isinstance(text, str) else list(text)
    if captions and not isinstance(model, FocalCLIP):
        raise UserError(
            "text: captions need a two-tower model of focalclip; give a run directory or an exported folder"
        )
    stage, block, trunk, modulation = _find(model, stage, block)
    weight = next(model.parameters())
    with torch.no_grad(), _evaluation_mode(model):
        with _input_of(modulation) as inputs:
            last_map = trunk.forward_features(images.to(weight.device, weight.dtype))
        parts = _parts(modulation, inputs[0])
        similarity = _similarity(model, last_map, captions)
    gates, modulator = (x.permute(0, 3, 1, 2) for x in (parts.gates, parts.modulator))  # B h w C -> B C h w
    if gates.shape[1] == 0:
        raise UserError(f"stage {stage}, block {block}: this kind of modulation has no gates to show")
    weights = [weight for level in modulation.focal_layers for weight in level.parameters()]
    kernels = [weight.detach().float().mean((0, 1)).cpu() for weight in weights]
    names = _gate_names(gates.shape[1], len(modulation.focal_layers), kernels)
    lengths = modulator.float().norm(dim=1).cpu()
    return Explanation(stage, block, gates.float().cpu(), names, lengths, kernels, similarity)


def _gate_names(num_gates: int, num_levels: int, kernels: list[Tensor]) -> list[str]:
    if num_gates != num_levels + 1:
        return [f"gate {number}" for number in range(1, num_gates + 1)]
    sizes = [f" ({kernel.shape[0]}x{kernel.shape[1]})" for kernel in kernels] or [""] * num_levels
    return [*(f"level {level}{size}" for level, size in enumerate(sizes, 1)), "global"]


def _find(model: nn.Module, stage: int, block: int) -> tuple[int, int, Any, Any]:
    """Stage and block as counted from 0, the tower that they are in, and the modulation."""
    found: dict[int, dict[int, Any]] = {}
    trunk = ""
    for name, module in model.named_modules():
        match = _MODULATION.fullmatch(name)
        if match and all(hasattr(module, part) for part in ("f", "h", "focal_layers")):
            found.setdefault(int(match["stage"]), {})[int(match["block"])] = module
            trunk = match["trunk"]
    if not found:
        raise UserError("this model has no focal modulation to explain; give one whose image tower is a FocalNet")
    stage = _count("stage", stage, sorted(found))
    block = _count(f"block of stage {stage}", block, sorted(found[stage]))
    return stage, block, model.get_submodule(trunk), found[stage][block]


def _count(what: str, index: int, known: list[int]) -> int:
    try:
        return known[index]
    except IndexError:
        raise UserError(f"{what}: {index} is not there; choose one of {known[0]} to {known[-1]}") from None


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    before = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in before.items():
            module.training = mode


@contextmanager
def _input_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """What the module is called with inside the context; the hook is removed in every case."""
    inputs: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    try:
        yield inputs
    finally:
        handle.remove()


def _parts(modulation: Any, x: Tensor) -> ModulationParts:
    """The parts of our operator or timm's for its input ``x``."""
    if isinstance(modulation, FocalModulation):
        return modulation.parts(x)
    from focalclip.interop.timm import modulation_parts  # timm is slow to import

    return modulation_parts(modulation, x)


def _similarity(model: Any, last_map: Tensor, captions: list[str]) -> Tensor:
    """Cosine (B, T, h, w) of each projected position of ``last_map`` (B, D, h, w) with each caption.

    The projection is affine and pooling a mean, so the mean of the projected positions is the picture's own embedding.
    """
    batch, _, height, width = last_map.shape
    if not captions:
        return torch.empty(batch, 0, height, width)
    positions = last_map.permute(0, 2, 3, 1).flatten(0, 2)  # B D h w -> (B h w) D
    image_embeds = F.normalize(model.visual.proj(model.visual.norm(positions)).float(), dim=-1)
    text_embeds = model.encode_text(model.tokenizer(captions).to(last_map.device), normalize=True)
    return (image_embeds @ text_embeds.T).unflatten(0, (batch, height, width)).permute(0, 3, 1, 2).cpu()
