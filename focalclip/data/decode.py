"""Compressed bytes to RGB pixels: simplejpeg for JPEG, Pillow for the rest and for JPEGs that simplejpeg refuses."""

import io

import numpy as np
import simplejpeg
from PIL import Image

MAX_PIXELS = 1 << 28  # a header that claims more (16384 x 16384) is taken for damage: decoding it would end the process
_FORMATS = ("JPEG", "PNG", "WEBP")


def decode_image(data: bytes, min_side: int = 0) -> np.ndarray:
    """Decode one picture; colours only, an alpha channel is dropped as Pillow's ``convert("RGB")`` does.

    Args:
        data: A JPEG, PNG or WebP file.
        min_side: If positive, a large JPEG is decoded at 4/8 to 1/8 of its size where both sides keep this many
            pixels. (Scales of 7/8 to 5/8 cost more than a full decode.)

    Returns:
        uint8 (height, width, 3).

    Raises:
        ValueError: if the bytes are not a whole picture; the message says why.
    """
    if data[:2] == b"\xff\xd8":
        try:
            return _decode_jpeg(data, min_side)
        except ValueError:
            pass  # CMYK, and odd files that Pillow still reads
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            _check_size(*image.size)
            if image.mode.startswith(("I", "F")):
                raise ValueError("more than 8 bits per channel, which would be clipped to white")
            return np.array(image if image.mode == "RGB" else image.convert("RGB"))
    except Image.UnidentifiedImageError:
        raise ValueError("undecodable image (neither JPEG, PNG nor WebP)") from None
    except Exception as error:  # noqa: BLE001 (on damaged files Pillow raises whatever it stumbles over)
        raise ValueError(f"undecodable image ({error})") from None


def _decode_jpeg(data: bytes, min_side: int) -> np.ndarray:
    height, width, _, _ = simplejpeg.decode_jpeg_header(data)
    _check_size(int(width), int(height))
    return simplejpeg.decode_jpeg(data, "RGB", min_height=min_side, min_width=min_side, min_factor=2)


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ValueError(f"its header claims {width} x {height} pixels")
