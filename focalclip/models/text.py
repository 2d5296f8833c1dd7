"""Text towers and their tokenizers: open_clip's transformer with CLIP's BPE, or any Hugging Face text encoder.

Both are ``tower(tokens) -> (B, embed_dim)`` for int64 tokens (B, context_length), with open_clip's parameter names,
so that an exported model is one that open_clip reads.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from focalclip.config import TextTowerConfig
from focalclip.errors import UserError, first_line

Tokenizer = Callable[[list[str]], Tensor]

HUGGING_FACE = "transformers:"


def create_text_tower(config: TextTowerConfig, embed_dim: int) -> nn.Module:
    """Build the tower that ``config`` names, ending in a linear projection to ``embed_dim``.

    Raises:
        UserError: if the name is neither ``open_clip`` nor ``transformers:NAME_OR_FOLDER``, or cannot be had.
    """
    if config.name.startswith(HUGGING_FACE):
        return HuggingFaceTextTower(config, embed_dim)
    if config.name == "open_clip":
        from open_clip.transformer import TextTransformer

        tower = TextTransformer(
            context_length=config.context_length,
            width=config.width,
            heads=config.heads,
            layers=config.layers,
            output_dim=embed_dim,
            no_causal_mask=not config.causal,
        )
        tower.transformer.register_forward_pre_hook(_cut_mask, with_kwargs=True)
        return tower
    raise UserError(f"model.text.name={config.name!r} is not known; use open_clip or transformers:NAME_OR_FOLDER")


def create_tokenizer(config: TextTowerConfig) -> Tokenizer:
    """The tokenizer that belongs to the tower: a list of strings to int64 tokens (B, L), L at most the context length.

    Raises:
        UserError: if a Hugging Face tokenizer cannot be had.
    """
    if config.name.startswith(HUGGING_FACE):
        return HuggingFaceTokenizer(config)
    return ByteLevelTokenizer(config)


def lengths_to_the_end(tokens: Tensor) -> Tensor:
    """How many of each row's tokens (B, L) stand up to its end of text, the largest number of CLIP's BPE: (B,).

    Under causal attention, with the embedding taken at that token, those behind it change nothing.
    """
    return tokens.argmax(1) + 1


def _cut_mask(transformer: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:  # noqa: ARG001
    """Fit the causal mask to captions shorter than the context (open_clip 3.3 always passes the whole one)."""
    length = args[0].shape[1]
    mask = kwargs["attn_mask"]
    return args, kwargs | {"attn_mask": mask if mask is None else mask[:length, :length]}


class ByteLevelTokenizer:
    """CLIP's byte-pair encoding, from open_clip; cut to the longest caption of the list where that changes nothing.

    Under causal attention no token sees the padding behind it, so shorter rows give the same embeddings; captions of a
    few words then cost a fraction of the full context.
    """

    def __init__(self, config: TextTowerConfig) -> None:
        from open_clip.tokenizer import SimpleTokenizer

        self.tokenizer = SimpleTokenizer(context_length=config.context_length)
        self.causal = config.causal

    def __call__(self, texts: list[str]) -> Tensor:
        """Tokens (B, L), int64, L at most the context length."""
        tokens = self.tokenizer(list(texts))
        if not self.causal or len(tokens) == 0:
            return tokens
        return tokens[:, : int(lengths_to_the_end(tokens).max())].contiguous()


class HuggingFaceTextTower(nn.Module):
    """Encoder of transformers, mean over the tokens that are not padding, linear projection.

    Works for any encoder whose output has ``last_hidden_state`` and whose configuration tells ``hidden_size`` and
    ``pad_token_id`` (BERT, RoBERTa, MPNet, DeBERTa, the encoder of T5, ...).
    """

    def __init__(self, config: TextTowerConfig, embed_dim: int) -> None:
        super().__init__()
        import transformers

        source = config.name.removeprefix(HUGGING_FACE)
        self.config = _from_hub(transformers.AutoConfig.from_pretrained, source)
        _check_fits(self.config, config)
        if config.pretrained:
            encoder = _from_hub(transformers.AutoModel.from_pretrained, source)
        else:
            encoder = transformers.AutoModel.from_config(self.config)
        encoder = encoder.float()  # transformers keeps the dtype of the checkpoint, which may be of 16 bits
        self.transformer = encoder.get_encoder() if self.config.is_encoder_decoder else encoder
        self.transformer.pooler = None  # BERT's pooler would stay without a gradient under mean pooling
        self.proj = nn.Linear(self.config.hidden_size, embed_dim, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Encode (B, L) tokens to (B, embed_dim)."""
        mask = (tokens != self.config.pad_token_id).long()
        hidden = self.transformer(input_ids=tokens, attention_mask=mask).last_hidden_state  # (B, L, width)
        weights = mask[..., None].to(hidden.dtype)
        return self.proj((hidden * weights).sum(1) / weights.sum(1).clamp(min=1))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass (open_clip's name for it)."""
        if enable:
            self.transformer.gradient_checkpointing_enable()


class HuggingFaceTokenizer:
    """A tokenizer of transformers behind the one-call interface, padded and cut to the context length."""

    def __init__(self, config: TextTowerConfig) -> None:
        import transformers

        self.context_length = config.context_length
        source = config.name.removeprefix(HUGGING_FACE)
        self.tokenizer: Any = _from_hub(transformers.AutoTokenizer.from_pretrained, source)
        masked = getattr(_from_hub(transformers.AutoConfig.from_pretrained, source), "pad_token_id", None)
        if self.tokenizer.pad_token_id is None or self.tokenizer.pad_token_id != masked:
            raise UserError(
                f"model.text.name: the tokenizer of {source!r} pads with token {self.tokenizer.pad_token_id}, its "
                f"encoder masks token {masked}; use an encoder and tokenizer that agree on a padding token"
            )

    def __call__(self, texts: list[str]) -> Tensor:
        """Tokens (B, context_length), int64."""
        out = self.tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=self.context_length, return_tensors="pt"
        )
        return out["input_ids"].to(torch.int64)


def _check_fits(encoder: Any, config: TextTowerConfig) -> None:
    """Raise UserError unless a configuration of transformers is that of a text encoder which takes our captions."""
    for field in ("hidden_size", "pad_token_id"):
        if getattr(encoder, field, None) is None:
            raise UserError(
                f"model.text.name: the configuration of {config.name.removeprefix(HUGGING_FACE)!r} "
                f"({encoder.model_type}) has no {field}; use a text encoder with a padding token, such as BERT"
            )
    longest = getattr(encoder, "max_position_embeddings", None)  # T5 has relative positions and no such bound
    if longest is not None and longest < config.context_length:
        raise UserError(
            f"model.text.context_length={config.context_length} is more than {config.name} takes; use at most {longest}"
        )


def _from_hub(load: Callable[[str], Any], source: str) -> Any:
    """Call a ``from_pretrained``; its many failures become one sentence."""
    try:
        return load(source)
    except (OSError, ValueError) as error:
        raise UserError(
            f"model.text.name: transformers cannot load {source!r}: {first_line(error)} "
            "Give a folder with config.json and tokenizer files, or a hub name on a machine that reaches the hub."
        ) from None
