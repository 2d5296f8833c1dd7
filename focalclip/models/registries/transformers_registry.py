"""Exported models under transformers' roof: ``AutoModel`` and its kin know ``focalclip`` once focalclip is imported.

Nothing of it is code on the hub, so ``trust_remote_code`` stays False.
"""

from typing import Any

from focalclip.after_import import after_import

MODEL_TYPE = "focalclip"


def register_with_transformers() -> None:
    """Register our model, now or as soon as transformers' automatic classes are loaded."""
    after_import("transformers.models.auto.modeling_auto", _register)


def _register(modeling_auto: Any) -> None:
    from transformers import AutoConfig

    from focalclip.models.registries.transformers_config import FocalCLIPConfig

    AutoConfig.register(MODEL_TYPE, FocalCLIPConfig)
    # The pipeline looks here, not where models are registered (transformers 5.23); else it logs an error.
    modeling_auto.MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES[MODEL_TYPE] = "FocalCLIPModel"
