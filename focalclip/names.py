"""Names of towers and of trained models: ``PREFIX:REST``, or a plain name, and the code that each stands for.

These tables are the only place that knows a prefix. Training, loading, evaluation and the configuration's checks read
them. Code is named as ``module:function`` and imported when it is first needed, because most prefixes stand for a
library that is slow to import or optional. docs/extending.md adds a tower and a source as complete examples.
"""

import fnmatch
import importlib
from dataclasses import dataclass
from typing import Any

OPEN_CLIP, TIMM, TRANSFORMERS = "open_clip:", "timm:", "transformers:"


@dataclass(frozen=True)
class ImageTowerEntry:
    """How an image tower is built for training.

    Attributes:
        build: ``function(name, **options)`` with the name behind the prefix; returns an
            :class:`~focalclip.models.image.ImageTower` with fresh weights. Training passes ``drop_path``, ``init``, the
            ``settings`` below and ``model.image.options``.
        published: the same with the weights that are published under this name; None if there are none.
        settings: settings of ``model.image`` that are passed on besides ``drop_path`` and ``init``; to change one that
            is not listed is an error.
        in_timm: timm builds it by this name (once focalclip is imported), and so does open_clip.
    """

    build: str
    published: str | None = None
    settings: tuple[str, ...] = ()
    in_timm: bool = False


@dataclass(frozen=True)
class TextTowerEntry:
    """How a text tower and its tokenizer are built for training.

    Attributes:
        build: ``function(config, embed_dim)`` with the :class:`~focalclip.config.TextTowerConfig`; returns a module
            ``tower(tokens) -> (B, embed_dim)``.
        tokenizer: ``function(config)``; returns a function from captions to int64 tokens (B, L).
        ignores: settings of ``model.text`` that it does not use; to change one is an error.
    """

    build: str
    tokenizer: str
    ignores: tuple[str, ...] = ()


@dataclass(frozen=True)
class Source:
    """What a prefix stands for; None where the library has no such thing.

    Attributes:
        example: the form in which messages show it.
        model: ``function(rest)``; a trained model with both towers.
        encoder: ``function(rest)``; a trained image tower as :class:`~focalclip.interop.encoder.ImageEncoder`.
        image_tower: how its image towers are built for training.
        text_tower: how its text towers are built for training.
    """

    example: str
    model: str | None = None
    encoder: str | None = None
    image_tower: ImageTowerEntry | None = None
    text_tower: TextTowerEntry | None = None


SOURCES: dict[str, Source] = {
    OPEN_CLIP: Source(
        "open_clip:NAME/PRETRAINED",
        model="focalclip.interop.open_clip:OpenClipModel",
        encoder="focalclip.interop.open_clip:open_clip_encoder",
    ),
    TIMM: Source(
        "timm:NAME",
        encoder="focalclip.interop.timm:timm_encoder",
        image_tower=ImageTowerEntry(
            "focalclip.interop.timm:create_timm_tower", "focalclip.interop.timm:published_timm_tower", in_timm=True
        ),
    ),
    TRANSFORMERS: Source(
        "transformers:NAME_OR_FOLDER",
        model="focalclip.interop.transformers:load_transformers",
        encoder="focalclip.interop.transformers:transformers_encoder",
        text_tower=TextTowerEntry(
            "focalclip.interop.transformers:HuggingFaceTextTower",
            "focalclip.interop.transformers:HuggingFaceTokenizer",
            ignores=("width", "heads", "layers", "causal"),
        ),
    ),
}

# Towers without a prefix, by shell pattern.
IMAGE_TOWERS: dict[str, ImageTowerEntry] = {
    "focalnet_*": ImageTowerEntry(
        "focalclip.models.focalnet.variants:create_focalnet",
        "focalclip.interop.timm:published_focalnet",
        settings=("mixer", "activation_checkpointing"),
        in_timm=True,
    ),
}
TEXT_TOWERS: dict[str, TextTowerEntry] = {
    "open_clip": TextTowerEntry(
        "focalclip.interop.open_clip:create_text_transformer",
        "focalclip.interop.open_clip:ByteLevelTokenizer",
        ignores=("pretrained",),
    ),
}


def split(name: str) -> tuple[str, str]:
    """A name's prefix, empty where it has none that is known, and the rest."""
    prefix = next((prefix for prefix in SOURCES if name.startswith(prefix)), "")
    return prefix, name[len(prefix) :]


def image_tower_entry(name: str) -> ImageTowerEntry | None:
    """How the image tower of this name is built; None if no table has it."""
    source = SOURCES.get(split(name)[0])
    if source is not None:
        return source.image_tower
    return next((entry for pattern, entry in IMAGE_TOWERS.items() if fnmatch.fnmatchcase(name, pattern)), None)


def text_tower_entry(name: str) -> TextTowerEntry | None:
    """How the text tower of this name is built; None if no table has it."""
    source = SOURCES.get(split(name)[0])
    return TEXT_TOWERS.get(name) if source is None else source.text_tower


def find(path: str) -> Any:
    """The object that ``module:name`` names, its module imported."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)
