"""One rule for pictures: what training, evaluation and the encoder make of a file is the same, or it is refused."""

import io
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from focalclip.config import ImageTowerConfig
from focalclip.data.images import FORMATS, MAX_PIXELS, decode, decode_array, to_rgb
from focalclip.data.reader import FileEntry, PictureSet
from focalclip.data.write import write_pictures
from focalclip.evaluation.features.images import encode_images
from focalclip.evaluation.protocols import PROTOCOLS
from focalclip.models.preprocess import eval_transform

ORIENTATION = 0x0112


def smooth(size: tuple[int, int] = (600, 400), seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def encoded(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def both(data: bytes) -> np.ndarray:
    """What both decoders make of a file, which must be the same."""
    evaluated, trained = np.asarray(decode(data)), decode_array(data)
    assert trained.dtype == np.uint8
    np.testing.assert_array_equal(evaluated, trained)
    return trained


def refused(data: bytes) -> str:
    """Why both decoders refuse a file."""
    with pytest.raises(ValueError, match=r"\w") as trained:
        decode_array(data)
    with pytest.raises(ValueError, match=r"\w") as evaluated:
        decode(data)
    assert str(trained.value) == f"undecodable image ({evaluated.value})"
    assert "\n" not in str(trained.value)
    assert " at 0x" not in str(trained.value)
    return str(evaluated.value)


# Formats


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_is_decoded_by_both_whatever_the_file_is_called(format):
    image = smooth((61, 40))
    data = encoded(image, format)
    np.testing.assert_array_equal(both(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize("format", ["EPS", "ICO", "PCX", "QOI", "DDS", "SGI"])
def test_other_formats_are_refused_by_name(format):
    """Pillow would start an interpreter, Ghostscript, on an EPS."""
    assert refused(encoded(smooth((32, 32)), format)).startswith(f"{format}, which is none of JPEG, PNG, WEBP, GIF")


@pytest.mark.parametrize("content", [b"<html>404</html>", b"%PDF-1.7", b"\0" * 100, b"x", b"\xff\xd8", b"\x89PNG"])
def test_what_is_no_picture_is_refused(content):
    refused(content)
    assert refused(b"") == "empty, or damaged where it is stored"


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"optimize": True}, {"restart_marker_rows": 1}])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_jpegs_are_pillows_bit_for_bit(options, subsampling, mode):
    """So the numbers of an evaluation are those of harnesses that take Pillow."""
    for size in [(61, 40), (17, 3), (600, 401)]:
        data = encoded(smooth(size).convert(mode), "JPEG", quality=83, subsampling=subsampling, **options)
        np.testing.assert_array_equal(both(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_a_jpeg_in_cmyk_is_read_as_pillow_reads_it_and_refused_if_damaged():
    data = encoded(smooth((300, 200)).convert("CMYK"), "JPEG", quality=90)
    np.testing.assert_array_equal(both(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    assert np.abs(both(data).astype(int) - np.asarray(smooth((300, 200)))).mean() < 3, "Adobe inverts its inks"
    assert "damaged" in refused(zeroed(data))


def test_of_an_animation_the_first_frame_is_taken():
    frames = [Image.new("RGB", (20, 10), colour) for colour in ("red", "lime", "blue")]
    for format in ("GIF", "WEBP", "PNG", "TIFF"):
        options = {"lossless": True} if format == "WEBP" else {}
        data = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
        assert Image.open(io.BytesIO(data)).n_frames == 3
        assert (both(data) == (255, 0, 0)).all(), format


def test_a_phones_jpeg_with_another_behind_it_stays_a_jpeg_in_shards(tmp_path):
    data = encoded(smooth((60, 40)), "MPO", save_all=True, append_images=[smooth((60, 40), seed=1)])
    assert Image.open(io.BytesIO(data)).format == "MPO"
    (tmp_path / "a.jpg").write_bytes(data)
    pictures = PictureSet(tmp_path, (FileEntry(tmp_path / "a.jpg", "a"),), captions=(("a dog",),))
    write_pictures(pictures, tmp_path / "shards")
    assert data in (tmp_path / "shards" / "00000.tar").read_bytes()


# Damage


def zeroed(data: bytes) -> bytes:
    """The second half zero, the end mark kept: a download that broke off in a file of full length."""
    half = len(data) // 2
    return data[:half] + bytes(len(data) - half - 2) + data[-2:]


def damages(data: bytes) -> dict[str, bytes]:
    half = len(data) // 2
    end = b"\xff\xd9"
    return {
        "zero": zeroed(data),
        "zero without end": data[:half] + bytes(len(data) - half),
        "cut": data[:half],
        "cut with end": data[:half] + end,
        "filled": data[:half] + b"\xff" * (len(data) - half - 2) + end,
        "last part zero": data[: int(len(data) * 0.95)] + bytes(len(data) - int(len(data) * 0.95) - 2) + end,
        "lost": data[:half] + data[half + 64 :],
    }


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"optimize": True}, {"restart_marker_rows": 1}])
@pytest.mark.parametrize(
    ("kind", "noisy"), [(kind, noisy) for kind in damages(bytes(100)) for noisy in sorted({False, kind != "lost"})]
)
def test_a_damaged_jpeg_is_refused_not_painted_grey(options, kind, noisy):
    """(Of dense data a part may be missing so that the rest still makes a picture, which no decoder can tell.)"""
    image = smooth()
    if noisy:
        image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (401, 603, 3), dtype=np.uint8))
    data = damages(encoded(image, "JPEG", quality=70 if noisy else 90, **options))[kind]
    assert refused(data).startswith("truncated or damaged JPEG")
    with pytest.raises(ValueError, match="truncated or damaged JPEG"):
        decode_array(data, min_side=50)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"optimize": True}, {"restart_marker_rows": 1}])
