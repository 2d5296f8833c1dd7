"""From pixels to the input of an image tower."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from focalclip.base.errors import UserError
from focalclip.config import ImageTowerConfig
from focalclip.data.images import to_rgb

CHANNELS = (1, 3)
"""Channels that a picture can be given: grey and RGB."""

_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def normalize(
    images: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype = torch.float32
) -> Tensor:
    """Turn uint8 (..., C, H, W) into ``(x / 255 - mean) / std``, on the device that the pixels are on.

    The only such formula: training and evaluation both call it. It computes in float32, whatever ``dtype`` it returns.
    """
    shift = torch.tensor(mean, device=images.device).view(-1, 1, 1)
    scale = torch.tensor(std, device=images.device).view(-1, 1, 1)
    return ((images.float() / 255 - shift) / scale).to(dtype)


def eval_transform(config: ImageTowerConfig, channels: int = 3) -> "EvalTransform":
    """The fixed chain from a picture to the tower's input; on RGB the same values as open_clip's ``image_transform``.

    ``shortest`` resizes the shorter side and crops the centre, ``squash`` resizes both sides, ``longest`` resizes the
    longer side and pads with black (open_clip's fill).

    Args:
        config: size, colours and resize.
        channels: 3 for RGB; 1 for grey (ITU-R BT.601), normalised by the means over the colours.

    Returns:
        A function from a Pillow image of any mode to float32 (channels, image_size, image_size), normalised.

    Raises:
        UserError: if a picture does not have so many channels.
    """
    check_channels(channels)
    return EvalTransform(config, channels)


def check_channels(channels: int) -> None:
    """Raise UserError unless pictures can be made into images of so many channels."""
    if channels not in CHANNELS:
        raise UserError(
            f"this tower takes images of {channels} channels, which pictures do not have; prepare tensors of shape "
            f"(B, {channels}, H, W) yourself"
        )


@dataclass(frozen=True)
class EvalTransform:
    """What :func:`eval_transform` returns; it can be pickled, for the processes of a loader."""

    config: ImageTowerConfig
    channels: int = 3

    def __call__(self, image: Image.Image) -> Tensor:
        """One picture as (channels, image_size, image_size)."""
        config = self.config
        fitted = _FITS[config.resize_mode](to_rgb(image), config.image_size, _FILTERS[config.interpolation])
        if self.channels == 1:
            grey = torch.from_numpy(np.array(fitted.convert("L")))[None]
            return normalize(grey, [sum(config.mean) / 3], [sum(config.std) / 3])
        pixels = torch.from_numpy(np.array(fitted))
        return normalize(pixels.permute(2, 0, 1).contiguous(), config.mean, config.std)  # H W 3 -> 3 H W


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
    padded.paste(image.resize((width, height), resample), ((size - width) // 2, (size - height) // 2))
    return padded


_FITS = {"shortest": _fit_shortest, "squash": _squash, "longest": _fit_longest}
