"""Compressed pictures to 8-bit RGB: one rule for training, evaluation, encoders and extraction (docs/decoding.md).

simplejpeg decodes JPEG, because it refuses damaged ones and is fast; Pillow decodes everything else. Where both can
decode a JPEG, their pixels are equal.
"""

import io
import re
import warnings
import zlib
from functools import cache, partial
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from focalclip.base.errors import first_line

# torchvision.datasets.folder.IMG_EXTENSIONS: the order of ELEVATER's archive is that of torchvision's ImageFolder
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")

PICTURE_SUFFIXES = (*IMAGE_SUFFIXES, ".gif", ".pbm", ".pnm", ".pfm", ".avif", ".jp2", ".jfif")
"""Suffixes of files that can be decoded; what a folder of pictures is searched for where no data set defines it."""

SHARD_SUFFIXES = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
"""The formats that shards hold, by Pillow's name, and the extension of their members. (MPO: a JPEG with others behind
it, as phones write them.)"""

SHARD_IMAGES = ("webp", "png", "jpg", "jpeg")
"""Extensions of images in shards; where a sample of an evaluation task has several, the first of these counts."""

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
"""Formats that are decoded, by Pillow's names, whatever a file is called. (Pillow's others include EPS, which starts an
interpreter.)"""

MAX_PIXELS = 178_956_970
"""Pillow's bound (twice ``Image.MAX_IMAGE_PIXELS``), for every format: 0.5 GB of RGB."""

_TO_RGB = {"Gray", "YCbCr", "RGB"}  # colour spaces that TurboJPEG turns into RGB

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""How a picture of each EXIF orientation becomes upright."""

_JPEG_END = b"\xff\xd9"

_HOLES = (
    bytes(512),
    b"\xff" * 64,
)  # what a download or disk leaves where bytes are missing; hardly any scan holds them

_BIT_BUFFER = 16  # bytes that a JPEG decoder may have read beyond the last one it needed

# Pillow warns from half of MAX_PIXELS on; those pictures are decoded, and larger ones refused.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def decode(data: bytes, *, upright: bool = True) -> Image.Image:
    """Decode a picture to RGB.

    Args:
        data: a file of one of ``FORMATS``; of an animation the first frame.
        upright: turn it as its EXIF orientation says.

    Raises:
        ValueError: if it is damaged, of another format, or too large.
    """
    pixels = _decode_jpeg(data, 0, upright) if _is_jpeg(data) else None
    return _decode_with_pillow(data, upright) if pixels is None else Image.fromarray(pixels)


def decode_array(data: bytes, min_side: int = 0) -> np.ndarray:
    """Decode a training picture, as :func:`decode` does.

    Args:
        data: a file of one of ``FORMATS``.
        min_side: If positive, a large JPEG is decoded at 4/8 to 1/8 of its size where both sides keep this many
            pixels. (Scales of 7/8 to 5/8 cost more than a full decode.)

    Returns:
        uint8 (height, width, 3).

    Raises:
        ValueError: if it is damaged, of another format, or too large.
    """
    try:
        pixels = _decode_jpeg(data, min_side, upright=True) if _is_jpeg(data) else None
        return np.array(_decode_with_pillow(data, upright=True)) if pixels is None else pixels
    except ValueError as error:
        raise ValueError(f"undecodable image ({error})") from None


def to_rgb(picture: Image.Image, *, upright: bool = True) -> Image.Image:
    """A picture of any mode, upright in 8-bit RGB; one that is so already is returned itself.

    An alpha channel and transparency are dropped, as ``convert("RGB")`` does. 16 bits become their upper 8, which is
    how Pillow reads 16-bit colours. Integers of 32 bits and floats have no range of their own: the values are scaled
    from the smallest of 0-1 (floats), 0-255 and 0-65535 that holds them all, else from their lowest to their highest.

    Args:
        picture: from Pillow.
        upright: turn it as its EXIF orientation says.

    Raises:
        ValueError: if a float is NaN or infinite.
        OSError: if the picture was not loaded yet and is damaged; Pillow may raise others.
    """
    picture.load()
    turn = _TURNS.get(_orientation(picture)) if upright else None
    if picture.mode.startswith(("I", "F")):
        rgb = Image.fromarray(_to_8_bits(picture)).convert("RGB")
    elif picture.mode == "P":
        rgb = picture.copy()
        rgb.info.pop("transparency", None)  # Pillow warns when it drops it itself
        rgb = rgb.convert("RGB")
    elif picture.mode == "La":
        rgb = picture.convert("LA").convert("RGB")
    else:
        rgb = picture if picture.mode == "RGB" else picture.convert("RGB")
    if turn is not None:
        rgb = rgb.transpose(turn)
        rgb.info = {}  # else it would be turned again
    return rgb


class PictureHead(NamedTuple):
    """What the first bytes of a picture say."""

    format: str
    """Pillow's name of it."""
    width: int
    height: int