@pytest.mark.parametrize("fill", [b"\0", b" ", b"\x55"])
def test_what_does_no_harm_to_a_jpeg_costs_no_picture(options, fill):
    """Bytes behind the end, or between the last block and the end, as some cameras leave them."""
    data = encoded(smooth((300, 200)), "JPEG", quality=90, **options)
    whole = both(data)
    for sound in (data + fill * 1000, data + b"junk" + data, data[:-2] + fill * 100 + data[-2:]):
        np.testing.assert_array_equal(both(sound), whole)


@pytest.mark.parametrize("format", ["PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000"])
def test_a_truncated_file_of_any_format_is_refused(format):
    data = encoded(smooth((200, 150)), format)
    for share in (0.1, 0.5, 0.9):
        refused(data[: int(len(data) * share)])


def test_every_wrong_bit_in_the_pixels_of_a_png_is_found():
    data = encoded(smooth((40, 30)), "PNG")
    start = data.index(b"IDAT") + 4
    for at in np.random.default_rng(0).integers(start, len(data) - 12, 200).tolist():
        refused(data[:at] + bytes([data[at] ^ 16]) + data[at + 1 :])


def test_broken_metadata_cost_no_picture():
    exif = b"Exif\0\0MM\0*\xff\xff\xff\xff"
    data = encoded(smooth((60, 40)), "JPEG", exif=exif)
    assert both(data).shape == (40, 60, 3)


# Sizes


def test_a_size_that_is_too_large_is_refused_before_a_pixel_is_decoded():
    header = bytearray(encoded(smooth((60, 40)), "JPEG"))
    frame = header.index(b"\xff\xc0")
    header[frame + 5 : frame + 9] = struct.pack(">HH", 13000, 14000)
    assert "14000 x 13000" in refused(bytes(header))
    side = int(MAX_PIXELS**0.5) + 1
    giant = encoded(Image.new("1", (side, side)), "PNG")
    assert len(giant) < 100_000
    refused(giant)


def test_a_large_picture_of_one_bit_is_decoded_without_a_warning():
    picture = Image.new("1", (10_000, 9_000))
    picture.paste(1, (0, 0, 5_000, 9_000))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # as importing focalclip does
        pixels = decode_array(encoded(picture, "PNG"))
    assert pixels.shape == (9_000, 10_000, 3)
    assert (pixels[:, 0].min(), pixels[:, -1].max()) == (255, 0)


# More than 8 bits


RAMP = np.linspace(0, 65535, 256).reshape(16, 16).astype(np.uint16)
LEVELS = np.arange(256).reshape(16, 16)


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM"])
def test_a_grey_ramp_of_16_bits_keeps_its_256_levels(format):
    data = encoded(Image.fromarray(RAMP), format)
    assert np.abs(both(data)[..., 0].astype(int) - LEVELS).max() <= 1
    assert len(np.unique(both(data)[..., 0])) == 256
    if format != "PPM":
        np.testing.assert_array_equal(both(data)[..., 0], LEVELS)


