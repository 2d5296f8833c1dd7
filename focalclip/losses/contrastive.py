"""The symmetric contrastive loss of CLIP, and of UniCL where labels are given.

With embeddings u_i (image) and v_j (text) of the *global* batch of B pairs and scale s = exp(logit_scale):

    Z_ij = s <u_i, v_j>                                    similarity of image i and caption j
    M_ij = 1 if i = j, or if both pairs carry the same label, else 0
    L_i2t = -1/B sum_i ( sum_j M_ij log softmax_j(Z_ij) / sum_j M_ij )      (L_t2i: the same on the transpose)
    L = (L_i2t + L_t2i) / 2

Without labels M is the identity and this is CLIP's loss (https://arxiv.org/abs/2103.00020, figure 3); with labels it is
UniCL's (https://arxiv.org/abs/2204.03610): captions that describe the same class are not punished as negatives.

A pair may stand in a batch more than once (at the border of two epochs, or in the place of a broken sample), and would
be its own negative there. Where identities are given, only its first copy counts: the others are left out of the mean
over i and of every softmax, so the loss is that of the batch without them.

Each rank computes its own b rows of Z and of its transpose against the gathered embeddings: memory is b x B, not B x B.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from focalclip.base.ranks import Group, rank, world_size
from focalclip.losses.exchange import first_copies, gather, gather_with_grad, sum_with_grad

_LEFT_OUT = torch.finfo(torch.float32).min  # of a softmax; finite, because its logarithm is multiplied by 0


def contrastive_loss(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    *,
    labels: Tensor | None = None,
    ids: Tensor | None = None,
    group: Group = None,
) -> Tensor:
    """Mean over the global batch of the image-to-text and text-to-image losses.

    Args:
        image: (b, D) image embeddings of this rank, normalised to unit length.
        text: (b, D) text embeddings of the same pairs, normalised to unit length.
        scale: what the cosines are multiplied by, exp(logit_scale), 0-dim or of shape [1].
        labels: (b,) integers, or None. Pairs with the same label >= 0 are positives for each other; a pair with a
            negative label is positive with itself alone.
        ids: (b,) integers that identify the pairs, or None: all differ. Of pairs with the same id >= 0 only the first
            in the global batch counts.
        group: process group whose ranks share the batch; None for all.

    Returns:
        0-dim float32 loss of the global batch, equal on every rank. Averaging parameter gradients over ranks, as
        DeepSpeed and DDP do, gives the gradient of this value (see ``focalclip.losses.exchange``).

    Raises:
        ValueError: if the shapes do not fit together.
    """
    if image.ndim != 2 or image.shape != text.shape:
        raise ValueError(f"image {tuple(image.shape)} and text {tuple(text.shape)} must both be (batch, dim)")
    for name, numbers in (("labels", labels), ("ids", ids)):
        if numbers is not None and numbers.shape != image.shape[:1]:
            raise ValueError(f"{name} {tuple(numbers.shape)} must be ({image.shape[0]},): one integer per pair")

    with torch.autocast(image.device.type, enabled=False):  # float32: a softmax over thousands of columns
        both = torch.cat([image.float(), text.float()], dim=1)
        all_image, all_text = gather_with_grad(both, group).chunk(2, dim=1)  # (B, D) each, one collective
        scale = scale.float()
        counted = None if ids is None else first_copies(ids.to(image.device), group)
        positives = _positives(image.shape[0], labels, counted, image.device, group)
        image_to_text = _cross_entropy(scale * image.float() @ all_text.T, positives, counted, group)
        text_to_image = _cross_entropy(scale * text.float() @ all_image.T, positives, counted, group)
        own = (image_to_text + text_to_image) / 2
        # The value is the mean over ranks; the gradient stays that of the own rows (the engine averages it over ranks).
        mean = sum_with_grad(own.detach(), group) / world_size(group)
        return own + (mean - own.detach()) if world_size(group) > 1 else own


def _positives(b: int, labels: Tensor | None, counted: Tensor | None, device: torch.device, group: Group) -> Tensor:
    """The own rows of M: indices (b,) where every row has one positive, else row-normalised weights (b, B).

    A row that does not count has the index -100, which cross_entropy ignores, or weights 0.
    """
    own = torch.arange(b, device=device) + b * rank(group)
    if labels is None:
        return own if counted is None else own.where(counted[own], own.new_tensor(-100))
    all_labels = gather(labels.to(device), group)
    same = (labels.to(device)[:, None] == all_labels) & (all_labels >= 0)
    same |= own[:, None] == torch.arange(all_labels.shape[0], device=device)
    if counted is not None:
        same &= counted & counted[own, None]
    return same / same.sum(dim=1, keepdim=True).clamp(min=1)


def _cross_entropy(logits: Tensor, positives: Tensor, counted: Tensor | None, group: Group) -> Tensor:
    """Mean over the rows that count, taken as if every rank had equally many: the mean over ranks is the global one."""
    if counted is None:
        return F.cross_entropy(logits, positives)
    logits = logits.masked_fill_(~counted, _LEFT_OUT)
    return F.cross_entropy(logits, positives, reduction="sum") / (counted.sum() / world_size(group))
