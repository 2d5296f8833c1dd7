"""Towers by depth: groups of parameters from the stem up, and towers locked below the last of them.

A locked tower is a fixed function: its parameters need no gradient and are not in the optimiser; it stays in evaluation
mode, so its stochastic depth and dropout are off and its running statistics stay; no activation of it is kept. The
linear projection behind it is trained (Zhai et al. 2022, "LiT", https://arxiv.org/abs/2111.07991; as open_clip does it
for a tower of timm).
"""

from typing import Any

from torch import nn

from focalclip.base.errors import UserError
from focalclip.models.norm import GlobalBatchNorm
from focalclip.models.text import text_entry

TOWERS = {"image": "visual.trunk.", "text": "text."}
"""The towers of a model, and how the names of their parameters begin; a text tower holds its projection."""


def depth_groups(model: Any, tower: str) -> list[list[str]]:
    """Names of the parameters of a tower of ``model`` by depth, the stem or embeddings first, without the projection.

    A tower's own ``depth_groups()`` tells them; without it, blocks are the items of its longest ``nn.ModuleList``, what
    comes before them is the first group, and what comes behind belongs to the last block.

    Args:
        model: a :class:`~focalclip.models.clip.FocalCLIP`.
        tower: a key of :data:`TOWERS`.
    """
    module = model.visual.trunk if tower == "image" else model.text
    if hasattr(module, "depth_groups"):
        return [group for group in module.depth_groups() if group]
    projection = None if tower == "image" else text_entry(model.config.text).projection
    own = [name for name, _ in module.named_parameters() if projection is None or name.split(".")[0] != projection]
    lists = {name: child for name, child in module.named_modules() if isinstance(child, nn.ModuleList)}
    longest = max(lists, key=lambda name: len(lists[name]), default=None)
    if longest is None:
        return [own]
    before, after = [], []
    blocks: list[list[str]] = [[] for _ in lists[longest]]
    for name in own:
        if name.startswith(f"{longest}."):
            blocks[int(name.removeprefix(f"{longest}.").split(".")[0])].append(name)
        else:
            # the parameters of a module come before those of its parts, so an embedding beside the blocks is found here
            (after if any(blocks) else before).append(name)
    blocks[-1] += after
    return [group for group in (before, *blocks) if group]


def lock_towers(model: Any, *, with_feature_norm: bool = False) -> None:
    """Lock what the configuration of ``model`` says; all is in training mode or not as before.

    Args:
        model: a :class:`~focalclip.models.clip.FocalCLIP`.
        with_feature_norm: the statistics of its feature_norm are of trained weights: lock them with the image tower.

    Raises:
        UserError: if a tower has not so many groups to unlock, or cannot be locked.
    """
    for tower in TOWERS:
        settings = getattr(model.config, tower)
        if settings.lock:
            model.locked += _lock(model, tower, settings.unlocked_groups)
    if with_feature_norm and model.config.image.lock and isinstance(model.visual.norm, GlobalBatchNorm):
        model.locked.append(model.visual.norm)
    model.train(model.training)


def _lock(model: Any, tower: str, unlocked: int) -> list[nn.Module]:
    """Lock a tower below its last groups; returns the modules that are to stay in evaluation mode."""
    if tower == "text" and text_entry(model.config.text).projection is None:
        raise UserError(
            f"model.text.lock: the projection of {model.config.text.name} is not known, and would be locked"
        )
    module = model.visual.trunk if tower == "image" else model.text
    groups = depth_groups(model, tower)
    if unlocked >= len(groups):
        raise UserError(
            f"model.{tower}.unlocked_groups={unlocked}: the {tower} tower has {len(groups)} groups, so nothing would "
            f"be locked; use at most {len(groups) - 1}, or set lock=false"
        )
    locked = {name for group in groups[: len(groups) - unlocked] for name in group}
    for name, parameter in module.named_parameters():
        if name in locked:
            parameter.requires_grad_(False)
    if not unlocked and tower == "image":
        model.visual.is_locked = True
        return [module]
    fixed, is_below = [], True
    for name, part in module.named_modules():
        own = {f"{name}.{parameter}" if name else parameter for parameter, _ in part.named_parameters()}
        if own & locked == own and (own or is_below):  # those without parameters, such as dropout, by their place
            fixed.append(part)
        elif next(part.parameters(recurse=False), None) is not None and not own & locked:
            is_below = False
    return fixed
