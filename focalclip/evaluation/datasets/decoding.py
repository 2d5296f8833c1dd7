"""Compressed images to Pillow."""

import io
import struct

from PIL import Image

from focalclip.errors import first_line


def decode(data: bytes) -> Image.Image:
    """Decode an image to RGB with Pillow, as the other harnesses do.

    Raises:
        ValueError: if it is damaged.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.convert("RGB")
    except Image.UnidentifiedImageError:  # its message holds the address of the buffer
        raise ValueError("not an image" if data else "empty, or damaged where it is stored") from None
    except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as error:
        raise ValueError(first_line(error)) from None
