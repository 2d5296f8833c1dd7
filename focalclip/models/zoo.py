"""Models by name. A two-tower model is the ``model`` section of a complete configuration file in ``configs/``."""

import fnmatch

from focalclip.config import ModelConfig, RunConfig, load_yaml
from focalclip.errors import UserError
from focalclip.models.clip import FocalCLIP
from focalclip.shipped import config_dir, config_names


def list_models(pattern: str = "*") -> list[str]:
    """Every named model: image towers (``focalnet_*``) and two-tower models (``focalclip_*``).

    Args:
        pattern: shell pattern such as ``focalnet*lrf``.
    """
    from focalclip.models.focalnet.variants import FOCALNETS

    return fnmatch.filter([*FOCALNETS, *_two_towers()], pattern)


def create_model(model: str | ModelConfig) -> FocalCLIP:
    """Build a two-tower model with fresh weights.

    Args:
        model: name of a file in ``configs/`` without its ending, or a configuration.

    Raises:
        UserError: if there is no such name.
    """
    if isinstance(model, ModelConfig):
        return FocalCLIP(model)
    if model not in _two_towers():
        raise UserError(f"create_model: {model!r} is not a two-tower model; use one of {', '.join(_two_towers())}")
    return FocalCLIP(load_yaml(RunConfig, config_dir() / f"{model}.yaml").model)


def _two_towers() -> list[str]:
    """Configurations that name a model of their own; the others say how to train one."""
    return [name for name in config_names() if name.startswith("focalclip_")]
