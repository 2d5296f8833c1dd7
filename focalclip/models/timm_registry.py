"""Small FocalNets under timm's roof, so that open_clip and timm build them by name once focalclip is imported.

``import focalclip`` must not cost an import of timm (seconds), and users import the two in either order. So the names
are added at once where timm's ``focalnet`` module is loaded already, else right after it is loaded.
"""

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from functools import partial
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


def _with_stem(timm_focalnet: Any, patch_size: int) -> Any:
    """Timm's FocalNet with a stem of this stride; timm's own is fixed to 4."""
    if patch_size == 4:
        return timm_focalnet.FocalNet

    class FocalNet(timm_focalnet.FocalNet):
        def __init__(self, in_chans: int = 3, use_overlap_down: bool = False, **options: Any) -> None:
            super().__init__(in_chans=in_chans, use_overlap_down=use_overlap_down, **options)
            dim, norm_layer = self.embed_dim[0], type(self.stem.norm)
            self.stem = timm_focalnet.Downsample(
                in_chans, dim, stride=patch_size, overlap=use_overlap_down, norm_layer=partial(norm_layer, eps=1e-5)
            )
            timm_focalnet.named_apply(timm_focalnet._init_weights, self.stem)
            for info in self.feature_info:
                info["reduction"] = info["reduction"] // 4 * patch_size

    return FocalNet


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
        from timm.models._builder import build_model_with_cfg

        stages = tuple(range(config.num_stages))
        return build_model_with_cfg(
            _with_stem(timm_focalnet, config.patch_size),
            name,
            pretrained,
            feature_cfg={"flatten_sequential": True, "out_indices": kwargs.pop("out_indices", stages)},
            **(options | kwargs),
        )

    create.__name__, create.__module__ = name, TIMM_MODULE  # timm files a model under the module of its function
    return create
