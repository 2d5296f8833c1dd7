"""focalclip: pretrain, judge and reuse attention-free language-image models.

Importing it costs little: every name below is looked up in its module when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from focalclip.base import __version__ as __version__
from focalclip.interop.register import register_with_timm, register_with_transformers

if TYPE_CHECKING:
    from focalclip import losses
    from focalclip.explanation.maps import explain
    from focalclip.interop.folder import save
    from focalclip.interop.load import load, load_image_encoder
    from focalclip.models import weights
    from focalclip.models.clip import create_model, list_models
    from focalclip.models.image import create_image_tower

_HOMES = {
    "create_image_tower": "focalclip.models.image",
    "create_model": "focalclip.models.clip",
    "explain": "focalclip.explanation.maps",
    "list_models": "focalclip.models.clip",
    "load": "focalclip.interop.load",
    "load_image_encoder": "focalclip.interop.load",
    "save": "focalclip.interop.folder",
}
_MODULES = {"losses": "focalclip.losses", "weights": "focalclip.models.weights"}

__all__ = [
    "create_image_tower",
    "create_model",
    "explain",
    "list_models",
    "load",
    "load_image_encoder",
    "losses",
    "save",
    "weights",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(_MODULES[name])
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'focalclip' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


register_with_timm()
register_with_transformers()
