"""Compressed pictures to pixels, the one place where they are decoded.

Two libraries decode JPEG, and their pixels differ in the last bits, so which one is used decides numbers. Evaluation
takes Pillow, as the other harnesses do (:func:`decode`); training takes simplejpeg, which is faster and can decode at
a fraction of the size, and Pillow for what simplejpeg cannot read (:func:`decode_array`).
"""

import io
import struct
from collections.abc import Collection

import numpy as np
from PIL import Image

from focalclip.base.errors import first_line

# torchvision.datasets.folder.IMG_EXTENSIONS: the order of ELEVATER's archive is that of torchvision's ImageFolder
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")

SHARD_SUFFIXES = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
"""The formats that shards hold, by Pillow's name, and the extension of their members."""

SHARD_IMAGES = ("webp", "png", "jpg", "jpeg")
"""Extensions of images in shards; where a sample of an evaluation task has several, the first of these counts."""

MAX_PIXELS = 1 << 28  # a header that claims more (16384 x 16384) is taken for damage: decoding it would end the process


def decode(data: bytes) -> Image.Image:
    """Decode a picture of any format to RGB with Pillow.

    Raises:
        ValueError: if it is damaged.
    """
    try:
        with _opened(data) as image:
            return image.convert("RGB")
    except Image.UnidentifiedImageError:  # its message holds the address of the buffer
        raise ValueError("not an image" if data else "empty, or damaged where it is stored") from None
    except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as error:
        raise ValueError(first_line(error)) from None


def decode_array(data: bytes, min_side: int = 0) -> np.ndarray:
    """Decode a training picture; an alpha channel is dropped, as Pillow's ``convert("RGB")`` does.

    Args:
        data: A JPEG, PNG or WebP file.
        min_side: If positive, a large JPEG is decoded at 4/8 to 1/8 of its size where both sides keep this many
            pixels. (Scales of 7/8 to 5/8 cost more than a full decode.)

    Returns:
        uint8 (height, width, 3).

    Raises:
        ValueError: if the bytes are not a whole picture, or it has more than 8 bits per channel.
    """
    if data[:2] == b"\xff\xd8":
        try:
            return _decode_jpeg(data, min_side)
        except ValueError:
            pass  # CMYK, and odd files that Pillow still reads
    try:
        with _opened(data, SHARD_SUFFIXES) as image:
            if image.mode.startswith(("I", "F")):
                raise ValueError("more than 8 bits per channel, which would be clipped to white")
            return np.array(image if image.mode == "RGB" else image.convert("RGB"))
    except Image.UnidentifiedImageError:
        raise ValueError("undecodable image (neither JPEG, PNG nor WebP)") from None
    except Exception as error:  # noqa: BLE001 (damaged files make Pillow raise errors of any kind)
        raise ValueError(f"undecodable image ({error})") from None


def image_format(data: bytes) -> str | None:
    """Pillow's name of the format of a picture that can be decoded."""
    with Image.open(io.BytesIO(data)) as image:
        return image.format


def _opened(data: bytes, formats: Collection[str] | None = None) -> Image.Image:
    image = Image.open(io.BytesIO(data), formats=None if formats is None else list(formats))
    _check_size(*image.size)
    return image


def _decode_jpeg(data: bytes, min_side: int) -> np.ndarray:
    import simplejpeg  # an optional dependency, which evaluation does without

    height, width, _, _ = simplejpeg.decode_jpeg_header(data)
    _check_size(int(width), int(height))
    return simplejpeg.decode_jpeg(data, "RGB", min_height=min_side, min_width=min_side, min_factor=2)


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ValueError(f"its header claims {width} x {height} pixels")
