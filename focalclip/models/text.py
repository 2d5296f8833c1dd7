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
        UserError: if no table has the name, or the tower cannot be loaded.
    """
    return names.find(text_entry(config).build)(config, embed_dim)


def create_tokenizer(config: TextTowerConfig) -> Tokenizer:
    """The tokenizer that belongs to the tower: a list of strings to int64 tokens (B, L), L at most the context length.

    Raises:
        UserError: if the tokenizer cannot be loaded.
    """
    return names.find(text_entry(config).tokenizer)(config)


MAX_CHARACTERS = 1 << 14
"""Characters of a text that are tokenised, if they give more than enough tokens."""

MARGIN = 256
"""Tokens that must follow those that are wanted before the place where a text was cut."""


def first_tokens(text: str, count: int, encode: Callable[[str, int], list[int]]) -> list[int]:
    """The first ``count`` tokens of a text at a bounded cost: those of its beginning where that holds more than enough.

    Where a text is cut, the tokens near the cut may change; hence the margin of tokens between them and those that are
    returned. (In byte-pair encoding, what follows changes earlier tokens only along pairs of ever higher rank, which
    overlap; a chain of them as long as the margin takes a text made for it.) What else could change is what ftfy does
    to a line of more than ``MAX_CHARACTERS`` whose encoding is damaged behind the cut alone.

    Args:
        text: Of any length.
        count: Tokens wanted; there may be fewer, and more may be returned.
        encode: From a text to at least so many of its first tokens, or all.
    """
    if len(text) > MAX_CHARACTERS:
        tokens = encode(text[:MAX_CHARACTERS], count + MARGIN)
        if len(tokens) >= count + MARGIN:
            return tokens
    return encode(text, count)


def lengths_to_the_end(tokens: Tensor) -> Tensor:
    """Number of tokens of each row (B, L) up to its end of text, which has CLIP's largest token number: (B,).

    Under causal attention, with the embedding taken at that token, later tokens change nothing.
    """
    return tokens.argmax(1) + 1


def text_entry(config: TextTowerConfig) -> names.TextTowerEntry:
    """The table's entry for the tower that ``config`` names.

    Raises:
        UserError: if no table has the name.
    """
    entry = names.text_tower_entry(config.name)
    if entry is None:
        known = " or ".join(names.text_tower_names())
        raise UserError(f"model.text.name={config.name!r} is not known; use {known}")
    return entry