def inspect(data: bytes) -> PictureHead:
    """Format and size of a picture, with a search for damage that decodes nothing where a file looks whole.

    A JPEG looks whole that ends its scan and has no hole in it, a PNG by its checksums and end, WebP by its length. All
    else is decoded, which decides. What this cannot see are changed bytes inside a scan: those are found at decoding.

    Args:
        data: a file of one of ``FORMATS``.

    Raises:
        ValueError: if it is damaged, of another format, or too large.
    """
    if _is_jpeg(data):
        import simplejpeg

        try:
            height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        except ValueError:
            height, width, colours = 0, 0, ""
        if colours in _TO_RGB:
            _check_size(int(width), int(height))
            start = _start_of_scan(data)
            if data.rfind(_JPEG_END) <= start or any(data.find(hole, start) >= 0 for hole in _HOLES):
                decode_array(data, 1)
            return PictureHead("JPEG", int(width), int(height))
    try:
        with _open(data) as image:
            _check_size(*image.size)
            head, looks_whole = PictureHead(image.format or "", *image.size), False
            if image.format == "PNG":
                _check_png(data)
                looks_whole = b"IEND" in data[-64:]
            elif image.format == "WEBP":
                looks_whole = 8 + int.from_bytes(data[4:8], "little") <= len(data)
    except UnidentifiedImageError:
        raise ValueError(_what_it_is(data)) from None
    except Exception as error:  # noqa: BLE001 (damaged files make Pillow raise errors of any kind)
        raise ValueError(first_line(error)) from None
    if not looks_whole:
        decode(data)
    return head


def _is_jpeg(data: bytes) -> bool:
    return data[:2] == b"\xff\xd8"


def _open(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data), formats=_formats())


