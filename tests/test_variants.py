"""Parameter counts of every variant, to the unit: against counted numbers and against closed formulas."""

from dataclasses import replace

import pytest
import torch

from focalclip.errors import UserError
from focalclip.models.focal_modulation import FocalModulation
from focalclip.models.focalnet import FocalNet, FocalNetConfig
from focalclip.models.variants import FOCALNETS, create_focalnet

# Instantiated from the authors' code: parameters with a 1000-way head, and without a head.
COUNTS = {
    "focalnet_tiny_srf": (28_427_116, 27_658_116),
    "focalnet_tiny_lrf": (28_647_928, 27_878_928),
    "focalnet_small_srf": (49_891_216, 49_122_216),
    "focalnet_small_lrf": (50_342_440, 49_573_440),
    "focalnet_base_srf": (88_148_144, 87_123_144),
    "focalnet_base_lrf": (88_749_768, 87_724_768),
    "focalnet_large_fl3": (207_100_744, 205_563_744),
    "focalnet_large_fl4": (207_281_248, 205_744_248),
    "focalnet_xlarge_fl3": (366_082_120, 364_033_120),
    "focalnet_xlarge_fl4": (366_322_784, 364_273_784),
    "focalnet_huge_fl3": (686_564_424, 683_747_424),
    "focalnet_huge_fl4": (689_277_664, 686_460_664),
}
# The same with options (1000-way head): overlapping patches, and the deeper and thinner nets of the paper's Table 3.
OPTION_COUNTS = [
    ("focalnet_tiny_srf", {"use_overlap": True}, 30_371_980),
    ("focalnet_tiny_lrf", {"use_overlap": True}, 30_592_792),
    ("focalnet_small_srf", {"use_overlap": True}, 51_836_080),
    ("focalnet_small_lrf", {"use_overlap": True}, 52_287_304),
    ("focalnet_base_srf", {"use_overlap": True}, 91_601_456),
    ("focalnet_base_lrf", {"use_overlap": True}, 92_203_080),
    ("focalnet_tiny_srf", {"embed_dim": 64, "depths": (3, 3, 16, 3)}, 24_275_955),
    ("focalnet_tiny_srf", {"embed_dim": 64, "depths": (3, 3, 16, 3), "use_overlap": True}, 25_142_451),
    ("focalnet_tiny_srf", {"embed_dim": 64, "depths": (4, 4, 28, 4), "use_overlap": True}, 38_159_968),
    ("focalnet_tiny_lrf", {"embed_dim": 96, "depths": (4, 4, 28, 4), "use_overlap": True}, 85_838_984),
    ("focalnet_tiny_lrf", {"focal_levels": 0}, 28_270_000),  # paper's Table 14: 28.27 M
    ("focalnet_large_fl3", {"num_classes": 21_842}, 239_134_898),
    ("focalnet_huge_fl4", {"num_classes": 21_842}, 747_989_578),
]


def count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def count_on_meta(name: str, **overrides) -> int:
    with torch.device("meta"):
        return count(create_focalnet(name, **overrides))


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts_equal_the_published_models(name):
    assert (count_on_meta(name, num_classes=1000), count_on_meta(name)) == COUNTS[name]


@pytest.mark.parametrize(("name", "options", "expected"), OPTION_COUNTS)
def test_parameter_counts_with_options(name, options, expected):
    tolerance = 5_000 if options.get("focal_levels") == 0 else 0  # the only number known to four digits alone
    assert abs(count_on_meta(name, **{"num_classes": 1000} | options) - expected) <= tolerance


@pytest.mark.parametrize(
    ("dim", "levels", "window", "expected"),
    [
        (96, 2, 3, 40_803), (96, 3, 3, 45_604), (128, 3, 3, 77_188),
        (192, 3, 5, 178_756), (352, 4, 3, 556_517), (768, 3, 3, 2_429_188),
    ],
)  # fmt: skip
def test_modulation_counts(dim, levels, window, expected):
    module = FocalModulation(dim, num_levels=levels, window=window)
    assert count(module) == expected


def closed_form(c: FocalNetConfig) -> int:
    """Sum of the weights written out by layer, for an MLP ratio of 4."""
    kernel_size = {4: 7, 2: 3}[c.patch_size] if c.use_overlap else c.patch_size
    total = 3 * kernel_size**2 * c.embed_dim + 3 * c.embed_dim
    for stage, depth in enumerate(c.depths):
        dim, levels = c.embed_dim * 2**stage, c.focal_levels
        squares = sum((c.focal_windows + 2 * level) ** 2 for level in range(levels))
        block = 12 * dim**2 + dim * (levels + 1) + dim * squares + 13 * dim + levels + 1
        block += 2 * dim * (c.layer_scale is not None) + 2 * dim * c.use_post_norm_in_modulation
        total += depth * block
        if stage > 0:
            half = dim // 2
            total += (18 if c.use_overlap else 8) * half**2 + 6 * half
    return total + 2 * dim + (dim * c.num_classes + c.num_classes)


@pytest.mark.parametrize("name", FOCALNETS)
def test_parameter_counts_equal_the_closed_form(name):
    variant = FOCALNETS[name]
    changed = replace(variant, use_overlap=variant.patch_size in (2, 4), num_classes=7, layer_scale=0.1)
    for config in (variant, changed):
        with torch.device("meta"):
            assert count(FocalNet(config)) == closed_form(config)


@pytest.mark.parametrize("name", ["focalnet_pico", "focalnet_nano"])
def test_small_nets_are_small_and_take_small_images(name):
    tower = create_focalnet(name).eval()
    assert 2e6 <= count(tower) <= 6e6
    for size in (48, 64, 96):
        with torch.no_grad():
            maps = tower.feature_maps(torch.randn(1, 3, size, size))
        assert min(maps[-1].shape[2:]) >= 2


def test_unknown_names_and_options_are_refused():
    with pytest.raises(UserError, match=r"focalnet_tiny_xrf is not a FocalNet variant.*focalnet_tiny_srf"):
        create_focalnet("focalnet_tiny_xrf")
    with pytest.raises(UserError, match=r"droppath is not an option.*drop_path"):
        create_focalnet("focalnet_nano", droppath=0.1)
