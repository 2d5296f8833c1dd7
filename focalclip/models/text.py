"""Text towers and their tokenizers by name; the tables of :mod:`focalclip.names` say which code builds a name.

A text tower is ``tower(tokens) -> (B, embed_dim)`` for int64 tokens (B, L), with open_clip's parameter names, so that
an exported model is one that open_clip reads.
"""

from collections.abc import Callable

from torch import Tensor, nn

from focalclip import names
from focalclip.base.errors import UserError
from focalclip.config import TextTowerConfig

Tokenizer = Callable[[list[str]], Tensor]


def create_text_tower(config: TextTowerConfig, embed_dim: int) -> nn.Module:
    """Build the tower that ``config`` names, ending in a linear projection to ``embed_dim``.

    Raises:
        UserError: if the name is neither ``open_clip`` nor ``transformers:NAME_OR_FOLDER``, or cannot be had.
    """
    return names.find(_entry(config).build)(config, embed_dim)


def create_tokenizer(config: TextTowerConfig) -> Tokenizer:
    """The tokenizer that belongs to the tower: a list of strings to int64 tokens (B, L), L at most the context length.

    Raises:
        UserError: if a Hugging Face tokenizer cannot be had.
    """
    return names.find(_entry(config).tokenizer)(config)


def lengths_to_the_end(tokens: Tensor) -> Tensor:
    """How many of each row's tokens (B, L) stand up to its end of text, the largest number of CLIP's BPE: (B,).

    Under causal attention, with the embedding taken at that token, those behind it change nothing.
    """
    return tokens.argmax(1) + 1


def _entry(config: TextTowerConfig) -> names.TextTowerEntry:
    entry = names.text_tower_entry(config.name)
    if entry is None:
        known = [
            *names.TEXT_TOWERS,
            *(f"{prefix}NAME_OR_FOLDER" for prefix, s in names.SOURCES.items() if s.text_tower),
        ]
        raise UserError(f"model.text.name={config.name!r} is not known; use {' or '.join(known)}")
    return entry
