"""The two-tower model: an image tower, a text tower, and the scale of their cosines."""

import fnmatch
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from focalclip import names
from focalclip.base.errors import UserError
from focalclip.config import ModelConfig, config_dir, config_names, load_config
from focalclip.models.draws import use_sample_draws
from focalclip.models.image import check_image_size, create_image_tower
from focalclip.models.lock import LockedFeatures, lock_towers, without_projection
from focalclip.models.norm import GlobalBatchNorm
from focalclip.models.preprocess import eval_transform
from focalclip.models.text import Tokenizer, create_text_tower, create_tokenizer, lengths_to_the_end, text_entry


class _AtMost(torch.autograd.Function):
    """``x.clamp(max=maximum)`` through which a value above the maximum can still be pulled back.

    clamp's own gradient is zero there: a scale that one step carries over its bound would stay for good.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, maximum: float) -> Tensor:
        ctx.save_for_backward(x > maximum)
        return x.clamp(max=maximum)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (above,), (grad,) = ctx.saved_tensors, grads
        return grad.masked_fill(above & (grad < 0), 0), None  # descent along a negative gradient leads further out


class ProjectedImageTower(nn.Module):
    """Image tower, optional normalisation of its pooled features, linear projection to the shared width."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        image = config.image
        entry = names.image_tower_entry(image.name)
        settings = {name: getattr(image, name) for name in (entry.settings if entry else ())}
        self.trunk: Any = create_image_tower(image.name, **image.options, **settings)
        check_image_size(self.trunk, image)
        width: int = self.trunk.num_features
        self.norm = GlobalBatchNorm(width) if image.feature_norm == "batch" else nn.Identity()
        self.proj = nn.Linear(width, config.embed_dim)
        nn.init.normal_(self.proj.weight, std=width**-0.5)  # CLIP's scale for both projections
        nn.init.zeros_(self.proj.bias)
        self.is_locked = False
        self.cache: LockedFeatures | None = None

    def forward(self, images: Tensor) -> Tensor:
        """Encode (B, 3, H, W) to (B, embed_dim)."""
        return self.proj(self.norm(self.features(images)))

    def features(self, images: Tensor) -> Tensor:
        """Pooled features (B, C) of the tower; of one that is locked as a whole nothing is kept for gradients."""
        if not self.is_locked:
            return self.trunk(images)
        if self.cache is not None and self.training:
            return self.cache(self.trunk, images).to(self.proj.weight.dtype)
        with torch.no_grad():
            return self.trunk(images)


