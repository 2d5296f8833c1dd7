"""Names of towers and of trained models: ``PREFIX:REST``, or a plain name, and the code that each stands for.

These tables are the only place that knows a prefix. Training, loading, evaluation and the configuration's checks read
them. Code is named as ``module:function`` and imported when it is first needed, because most prefixes stand for a
library that is slow to import or optional. docs/extending.md adds a tower and a source as complete examples.
"""

import fnmatch
import importlib
from dataclasses import dataclass
from typing import Any

from focalclip.base.errors import missing_module
from focalclip.base.files import home_expanded

OPEN_CLIP, TIMM, TRANSFORMERS = "open_clip:", "timm:", "transformers:"

TOWER_SETTINGS = ("drop_path", "init", "mixer", "activation_checkpointing")
"""Settings of ``model.image`` that a tower may be built with."""


@dataclass(frozen=True)
class ImageTowerEntry:
    """How an image tower is built for training.

    Attributes:
        build: ``function(name, **options)`` with the name behind the prefix; returns an
            :class:`~focalclip.models.image.ImageTower` with fresh weights. Training passes the ``settings`` below and
            ``model.image.options``.
        published: the same with the weights that are published under this name; None if there are none.
        settings: which of :data:`TOWER_SETTINGS` it takes; to change one of the others is an error.
        variants: the names that a pattern stands for, where it stands for more than itself.
        to_timm: ``function(weights)``; its state dict as that of the tower that timm builds by the name (once focalclip
            is imported). None: timm has no such tower, and neither has open_clip.
        from_timm: the reverse of ``to_timm``.
        load: ``function(tower, config, weights, where)`` with the tower, its
            :class:`~focalclip.config.ImageTowerConfig` and the weights by another library's names; fits them to the
            tower, loads them strictly, and returns what was fitted. None: by the tower's own names alone.
    """

    build: str
    published: str | None = None
    settings: tuple[str, ...] = ()
    variants: str | None = None
    to_timm: str | None = None
    from_timm: str | None = None
    load: str | None = None

    @property
    def in_timm(self) -> bool:
        """Whether timm, and so open_clip, builds it by its name."""
        return self.to_timm is not None


@dataclass(frozen=True)
class TextTowerEntry:
    """How a text tower and its tokenizer are built for training.

    Attributes:
        build: ``function(config, embed_dim)`` with the :class:`~focalclip.config.TextTowerConfig`; returns a module
            ``tower(tokens) -> (B, embed_dim)``.
        tokenizer: ``function(config)``; returns a function from captions to int64 tokens (B, L).
        ignores: settings of ``model.text`` that it does not use; to change one is an error.
        clip_tokens: its tokens are CLIP's byte-pair encoding, where the end of the text has the largest number.
        write_files: ``function(model, folder)``; writes what ``build`` and ``tokenizer`` read beside the weights, so
            that an exported folder can stand behind the prefix. None if they read no files.
        open_clip: ``function(config)``; how open_clip builds it, as a ``text_cfg`` without ``context_length``. None if
            open_clip cannot.
        projection: the attribute that holds its linear projection; None: it cannot be locked or pretrained.
        fit: ``function(tower, weights)``; fits the positions of ``weights``, in place, to those of the tower.
    """

    build: str
    tokenizer: str
    ignores: tuple[str, ...] = ()
    clip_tokens: bool = False
    write_files: str | None = None
    open_clip: str | None = None
    projection: str | None = None
    fit: str | None = None


@dataclass(frozen=True)
class Source:
    """What a prefix stands for; None where the library has no such thing.

    Attributes:
        example: the form in which messages show it.
        model: ``function(rest)``; a trained model with both towers.
        encoder: ``function(rest)``; a trained image tower as :class:`~focalclip.interop.encoder.ImageEncoder`.
        image_tower: how its image towers are built for training.
        text_tower: how its text towers are built for training.
        image_weights: ``function(rest)``; what a trained image tower is loaded from, as
            :class:`~focalclip.interop.encoder.TowerWeights`.
        text_weights: ``function(rest, config)``; the same of a text tower, for one of this
            :class:`~focalclip.config.TextTowerConfig`.
    """

    example: str
    model: str | None = None
    encoder: str | None = None
    image_tower: ImageTowerEntry | None = None
    text_tower: TextTowerEntry | None = None
    image_weights: str | None = None
    text_weights: str | None = None


