"""Image towers by name: FocalNet's variants, or any tower of timm behind the same interface."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from focalclip.config import ImageTowerConfig
from focalclip.errors import UserError, first_line

TIMM = "timm:"


def create_image_tower(name: str, **options: Any) -> Any:
    """Build an image tower with fresh weights.

    Args:
        name: a FocalNet variant (``focalclip.list_models("focalnet*")``), or ``timm:NAME``.
        **options: for FocalNets the fields of :class:`~focalclip.models.focalnet.FocalNetConfig`; for timm's towers
            ``drop_path`` and ``pretrained``.

    Returns:
        A module ``tower(images) -> (B, num_features)`` with ``feature_maps(images)``, ``strides``, ``feature_dims`` and
        ``num_features``.

    Raises:
        UserError: if the name is not known.
    """
    if name.startswith(TIMM):
        return TimmTower(name.removeprefix(TIMM), **options)
    from focalclip.models.variants import create_focalnet

    return create_focalnet(name, **options)


def check_image_size(tower: nn.Module, config: ImageTowerConfig) -> None:
    """Try one picture of the configured size, on the meta device: many towers take one size alone, or a least size.

    Raises:
        UserError: if the tower refuses it.
    """
    state = {name: x.to("meta") for name, x in [*tower.named_parameters(), *tower.named_buffers()]}
    picture = torch.empty(1, 3, config.image_size, config.image_size, device="meta")
    try:
        with torch.no_grad():
            functional_call(tower.eval(), state, picture)
    except (AssertionError, RuntimeError, UserError) as error:
        raise UserError(
            f"model.image.image_size={config.image_size} does not suit {config.name}: {first_line(error)}"
        ) from None
    finally:
        tower.train()


class TimmTower(nn.Module):
    """A tower of timm: pooled features, and feature maps through timm's ``forward_intermediates``."""

    def __init__(self, name: str, *, drop_path: float = 0.0, pretrained: bool = False) -> None:
        super().__init__()
        import timm

        if not timm.is_model(name):
            near = ", ".join(timm.list_models(f"*{name.split('_')[0]}*")[:5])
            raise UserError(
                f"timm:{name} is not a model of timm; near it: {near or 'none'} (timm.list_models() has all)"
            )
        options: dict[str, Any] = {"drop_path_rate": drop_path} if drop_path else {}
        try:
            trunk: Any = timm.create_model(name, pretrained=pretrained, num_classes=0, **options)
        except TypeError as error:
            if "drop_path_rate" not in str(error):
                raise
            raise UserError(f"model.image.drop_path={drop_path}: timm:{name} has no stochastic depth; set 0") from None
        except (OSError, RuntimeError) as error:
            raise UserError(f"timm:{name}: timm cannot build it: {first_line(error)}") from None
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
