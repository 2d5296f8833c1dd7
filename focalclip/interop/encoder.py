"""The image tower alone, frozen or to be trained further, for use inside other people's work."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from PIL import Image
from torch import Tensor, fx, nn

from focalclip.base.errors import UserError

Preprocess = Callable[[Image.Image], Tensor]


@dataclass(frozen=True)
class TowerWeights:
    """The weights of one trained tower, and what tells whether another tower with them is the same.

    Attributes:
        weights: by the names of the library that they come from. Those of a text tower include its projection.
        projection: weight (D, C) and bias (D,) or None of the linear map behind an image tower's C pooled features;
            None: there is none.
        encode: from the tower's input to its features before the projection, (B, C); None: not known.
        tokenizer: of a text tower.
        mean: of the pixels that the tower was trained on; None: not known.
        std: the same.
    """

    weights: Mapping[str, Tensor]
    projection: tuple[Tensor, Tensor | None] | None = None
    encode: Callable[[Tensor], Tensor] | None = None
    tokenizer: Any = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


@fx.wrap
def _as_input(images: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    """``images`` in the precision of a tower.

    Raises:
        UserError: if they are not what the encoder's ``preprocess`` makes of pictures.
    """
    kind = images.dtype if isinstance(images, Tensor) else type(images).__name__
    if not isinstance(images, Tensor) or not images.is_floating_point():
        raise UserError(
            f"the encoder takes normalised floats, not {kind}: stack what encoder.preprocess makes of each picture, or "
            "scale to [0, 1] and normalise as it does"
        )
    if images.ndim != 4 or images.shape[1] != channels:
        raise UserError(
            f"the encoder takes images of shape (B, {channels}, H, W), not {tuple(images.shape)}; stack what "
            "encoder.preprocess returns"
        )
    return images.to(dtype)


class ImageEncoder(nn.Module):
    """An image tower with the preprocessing that its weights belong to; frozen, unless it is to be trained further.

    Frozen, it stays in evaluation mode whatever the surrounding model does, its parameters need no gradient, and no
    activation is kept for a backward pass. Images may be of any floating dtype: they are cast to that of the
    parameters.

    Args:
        tower: the image tower.
        create_preprocess: makes its preprocessing, which can be pickled.

    Attributes:
        trainable: whether :meth:`unfreeze` was called.
        num_features: width D of the pooled features.
        strides: pixels per position of each feature map.
        feature_dims: channels of each feature map.
    """

    def __init__(self, tower: nn.Module, create_preprocess: Callable[[], Preprocess]) -> None:
        super().__init__()
        self.tower = tower.eval().requires_grad_(False)
        self.trainable = False
        self._create_preprocess = create_preprocess
        self.num_features: int = tower.num_features  # pyrefly: ignore
        self.strides: list[int] = list(tower.strides)  # pyrefly: ignore
        self.feature_dims: list[int] = list(tower.feature_dims)  # pyrefly: ignore
        super().train(False)

    def unfreeze(self) -> Self:
        """Make the tower part of what trains: gradients for all parameters, training mode, ``train()`` obeyed."""
        self.trainable = True
        self.tower.requires_grad_(True)
        return self.train()

    def forward(self, images: Tensor) -> Tensor:
        """Pooled features (B, num_features) of preprocessed images (B, 3, H, W).

        Raises:
            UserError: if ``images`` are integers, or of another shape.
        """
        with torch.set_grad_enabled(self.trainable and torch.is_grad_enabled()):
            return self.tower(self._cast(images))

    def feature_maps(self, images: Tensor) -> list[Tensor]:
        """One map (B, C_i, H_i, W_i) per stage, from fine to coarse, of preprocessed images (B, 3, H, W).

        Raises:
            UserError: if ``images`` are integers, or of another shape.
        """
        with torch.set_grad_enabled(self.trainable and torch.is_grad_enabled()):
            return self.tower.feature_maps(self._cast(images))  # pyrefly: ignore[not-callable]

    def _cast(self, images: Tensor) -> Tensor:
        return _as_input(images, getattr(self.tower, "in_channels", 3), next(self.tower.parameters()).dtype)

    @property
    def preprocess(self) -> Preprocess:
        """Picture of any mode to (3, S, S) float32 tensor, as the weights expect it; it can be pickled."""
        return self._create_preprocess()

    def train(self, mode: bool = True) -> Self:
        """As of any module, if the encoder is trainable; a frozen one stays in evaluation mode.

        A frozen encoder inside a model that trains must not start to drop paths.
        """
        return super().train(mode) if self.trainable else self


class ForeignTower(nn.Module, ABC):
    """Tower whose widths and strides are measured on one picture, because its library does not tell them all.

    Attributes:
        num_features: width D of the pooled features.
        strides: pixels per position of each feature map; empty where the tower has none.
        feature_dims: channels of each feature map.
    """

    num_features: int
    strides: list[int]
    feature_dims: list[int]

    @abstractmethod
    def feature_maps(self, images: Tensor) -> list[Tensor]:
        """One (B, C_i, H_i, W_i) map for each of ``strides``.

        Raises:
            UserError: if the tower has none.
        """

    @torch.no_grad()
    def measure(self, images: Tensor) -> None:
        """Set the attributes from what the tower makes of ``images`` (1, 3, S, S).

        Raises:
            UserError: if what it makes of them is left to chance, as under masked pretraining.
        """
        self.eval()
        pooled = self(images)
        if not torch.equal(self(images), pooled):
            raise UserError(f"{type(self).__name__}: this tower gives one picture different features; choose another")
        self.num_features = pooled.shape[1]
        try:
            maps = self.feature_maps(images)
        except UserError:
            maps = []
        self.feature_dims = [x.shape[1] for x in maps]
        self.strides = [round(images.shape[2] / x.shape[2]) for x in maps]