class FocalCLIP(nn.Module):
    """Contrastive language-image model.

    Attributes:
        visual: the image tower with its projection; ``visual.trunk`` is the tower alone.
        text: the text tower with its projection.
        logit_scale: parameter of shape [1] (DeepSpeed refuses 0-dim parameters): logarithm of the scale of the cosines,
            as in open_clip.
        config: the :class:`~focalclip.config.ModelConfig` that built it.
        locked: modules that stay in evaluation mode, see :func:`~focalclip.models.lock.lock_towers`.
        outputs: names of what :meth:`forward` returns.
    """

    outputs = ("image", "text", "scale")

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.visual = ProjectedImageTower(config)
        self.text = create_text_tower(config.text, config.embed_dim)
        if config.image.activation_checkpointing:
            self.text.set_grad_checkpointing(True)  # pyrefly: ignore[not-callable]
        self.logit_scale = nn.Parameter(torch.full((1,), config.init_logit_scale))
        use_sample_draws(self)
        self.locked: list[nn.Module] = []
        self.text_cache: LockedFeatures | None = None
        self._tokenizer: Tokenizer | None = None

    def train(self, mode: bool = True) -> Self:
        """As of any module; what is locked stays in evaluation mode."""
        super().train(mode)
        for module in self.locked:
            module.eval()
        return self

    def forward(self, images: Tensor, tokens: Tensor) -> dict[str, Tensor]:
        """Everything that a loss may need, by name.

        Args:
            images: (B, 3, H, W), normalised as ``preprocess`` does.
            tokens: (B, L) int64 from ``tokenizer``.

        Returns:
            ``image`` and ``text``, embeddings (B, D) of unit length, and ``scale``, see :meth:`scale`. These are the
            names of the losses' parameters.
        """
        return {
            "image": self.encode_image(images, normalize=True),
            "text": self.encode_text(tokens, normalize=True),
            "scale": self.scale(),
        }

    def scale(self) -> Tensor:
        """What cosines are multiplied by, of shape [1]: exp(logit_scale), at most exp(max_logit_scale).

        Bounded here, not by clamping the parameter after a step: ZeRO and bf16 keep a master copy that would undo it.
        Above the bound, only gradients that lead back below it pass.
        """
        return _AtMost.apply(self.logit_scale.float(), self.config.max_logit_scale).exp()

    def encode_image(self, images: Tensor, normalize: bool = False) -> Tensor:
        """Embed normalised images (B, 3, H, W) as (B, D); unit vectors are float32 in every precision."""
        embeds = self.visual(images)
        return F.normalize(embeds.float(), dim=-1) if normalize else embeds

    def encode_text(self, tokens: Tensor, normalize: bool = False) -> Tensor:
        """Embed tokens (B, L) as (B, D); unit vectors are float32 in every precision."""
        embeds = self.text(tokens) if self.text_cache is None or not self.training else self._cached_text(tokens)
        return F.normalize(embeds.float(), dim=-1) if normalize else embeds

    def _cached_text(self, tokens: Tensor) -> Tensor:
        """Embeddings (B, D) of a text tower that is locked up to its projection."""
        assert self.text_cache is not None
        with without_projection(self.text, text_entry(self.config.text).projection or "") as projection:
            features = self.text_cache(self.text, tokens)
        if isinstance(projection, nn.Module):
            return projection(features.to(next(projection.parameters()).dtype))
        return features.to(projection.dtype) @ projection

    def text_lengths(self, tokens: Tensor) -> Tensor | None:
        """Number of leading tokens of each row (B, L) that its embedding depends on: (B,); None where all count.

        Rows may be cut after them, as the tokenizer cuts a whole list of captions.
        """
        text = self.config.text
        ends_at_token = text.causal and text_entry(text).clip_tokens
        return lengths_to_the_end(tokens) if ends_at_token else None

    @property
    def preprocess(self) -> Any:
        """Picture to (3, S, S) tensor, as the weights expect it in evaluation."""
        return eval_transform(self.config.image)

    @property
    def tokenizer(self) -> Tokenizer:
        """List of strings to int64 tokens (B, L), L at most the context length."""
        if self._tokenizer is None:
            self._tokenizer = create_tokenizer(self.config.text)
        return self._tokenizer


def list_models(pattern: str = "*") -> list[str]:
    """Every named model: image towers (``focalnet_*`` and others of the table) and two-tower models (``focalclip_*``).

    Args:
        pattern: shell pattern such as ``focalnet*lrf``.
    """
    return fnmatch.filter([*names.image_tower_names(), *_two_towers()], pattern)


def create_model(model: str | ModelConfig) -> FocalCLIP:
    """Build a two-tower model with fresh weights.

    Args:
        model: name of a file in ``configs/`` without its ending, or a configuration. What ``pretrained`` names in it is
            loaded, and what it locks is locked.

    Raises:
        UserError: if there is no such name, or the weights do not fit.
    """
    if isinstance(model, ModelConfig):
        built = FocalCLIP(model)
        if model.image.pretrained is not None or model.text.pretrained is not None:
            names.find("focalclip.interop.start:load_pretrained")(built)
        lock_towers(built)
        return built
    if model not in _two_towers():
        raise UserError(f"create_model: {model!r} is not a two-tower model; use one of {', '.join(_two_towers())}")
    return FocalCLIP(load_config(config_dir() / f"{model}.yaml").model)


def _two_towers() -> list[str]:
    """Configurations that name a model of their own; the others say how to train one."""
    return [name for name in config_names() if name.startswith("focalclip_")]
