"""Image towers by name, behind one interface; the tables of :mod:`focalclip.names` say which code builds a name."""

from typing import Any, Protocol

import torch
from torch import Tensor

from focalclip import names
from focalclip.base.errors import UserError, first_line
from focalclip.config import ImageTowerConfig
from focalclip.models.cost import run_on_meta


class ImageTower(Protocol):
    """What every image tower offers: an ``nn.Module`` with these attributes.

    Attributes:
        num_features: width D of the pooled features.
        strides: input pixels per position of each feature map; empty where the tower has no maps.
        feature_dims: channels of each feature map.
    """

    num_features: int
    strides: list[int]
    feature_dims: list[int]

    def __call__(self, images: Tensor) -> Tensor:
        """Pooled features (B, num_features) of normalised images (B, 3, H, W)."""
        ...

    def feature_maps(self, images: Tensor) -> list[Tensor]:
        """One (B, C_i, H_i, W_i) map for each of ``strides``, finest first."""
        ...


def create_image_tower(name: str, *, pretrained: bool = False, **options: Any) -> Any:
    """Build an image tower.

    Args:
        name: one of ``focalclip.list_models()``, or a name with a prefix whose source has image towers, ``timm:NAME``.
        pretrained: start from the weights that are published under this name, else from fresh ones. FocalNet's are the
            authors' ImageNet weights; the first use needs a connection to the Hugging Face hub, later ones its cache.
        **options: for FocalNets the fields of :class:`~focalclip.models.focalnet.FocalNetConfig`; for timm's towers
            ``drop_path``, ``init``, and arguments of timm's model function. Lists become tuples.

    Returns:
        An ``nn.Module`` that is an :class:`ImageTower`.

    Raises:
        UserError: if the name is not known, has no published weights, or they cannot be had; if an option is not known
            or does not suit the tower.
    """
    options = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
    entry = names.image_tower_entry(name)
    if entry is None:
        others = " or ".join(f"{prefix}{name}" for prefix, source in names.SOURCES.items() if source.image_tower)
        raise UserError(
            f"{name} is not an image tower; one of another library is written {others}, ours are "
            f"{', '.join(names.image_tower_names())}"
        )
    if pretrained and entry.published is None:
        raise UserError(f"{name}: there are no published weights; leave out pretrained")
    build = names.find((entry.published or "") if pretrained else entry.build)
    try:
        return build(names.split(name)[1], **options)
    except TypeError as error:  # text where a number belongs, and the like
        raise UserError(f"{name}: cannot be built with {options}: {first_line(error)}") from None


def check_image_size(tower: Any, config: ImageTowerConfig) -> None:
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


def check_patches(tower: Any, config: ImageTowerConfig) -> None:
    """Check that the patches of the configured size cover the picture: a last part of one would be left out.

    Raises:
        UserError: naming the sizes that fit.
    """
    size, sides = config.image_size, []

    def note(module: torch.nn.Conv2d, inputs: tuple[Tensor]) -> None:
        is_cut = module.kernel_size == module.stride and not any(module.padding)
        if inputs[0].shape[-1] == size and is_cut:
            sides.append(module.stride[0])

    handles = [m.register_forward_pre_hook(note) for m in tower.modules() if isinstance(m, torch.nn.Conv2d)]
    run_on_meta(tower, torch.empty(1, 3, size, size, device="meta"))
    for handle in handles:
        handle.remove()
    if sides and size % sides[0]:
        below = size - size % sides[0]
        raise UserError(
            f"model.image.image_size={size} is not a multiple of the {sides[0]} pixels of a patch of {config.name}, so "
            f"the last {size % sides[0]} would be left out; use {below or sides[0]} or {below + sides[0]}"
        )
