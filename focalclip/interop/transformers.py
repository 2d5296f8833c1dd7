"""Models of transformers behind our interface: text encoders, CLIP and SigLIP, any image tower; FocalNet in and out.

What ``scripts/export.py --format transformers`` wrote becomes a FocalCLIP again, and their FocalNet becomes ours,
because transformers returns its maps after the downsampling to the next stage and we return them before it. The class
that transformers builds for our two-tower model is in :mod:`focalclip.interop.transformers_model`.
"""

import importlib
import inspect
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from focalclip.base.errors import UserError, first_line
from focalclip.config import ImageTowerConfig, TextTowerConfig
from focalclip.data.images import to_rgb
from focalclip.interop.encoder import ForeignTower, ImageEncoder, TowerWeights
from focalclip.interop.folder import TOWER_WEIGHTS, write_weights
from focalclip.interop.register import MODEL_TYPE
from focalclip.models import draws
from focalclip.models.clip import FocalCLIP
from focalclip.models.focalnet import FocalNet, FocalNetConfig
from focalclip.models.preprocess import CHANNELS, check_channels, eval_transform
from focalclip.models.text import MARGIN, MAX_CHARACTERS
from focalclip.models.weights import load_strictly, state_dict_from_transformers, to_transformers
from focalclip.models.weights.dialects import some
from focalclip.names import TRANSFORMERS, split

_TWO_TOWERS = ("clip", "siglip")


_TRANSFORMERS_FIELDS = {
    "embed_dim", "depths", "focal_levels", "focal_windows", "mlp_ratio", "patch_size", "use_overlap", "use_post_norm",
    "use_post_norm_in_modulation", "normalize_modulator", "layer_scale", "dropout", "drop_path", "in_channels",
    "num_classes", "activation_checkpointing", "init",
}  # fmt: skip


class FocalCLIPConfig(PreTrainedConfig):
    """What :class:`~focalclip.interop.transformers_model.FocalCLIPModel` is built from.

    Attributes:
        model: a :class:`~focalclip.config.ModelConfig` as a dictionary.
        text_encoder: configuration of the Hugging Face text encoder, if the model has one.
    """

    model_type = MODEL_TYPE

    model: dict | None = None
    text_encoder: dict | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        # Here, as no model is looked up without a configuration: open_clip alone loads transformers' automatic classes,
        # and it need not pay for transformers' model classes.
        importlib.import_module("focalclip.interop.transformers_model")


class HuggingFaceTextTower(nn.Module):
    """Encoder of transformers, mean over the tokens that are not padding, linear projection.

    Works for any encoder whose output has ``last_hidden_state`` and whose configuration tells ``hidden_size`` and
    ``pad_token_id`` (BERT, RoBERTa, MPNet, DeBERTa, the encoder of T5, ...).
    """

    def __init__(self, config: TextTowerConfig, embed_dim: int) -> None:
        super().__init__()
        source = split(config.name)[1]
        self.config = _load_text(source, transformers.AutoConfig.from_pretrained)
        _check_fits(self.config, config)
        encoder = transformers.AutoModel.from_config(self.config)
        encoder = encoder.float()  # transformers takes the dtype of the configuration, which may be of 16 bits
        self.transformer = encoder.get_encoder() if self.config.is_encoder_decoder else encoder
        self.transformer.pooler = None  # BERT's pooler would stay without a gradient under mean pooling
        _draw_by_sample(self.transformer)
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


