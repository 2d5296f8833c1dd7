"""Protocols by name: what decides a number besides the model and the images.

A task file states a task as ELEVATER has it. Another protocol changes it by rule (:class:`Protocol`) and by the task
file's exceptions for that protocol (:class:`Override`). Common to all: a class is the normalised mean of the normalised
embeddings of its prompts, images are normalised, and scores are 100 x cosine, whatever scale the model learned.
The pixels' mean and standard deviation are the model's own under every protocol.
"""

import difflib
import hashlib
from collections.abc import Callable, Sequence
from typing import Any, Literal

from pydantic import Field, field_validator

from focalclip.base.errors import UserError
from focalclip.base.strict import Strict

Scores = Literal["softmax", "cosine"]

Resize = Literal["model", "squash", "resize256_crop224"]

Candidates = Literal["occurring", "all"]

DataSource = Literal["elevater", "wds"]


def shipped_list(kind: str, reference: str) -> tuple[str, ...]:
    """A list too long for a task file, from an installed package that has it: ``names: open_clip:imagenet``.

    Args:
        kind: ``names``, ``templates`` or ``codes``.
        reference: such as ``open_clip:imagenet``.

    Raises:
        UserError: if there is no such list.
    """
    if reference not in _SHIPPED[kind]:
        known = ", ".join(_SHIPPED[kind])
        raise UserError(f"{kind}: {reference!r} is neither a list nor one of {known}; write [item, item ...]")
    return _SHIPPED[kind][reference]()


def _imagenet_names() -> tuple[str, ...]:
    from focalclip.interop.open_clip import imagenet_names

    return imagenet_names()


def _imagenet_templates() -> tuple[str, ...]:
    from focalclip.interop.open_clip import imagenet_templates

    return imagenet_templates()


def _unicl_imagenet_names() -> tuple[str, ...]:
    """OpenAI's names with the second of each equal pair renamed (data/imagenet/constants.py of microsoft/UniCL)."""
    names = list(_imagenet_names())
    for old, new in {"missile": "projectile", "sunglasses": "dark glasses"}.items():
        names[names.index(old, names.index(old) + 1)] = new
    return tuple(names)


def _unicl_imagenet_templates() -> tuple[str, ...]:
    """OpenAI's 80 and the bare name with a full stop (data/imagenet/constants.py of microsoft/UniCL)."""
    return ("{c}.", *_imagenet_templates())


def _imagenet_wordnet_ids() -> tuple[str, ...]:
    from focalclip.interop.timm import imagenet_wordnet_ids

    return imagenet_wordnet_ids()


_SHIPPED: dict[str, dict[str, Callable[[], tuple[str, ...]]]] = {
    "names": {"open_clip:imagenet": _imagenet_names, "unicl:imagenet": _unicl_imagenet_names},
    "templates": {"open_clip:imagenet": _imagenet_templates, "unicl:imagenet": _unicl_imagenet_templates},
    "codes": {"timm:imagenet-1k": _imagenet_wordnet_ids},
}


class Override(Strict):
    """What one protocol changes in one task."""

    resize: Resize | None = None
    names: tuple[str, ...] | None = None
    """Class names in label order, or a reference to a :func:`shipped_list`."""
    respelt: dict[str, str] = Field(default_factory=dict)
    """Names that the protocol spells differently: from the task's spelling to the protocol's."""
    templates: tuple[str, ...] | None = None
    note: str | None = None
    """Where the protocol has no rule for the task: what is done."""

    @field_validator("names", "templates", mode="before")
    @classmethod
    def _look_up(cls, value: Any, info: Any) -> Any:
        return shipped_list(info.field_name, value) if isinstance(value, str) else value


class Protocol(Strict):
    """One way of measuring, by rule."""

    name: str
    source: str
    """The code that defines it."""
    follows: str | None = None
    """Another protocol, whose exceptions hold here too."""
    metrics: dict[str, str] = Field(default_factory=dict)
    """Metrics that replace ELEVATER's."""
    scores: Scores | None = None
    """What ranks the images of multi-label data; null: as the task has it."""
    resize: Resize | None = None
    """Null: as the task has it."""
    candidates: Candidates | None = None
    """Null: as the task has it."""
    data: DataSource | None = None
    """Whose images it is defined on; null: as the task has it."""
    upright: bool = True
    """Whether pictures are turned as their EXIF orientation says, as in training; False where the code that defines the
    protocol takes them as they are stored."""


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol(name="elevater", source="Elevater_Toolkit_IC and vision-evaluation (metrics)", upright=False),
        Protocol(
            name="clip_benchmark",
            source="CLIP_benchmark 1.6.2",
            metrics={"map_11point": "map"},
            scores="cosine",
            resize="model",
            candidates="all",
            data="wds",
            upright=False,
        ),
        Protocol(
            name="datacomp",
            source="mlfoundations/datacomp, which calls CLIP_benchmark",
            follows="clip_benchmark",
            metrics={"map_11point": "map"},
            scores="cosine",
            resize="model",
            candidates="all",
            data="wds",
            upright=False,
        ),
        Protocol(
            name="unicl",
            source="microsoft/UniCL for ImageNet-1K; the ELEVATER toolkit for everything else",
            upright=False,
        ),
        Protocol(name="demo", source="the task files of the demo benchmark"),
        Protocol(name="wds", source="the task folder: its names, prompts and kind of labels"),
    )
}


def load_protocol(name: str) -> Protocol:
    """The protocol of that name.

    Raises:
        UserError: if there is none.
    """
    if name not in PROTOCOLS:
        near = difflib.get_close_matches(name, PROTOCOLS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(PROTOCOLS)}"
        raise UserError(f"--protocol {name}: no such protocol; {hint}")
    return PROTOCOLS[name]


def lines_sha256(lines: Sequence[str]) -> str:
    """SHA-256 of the lines joined by newlines, in UTF-8: the checksum of names and of templates."""
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
