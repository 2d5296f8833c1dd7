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

    from focalclip.models.transformers_clip import FocalCLIPConfig, FocalCLIPModel

    AutoConfig.register(MODEL_TYPE, FocalCLIPConfig)
    for auto in (modeling_auto.AutoModel, modeling_auto.AutoModelForZeroShotImageClassification):
        auto.register(FocalCLIPConfig, FocalCLIPModel)
    # The pipeline looks here, not where register writes (transformers 5.23); without the name it logs an error.
    names = modeling_auto.MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES
    names[MODEL_TYPE] = FocalCLIPModel.__name__
