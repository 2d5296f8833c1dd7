"""Training augmentation: random crops, rotations and colours (evaluation's chain is ``models.preprocess``).

Pixels stay uint8 up to the device, where the batch is normalised. Crops are taken from each picture; everything else is
done to a whole batch at once.
"""

import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from focalclip.config import AugmentConfig
from focalclip.data.order import Draw

_LUMA = (77, 150, 29)  # 256 x (0.299, 0.587, 0.114), ITU-R BT.601, as Pillow and torchvision use

_RECOLOUR_SCALE = (0.4, 1.0)  # range of a channel's factor; at most 1, so nothing saturates

_PERMUTATIONS = np.array(list(itertools.permutations(range(3))))


def min_decoded_side(draws: Sequence[float], augment: AugmentConfig, size: int) -> int:
    """Shorter side at which a decoded picture still has ``size`` pixels in this sample's crop."""
    longest = max(augment.ratio[1], 1 / augment.ratio[0])
    return math.ceil(size * math.sqrt(longest / _crop_area(draws, augment)))


def random_resized_crop(pixels: np.ndarray, draws: Sequence[float], augment: AugmentConfig, size: int) -> Tensor:
    """Cut this sample's box out of a picture and resize it (bicubic, antialiased).

    The area is uniform in ``augment.scale``; the ratio is log-uniform over the part of ``augment.ratio`` at which a
    box of that area fits into the picture. (torchvision redraws both until they fit, which favours small areas, and
    gives up after ten draws.)

    Args:
        pixels: uint8 (height, width, 3).
        draws: One row of :func:`focalclip.data.order.uniform_draws`.
        augment: Ranges of area and ratio.
        size: Side of the result in pixels.

    Returns:
        uint8 (3, size, size).
    """
    height, width, _ = pixels.shape
    h, w = _crop_shape(height, width, draws, augment)
    top, left = int(draws[Draw.TOP] * (height - h + 1)), int(draws[Draw.LEFT] * (width - w + 1))
    box = torch.from_numpy(pixels[top : top + h, left : left + w]).permute(2, 0, 1)[None]  # H W 3 -> 1 3 H W
    return F.interpolate(box, size=(size, size), mode="bicubic", antialias=True)[0]


def _crop_area(draws: Sequence[float], augment: AugmentConfig) -> float:
    low, high = augment.scale
    return low + (high - low) * draws[Draw.AREA]


def _crop_shape(height: int, width: int, draws: Sequence[float], augment: AugmentConfig) -> tuple[int, int]:
    """Height and width of the crop in pixels."""
    area, aspect = _crop_area(draws, augment), width / height
    # A box of this area fits at ratios from area * aspect to aspect / area. Where no allowed ratio is among them (a
    # picture longer than all), the nearest one is taken and the box shrunk until it fits.
    low, high = (min(max(ratio, augment.ratio[0]), augment.ratio[1]) for ratio in (area * aspect, aspect / area))
    ratio = low * (high / low) ** draws[Draw.RATIO]
    box_height = math.sqrt(area * width * height / ratio)
    box_height *= min(1.0, height / box_height, width / (box_height * ratio))
    return min(max(round(box_height), 1), height), min(max(round(box_height * ratio), 1), width)


def augment_batch(images: np.ndarray, draws: np.ndarray, augment: AugmentConfig) -> None:
    """Rotate and flip; then recolour, drop the colours and invert, each where its draw falls below its probability.

    Args:
        images: uint8 (batch, 3, size, size), changed in place.
        draws: float64 (batch, 16), see :class:`focalclip.data.order.Draw`.
        augment: The largest angle and the four probabilities.
    """
    if augment.rotate:
        _rotate(images, np.deg2rad(augment.rotate * (2 * draws[:, Draw.ANGLE] - 1)))
    chosen = draws[:, Draw.FLIP] < augment.flip
    images[chosen] = images[chosen][..., ::-1]
    chosen = draws[:, Draw.RECOLOUR] < augment.recolour
    images[chosen] = _recolour(images[chosen], draws[chosen])
    chosen = draws[:, Draw.GREY] < augment.grey
    images[chosen] = _luma(images[chosen])
    chosen = draws[:, Draw.INVERT] < augment.invert
    images[chosen] = 255 - images[chosen]


def _rotate(images: np.ndarray, angles: np.ndarray) -> None:
    """Turn each image about its centre by its angle in radians (bilinear), in place."""
    cos, sin, zero = np.cos(angles), np.sin(angles), np.zeros_like(angles)
    turns = torch.from_numpy(np.stack([cos, -sin, zero, sin, cos, zero], axis=1)).float().view(-1, 2, 3)
    pixels = torch.from_numpy(images)
    grid = F.affine_grid(turns, list(pixels.shape), align_corners=False)
    turned = F.grid_sample(pixels.float(), grid, padding_mode="border", align_corners=False)
    pixels.copy_(turned.round_())


def _recolour(images: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Permute the channels and scale each, in 1/256 steps."""
    order = _PERMUTATIONS[(draws[:, Draw.PERMUTATION] * len(_PERMUTATIONS)).astype(int)]  # B 3
    low, high = _RECOLOUR_SCALE
    scale = (256 * (low + (high - low) * draws[:, Draw.RED : Draw.BLUE + 1])).astype(np.uint16)
    permuted = images[np.arange(len(images))[:, None], order].astype(np.uint16)
    return (permuted * scale[:, :, None, None] >> 8).astype(np.uint8)


def _luma(images: np.ndarray) -> np.ndarray:
    """Brightness in one channel, (batch, 1, size, size)."""
    red, green, blue = (images[:, c : c + 1].astype(np.uint16) * _LUMA[c] for c in range(3))
    return (red + green + blue + 128 >> 8).astype(np.uint8)  # at most 255 * 256 + 128: fits 16 bits