class PaddingTokenizer:
    """A tokenizer of transformers as a function of captions; pads to the full context, as SigLIP was trained."""

    def __init__(self, tokenizer: Any, context_length: int) -> None:
        self.tokenizer = tokenizer
        self.context_length = context_length

    def __call__(self, texts: list[str]) -> Tensor:
        """Tokens (B, context_length), int64; longer captions are cut."""
        texts = [self._head(text) for text in texts]
        out = self.tokenizer(
            texts, padding="max_length", truncation=True, max_length=self.context_length, return_tensors="pt"
        )
        return out["input_ids"].to(torch.int64)

    def _head(self, text: str) -> str:
        """The whole words at the beginning of a long text, if their tokens fill the context and the margin.

        A word is never cut: where tokens are chosen by their probability, its end decides how it begins.
        """
        words = text[:MAX_CHARACTERS].rsplit(maxsplit=1)
        if len(text) <= MAX_CHARACTERS or len(words) < 2 or self.tokenizer.truncation_side != "right":
            return text
        tokens = self.tokenizer(words[0], add_special_tokens=False, verbose=False)["input_ids"]
        return words[0] if len(tokens) >= self.context_length + MARGIN else text


def create_tokenizer(config: TextTowerConfig) -> PaddingTokenizer:
    """The tokenizer that belongs to a :class:`HuggingFaceTextTower`.

    Raises:
        UserError: if it cannot be loaded, or pads with another token than the encoder masks.
    """
    source = split(config.name)[1]
    tokenizer = _load_text(source, transformers.AutoTokenizer.from_pretrained)
    encoder = _load_text(source, transformers.AutoConfig.from_pretrained)
    check_vocabulary(tokenizer, f"model.text.name: {source!r}", getattr(encoder, "vocab_size", None))
    masked = getattr(encoder, "pad_token_id", None)
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id != masked:
        raise UserError(
            f"model.text.name: the tokenizer of {source!r} pads with token {tokenizer.pad_token_id}, its "
            f"encoder masks token {masked}; use an encoder and tokenizer that agree on a padding token"
        )
    return PaddingTokenizer(tokenizer, config.context_length)


def check_vocabulary(tokenizer: Any, what: str, size: int | None = None) -> None:
    """Check that a tokenizer of transformers has a vocabulary, and not a larger one than its text tower.

    Where its files are missing, transformers builds one of special tokens alone, which are then the tokens of any text.

    Args:
        tokenizer: as transformers loads it.
        what: where it comes from, for the message.
        size: tokens that the text tower knows; None: not known.

    Raises:
        UserError: if it has no vocabulary, or another model's.
    """
    vocabulary = tokenizer.get_vocab()
    if len(vocabulary.keys() - set(tokenizer.all_special_tokens)) < 2:  # T5's has the mark of a word's beginning
        raise UserError(
            f"{what}: its tokenizer has no vocabulary; add the tokenizer's files (tokenizer.json, or vocab.json and"
            " merges.txt ...), as save_pretrained writes them"
        )
    if size is not None and max(vocabulary.values()) >= size:
        raise UserError(
            f"{what}: its tokenizer has {max(vocabulary.values()) + 1:,} tokens and its text tower {size:,}; take the"
            " tokenizer that belongs to it"
        )


def write_text_files(model: FocalCLIP, folder: Path) -> None:
    """Write the configuration of the text encoder and its tokenizer, as an exported folder holds them."""
    text, tokenizer = model.text, model.tokenizer
    assert isinstance(text, HuggingFaceTextTower)
    assert isinstance(tokenizer, PaddingTokenizer)
    text.config.save_pretrained(folder)
    tokenizer.tokenizer.save_pretrained(folder)


def open_clip_text_config(config: TextTowerConfig) -> dict[str, Any]:
    """The text tower in open_clip's ``text_cfg``."""
    return {
        "hf_model_name": split(config.name)[1], "hf_model_pretrained": False,
        "hf_tokenizer_name": ".",  # open_clip reads the tokenizer of a local folder from that folder
        "hf_proj_type": "linear", "hf_pooler_type": "mean_pooler",
    }  # fmt: skip


_ATTENTION_PLACE = 1 << 20  # places of attention weights in draws, behind those of all modules


