"""The image tower alone, frozen, for use inside other people's work."""

from typing import Any, Self

import torch
from torch import Tensor, nn

from focalclip.config import ImageTowerConfig
from focalclip.preprocess import eval_transform


class ImageEncoder(nn.Module):
    """A frozen image tower with the preprocessing that its weights belong to.

    It stays in evaluation mode whatever the surrounding model does, its parameters need no gradient, and no activation
    is kept for a backward pass.

    Attributes:
        num_features: width D of the pooled features.
        strides: pixels per position of each feature map.
        feature_dims: channels of each feature map.
    """

    def __init__(self, tower: nn.Module, config: ImageTowerConfig) -> None:
        super().__init__()
        self.tower = tower.eval().requires_grad_(False)
        self.config = config
        self.num_features: int = tower.num_features  # pyrefly: ignore
        self.strides: list[int] = list(tower.strides)  # pyrefly: ignore
        self.feature_dims: list[int] = list(tower.feature_dims)  # pyrefly: ignore
        super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Pooled features (B, num_features) of preprocessed images (B, 3, H, W)."""
        return self.tower(images)

    @torch.no_grad()
    def feature_maps(self, images: Tensor) -> list[Tensor]:
        """One map (B, C_i, H_i, W_i) per stage, from fine to coarse, of preprocessed images (B, 3, H, W)."""
        return self.tower.feature_maps(images)  # pyrefly: ignore[not-callable]

    @property
    def preprocess(self) -> Any:
        """Picture to (3, S, S) tensor."""
        return eval_transform(self.config)

    def train(self, mode: bool = True) -> Self:  # noqa: ARG002
        """Stay in evaluation mode: a frozen encoder inside a model that trains must not start to drop paths."""
        return self
