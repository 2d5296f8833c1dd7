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
        min_side: If positive, a large JPEG may be decoded at 1/2, 1/4 or 1/8 of its size, as long as both sides keep
            this many pixels. (Factors between 1 and 2 cost more than a full decode, so they are not used.)

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
            return np.array(image if image.mode == "RGB" else image.convert("RGB"))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # Pillow reports damaged PNGs as SyntaxError
        raise ValueError(f"undecodable image ({_brief(error)})") from None


def _decode_jpeg(data: bytes, min_side: int) -> np.ndarray:
    height, width, _, _ = simplejpeg.decode_jpeg_header(data)
    _check_size(int(width), int(height))
    return simplejpeg.decode_jpeg(data, "RGB", min_height=min_side, min_width=min_side, min_factor=2)


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ValueError(f"undecodable image (its header claims {width} x {height} pixels)")


def _brief(error: Exception) -> str:
    """Pillow's message without the address of the buffer that it read from."""
    return "neither JPEG, PNG nor WebP" if isinstance(error, Image.UnidentifiedImageError) else str(error)
