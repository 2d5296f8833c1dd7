"""Models of transformers behind our interface: CLIP and SigLIP with both towers, or any image tower alone.

What ``scripts/export.py --format transformers`` wrote becomes a FocalCLIP again, and a FocalNet our own: transformers
returns its maps after the downsampling to the next stage, we return them before it.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from focalclip.errors import UserError, first_line
from focalclip.models.focalnet import FocalNet, FocalNetConfig
from focalclip.models.registries.transformers_registry import MODEL_TYPE
from focalclip.models.sources.encoder import ImageEncoder
from focalclip.models.sources.foreign import ForeignTower
from focalclip.models.text import HUGGING_FACE
from focalclip.models.weights import from_transformers, load_strictly
from focalclip.models.weights.names import some
from focalclip.preprocess import eval_transform

_TWO_TOWERS = ("clip", "siglip")


def load_transformers(source: str) -> Any:
    """CLIP, SigLIP or an export of ours, with ``encode_image``, ``encode_text``, ``preprocess`` and ``tokenizer``.

    Args:
        source: a name on the Hugging Face hub, or a folder.

    Raises:
        UserError: if it is another kind of model, is not whole, or cannot be had.
    """
    import transformers

    config = _told(source, transformers.AutoConfig.from_pretrained)
    if config.model_type not in (*_TWO_TOWERS, MODEL_TYPE):
        raise UserError(
            f"{HUGGING_FACE}{source}: a {config.model_type}, and only {' and '.join(_TWO_TOWERS)} have the two "
            "towers that focalclip.load wants; focalclip.load_image_encoder takes image towers"
        )
    tokenizer = _told(source, transformers.AutoTokenizer.from_pretrained)
    model = _trained(source, transformers.AutoModel)
    if config.model_type == MODEL_TYPE:
        if config.text_encoder is not None:
            model.model._tokenizer = PaddingTokenizer(tokenizer, model.model.config.text.context_length)
        return model.model
    preprocess = ProcessorTransform(_told(source, transformers.AutoImageProcessor.from_pretrained))
    return TransformersModel(model, preprocess, PaddingTokenizer(tokenizer, config.text_config.max_position_embeddings))


class TransformersModel(nn.Module):
    """CLIP or SigLIP of transformers with its preprocessing and tokenizer."""

    def __init__(self, model: Any, preprocess: "ProcessorTransform", tokenizer: "PaddingTokenizer") -> None:
        super().__init__()
        self.model = model
        self.preprocess = preprocess
        self.tokenizer = tokenizer

    def encode_image(self, images: Tensor, normalize: bool = False) -> Tensor:
        """Embed preprocessed images (B, 3, H, W) as (B, D)."""
        return _embeds(self.model.get_image_features(pixel_values=images), normalize)

    def encode_text(self, tokens: Tensor, normalize: bool = False) -> Tensor:
        """Embed tokens (B, L) as (B, D)."""
        return _embeds(self.model.get_text_features(input_ids=tokens), normalize)

    def text_lengths(self, tokens: Tensor) -> Tensor | None:
        """How many tokens of each row (B, L) decide its embedding: (B,); None where all do.

        CLIP's attention is causal and its embedding that of the first end-of-text; SigLIP sees the padding, too.
        """
        if self.model.config.model_type != "clip":
            return None
        end = self.model.config.text_config.eos_token_id
        if end == 2:  # configurations from before transformers 4.30, which then takes the largest number
            return tokens.argmax(1) + 1
        is_end = tokens == end
        return torch.where(is_end.any(1), is_end.int().argmax(1) + 1, tokens.shape[1])


class PaddingTokenizer:
    """A tokenizer of transformers as a function of texts; pads to the full context, as SigLIP was trained."""

    def __init__(self, tokenizer: Any, context_length: int) -> None:
        self.tokenizer = tokenizer
        self.context_length = context_length

    def __call__(self, texts: list[str]) -> Tensor:
        """Tokens (B, context_length), int64."""
        out = self.tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=self.context_length, return_tensors="pt"
        )
        return out["input_ids"].to(torch.int64)


class TransformersTower(ForeignTower):
    """Image model of transformers.

    Pooled features are its trained ``pooler_output``, else its class token, else the mean over positions. Feature maps
    are its hidden states without the embedding's: one per stage of a convolutional net, one per block of a ViT; a
    Swin's come after the downsampling, as transformers gives them.
    """

    def __init__(self, model: Any, source: str) -> None:
        super().__init__()
        self.model = model
        self.source = source
        parameters = inspect.signature(model.forward).parameters
        if "pixel_values" not in parameters:
            raise UserError(
                f"{HUGGING_FACE}{source}: a {model.config.model_type} takes no pictures; name an image model"
            )
        # Learned positions are for one resolution; where the model can fit them to another, it is asked to.
        self._options = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in parameters else {}

    def forward(self, images: Tensor) -> Tensor:
        """Pooled features (B, num_features) of preprocessed images (B, 3, H, W)."""
        out = self.model(pixel_values=images, **self._options)
        if (pooled := getattr(out, "pooler_output", None)) is not None:
            return pooled.flatten(1)
        last = out.last_hidden_state
        if last.ndim == 4:
            return last.mean((2, 3))
        return last[:, 0] if self._num_prefix_tokens(last, images) else last.mean(1)

    def feature_maps(self, images: Tensor) -> list[Tensor]:
        """One (B, C_i, H_i, W_i) map for each of ``strides``.

        Raises:
            UserError: if its hidden states are no maps.
        """
        out = self.model(pixel_values=images, output_hidden_states=True, **self._options)
        states = getattr(out, "reshaped_hidden_states", None) or getattr(out, "hidden_states", None)
        if not states:
            raise UserError(f"{HUGGING_FACE}{self.source}: gives pooled features alone; choose a ViT or a timm: tower")
        return [x if x.ndim == 4 else self._as_map(x, images) for x in states[1:]]

    def _grid(self, images: Tensor) -> tuple[int, int]:
        patch = getattr(self.model.config, "patch_size", None) or 0
        height, width = (patch, patch) if isinstance(patch, int) else patch
        return (images.shape[2] // height, images.shape[3] // width) if height and width else (0, 0)

    def _num_prefix_tokens(self, tokens: Tensor, images: Tensor) -> int:
        """Class and register tokens before those of the patches; 0 where there is no telling."""
        height, width = self._grid(images)
        return max(tokens.shape[1] - height * width, 0) if height * width else 0

    def _as_map(self, tokens: Tensor, images: Tensor) -> Tensor:
        height, width = self._grid(images)
        if not height * width or tokens.shape[1] < height * width:
            raise UserError(
                f"{HUGGING_FACE}{self.source}: its hidden states are no maps; choose a ViT or a timm: tower"
            )
        patches = tokens[:, -height * width :]
        return patches.transpose(1, 2).unflatten(2, (height, width))  # B (H W) C -> B C H W


class ProcessorTransform:
    """An image processor of transformers as a function of one picture."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, picture: Image.Image) -> Tensor:
        """Picture of any mode to (3, H, W) float32."""
        return self.processor(images=picture.convert("RGB"), return_tensors="pt")["pixel_values"][0].float()


