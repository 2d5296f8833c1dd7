"""Models of open_clip behind our interface: both towers, or the image tower alone."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from focalclip.errors import UserError, first_line
from focalclip.models.sources.encoder import ImageEncoder
from focalclip.models.sources.foreign import ForeignTower

OPEN_CLIP = "open_clip:"


class OpenClipModel(nn.Module):
    """A model of open_clip with its preprocessing and tokenizer.

    Args:
        name: ``ARCHITECTURE/PRETRAINED``, ``hf-hub:ORG/NAME`` or ``local-dir:FOLDER``.

    Raises:
        UserError: if open_clip has no such weights, or cannot load them.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        import open_clip

        self.model, self.preprocess = _create(name)
        architecture = name if ":" in name else name.partition("/")[0]
        self.tokenizer = _told(name, partial(open_clip.get_tokenizer, architecture))

    def encode_image(self, images: Tensor, normalize: bool = False) -> Tensor:
        """Embed normalised images (B, 3, H, W) as (B, D)."""
        return self.model.encode_image(images, normalize=normalize)

    def encode_text(self, tokens: Tensor, normalize: bool = False) -> Tensor:
        """Embed tokens (B, L) as (B, D)."""
        return self.model.encode_text(tokens, normalize=normalize)


class OpenClipTower(ForeignTower):
    """Image tower of open_clip without its projection.

    Pooled features are what the projection takes; those of a ModifiedResNet, which projects inside its attention
    pooling, are its embeddings. Towers of timm give timm's feature maps, a ViT one per block, a ModifiedResNet one per
    stage.
    """

    def __init__(self, visual: Any, name: str) -> None:
        super().__init__()
        self.name = name
        self.visual = visual
        if hasattr(visual, "trunk"):  # timm's; a head that pools by attention ends in the projection
            visual.trunk.reset_classifier(0)
            visual.head = getattr(visual.head, "pool", nn.Identity())
        elif isinstance(getattr(visual, "proj", None), nn.Parameter):
            visual.proj = None
        if hasattr(visual, "output_tokens"):
            visual.output_tokens = False  # CoCa's returns its tokens too

    def forward(self, images: Tensor) -> Tensor:
        """Pooled features (B, num_features) of normalised images (B, 3, H, W)."""
        return self.visual(images)

    def feature_maps(self, images: Tensor) -> list[Tensor]:
        """One (B, C_i, H_i, W_i) map for each of ``strides``.

        Raises:
            UserError: if the tower has none.
        """
        if not hasattr(getattr(self.visual, "trunk", self.visual), "forward_intermediates"):
            raise UserError(
                f"{OPEN_CLIP}{self.name}: its image tower gives pooled features alone; choose one of timm or a ViT"
            )
        maps = self.visual.forward_intermediates(images, intermediates_only=True)["image_intermediates"]
        return maps[1:] if hasattr(self.visual, "attnpool") else maps  # a ModifiedResNet's first one is its stem's


def open_clip_encoder(name: str) -> ImageEncoder:
    """The image tower of a trained model of open_clip, frozen; ``name`` is that of :class:`OpenClipModel`.

    Raises:
        UserError: if open_clip has no such weights, or cannot load them.
    """
    from open_clip.transform import PreprocessCfg, image_transform_v2

    visual = _create(name)[0].float().visual
    config = PreprocessCfg(**visual.preprocess_cfg)
    tower = OpenClipTower(visual, name)
    tower.measure(torch.zeros(1, *config.input_size))
    create_preprocess: Any = partial(image_transform_v2, config, is_train=False)
    return ImageEncoder(tower, create_preprocess)


def _create(name: str) -> tuple[Any, Any]:
    """The trained model and its preprocessing."""
    import open_clip

    architecture, pretrained = name, None
    if not name.startswith(("hf-hub:", "local-dir:")):
        architecture, _, pretrained = name.partition("/")
        tags = open_clip.list_pretrained_tags_by_model(architecture)
        if not pretrained and tags:
            raise UserError(
                f"open_clip:{name}: say which weights, as open_clip:{architecture}/PRETRAINED with one of "
                f"{', '.join(tags)}"
            )
        if not pretrained:
            raise UserError(f"open_clip:{name}: open_clip has no weights of that name; see open_clip.list_pretrained()")
    made: Any = _told(name, partial(open_clip.create_model_from_pretrained, architecture, pretrained=pretrained))
    return made


def _told(name: str, create: partial[Any]) -> Any:
    """What ``create`` makes, its failures told in one sentence."""
    try:
        return create()
    except (RuntimeError, OSError, ValueError) as error:
        raise UserError(f"open_clip:{name}: open_clip cannot load it: {first_line(error)}") from None
