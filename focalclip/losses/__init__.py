"""Contrastive losses over the global batch."""

from focalclip.losses.contrastive import contrastive_loss

__all__ = ["contrastive_loss"]