def _draw_by_sample(encoder: Any) -> None:
    """Let dropout of attention weights depend on the sample (:mod:`focalclip.models.draws`), as transformers' does not.

    Encoders that do not take an attention function keep theirs, which draws from torch's generator.
    """
    rates = [getattr(encoder.config, name, 0.0) for name in ("attention_probs_dropout_prob", "attention_dropout")]
    if any(rates) and encoder.config._attn_implementation == "sdpa":
        transformers.AttentionInterface.register("sample_draws", _attention)
        transformers.AttentionMaskInterface.register("sample_draws", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
        encoder.set_attn_implementation("sample_draws")


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """Transformers' scaled dot product attention of (B, heads, L, C), with our dropout where there is one."""
    if not options.get("dropout"):
        return sdpa_attention_forward(module, query, key, value, mask, **options)
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * (options.get("scaling") or query.shape[-1] ** -0.5)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    elif getattr(module, "is_causal", False):
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(later, float("-inf"))
    place = _ATTENTION_PLACE + (getattr(module, "layer_idx", None) or 0)
    weights = draws.dropout(scores.softmax(-1), options["dropout"], place)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def _check_fits(encoder: Any, config: TextTowerConfig) -> None:
    """Raise UserError unless a configuration of transformers is that of a text encoder which takes our captions."""
    for field in ("hidden_size", "pad_token_id"):
        if getattr(encoder, field, None) is None:
            raise UserError(
                f"model.text.name: the configuration of {split(config.name)[1]!r} "
                f"({encoder.model_type}) has no {field}; use a text encoder with a padding token, such as BERT"
            )
    longest = getattr(encoder, "max_position_embeddings", None)  # T5 has relative positions and no such bound
    if longest is not None and longest < config.context_length:
        raise UserError(
            f"model.text.context_length={config.context_length} is more than {config.name} takes; use at most {longest}"
        )


class ProcessorTransform:
    """An image processor of transformers as a function of one picture.

    Args:
        processor: theirs.
        channels: of the images: 3 for RGB, 1 for grey.
    """

    def __init__(self, processor: Any, channels: int = 3) -> None:
        self.processor = processor
        self.channels = channels
        check_channels(channels)

    def __call__(self, picture: Image.Image) -> Tensor:
        """Picture of any mode to (channels, H, W) float32."""
        rgb, options = to_rgb(picture), {}
        if self.channels == 1:
            means = (sum(values) / len(values) for values in (self.processor.image_mean, self.processor.image_std))
            options = {"do_convert_rgb": False} | {
                name: [mean] for name, mean in zip(("image_mean", "image_std"), means, strict=True)
            }
        image = rgb.convert("L") if self.channels == 1 else rgb
        return self.processor(images=image, return_tensors="pt", **options)["pixel_values"][0].float()


def _image_channels(config: Any) -> int:
    """Channels that an image model of transformers takes."""
    return getattr(getattr(config, "vision_config", config), "num_channels", 3)


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
        self.in_channels = _image_channels(model.config)
        parameters = inspect.signature(model.forward).parameters
        if "pixel_values" not in parameters:
            raise UserError(
                f"{TRANSFORMERS}{source}: a {model.config.model_type} takes no pictures; name an image model"
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
            raise UserError(f"{TRANSFORMERS}{self.source}: gives pooled features alone; choose a ViT or a timm: tower")
        return [x if x.ndim == 4 else self._as_map(x, images) for x in states[1:]]

    def __getstate__(self) -> Any:
        """Without the hooks that transformers hangs into a model that runs, which cannot be pickled.

        They are local functions; the next forward pass hangs them in again.
        """
        for module in self.model.modules():
            for number, hook in list(module._forward_hooks.items()):
                if getattr(hook, "__module__", "") == "transformers.utils.output_capturing":
                    del module._forward_hooks[number]
            if hasattr(module, "_output_capturing_hooks_installed"):
                module._output_capturing_hooks_installed = False
        return super().__getstate__()

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
                f"{TRANSFORMERS}{self.source}: its hidden states are no maps; choose a ViT or a timm: tower"
            )
        patches = tokens[:, -height * width :]
        return patches.transpose(1, 2).unflatten(2, (height, width))  # B (H W) C -> B C H W


def load_transformers(source: str) -> Any:
    """CLIP, SigLIP or an export of ours, with ``encode_image``, ``encode_text``, ``preprocess`` and ``tokenizer``.

    Args:
        source: a name on the Hugging Face hub, or a folder.

    Raises:
        UserError: if it is another kind of model, is not whole, or cannot be had.
    """
    config = _load_source(source, transformers.AutoConfig.from_pretrained)
    if config.model_type not in (*_TWO_TOWERS, MODEL_TYPE):
        raise UserError(
            f"{TRANSFORMERS}{source}: a {config.model_type}, and only {' and '.join(_TWO_TOWERS)} have the two "
            "towers that focalclip.load wants; focalclip.load_image_encoder takes image towers"
        )
    tokenizer = _load_source(source, transformers.AutoTokenizer.from_pretrained)
    _check_tokens(source, tokenizer, config)
    model = _trained(source, transformers.AutoModel)
    if config.model_type == MODEL_TYPE:
        if config.text_encoder is not None:
            model.model._tokenizer = PaddingTokenizer(tokenizer, model.model.config.text.context_length)
        return model.model
    preprocess = ProcessorTransform(_load_source(source, transformers.AutoImageProcessor.from_pretrained))
    return TransformersModel(model, preprocess, PaddingTokenizer(tokenizer, config.text_config.max_position_embeddings))


def _check_tokens(source: str, tokenizer: Any, config: Any) -> None:
    """Raise UserError unless the tokenizer is the text tower's: whole, no larger, and ending texts as CLIP finds it."""
    text = config.text_encoder or {} if config.model_type == MODEL_TYPE else config.text_config.to_dict()
    check_vocabulary(tokenizer, f"{TRANSFORMERS}{source}", text.get("vocab_size"))
    end = text.get("eos_token_id")
    if config.model_type == "clip" and end != 2 and end not in tokenizer("a photo")["input_ids"]:  # 2: see text_lengths
        raise UserError(
            f"{TRANSFORMERS}{source}: its tokenizer does not end a text with token {end}, at which CLIP takes its"
            " embedding; take the tokenizer that belongs to it"
        )


def transformers_encoder(source: str) -> ImageEncoder:
    """The image tower of a model of transformers, frozen, with the preprocessing of its own configuration.

    Args:
        source: a name on the Hugging Face hub, or a folder.

    Raises:
        UserError: if it has no image tower, is not whole, or cannot be had.
    """
    config = _load_source(source, transformers.AutoConfig.from_pretrained)
    if config.model_type == MODEL_TYPE:
        ours = _trained(source, transformers.AutoModel).model
        return ImageEncoder(ours.visual.trunk, partial(eval_transform, ours.config.image))
    channels = _image_channels(config)
    processor = _load_source(source, transformers.AutoImageProcessor.from_pretrained)
    preprocess = partial(ProcessorTransform, processor, channels)
    if config.model_type == "focalnet":
        return ImageEncoder(_focalnet(source, config), preprocess)
    model = _trained(source, transformers.AutoModel)
    tower = TransformersTower(getattr(model, "vision_model", model), source)
    if channels in CHANNELS:
        images = preprocess()(Image.new("RGB", (64, 64)))[None]
    else:
        size = getattr(tower.model.config, "image_size", 224)
        images = torch.zeros(1, channels, *((size, size) if isinstance(size, int) else size))
    tower.measure(images)
    return ImageEncoder(tower, preprocess)


def image_weights(source: str) -> TowerWeights | FocalCLIP:
    """The weights of a FocalNet of transformers, by our names; of an export of ours the whole model.

    Raises:
        UserError: if it is another kind of model, is not whole, or cannot be had.
    """
    config = _load_source(source, transformers.AutoConfig.from_pretrained)
    if config.model_type == MODEL_TYPE:
        return load_transformers(source)
    if config.model_type != "focalnet":
        raise UserError(
            f"{TRANSFORMERS}{source}: a {config.model_type}, and only FocalNets of transformers have the names of a "
            "tower here; give timm: or open_clip: weights of the same tower"
        )
    processor = _load_source(source, transformers.AutoImageProcessor.from_pretrained)
    tower = _focalnet(source, config)
    statistics = [tuple(getattr(processor, name)) for name in ("image_mean", "image_std")]
    return TowerWeights(tower.state_dict(), encode=tower, mean=statistics[0], std=statistics[1])


def text_weights(source: str, config: TextTowerConfig) -> TowerWeights | FocalCLIP:
    """The weights of a text encoder, by the names of a :class:`HuggingFaceTextTower` and without a projection.

    Of an export of ours the whole model. The tokenizer has the context length of ``config``.

    Raises:
        UserError: if it is no text encoder, is not whole, or cannot be had.
    """
    theirs = _load_source(source, transformers.AutoConfig.from_pretrained)
    if theirs.model_type == MODEL_TYPE:
        return load_transformers(source)
    if theirs.model_type in _TWO_TOWERS:
        raise UserError(
            f"{TRANSFORMERS}{source}: a {theirs.model_type}, whose text tower has other names than the ones here; give "
            "open_clip: weights of the same model"
        )
    named = TextTowerConfig(name=f"{TRANSFORMERS}{source}", context_length=config.context_length)
    tower: Any = HuggingFaceTextTower(named, 8)
    trained = _trained(source, transformers.AutoModel)
    encoder = trained.get_encoder() if theirs.is_encoder_decoder else trained
    encoder.pooler = None
    load_strictly(tower.transformer, encoder.state_dict(), named.name)
    tower.proj = nn.Identity()
    return TowerWeights(tower.state_dict(), encode=tower.eval(), tokenizer=create_tokenizer(named))


def _focalnet(source: str, theirs: Any) -> FocalNet:
    """Our FocalNet with the weights of theirs."""
    if theirs.hidden_act != "gelu" or theirs.layer_norm_eps != 1e-5:
        raise UserError(
            f"{TRANSFORMERS}{source}: hidden_act={theirs.hidden_act}, layer_norm_eps={theirs.layer_norm_eps}; "
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
    load_strictly(
        tower, state_dict_from_transformers(weights, post_norm=config.use_post_norm), f"{TRANSFORMERS}{source}"
    )
    return tower


def _trained(source: str, kind: Any) -> Any:
    """The model in float32, none of its weights left at random.

    Image classifiers and masked models are saved without the pooler that transformers adds; it is taken off again.
    """
    model, info = _load_source(source, partial(kind.from_pretrained, output_loading_info=True))
    missing = set(info["missing_keys"])
    if others := {name for name in missing if not name.startswith("pooler.")}:
        raise UserError(
            f"{TRANSFORMERS}{source}: {len(others)} weights are missing ({some(others)}) and would be random; "
            "use a whole checkpoint of this model"
        )
    if missing:
        model.pooler = None
    return model.float().eval()


def _load_text(source: str, load: Callable[[str], Any]) -> Any:
    """Call a ``from_pretrained`` for ``model.text.name`` and turn its failures into a UserError."""
    return _load(
        source, load, f"model.text.name: transformers cannot load {source!r}", "config.json and tokenizer files"
    )


def _load_source(source: str, load: Callable[[str], Any]) -> Any:
    """Call a ``from_pretrained`` for a trained model and turn its failures into a UserError."""
    problem = f"{TRANSFORMERS}{source}: transformers cannot load it"
    return _load(source, load, problem, "the files of save_pretrained and its preprocessor")


def _load(source: str, load: Callable[[str], Any], problem: str, files: str) -> Any:
    from safetensors import SafetensorError

    try:
        return load(source)
    except (OSError, ValueError, RuntimeError, LookupError, TypeError, SafetensorError) as error:
        raise UserError(
            f"{problem}: {first_line(error)} "
            f"Give a folder with {files}, or a hub name on a machine that reaches the hub."
        ) from None


def _embeds(out: Any, normalize: bool) -> Tensor:
    features = getattr(out, "pooler_output", out)
    return F.normalize(features.float(), dim=-1) if normalize else features


def why_not_transformers(tower: Any) -> str | None:
    """What transformers' FocalNet cannot hold of this tower, in one clause; None if it holds all of it."""
    if not isinstance(tower, FocalNet):
        return "the tower is no FocalNet"
    config = tower.config
    if config.use_overlap and config.patch_size != 4:
        return f"it has overlapping stems of stride 4 alone, not {config.patch_size}"
    return next((f"it has no {name}={getattr(config, name)}" for name in _changed(config, _TRANSFORMERS_FIELDS)), None)


def _changed(config: FocalNetConfig, known: set[str]) -> list[str]:
    """Fields outside ``known`` that differ from their defaults."""
    default = FocalNetConfig()
    names = [field.name for field in fields(config) if field.name not in known]
    return [name for name in names if getattr(config, name) != getattr(default, name)]


def write_transformers_tower(model: FocalCLIP, folder: Path) -> None:
    """Write what ``transformers.FocalNetModel.from_pretrained(FOLDER)`` loads, with its image processor.

    Raises:
        UserError: if transformers' FocalNet cannot hold the tower.
    """
    tower = model.visual.trunk
    if reason := why_not_transformers(tower):
        raise UserError(f"transformers cannot hold {model.config.image.name}: {reason}")
    c = replace(tower.config, drop_path=0.0)
    config = transformers.FocalNetConfig(
        image_size=model.config.image.image_size, patch_size=c.patch_size, num_channels=c.in_channels,
        embed_dim=c.embed_dim, use_conv_embed=c.use_overlap, hidden_sizes=list(c.dims), depths=list(c.depths),
        focal_levels=list(c.stage_levels), focal_windows=list(c.stage_windows), mlp_ratio=c.mlp_ratio,
        hidden_dropout_prob=c.dropout, drop_path_rate=0.0, use_layerscale=c.layer_scale is not None,
        layerscale_value=c.layer_scale or 1e-4, use_post_layernorm=c.use_post_norm,
        use_post_layernorm_in_modulation=c.use_post_norm_in_modulation, normalize_modulator=c.normalize_modulator,
        encoder_stride=tower.strides[-1],
    )  # fmt: skip
    config.architectures = ["FocalNetModel"]
    config.save_pretrained(folder)
    write_weights(to_transformers(tower.state_dict()), folder / TOWER_WEIGHTS)
    image_processor(model.config.image).save_pretrained(folder)


def image_processor(image: ImageTowerConfig) -> Any:
    """The image processor of transformers that makes of a picture what ``model.preprocess`` makes of it.

    Raises:
        UserError: if it has no such resize.
    """
    from transformers import CLIPImageProcessorPil  # Pillow's resize, as in training; torchvision's differs slightly

    side = image.image_size
    if image.resize_mode == "longest":
        raise UserError("--format transformers: its image processor has no resize_mode=longest; export to open_clip")
    square = {"height": side, "width": side}
    return CLIPImageProcessorPil(
        size=square if image.resize_mode == "squash" else {"shortest_edge": side},
        do_center_crop=image.resize_mode == "shortest",
        crop_size=square,
        image_mean=list(image.mean),
        image_std=list(image.std),
        resample={"bilinear": 2, "bicubic": 3}[image.interpolation],  # Pillow's numbers
    )
