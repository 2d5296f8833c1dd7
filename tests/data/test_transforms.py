"""Pixels: the evaluation chain equals open_clip's, the training chain does what its settings say, decoding is sound."""

import io

import numpy as np
import pytest
import torch
from open_clip.transform import image_transform
from PIL import Image
from tiny_shards import picture

from focalclip.config import AugmentConfig, ImageTowerConfig
from focalclip.data.images import decode_array
from focalclip.data.order import Draw, uniform_draws
from focalclip.data.transforms import augment_batch, min_decoded_side, random_resized_crop
from focalclip.models.preprocess import eval_transform

WHOLE = AugmentConfig(scale=(1.0, 1.0), ratio=(1.0, 1.0))
ROUNDING = 2  # grey levels: two resizers that both round, and JPEG's own rounding


def draws_of(count: int) -> np.ndarray:
    return uniform_draws(seed=3, start=0, count=count)


def gradient(width: int, height: int) -> np.ndarray:
    """Red tells the column and green the row, as fractions of the whole."""
    x, y = np.meshgrid((np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height)
    return (np.stack([x, y, np.full_like(x, 0.5)], axis=-1) * 255).round().astype(np.uint8)


# Evaluation


@pytest.mark.parametrize("resize_mode", ["shortest", "squash", "longest"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(64, 64), (37, 90), (301, 97), (20, 20), (48, 48), (5, 200)])
def test_eval_transform_equals_open_clip(resize_mode, interpolation, size):
    config = ImageTowerConfig(image_size=48, resize_mode=resize_mode, interpolation=interpolation)
    theirs = image_transform(
        48, is_train=False, mean=config.mean, std=config.std, resize_mode=resize_mode, interpolation=interpolation
    )
    image = Image.open(io.BytesIO(picture(1, size)))
    torch.testing.assert_close(eval_transform(config)(image), theirs(image), rtol=0, atol=0)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK"])
def test_a_picture_of_any_mode_is_preprocessed_as_the_rgb_that_evaluation_decodes(mode):
    """open_clip resizes before it converts: a palette or 1 bit then by the nearest neighbour."""
    config = ImageTowerConfig(image_size=33)
    image = Image.open(io.BytesIO(picture(2, (50, 70)))).convert(mode)
    theirs = image_transform(33, is_train=False, mean=config.mean, std=config.std)
    torch.testing.assert_close(eval_transform(config)(image), theirs(image.convert("RGB")), rtol=0, atol=0)


# Decoding


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_decoding_matches_pillow(format, mode):
    data = picture(3, (61, 40), format, mode)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    pixels = decode_array(data)
    assert pixels.shape == (40, 61, 3)
    assert pixels.dtype == np.uint8
    assert np.abs(pixels - expected).max() <= (0 if format != "JPEG" else ROUNDING)


@pytest.mark.parametrize("min_side", [0, 30, 100, 101, 150, 200, 201, 500])
def test_large_jpegs_are_decoded_small_but_never_too_small(min_side):
    height, width, _ = decode_array(picture(4, (600, 400), "JPEG"), min_side).shape
    if 0 < min_side <= 200:
        assert min_side <= height < min_side + 400 / 8  # scales come in eighths
        assert (width, height) <= (300, 200)
    else:
        assert (width, height) == (600, 400)


def test_jpegs_that_simplejpeg_refuses_are_read_by_pillow():
    assert decode_array(picture(5, (30, 20), "JPEG", "CMYK")).shape == (20, 30, 3)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"<html>404</html>", "not an image"),
        (picture(0)[:300], "runcated"),
        (picture(0, format="JPEG")[:400], "runcated"),
        (picture(0, format="WEBP")[:60], ""),
    ],
)
def test_undecodable_images_say_why(data, reason):
    with pytest.raises(ValueError, match=f"undecodable image .*{reason}"):
        decode_array(data)


def test_huge_claims_are_refused():
    header = bytearray(picture(0, format="JPEG"))
    frame = header.index(b"\xff\xc0")
    header[frame + 5 : frame + 9] = b"\xff\xdc\xff\xdc"  # 65500 x 65500
    with pytest.raises(ValueError, match=r"65500 x 65500|decompression bomb"):
        decode_array(bytes(header))


# Training


