"""Small FocalNets under timm's roof, so that open_clip and timm build them by name once focalclip is imported.

``import focalclip`` must not cost an import of timm (seconds), and users import the two in either order. So the names
are added at once where timm's ``focalnet`` module is loaded already, else right after it is loaded.
"""

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

TIMM_MODULE = "timm.models.focalnet"
_added: set[str] = set()


def register_with_timm() -> None:
    """Add the FocalNets that timm does not name, now or as soon as timm's own are loaded."""
    if TIMM_MODULE in sys.modules:
        _register(sys.modules[TIMM_MODULE])
    else:
        sys.meta_path.insert(0, _AfterTimm())


def needs_focalclip(name: str) -> bool:
    """Whether timm can build ``name`` only where focalclip is imported too."""
    importlib.import_module(TIMM_MODULE)
    return name in _added


class _AfterTimm(MetaPathFinder):
    """Lets the usual machinery find timm's module, and registers our names once it has run."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:  # noqa: ARG002
        if name != TIMM_MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        loader: Any = spec.loader
        execute = loader.exec_module

        def execute_then_register(module: ModuleType) -> None:
            execute(module)
            _register(module)

        loader.exec_module = execute_then_register
        return spec


def _register(timm_focalnet: Any) -> None:
    """Register an entry point, without weights, for each of our variants that timm lacks."""
    from timm.models import _registry

    from focalclip.models.variants import FOCALNETS

    for name in FOCALNETS:
        if not _registry.is_model(name):
            timm_focalnet.default_cfgs.update(_registry.generate_default_cfgs({name: timm_focalnet._cfg()}))
            setattr(timm_focalnet, name, _registry.register_model(_entry_point(timm_focalnet, name)))
            _added.add(name)


def _entry_point(timm_focalnet: Any, name: str) -> Any:
    from focalclip.models.variants import FOCALNETS

    config = FOCALNETS[name]
    options = {
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
        return timm_focalnet._create_focalnet(name, pretrained=pretrained, **(options | kwargs))

    create.__name__, create.__module__ = name, TIMM_MODULE  # timm files a model under the module of its function
    return create
