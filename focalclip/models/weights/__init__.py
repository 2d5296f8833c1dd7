"""FocalNet weights of other code bases, in and out: ``focalclip.weights``.

``from_`` functions build the FocalNet that weights imply; ``state_dict_from_`` and ``to_`` functions translate
dictionaries.
"""

from focalclip.models.weights.convert import (
    from_klite,
    from_official,
    from_timm,
    from_transformers,
    load_focalnet,
    load_strictly,
    state_dict_from_timm,
    state_dict_from_transformers,
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
    "state_dict_from_timm",
    "state_dict_from_transformers",
    "to_klite",
    "to_official",
    "to_timm",
    "to_transformers",
]
