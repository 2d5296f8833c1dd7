"""From pixels to the input of an image tower."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from focalclip.config import ImageTowerConfig

_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def normalize(
    images: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype = torch.float32
) -> Tensor:
    """Turn uint8 (..., 3, H, W) into ``(x / 255 - mean) / std``, on the device that the pixels are on.

    The only such formula: training and evaluation both call it. It computes in float32, whatever ``dtype`` it returns.
    """
    shift = torch.tensor(mean, device=images.device).view(3, 1, 1)
    scale = torch.tensor(std, device=images.device).view(3, 1, 1)
    return ((images.float() / 255 - shift) / scale).to(dtype)


def eval_transform(config: ImageTowerConfig) -> Callable[[Image.Image], Tensor]:
    """The fixed chain from a picture to the tower's input; the same values as open_clip's ``image_transform``.

    ``shortest`` resizes the shorter side and crops the centre, ``squash`` resizes both sides, ``longest`` resizes the
    longer side and pads with black (open_clip's fill).

    Returns:
        A function from a Pillow image of any mode to float32 (3, image_size, image_size), normalised.
    """
    size, resample = config.image_size, _FILTERS[config.interpolation]
    fit = {"shortest": _fit_shortest, "squash": _squash, "longest": _fit_longest}[config.resize_mode]

    def transform(image: Image.Image) -> Tensor:
        pixels = torch.from_numpy(np.array(fit(image, size, resample).convert("RGB")))
        return normalize(pixels.permute(2, 0, 1).contiguous(), config.mean, config.std)  # H W 3 -> 3 H W

    return transform


def _fit_shortest(image: Image.Image, size: int, resample: Image.Resampling) -> Image.Image:
    shorter = min(image.size)
    width, height = (int(size * side / shorter) for side in image.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image.resize((width, height), resample).crop((left, top, left + size, top + size))


def _squash(image: Image.Image, size: int, resample: Image.Resampling) -> Image.Image:
    return image.resize((size, size), resample)


def _fit_longest(image: Image.Image, size: int, resample: Image.Resampling) -> Image.Image:
    shrink = max(image.size) / size
    width, height = (max(round(side / shrink), 1) for side in image.size)
    padded = Image.new("RGB", (size, size))
    padded.paste(image.resize((width, height), resample).convert("RGB"), ((size - width) // 2, (size - height) // 2))
    return padded
