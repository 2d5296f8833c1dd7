"""What travels between ranks inside a loss: the collectives, with gradients.

Convention: losses are averaged over ranks by the engine (DeepSpeed and DDP both average gradients). A tensor that was
exchanged with gradient therefore receives the *sum* of what every rank asks of it, and the averaging that follows makes
it the gradient of the mean loss: no factor of the world size appears anywhere.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from focalclip.base.ranks import Group, world_size


def gather_with_grad(x: Tensor, group: Group = None) -> Tensor:
    """Concatenate the equally shaped ``x`` of all ranks along dimension 0, keeping gradients.

    Args:
        x: (b, ...) on every rank, with the same b.
        group: process group; None for all ranks.

    Returns:
        (b * world_size, ...), rank by rank. Backward gives each rank the sum over ranks of the gradients of its rows.
    """
    return x if world_size(group) == 1 else _Gather.apply(x, group)  # pyrefly: ignore[bad-return]


def sum_with_grad(x: Tensor, group: Group = None) -> Tensor:
    """Sum ``x`` over ranks, keeping gradients: backward sums the gradients over ranks too."""
    return x if world_size(group) == 1 else _Sum.apply(x, group)  # pyrefly: ignore[bad-return]


def gather(x: Tensor, group: Group = None) -> Tensor:
    """:func:`gather_with_grad` without the gradient, for labels and the like."""
    size = world_size(group)
    if size == 1:
        return x
    out = x.new_empty((size * x.shape[0], *x.shape[1:]))
    dist.all_gather_into_tensor(out, x.contiguous(), group=group)
    return out


def first_copies(ids: Tensor, group: Group = None) -> Tensor:
    """Which pairs of the global batch count, where some stand in it more than once.

    Args:
        ids: (b,) integers that identify the pairs of this rank; a negative one is like no other.
        group: process group; None for all ranks.

    Returns:
        bool (b * world_size,), equal on all ranks: false where an earlier pair has the same id.
    """
    ordered, places = gather(ids, group).sort(stable=True)
    is_copy = torch.zeros_like(ordered, dtype=torch.bool)
    is_copy[1:] = (ordered[1:] == ordered[:-1]) & (ordered[1:] >= 0)
    return torch.empty_like(is_copy).scatter_(0, places, ~is_copy)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return gather(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0].contiguous()
        mine = grad.new_empty((grad.shape[0] // world_size(ctx.group), *grad.shape[1:]))
        dist.reduce_scatter_tensor(mine, grad, group=ctx.group)
        return mine, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None
