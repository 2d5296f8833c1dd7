"""The two-tower model as one of transformers': configuration, saving, loading, and everything under its names."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForZeroShotImageClassification,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.generic import ModelOutput

from focalclip.base.errors import UserError
from focalclip.base.strict import from_dict
from focalclip.config import ModelConfig
from focalclip.interop import folder as store
from focalclip.interop.card import Trained
from focalclip.interop.transformers import (
    FocalCLIPConfig,
    HuggingFaceTextTower,
    PaddingTokenizer,
    image_processor,
    why_not_transformers,
    write_transformers_tower,
)
from focalclip.losses import contrastive_loss
from focalclip.models.clip import FocalCLIP
from focalclip.names import TRANSFORMERS

TOWER = "image_tower"


@dataclass
class FocalCLIPOutput(ModelOutput):
    """Like transformers' ``CLIPOutput``: unit-length embeddings and scaled similarities."""

    loss: Tensor | None = None
    logits_per_image: Tensor | None = None
    logits_per_text: Tensor | None = None
    text_embeds: Tensor | None = None
    image_embeds: Tensor | None = None


class FocalCLIPModel(PreTrainedModel):
    """A :class:`~focalclip.models.clip.FocalCLIP` behind the interface of transformers' ``CLIPModel``.

    It fits captions to the text tower itself, as focalclip's tokenizer does: too many tokens are cut, and padding
    becomes what the tower was trained with, whichever way the tokenizer pads.
    """

    config_class = FocalCLIPConfig
    main_input_name = "pixel_values"
    input_modalities = ("image", "text")  # pyrefly: ignore[bad-assignment] as transformers itself has it

    def __init__(self, config: FocalCLIPConfig) -> None:
        super().__init__(config)
        self.model = _build(config)
        # transformers empties buffers that are not in the state dict (the text tower's causal mask) while it loads.
        self._constants = {name: x.clone() for name, x in self.named_non_persistent_buffers()}
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in transformers."""
        loaded = super().from_pretrained(*args, **kwargs)
        model: Self = loaded[0] if isinstance(loaded, tuple) else loaded
        for name, x in model._constants.items():
            model.get_buffer(name).copy_(x)
        return loaded

    def _init_weights(self, module: nn.Module) -> None:
        """The towers initialise themselves."""

    def get_image_features(self, pixel_values: Tensor, **_: Any) -> BaseModelOutputWithPooling:
        """Embed (B, 3, H, W); ``pooler_output`` is (B, D), not normalised, as ``CLIPModel`` has it."""
        return BaseModelOutputWithPooling(pooler_output=self.model.encode_image(pixel_values))

    def get_text_features(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any
    ) -> BaseModelOutputWithPooling:
        """Embed tokens (B, L); ``pooler_output`` is (B, D), not normalised, as ``CLIPModel`` has it."""
        return BaseModelOutputWithPooling(pooler_output=self.model.encode_text(self._fit(input_ids, attention_mask)))

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        attention_mask: Tensor | None = None,
        return_loss: bool = False,
        return_dict: bool = True,
        **_: Any,
    ) -> FocalCLIPOutput | tuple[Any, ...]:
        """Compare (B, 3, H, W) images with (T, L) tokens: logits (B, T); the loss, if asked for, needs B = T."""
        tokens = self._fit(input_ids, attention_mask)
        outputs = self.model(pixel_values, tokens)
        image_embeds, text_embeds, scale = outputs["image"], outputs["text"], outputs["scale"]
        logits = scale * image_embeds @ text_embeds.T
        loss = contrastive_loss(image_embeds, text_embeds, scale) if return_loss else None
        output = FocalCLIPOutput(loss, logits, logits.T, text_embeds, image_embeds)
        return output if return_dict else output.to_tuple()

    def _fit(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Tokens (B, L) as the text tower takes them."""
        text = self.model.config.text
        length = text.context_length
        if self.config.text_encoder is not None:
            return input_ids[:, :length]
        end = input_ids.amax(1, keepdim=True)  # CLIP's end-of-text token has the largest number
        if attention_mask is not None:
            input_ids = input_ids.masked_fill(attention_mask == 0, 0)  # CLIP pads with 0
        if input_ids.shape[1] > length:
            cut = input_ids[:, length:].any(1, keepdim=True)
            input_ids = torch.cat([input_ids[:, : length - 1], input_ids[:, length - 1 : length].where(~cut, end)], 1)
        missing = 0 if text.causal else length - input_ids.shape[1]  # without a mask, padding counts
        return nn.functional.pad(input_ids, (0, missing))