def test_16_bits_in_either_byte_order():
    for mode, kind in (("I;16", "<u2"), ("I;16B", ">u2")):
        picture = Image.frombytes(mode, (16, 16), RAMP.astype(kind).tobytes())
        np.testing.assert_array_equal(np.asarray(to_rgb(picture))[..., 0], LEVELS)
        np.testing.assert_array_equal(both(encoded(picture, "TIFF"))[..., 0], LEVELS)


def png_of_16_bits(values: np.ndarray) -> bytes:
    """Pillow writes no 16-bit colours."""
    import zlib

    height, width, channels = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_grey_and_colours_of_16_bits_have_the_same_brightness(channels):
    values = np.random.default_rng(0).integers(0, 65536, (16, 16, 1)).repeat(channels, axis=2)
    np.testing.assert_array_equal(both(png_of_16_bits(values))[..., 0], values[..., 0] >> 8)


@pytest.mark.parametrize(
    ("low", "high", "scaled"),
    [(0, 1, (0, 255)), (0, 0.5, (0, 128)), (0, 255, (0, 255)), (0, 65535, (0, 255)), (-3, 8, (0, 255)),
     (0, 1e9, (0, 255)), (0.5, 0.5, (128, 128)), (-2, -2, (0, 0))],
)  # fmt: skip
def test_floats_are_scaled_by_their_range(low, high, scaled):
    values = np.linspace(low, high, 256).reshape(16, 16).astype(np.float32)
    pixels = both(encoded(Image.fromarray(values), "TIFF"))[..., 0]
    assert (pixels.min(), pixels.max()) == scaled
    assert (np.diff(pixels.ravel().astype(int)) >= 0).all()
    if (low, high) == (0, 1):
        np.testing.assert_array_equal(pixels, LEVELS)


def test_floats_that_are_no_numbers_are_refused():
    values = np.ones((8, 8), dtype=np.float32)
    values[3, 3] = np.nan
    assert refused(encoded(Image.fromarray(values), "TIFF")) == "holds NaN or infinity"


@pytest.mark.parametrize(("low", "high"), [(0, 255), (0, 65535), (0, 2**31 - 1), (-(2**31), 2**31 - 1)])
def test_integers_of_32_bits_are_scaled_by_their_range(low, high):
    values = np.linspace(low, high, 256).round().reshape(16, 16).astype(np.int32)
    np.testing.assert_array_equal(both(encoded(Image.fromarray(values), "TIFF"))[..., 0], LEVELS)


def test_unsigned_integers_of_32_bits_are_not_taken_for_negative():
    values = np.linspace(0, 2**32 - 1, 256).round().astype(np.uint32).reshape(16, 16)
    data = bytearray(encoded(Image.fromarray(values.view(np.int32)), "TIFF"))
    at = data.index(struct.pack("<HHIH", 339, 3, 1, 2))  # the tag SampleFormat: 2, signed
    data[at : at + 10] = struct.pack("<HHIH", 339, 3, 1, 1)
    np.testing.assert_array_equal(both(bytes(data))[..., 0], LEVELS)


def test_a_dark_pgm_of_16_bits_stays_dark():
    data = b"P5 16 16 65535\n" + np.full((16, 16), 200, ">u2").tobytes()
    assert both(data).max() == 1


# Alpha and palettes


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_dropped(mode):
    image = smooth((40, 30)).convert(mode)
    image.putalpha(0)
    pixels = both(encoded(image, "PNG"))
    np.testing.assert_array_equal(pixels, np.asarray(smooth((40, 30)).convert(mode[:-1]).convert("RGB")))


@pytest.mark.parametrize("transparency", [3, bytes([0, 128, 255])])
@pytest.mark.parametrize("format", ["PNG", "GIF"])
def test_a_palette_with_transparency_is_its_colours_without_a_warning(transparency, format):
    image = smooth((40, 30)).quantize(16)
    if format == "GIF" and isinstance(transparency, bytes):
        transparency = 0
    data = encoded(image, format, transparency=transparency)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels = both(data)
        preprocessed = eval_transform(ImageTowerConfig(image_size=8))(Image.open(io.BytesIO(data)))
    np.testing.assert_array_equal(pixels, np.asarray(image.convert("RGB")))
    assert preprocessed.shape == (3, 8, 8)


