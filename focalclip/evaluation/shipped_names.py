"""Lists too long for a task file, taken from the installed packages that ship them.

A task file names one instead of a list: ``names: open_clip:imagenet``.
"""

from collections.abc import Callable

from focalclip.base.errors import UserError


def _imagenet_names() -> tuple[str, ...]:
    """OpenAI's 1,000 names, of which 998 are distinct (open_clip ships them)."""
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES

    return tuple(IMAGENET_CLASSNAMES)


def _imagenet_templates() -> tuple[str, ...]:
    """OpenAI's 80 templates (open_clip ships them as functions)."""
    from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES

    return tuple(template("{c}") for template in OPENAI_IMAGENET_TEMPLATES)


def _unicl_imagenet_names() -> tuple[str, ...]:
    """OpenAI's names with the second of each equal pair renamed (data/imagenet/constants.py of microsoft/UniCL)."""
    names = list(_imagenet_names())
    for old, new in {"missile": "projectile", "sunglasses": "dark glasses"}.items():
        names[names.index(old, names.index(old) + 1)] = new
    return tuple(names)


def _unicl_imagenet_templates() -> tuple[str, ...]:
    """OpenAI's 80 and the bare name with a full stop (data/imagenet/constants.py of microsoft/UniCL)."""
    return ("{c}.", *_imagenet_templates())


def _wordnet_ids() -> tuple[str, ...]:
    """The 1,000 folder names of ImageNet-1K in label order (timm ships them)."""
    from timm.data import ImageNetInfo

    return tuple(ImageNetInfo("imagenet-1k").label_names())


_LISTS: dict[str, dict[str, Callable[[], tuple[str, ...]]]] = {
    "names": {"open_clip:imagenet": _imagenet_names, "unicl:imagenet": _unicl_imagenet_names},
    "templates": {"open_clip:imagenet": _imagenet_templates, "unicl:imagenet": _unicl_imagenet_templates},
    "codes": {"timm:imagenet-1k": _wordnet_ids},
}


def shipped_list(kind: str, reference: str) -> tuple[str, ...]:
    """The list that a reference stands for.

    Args:
        kind: ``names``, ``templates`` or ``codes``.
        reference: such as ``open_clip:imagenet``.

    Raises:
        UserError: if there is no such list.
    """
    if reference not in _LISTS[kind]:
        known = ", ".join(_LISTS[kind])
        raise UserError(f"{kind}: {reference!r} is neither a list nor one of {known}; write [item, item ...]")
    return _LISTS[kind][reference]()
