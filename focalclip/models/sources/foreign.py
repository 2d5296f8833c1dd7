"""What towers of other libraries have in common behind our interface."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from focalclip.errors import UserError


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
