"""Losses over the global batch, one file each, and the table that ``loss.name`` is looked up in.

A loss is a function. Its positional parameters are outputs of the model, by the names that ``FocalCLIP.forward`` gives
them. The keyword-only parameters ``labels``, ``ids`` and ``group`` are passed where it has them (see
:func:`contrastive_loss`); all other keyword-only parameters are its options, which ``loss.options`` sets. It returns a
0-dim tensor, equal on all ranks. docs/extending.md adds one as a complete example.
"""

from focalclip.losses.contrastive import contrastive_loss

__all__ = ["LOSSES", "contrastive_loss"]

LOSSES = {
    "contrastive": "focalclip.losses.contrastive:contrastive_loss",
}