def test_whole_picture_crop_is_a_plain_resize():
    pixels = np.asarray(Image.open(io.BytesIO(picture(6, (64, 64)))))
    ours = random_resized_crop(np.array(pixels), draws_of(1)[0].tolist(), WHOLE, 48)
    pillow = np.asarray(Image.fromarray(pixels).resize((48, 48), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    assert np.abs(ours.numpy().astype(int) - pillow).max() <= ROUNDING


@pytest.mark.parametrize(("width", "height"), [(100, 100), (160, 90), (100, 130)])
def test_crops_keep_to_the_area_and_ratio_asked_for(width, height):
    augment = AugmentConfig(scale=(0.2, 0.8), ratio=(0.75, 4 / 3))
    areas, ratios, centres = [], [], []
    for draws in draws_of(300).tolist():
        crop = random_resized_crop(gradient(width, height), draws, augment, 64).numpy() / 255
        # bicubic keeps a ramp: its slope over the 62 inner steps tells the box
        w, h = ((crop[c].max() - crop[c].min()) * 64 / 63 * side for c, side in ((0, width), (1, height)))
        areas.append(w * h / (width * height))
        ratios.append(w / h)
        centres.append([crop[0].mean(), crop[1].mean()])
    margin = 1.06  # whole pixels, and 8-bit slopes
    assert 0.2 / margin < min(areas) < 0.25
    assert 0.7 < max(areas) < 0.8 * margin
    assert 0.75 / margin < min(ratios) < 0.85
    assert 1.2 < max(ratios) < 4 / 3 * margin
    assert abs(np.mean(areas) - 0.5) < 0.04, "the area is uniform"
    np.testing.assert_allclose(np.mean(centres, axis=0), 0.5, atol=0.03)


@pytest.mark.parametrize(("width", "height"), [(400, 20), (20, 400), (1, 1), (1, 300), (2, 3)])
def test_pictures_longer_than_any_ratio_still_give_a_crop(width, height):
    for draws in draws_of(50).tolist():
        crop = random_resized_crop(gradient(width, height), draws, AugmentConfig(), 16)
        assert crop.shape == (3, 16, 16)
        assert crop.dtype == torch.uint8


def test_scaled_decoding_leaves_every_crop_its_pixels():
    augment = AugmentConfig(scale=(0.08, 1.0))
    for draws in draws_of(200).tolist():
        side = min_decoded_side(draws, augment, 64)
        area = 0.08 + 0.92 * draws[Draw.AREA]
        for aspect in (1, 2, 4):
            shorter = min(np.sqrt(area * side * side * aspect / r) * min(1, r) for r in augment.ratio)
            assert shorter >= 63.9


def test_scaled_decoding_gives_nearly_the_same_crop():
    data, draws = picture(7, (1200, 900), "JPEG"), draws_of(1)[0].tolist()
    small, full = decode_array(data, min_decoded_side(draws, AugmentConfig(), 64)), decode_array(data)
    assert small.shape[0] < full.shape[0]
    crops = [random_resized_crop(pixels, draws, AugmentConfig(), 64).float() for pixels in (small, full)]
    assert (crops[0] - crops[1]).abs().mean() < 2


def colour_batch(**probabilities) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A random batch before and after, and its draws."""
    before = np.random.default_rng(0).integers(0, 256, (400, 3, 4, 4), dtype=np.uint8)
    after, draws = before.copy(), draws_of(400)
    augment_batch(after, draws, AugmentConfig(**probabilities))
    return before, after, draws


def test_no_probability_changes_nothing():
    before, after, _ = colour_batch()
    np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("flip", lambda x: x[:, :, :, ::-1]),
        ("invert", lambda x: 255 - x),
        ("grey", lambda x: np.repeat((x * [[[[0.299]], [[0.587]], [[0.114]]]]).sum(1, keepdims=True), 3, axis=1)),
    ],
)
def test_flip_invert_and_grey_hit_their_share_of_samples(setting, expected):
    before, after, _ = colour_batch(**{setting: 0.3})
    hit = (before != after).any(axis=(1, 2, 3))
    assert 0.22 < hit.mean() < 0.38  # 3.5 standard errors
    assert np.abs(after[hit] - expected(before[hit].astype(float))).max() <= 1


def test_rotation_turns_about_the_centre_within_its_range():
    gradient = np.broadcast_to(np.arange(64, dtype=np.uint8) * 4, (200, 3, 64, 64)).copy()
    turned, draws = gradient.copy(), draws_of(200)
    augment_batch(turned, draws, AugmentConfig(rotate=30))
    angles = 30 * (2 * draws[:, Draw.ANGLE] - 1)
    assert angles.min() < -25
    assert angles.max() > 25
    middle = turned[:, 0, 16:48, 16:48].astype(float)
    slope_down, slope_right = np.diff(middle, axis=1).mean((1, 2)), np.diff(middle, axis=2).mean((1, 2))
    np.testing.assert_allclose(np.rad2deg(np.arctan2(-slope_down, slope_right)), angles, atol=0.5)
    np.testing.assert_allclose(middle[:, 15:17, 15:17].mean((1, 2)), 126, atol=1)


def test_recolour_permutes_and_darkens_whole_channels():
    before, after, _ = colour_batch(recolour=1.0)
    orders = set()
    for x, y in zip(before.astype(float), after.astype(float), strict=True):
        order = [int(np.argmax([np.corrcoef(x[c].ravel(), y[d].ravel())[0, 1] for c in range(3)])) for d in range(3)]
        orders.add(tuple(order))
        for d, c in enumerate(order):
            factor = y[d].sum() / x[c].sum()
            assert 0.38 < factor <= 1
            assert np.abs(y[d] - factor * x[c]).max() < 1.5
    assert len(orders) == 6


def test_colours_depend_on_the_sample_alone_and_not_on_its_batch():
    settings = {"flip": 0.5, "grey": 0.3, "invert": 0.5, "recolour": 0.7}
    before, after, draws = colour_batch(**settings)
    part = before[100:107].copy()
    augment_batch(part, draws[100:107], AugmentConfig(**settings))
    np.testing.assert_array_equal(part, after[100:107])