SOURCES: dict[str, Source] = {
    OPEN_CLIP: Source(
        "open_clip:NAME/PRETRAINED",
        model="focalclip.interop.open_clip:OpenClipModel",
        encoder="focalclip.interop.open_clip:open_clip_encoder",
        image_weights="focalclip.interop.open_clip:image_weights",
        text_weights="focalclip.interop.open_clip:text_weights",
    ),
    TIMM: Source(
        "timm:NAME",
        encoder="focalclip.interop.timm:timm_encoder",
        image_tower=ImageTowerEntry(
            "focalclip.interop.timm:create_timm_tower",
            "focalclip.interop.timm:published_timm_tower",
            settings=("drop_path", "init"),
            to_timm="focalclip.interop.timm:timm_trunk",
            from_timm="focalclip.interop.timm:timm_tower",
            load="focalclip.interop.timm:load_tower",
        ),
        image_weights="focalclip.interop.timm:image_weights",
    ),
    TRANSFORMERS: Source(
        "transformers:NAME_OR_FOLDER",
        model="focalclip.interop.transformers:load_transformers",
        encoder="focalclip.interop.transformers:transformers_encoder",
        text_tower=TextTowerEntry(
            "focalclip.interop.transformers:HuggingFaceTextTower",
            "focalclip.interop.transformers:create_tokenizer",
            ignores=("width", "heads", "layers", "causal"),
            write_files="focalclip.interop.transformers:write_text_files",
            open_clip="focalclip.interop.transformers:open_clip_text_config",
            projection="proj",
        ),
        image_weights="focalclip.interop.transformers:image_weights",
        text_weights="focalclip.interop.transformers:text_weights",
    ),
}

# Towers without a prefix, by name or shell pattern.
IMAGE_TOWERS: dict[str, ImageTowerEntry] = {
    "focalnet_*": ImageTowerEntry(
        "focalclip.models.focalnet.variants:create_focalnet",
        "focalclip.interop.timm:published_focalnet",
        settings=TOWER_SETTINGS,
        variants="focalclip.models.focalnet.variants:FOCALNETS",
        to_timm="focalclip.models.weights:to_timm",
        from_timm="focalclip.models.weights:state_dict_from_timm",
        load="focalclip.models.weights.convert:load_tower",
    ),
}
TEXT_TOWERS: dict[str, TextTowerEntry] = {
    "open_clip": TextTowerEntry(
        "focalclip.interop.open_clip:create_text_transformer",
        "focalclip.interop.open_clip:ByteLevelTokenizer",
        clip_tokens=True,
        open_clip="focalclip.interop.open_clip:text_config",
        projection="text_projection",
        fit="focalclip.interop.open_clip:fit_text_positions",
    ),
}


def split(name: str) -> tuple[str, str]:
    """A name's prefix, empty where it has none that is known, and the rest, in which ``~`` is the home directory."""
    prefix = next((prefix for prefix in SOURCES if name.startswith(prefix)), "")
    return prefix, home_expanded(name[len(prefix) :])


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


def forms(kind: str) -> list[str]:
    """How the sources of one kind are written, for messages and help: ``model``, ``encoder``, ``image_tower`` ..."""
    return [source.example for source in SOURCES.values() if getattr(source, kind) is not None]


def sources(kind: str) -> str:
    """What may name a trained model, an ``encoder``, ``image_weights`` or ``text_weights``, for messages and help."""
    others = {
        "model": ["package.module:function"],
        "encoder": ["a file of FocalNet weights"],
        "image_weights": ["a file of FocalNet or timm weights"],
    }.get(kind, [])
    return ", ".join(["run directory", "exported folder", *forms(kind), *others])


def image_tower_names() -> list[str]:
    """All names of image towers without a prefix."""
    return [
        name
        for pattern, entry in IMAGE_TOWERS.items()
        for name in (find(entry.variants) if entry.variants else [pattern])
    ]


def text_tower_names() -> list[str]:
    """All names of text towers, those with a prefix by their form."""
    return [*TEXT_TOWERS, *forms("text_tower")]


def find(path: str) -> Any:
    """The object that ``module:name`` names, its module imported.

    Raises:
        UserError: if its module needs a package that is not installed.
    """
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("focalclip"):
            raise
        raise missing_module(error) from None
