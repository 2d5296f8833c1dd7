"""From pixels to the input of an image tower."""

from collections.abc import Callable, Sequence

import torch
from PIL import Image
from torch import Tensor

from focalclip.config import ImageTowerConfig


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype) -> Tensor:
    """Turn uint8 (B, 3, H, W) into ``(x / 255 - mean) / std``, on the device that the pixels are on."""
    shift = torch.tensor(mean, device=images.device).view(3, 1, 1)
    scale = torch.tensor(std, device=images.device).view(3, 1, 1)
    return ((images.float() / 255 - shift) / scale).to(dtype)


def eval_transform(config: ImageTowerConfig) -> Callable[[Image.Image], Tensor]:
    """Evaluation chain."""
    from focalclip.data.transforms import eval_transform

    return eval_transform(config)
