"""Configuration of our model in transformers' form; cheap to import, unlike the model."""

from typing import Any

from transformers import PreTrainedConfig

from focalclip.models.registries.transformers_registry import MODEL_TYPE


class FocalCLIPConfig(PreTrainedConfig):
    """What :class:`~focalclip.models.registries.transformers_clip.FocalCLIPModel` is built from.

    Attributes:
        model: a :class:`~focalclip.config.ModelConfig` as a dictionary.
        text_encoder: configuration of the Hugging Face text encoder, if the model has one.
    """

    model_type = MODEL_TYPE

    model: dict | None = None
    text_encoder: dict | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        # Here, as no model is looked up without a configuration: open_clip alone loads transformers' automatic classes,
        # and it need not pay for transformers' model classes.
        from focalclip.models.registries.transformers_clip import register_models

        register_models()