def transformers_encoder(source: str) -> ImageEncoder:
    """The image tower of a model of transformers, frozen, with the preprocessing of its own configuration.

    Args:
        source: a name on the Hugging Face hub, or a folder.

    Raises:
        UserError: if it has no image tower, is not whole, or cannot be had.
    """
    import transformers

    config = _told(source, transformers.AutoConfig.from_pretrained)
    if config.model_type == MODEL_TYPE:
        ours = _trained(source, transformers.AutoModel).model
        return ImageEncoder(ours.visual.trunk, partial(eval_transform, ours.config.image))
    preprocess = partial(ProcessorTransform, _told(source, transformers.AutoImageProcessor.from_pretrained))
    if config.model_type == "focalnet":
        return ImageEncoder(_focalnet(source, config), preprocess)
    model = _trained(source, transformers.AutoModel)
    tower = TransformersTower(getattr(model, "vision_model", model), source)
    tower.measure(preprocess()(Image.new("RGB", (64, 64)))[None])
    return ImageEncoder(tower, preprocess)


def _focalnet(source: str, theirs: Any) -> FocalNet:
    """Our FocalNet with the weights of theirs."""
    import transformers

    if theirs.hidden_act != "gelu" or theirs.layer_norm_eps != 1e-5:
        raise UserError(
            f"{HUGGING_FACE}{source}: hidden_act={theirs.hidden_act}, layer_norm_eps={theirs.layer_norm_eps}; "
            "a FocalNet has gelu and 1e-5"
        )
    patch = theirs.patch_size if isinstance(theirs.patch_size, int) else theirs.patch_size[0]
    config = FocalNetConfig(
        embed_dim=theirs.embed_dim,
        depths=tuple(theirs.depths),
        focal_levels=tuple(theirs.focal_levels),
        focal_windows=tuple(theirs.focal_windows),
        mlp_ratio=theirs.mlp_ratio,
        patch_size=4
        if theirs.use_conv_embed
        else patch,  # their overlapping stem has stride 4 whatever patch_size says
        use_overlap=theirs.use_conv_embed,
        use_post_norm=theirs.use_post_layernorm,
        use_post_norm_in_modulation=theirs.use_post_layernorm_in_modulation,
        normalize_modulator=theirs.normalize_modulator,
        layer_scale=theirs.layerscale_value if theirs.use_layerscale else None,
        in_channels=theirs.num_channels,
    )
    with torch.device("meta"):
        tower = FocalNet(config)
    weights = _trained(source, transformers.FocalNetModel).state_dict()
    load_strictly(tower, from_transformers(weights, post_norm=config.use_post_norm), f"{HUGGING_FACE}{source}")
    return tower


def _trained(source: str, kind: Any) -> Any:
    """The model in float32, none of its weights left at random.

    Image classifiers and masked models are saved without the pooler that transformers adds; it is taken off again.
    """
    model, info = _told(source, partial(kind.from_pretrained, output_loading_info=True))
    missing = set(info["missing_keys"])
    if others := {name for name in missing if not name.startswith("pooler.")}:
        raise UserError(
            f"{HUGGING_FACE}{source}: {len(others)} weights are missing ({some(others)}) and would be random; "
            "use a whole checkpoint of this model"
        )
    if missing:
        model.pooler = None
    return model.float().eval()


def _told(source: str, load: Callable[[str], Any]) -> Any:
    """Call a ``from_pretrained``; its many failures become one sentence."""
    from safetensors import SafetensorError

    try:
        return load(source)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"{HUGGING_FACE}{source}: transformers cannot load it: {first_line(error)} "
            "Give a folder of save_pretrained with its preprocessor, or a hub name on a machine that reaches the hub."
        ) from None


def _embeds(out: Any, normalize: bool) -> Tensor:
    features = getattr(out, "pooler_output", out)
    return F.normalize(features.float(), dim=-1) if normalize else features