@cache
def _formats() -> list[str]:
    """Those of ``FORMATS`` that this Pillow can decode."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _decode_with_pillow(data: bytes, upright: bool) -> Image.Image:
    try:
        with _open(data) as image:
            _check_size(*image.size)
            if image.format == "PNG":
                _check_png(data)
            rgb = to_rgb(image, upright=upright)
            rgb.info = {}  # what was not turned here stays so
            return rgb
    except UnidentifiedImageError:  # its message holds the address of the buffer
        raise ValueError(_what_it_is(data)) from None
    except Exception as error:  # noqa: BLE001 (damaged files make Pillow raise errors of any kind)
        raise ValueError(first_line(error)) from None


def _what_it_is(data: bytes) -> str:
    """Why a file is of none of ``FORMATS``; its first bytes tell another format that Pillow knows."""
    start = data[:32].ljust(32, b"\0")
    others = [
        name for name, (_, accept) in Image.OPEN.items() if name not in FORMATS and accept and accept(start) is True
    ]
    if others:
        return f"{others[0]}, which is none of {', '.join(FORMATS)}"
    return "not an image" if data else "empty, or damaged where it is stored"


def _decode_jpeg(data: bytes, min_side: int, upright: bool) -> np.ndarray | None:
    """Pixels of a JPEG; None where they are Pillow's to decode, or to refuse.

    Pillow paints what is missing of a damaged JPEG grey and says nothing; TurboJPEG refuses it.
    """
    import simplejpeg

    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    _check_size(int(width), int(height))
    is_rgb = colours in _TO_RGB
    side, factor = (min_side, 2) if is_rgb else (1, 1)  # CMYK is only looked at for damage, at an eighth of its size
    read = partial(
        simplejpeg.decode_jpeg,
        data,
        "RGB" if is_rgb else "CMYK",
        min_height=side,
        min_width=side,
        min_factor=factor,
    )
    try:
        pixels = read()
    except ValueError as error:
        if not str(error).startswith(("Corrupt", "Premature")):
            return None
        if not _is_padded(data, str(error)):
            raise ValueError(f"truncated or damaged JPEG ({error})") from None
        pixels = read(strict=False)
    if not is_rgb:
        return None
    turn = _TURNS.get(_orientation_of_jpeg(data)) if upright else None
    return pixels if turn is None else np.array(Image.fromarray(pixels).transpose(turn))


def _is_padded(data: bytes, problem: str) -> bool:
    """Whether bytes without meaning follow a whole scan, as some cameras write them.

    The scan of a damaged JPEG, whose last blocks were read from such bytes, ends long before them.
    """
    unread = re.search(r"(\d+) extraneous bytes before marker 0xd9", problem)
    if unread is None:
        return False
    scan = data[: data.find(_JPEG_END, _start_of_scan(data))]
    padding = len(scan) - len(scan.rstrip(scan[-1:]))
    return int(unread[1]) <= padding <= int(unread[1]) + _BIT_BUFFER


def _start_of_scan(data: bytes) -> int:
    """Where the first scan of a JPEG begins; the segments before it may hold another JPEG, a thumbnail."""
    at = 2
    while data[at : at + 1] == b"\xff" and data[at + 1 : at + 2] != b"\xda":
        at += 2 + int.from_bytes(data[at + 2 : at + 4])
    return at


def _check_png(data: bytes) -> None:
    """Raise ValueError unless the checksums of a PNG's pixels agree; Pillow compares those of its other parts alone."""
    view, at = memoryview(data), 8
    while at + 12 <= len(data):
        kind, end = data[at + 4 : at + 8], at + 8 + int.from_bytes(data[at : at + 4])
        if kind == b"IEND":
            return
        if kind == b"IDAT" and zlib.crc32(view[at + 4 : end]) != int.from_bytes(data[end : end + 4]):
            raise ValueError("truncated or damaged PNG (its checksum differs)")
        at = end + 4


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ValueError(f"its header claims {width} x {height} pixels, more than {MAX_PIXELS:,}")


def _orientation(picture: Image.Image) -> int:
    """EXIF orientation, 1 to 8; 1, upright, where there is none that can be read."""
    try:
        return picture.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # noqa: BLE001 (damaged metadata make Pillow raise errors of any kind, and cost no picture)
        return 1


def _orientation_of_jpeg(data: bytes) -> int:
    metadata = data[: _start_of_scan(data)]
    if b"Exif" not in metadata and b"Orientation" not in metadata:  # EXIF, XMP
        return 1
    try:
        with _open(metadata) as image:
            return _orientation(image)
    except Exception:  # noqa: BLE001 (as above)
        return 1


def _to_8_bits(picture: Image.Image) -> np.ndarray:
    """Grey values of more than 8 bits, uint8 (height, width)."""
    values = np.asarray(picture)
    if picture.mode.startswith("I;16"):
        return (values >> 8).astype(np.uint8)
    tags = getattr(picture, "tag_v2", {})
    if tags.get(258) == (32,) and tags.get(339, (1,)) == (1,):  # BitsPerSample, SampleFormat of TIFF: unsigned
        values = values.view(np.uint32)
    low, high = float(values.min()), float(values.max())
    if not np.isfinite([low, high]).all():
        raise ValueError("holds NaN or infinity")
    if picture.format == "PPM" and picture.mode == "I":  # Pillow scales them to 16 bits
        low, high = 0, 65535
    elif low >= 0 and high <= 65535:
        low, high = 0, next(top for top in (1, 255, 65535) if high <= top and (top > 1 or picture.mode == "F"))
    return ((values - low) * (255 / ((high - low) or 1))).round().astype(np.uint8)
