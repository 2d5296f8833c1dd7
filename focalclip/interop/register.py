"""Our names for timm and transformers: registered now, or as soon as they are loaded; loading neither.

``import focalclip`` must not cost the seconds that these libraries take, so the code behind the names is found by
:func:`focalclip.names.find` when one of them is built.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from focalclip.names import find

Action = Callable[[ModuleType], None]


TIMM_MODULE = "timm.models.focalnet"


PATCH2_NEEDS = "timm.models.metaformer"  # the last of the modules that ours builds on


ADDED: set[str] = set()
"""Names that timm builds only where focalclip is imported."""


MODEL_TYPE = "focalclip"


def register_with_timm() -> None:
    """Add the FocalNets, and rivals of the small ones, that timm does not name: now, or once its own are loaded."""
    after_import(TIMM_MODULE, _register_focalnets)
    after_import(PATCH2_NEEDS, _register_patch2)


def register_with_transformers() -> None:
    """Register our model, now or as soon as transformers' automatic classes are loaded."""
    after_import("transformers.models.auto.modeling_auto", _register_transformers)


def needs_focalclip(name: str) -> bool:
    """Whether timm can build ``name`` only where focalclip is imported too."""
    importlib.import_module(TIMM_MODULE)
    return name in ADDED


def after_import(name: str, action: Action) -> None:
    """Call ``action(module)`` now if the module is loaded already, else right after it is loaded."""
    if name in sys.modules:
        action(sys.modules[name])
    else:
        sys.meta_path.insert(0, _After(name, action))


class _After(MetaPathFinder):
    """Lets the usual machinery find a module, and acts once it has run."""

    def __init__(self, name: str, action: Action) -> None:
        self.name, self.action = name, action

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:  # noqa: ARG002
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None:
            return None
        loader: Any = spec.loader
        execute = loader.exec_module

        def execute_then_act(module: ModuleType) -> None:
            execute(module)
            self.action(module)

        loader.exec_module = execute_then_act
        return spec


def _register_focalnets(timm_focalnet: Any) -> None:
    """Register an entry point, without weights, for each of our variants that timm lacks."""
    from timm.models import _registry

    from focalclip.models.focalnet.variants import FOCALNETS

    for name in FOCALNETS:
        if not _registry.is_model(name):
            timm_focalnet.default_cfgs.update(_registry.generate_default_cfgs({name: timm_focalnet._cfg()}))
            setattr(timm_focalnet, name, _registry.register_model(_entry_point(name)))
            ADDED.add(name)


def _register_patch2(_: Any) -> None:
    importlib.import_module("focalclip.interop.timm")  # which registers what it holds


def _entry_point(name: str) -> Any:
    from focalclip.models.focalnet.variants import FOCALNETS

    config = FOCALNETS[name]
    options: dict[str, Any] = {
        "embed_dim": config.embed_dim,
        "depths": config.depths,
        "mlp_ratio": config.mlp_ratio,
        "focal_levels": config.stage_levels,
        "focal_windows": config.stage_windows,
        "use_overlap_down": config.use_overlap,
        "use_post_norm": config.use_post_norm,
        "use_post_norm_in_modulation": config.use_post_norm_in_modulation,
        "normalize_modulator": config.normalize_modulator,
        "layerscale_value": config.layer_scale,
        "drop_path_rate": 0.0,
    }

    def create(pretrained: bool = False, **kwargs: Any) -> Any:
        from timm.models._builder import build_model_with_cfg

        stages = tuple(range(config.num_stages))
        return build_model_with_cfg(
            find("focalclip.interop.timm:tower_class")(config),
            name,
            pretrained,
            feature_cfg={"flatten_sequential": True, "out_indices": kwargs.pop("out_indices", stages)},
            **(options | kwargs),
        )

    create.__name__, create.__module__ = name, TIMM_MODULE  # timm files a model under the module of its function
    return create


def _register_transformers(modeling_auto: Any) -> None:
    from transformers import AutoConfig

    AutoConfig.register(MODEL_TYPE, find("focalclip.interop.transformers:FocalCLIPConfig"))
    # The pipeline looks here, not where models are registered (transformers 5.23); else it logs an error.
    modeling_auto.MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES[MODEL_TYPE] = "FocalCLIPModel"
