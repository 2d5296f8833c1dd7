"""focalclip: pretrain, judge and reuse attention-free language-image models.

Importing it costs little: every name below is looked up in its module when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from focalclip.models.registries.timm_registry import register_with_timm
from focalclip.models.registries.transformers_registry import register_with_transformers

__version__ = "0.1.0"

if TYPE_CHECKING:
    from focalclip import losses
    from focalclip.explain_maps import explain
    from focalclip.models import weights
    from focalclip.models.sources.loading import load, load_image_encoder
    from focalclip.models.sources.store import save
    from focalclip.models.towers import create_image_tower
    from focalclip.models.zoo import create_model, list_models

_HOMES = {
    "create_image_tower": "focalclip.models.towers",
    "create_model": "focalclip.models.zoo",
    "explain": "focalclip.explain_maps",
    "list_models": "focalclip.models.zoo",
    "load": "focalclip.models.sources.loading",
    "load_image_encoder": "focalclip.models.sources.loading",
    "save": "focalclip.models.sources.store",
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
