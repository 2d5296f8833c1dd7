"""Our towers under timm's roof, so that open_clip and timm build them by name once focalclip is imported."""

import importlib
from typing import Any

from focalclip.after_import import after_import

TIMM_MODULE = "timm.models.focalnet"
PATCH2_NEEDS = "timm.models.metaformer"  # the last of the modules that ours builds on
_added: set[str] = set()


def register_with_timm() -> None:
    """Add the FocalNets, and rivals of the small ones, that timm does not name: now, or once its own are loaded."""
    after_import(TIMM_MODULE, _register)
    after_import(PATCH2_NEEDS, _register_patch2)


def needs_focalclip(name: str) -> bool:
    """Whether timm can build ``name`` only where focalclip is imported too."""
    importlib.import_module(TIMM_MODULE)
    return name in _added


def _register(timm_focalnet: Any) -> None:
    """Register an entry point, without weights, for each of our variants that timm lacks."""
    from timm.models import _registry

    from focalclip.models.focalnet.variants import FOCALNETS

    for name in FOCALNETS:
        if not _registry.is_model(name):
            timm_focalnet.default_cfgs.update(_registry.generate_default_cfgs({name: timm_focalnet._cfg()}))
            setattr(timm_focalnet, name, _registry.register_model(_entry_point(name)))
            _added.add(name)


def _register_patch2(_: Any) -> None:
    from focalclip.models.registries.patch2 import default_cfgs  # importing it registers what it holds

    _added.update(default_cfgs)


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

        from focalclip.models.registries.timm_tower import tower_class

        stages = tuple(range(config.num_stages))
        return build_model_with_cfg(
            tower_class(config),
            name,
            pretrained,
            feature_cfg={"flatten_sequential": True, "out_indices": kwargs.pop("out_indices", stages)},
            **(options | kwargs),
        )

    create.__name__, create.__module__ = name, TIMM_MODULE  # timm files a model under the module of its function
    return create
