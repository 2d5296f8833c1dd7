"""Image towers by name: FocalNet's variants, or any tower of timm behind the same interface."""

from typing import Any

import torch
from torch import Tensor, nn

from focalclip.config import ImageTowerConfig
from focalclip.errors import UserError, first_line
from focalclip.models.cost import run_on_meta

TIMM = "timm:"


def create_image_tower(name: str, *, pretrained: bool = False, **options: Any) -> Any:
    """Build an image tower.

    Args:
        name: a FocalNet variant (``focalclip.list_models("focalnet*")``), or ``timm:NAME``.
        pretrained: start from the weights that timm publishes under this name, else from fresh ones. FocalNet's are the
            authors' ImageNet weights; the first use needs a connection to the Hugging Face hub, later ones its cache.
        **options: for FocalNets the fields of :class:`~focalclip.models.focalnet.FocalNetConfig`; for timm's towers
            ``drop_path``, ``init``, and arguments of timm's model function. Lists are taken as tuples.

    Returns:
        A module ``tower(images) -> (B, num_features)`` with ``feature_maps(images)``, ``strides``, ``feature_dims`` and
        ``num_features``.

    Raises:
        UserError: if the name is not known, has no published weights, or they cannot be had; if an option is not known
            or does not suit the tower.
    """
    options = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
    if name.startswith(TIMM):
        return create_timm_tower(name.removeprefix(TIMM), pretrained=pretrained, **options)
    from focalclip.models.focalnet.variants import create_focalnet

    try:
        return _published_focalnet(name, options) if pretrained else create_focalnet(name, **options)
    except TypeError as error:  # text where a number belongs, and the like
        raise UserError(f"{name}: cannot be built with {options}: {first_line(error)}") from None


def _published_focalnet(name: str, options: dict[str, Any]) -> nn.Module:
    """The named FocalNet with timm's copy of the authors' weights, in timm's reading of the disputed flags."""
    import timm

    from focalclip.models.focalnet.variants import FOCALNETS, create_focalnet
    from focalclip.models.weights import from_timm, load_strictly
    from focalclip.models.weights.architecture import check_published

    with torch.device("meta"):
        tower = create_focalnet(name, **options)
    published = {known: timm.get_pretrained_cfg(known) for known in FOCALNETS if timm.is_model(known)}
    published = {known: config for known, config in published.items() if config and config.has_weights}
    if name not in published:
        raise UserError(f"{name}: there are no published weights; there are for {', '.join(published)}")
    check_published(tower.config, name, published[name].num_classes)
    theirs = _create_in_timm(name, pretrained=True, num_classes=tower.config.num_classes)
    load_strictly(tower, from_timm(theirs.state_dict()), f"timm's {name}")
    return tower


def check_image_size(tower: nn.Module, config: ImageTowerConfig) -> None:
    """Try one picture of the configured size, on the meta device: many towers take one size alone, or a least size.

    Raises:
        UserError: if the tower refuses it.
    """
    picture = torch.empty(1, 3, config.image_size, config.image_size, device="meta")
    try:
        run_on_meta(tower, picture)
    except (AssertionError, RuntimeError, UserError) as error:
        raise UserError(
            f"model.image.image_size={config.image_size} does not suit {config.name}: {first_line(error)}"
        ) from None


def create_timm_tower(
    name: str, *, drop_path: float = 0.0, init: str = "official", pretrained: bool = False, **options: Any
) -> "TimmTower":
    """Build the tower that timm names; ``options`` are further arguments of timm's function of that name.

    Raises:
        UserError: if timm does not know the name or an option, cannot build it, or its weights cannot be had.
    """
    import timm

    if not timm.is_model(name):
        near = ", ".join(timm.list_models(f"*{name.split('_')[0]}*")[:5])
        raise UserError(f"timm:{name} is not a model of timm; near it: {near or 'none'} (timm.list_models() has all)")
    rate: dict[str, Any] = {"drop_path_rate": drop_path} if drop_path else {}
    try:
        trunk = _create_in_timm(name, pretrained=pretrained, num_classes=0, **rate, **options)
    except (TypeError, ValueError, AssertionError, ArithmeticError, LookupError, AttributeError) as error:
        if "drop_path_rate" in str(error):
            raise UserError(f"model.image.drop_path={drop_path}: timm:{name} has no stochastic depth; set 0") from None
        if not options or isinstance(error, UserError):
            raise
        raise UserError(f"model.image.options: timm:{name} refuses {options}: {first_line(error)}") from None
    if init == "fan_in" and not pretrained:
        _init_fan_in(trunk)
    return TimmTower(trunk)


@torch.no_grad()
def _init_fan_in(tower: nn.Module) -> None:
    """FocalNet's ``init="fan_in"`` for another tower: its linear maps and convolutions; all else stays as it is."""
    from focalclip.models.focalnet.network import init_affine

    for module in tower.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):  # convolutions of 1x1 are linear maps too
            is_convolution = isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1)
            init_affine(module, "fan_in", use_uniform=is_convolution)


def _create_in_timm(name: str, **options: Any) -> Any:
    """``timm.create_model``, its failures told in one sentence."""
    import timm
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return timm.create_model(name, **options)
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError):
        raise UserError(
            f"timm:{name}: its weights are not in the Hugging Face cache and the hub cannot be reached; connect once, "
            "or copy the cache of a machine that has them (HF_HUB_CACHE says where it is)"
        ) from None
    except (OSError, RuntimeError) as error:
        raise UserError(f"timm:{name}: timm cannot build it: {first_line(error)}") from None


class TimmTower(nn.Module):
    """A tower of timm: pooled features, and feature maps through timm's ``forward_intermediates``."""

    def __init__(self, trunk: Any) -> None:
        super().__init__()
        self.trunk = trunk
        self.num_features: int = trunk.head_hidden_size  # of what forward returns; num_features is the last map's
        self.strides: list[int] = [info["reduction"] for info in trunk.feature_info]
        self.feature_dims: list[int] = [info["num_chs"] for info in trunk.feature_info]

    def forward(self, images: Tensor) -> Tensor:
        """Pooled features (B, num_features) of normalised images (B, 3, H, W)."""
        return self.trunk(images)

    def feature_maps(self, images: Tensor) -> list[Tensor]:
        """One (B, C_i, H_i, W_i) map for each of ``strides``."""
        trunk: Any = self.trunk
        return trunk.forward_intermediates(images, intermediates_only=True)
