"""FocalNet weights of other code bases, in and out: ``focalclip.weights``."""

from focalclip.models.weights.convert import (
    from_klite,
    from_official,
    from_timm,
    from_transformers,
    load_focalnet,
    load_strictly,
    to_klite,
    to_official,
    to_timm,
    to_transformers,
)

__all__ = [
    "from_klite",
    "from_official",
    "from_timm",
    "from_transformers",
    "load_focalnet",
    "load_strictly",
    "to_klite",
    "to_official",
    "to_timm",
    "to_transformers",
]