MODES = [
    "1",
    "L",
    "P",
    "RGB",
    "RGBA",
    "LA",
    "PA",
    "La",
    "RGBa",
    "CMYK",
    "YCbCr",
    "HSV",
    "LAB",
    "I",
    "F",
    "I;16",
    "I;16B",
]


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_of_pillow_becomes_rgb(mode):
    base = smooth((40, 30))
    ways = {
        "PA": lambda: base.convert("P").convert("PA"),
        "La": lambda: base.convert("LA").convert("La"),
        "RGBa": lambda: base.convert("RGBA").convert("RGBa"),
        "HSV": lambda: base.convert("HSV"),
        "I;16": lambda: Image.fromarray(np.asarray(base.convert("L")).astype(np.uint16) * 257),
        "I;16B": lambda: Image.frombytes(
            "I;16B", base.size, (np.asarray(base.convert("L")).astype(">u2") * 257).tobytes()
        ),
        "LAB": lambda: Image.new("LAB", base.size, (128, 128, 128)),
    }
    picture = ways.get(mode, lambda: base.convert(mode))()
    rgb = to_rgb(picture)
    assert (rgb.mode, rgb.size) == ("RGB", base.size)
    assert eval_transform(ImageTowerConfig(image_size=8))(picture).shape == (3, 8, 8)
    if mode in ("I", "F", "I;16", "I;16B", "La"):
        expected = base.convert("L").convert("RGB")
        assert np.abs(np.asarray(rgb).astype(int) - np.asarray(expected)).max() <= 1


# Orientation


def turned(orientation: int, format: str) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return encoded(smooth((60, 40)), format, exif=exif, **({"lossless": True} if format == "WEBP" else {}))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_pictures_are_upright_for_training_evaluation_and_encoder(orientation, format):
    data = turned(orientation, format)
    picture = Image.open(io.BytesIO(data))
    upright = np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))
    np.testing.assert_array_equal(both(data), upright)
    np.testing.assert_array_equal(np.asarray(to_rgb(Image.open(io.BytesIO(data)))), upright)
    transform = eval_transform(ImageTowerConfig(image_size=16, resize_mode="squash"))
    expected = transform(Image.fromarray(upright))
    assert torch.equal(transform(Image.open(io.BytesIO(data))), expected)
    assert torch.equal(transform(decode(data)), expected), "and not turned twice"


@pytest.mark.parametrize("format", ["JPEG", "WEBP"])
def test_an_orientation_in_xmp_alone_counts_too(format):
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    data = encoded(smooth((60, 40)), format, xmp=xmp)
    assert Image.open(io.BytesIO(data)).getexif()[ORIENTATION] == 6
    assert both(data).shape == (60, 40, 3)


def test_the_orientation_of_a_tiff_is_turned_by_pillow_itself():
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    data = encoded(smooth((60, 40)), "TIFF", exif=exif)
    np.testing.assert_array_equal(both(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    assert both(data).shape == (60, 40, 3)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_as_stored_where_a_protocol_says_so(format):
    data = turned(6, format)
    stored = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    picture = decode(data, upright=False)
    np.testing.assert_array_equal(np.asarray(picture), stored)
    transform = eval_transform(ImageTowerConfig(image_size=16, resize_mode="squash"))
    assert torch.equal(transform(picture), transform(Image.fromarray(stored))), "nor turned later"


def test_the_protocols_of_others_take_pictures_as_they_are_stored():
    assert {name for name, protocol in PROTOCOLS.items() if protocol.upright} == {"demo", "wds"}


class Columns:
    """A model of which half of a picture is brighter."""

    device = "cpu"

    def preprocess(self, picture: Image.Image) -> torch.Tensor:
        return torch.from_numpy(np.array(picture.convert("L").resize((2, 2)), dtype=np.float32))

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)


def test_features_follow_the_protocol(tmp_path):
    half = Image.new("L", (40, 40))
    half.paste(255, (0, 0, 20, 40))  # bright on the left; above, once turned by a quarter
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    half.save(tmp_path / "a.png", exif=exif)
    entries = [FileEntry(Path(tmp_path / "a.png"), "a")]
    upright, stored = (
        encode_images(Columns(), entries, batch_size=1, progress=False, upright=upright).embeds[0] > 0.1
        for upright in (True, False)
    )
    assert upright.tolist() == [True, True, False, False]
    assert stored.tolist() == [True, False, True, False]