for _auto in (AutoModel, AutoModelForZeroShotImageClassification):  # transformers' automatic classes find the model
    _auto.register(FocalCLIPConfig, FocalCLIPModel, exist_ok=True)


def _build(config: FocalCLIPConfig) -> FocalCLIP:
    """The model with fresh weights, on the CPU whatever the surrounding context: its constants must be real.

    Raises:
        UserError: if the configuration does not hold a model.
    """
    if config.model is None:
        raise UserError("FocalCLIPConfig: model is missing; load a folder written by scripts/export.py")
    ours = from_dict(ModelConfig, config.model, "config.json: model")
    with torch.device("cpu"), tempfile.TemporaryDirectory() as folder:
        if config.text_encoder is not None:
            AutoConfig.for_model(**config.text_encoder).save_pretrained(folder)
            text = ours.text.model_copy(update={"name": f"{TRANSFORMERS}{folder}", "pretrained": False})
            ours = ours.model_copy(update={"text": text})
        return FocalCLIP(ours)


def write_transformers(trained: Trained, folder: Path) -> list[str]:
    """Write ``FocalCLIPModel`` with its processor, and the image tower as transformers' own ``FocalNetModel``.

    Raises:
        UserError: if transformers has no such preprocessing.
    """
    model = trained.model
    encoder = None
    if isinstance(model.text, HuggingFaceTextTower):
        encoder = model.text.config.to_dict()
        encoder.pop("_name_or_path", None)  # a path of this machine
    config = FocalCLIPConfig(
        model=store.exported_config(model.config).model_dump(mode="json"),
        text_encoder=encoder,
    )
    processor = transformers.CLIPProcessor(image_processor(model.config.image), _tokenizer(model))
    theirs = FocalCLIPModel(config)
    theirs.model.load_state_dict(model.state_dict())
    theirs.save_pretrained(folder)
    processor.save_pretrained(folder)
    notes = ["transformers knows the two-tower model only after `import focalclip`."]
    try:
        write_transformers_tower(model, folder / TOWER)
    except UserError as error:
        return [*notes, f"There is no {TOWER}/ for use without focalclip: {error}."]
    return notes


def _tokenizer(model: Any) -> Any:
    """The tokenizer as one of transformers'; CLIP's is built from the tables that open_clip ships."""
    if isinstance(model.tokenizer, PaddingTokenizer):
        return model.tokenizer.tokenizer
    from transformers import CLIPTokenizer

    ours, names = model.tokenizer.tokenizer, {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    return CLIPTokenizer(
        vocab={names.get(token, token): number for token, number in ours.encoder.items()},
        merges=list(ours.bpe_ranks),
        model_max_length=model.config.text.context_length,
    )


def transformers_usage(trained: Trained, folder: str) -> str:
    """Python that loads both towers, and the image tower alone."""
    both = f"""\
import focalclip  # registers the model with transformers
import transformers

# backend="pil": Pillow's resize, which training had; torchvision's, the default of transformers, differs a little
images = transformers.AutoImageProcessor.from_pretrained("{folder}", backend="pil")
classify = transformers.pipeline("zero-shot-image-classification", model="{folder}", image_processor=images)
classify(picture, candidate_labels=["a dog", "a cat"], hypothesis_template="{{}}")

model = transformers.AutoModel.from_pretrained("{folder}")
processor = transformers.AutoProcessor.from_pretrained("{folder}")
processor.image_processor = images
outputs = model(**processor(text=["a dog", "a cat"], images=picture, return_tensors="pt", padding=True))"""
    if why_not_transformers(trained.model.visual.trunk):
        return both
    return f"""{both}

# the image tower alone, without focalclip
tower = transformers.FocalNetModel.from_pretrained("{folder}", subfolder="{TOWER}")
images = transformers.AutoImageProcessor.from_pretrained("{folder}", subfolder="{TOWER}", backend="pil")
features = tower(**images(picture, return_tensors="pt")).pooler_output"""
