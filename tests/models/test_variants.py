"""Every variant: parameters to the unit, multiply-adds, strides and widths, against published and counted numbers."""

import fnmatch
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import focalclip
from focalclip.base.errors import UserError
from focalclip.models.cost import HEADER, Cost, count, row
from focalclip.models.focalnet import FocalNet, FocalNetConfig
from focalclip.models.focalnet.modulation import FocalModulation
from focalclip.models.focalnet.variants import FOCALNETS, VARIANTS, create_focalnet

DOCUMENT = (Path(__file__).parents[2] / "docs/models.md").read_text()
STRIDES = [4, 8, 16, 32]


class Row(NamedTuple):
    """One row of the table of the family."""

    parameters: int
    """With a head of 1000 classes, instantiated from the authors' code."""
    giga_multiply_adds: float
    """Convolutions and matrix products of that net at 224 pixels, counted with the authors' code."""
    width: int
    """Of the first stage."""
    strides: list[int] = STRIDES


TABLE = {
    "focalnet_tiny_srf": Row(28_427_116, 4.40, 96),
    "focalnet_tiny_lrf": Row(28_647_928, 4.47, 96),
    "focalnet_small_srf": Row(49_891_216, 8.60, 96),
    "focalnet_small_lrf": Row(50_342_440, 8.72, 96),
    "focalnet_base_srf": Row(88_148_144, 15.24, 128),
    "focalnet_base_lrf": Row(88_749_768, 15.40, 128),
    "focalnet_tiny_srf_overlap": Row(30_371_980, 4.65, 96),
    "focalnet_tiny_lrf_overlap": Row(30_592_792, 4.72, 96),
    "focalnet_small_srf_overlap": Row(51_836_080, 8.85, 96),
    "focalnet_small_lrf_overlap": Row(52_287_304, 8.96, 96),
    "focalnet_base_srf_overlap": Row(91_601_456, 15.67, 128),
    "focalnet_base_lrf_overlap": Row(92_203_080, 15.82, 128),
    "focalnet_tiny_deep": Row(25_142_451, 4.12, 64),
    "focalnet_small_deep": Row(38_159_968, 6.47, 64),
    "focalnet_base_deep": Row(85_090_144, 14.46, 96),
    # The authors' own counter gives 1.112, 4.305 and 16.934: it adds gates, modulation and norms, taken off here.
    "focalnet_tiny_iso": Row(5_880_280, 1.109, 192, [16]),
    "focalnet_small_iso": Row(22_376_344, 4.299, 384, [16]),
    "focalnet_base_iso": Row(87_255_832, 16.921, 768, [16]),
    "focalnet_large_fl3": Row(207_100_744, 35.69, 192),
    "focalnet_large_fl4": Row(207_281_248, 35.73, 192),
    "focalnet_xlarge_fl3": Row(366_082_120, 63.07, 256),
    "focalnet_xlarge_fl4": Row(366_322_784, 63.14, 256),
    "focalnet_huge_fl3": Row(686_564_424, 118.1, 352),
    "focalnet_huge_fl4": Row(689_277_664, 118.8, 352),
    # 91,442,784 without a head; no count of its multiply-adds is published: this one is ours.
    "focalnet_base_unicl": Row(91_442_784 + 1024 * 1000 + 1000, 15.88, 128),
}


@pytest.mark.parametrize("name", TABLE)
def test_the_table_of_the_family(name):
    expected = TABLE[name]
    tower, cost = assert_documented(name)
    head = tower.num_features * 1000
    assert cost.parameters + head + 1000 == expected.parameters
    digits = len(str(expected.giga_multiply_adds).split(".")[1])
    giga = (cost.multiply_adds + head) / 1e9
    assert giga == pytest.approx(expected.giga_multiply_adds, abs=0.51 * 10**-digits)
    assert tower.strides == expected.strides
    assert tower.feature_dims == [expected.width * 2**i for i in range(len(expected.strides))]
    with torch.device("meta"):
        maps = tower.feature_maps(torch.empty(1, 3, 224, 224))
    assert [tuple(x.shape[1:]) for x in maps] == [
        (dim, 224 // stride, 224 // stride) for dim, stride in zip(tower.feature_dims, expected.strides, strict=True)
    ]
    assert tower.num_features == tower.feature_dims[-1]


OURS = ["focalnet_pico", "focalnet_nano"]


@pytest.mark.parametrize("name", OURS)
def test_our_own_nets_are_documented(name):
    assert_documented(name)


def assert_documented(name: str) -> tuple[FocalNet, Cost]:
    """The row of docs/models.md is what the counter says."""
    with torch.device("meta"):
        tower = create_focalnet(name)
    cost = count(tower, 224)
    assert f"\n{row(name, tower, cost)}\n" in DOCUMENT
    return tower, cost


def test_the_table_is_complete_and_listed():
    assert set(focalclip.list_models("focalnet*")) == {*TABLE, *OURS} == VARIANTS.keys() == FOCALNETS.keys()
    assert DOCUMENT.count("\n| `focalnet_") == len(VARIANTS)
    assert HEADER in DOCUMENT
    assert fnmatch.filter(focalclip.list_models(), "*_iso") == [
        "focalnet_tiny_iso",
        "focalnet_small_iso",
        "focalnet_base_iso",
    ]


# Numbers known beyond the variants: (variant, options, parameters with a head of 1000 classes).
OPTION_COUNTS = [
    ("focalnet_tiny_deep", {"use_overlap": False}, 24_275_955),
    ("focalnet_small_deep", {"use_overlap": False}, 37_293_472),
    ("focalnet_base_deep", {"use_overlap": False}, 83_145_280),
    ("focalnet_tiny_deep", {"focal_levels": 3}, 25_452_876),
    ("focalnet_small_deep", {"focal_levels": 3}, 38_659_208),
    ("focalnet_base_deep", {"focal_levels": 3}, 85_838_984),
    ("focalnet_base_iso", {"use_post_norm_in_modulation": False}, 87_237_400),
    ("focalnet_base_iso", {"use_post_norm_in_modulation": False, "layer_scale": None}, 87_218_968),
    ("focalnet_large_fl3", {"num_classes": 21_842}, 239_134_898),
    ("focalnet_huge_fl4", {"num_classes": 21_842}, 747_989_578),
    ("focalnet_huge_fl4", {"num_classes": 0}, 686_460_664),
]


@pytest.mark.parametrize(("name", "options", "expected"), OPTION_COUNTS)
def test_parameter_counts_with_options(name, options, expected):
    assert count_on_meta(name, **{"num_classes": 1000} | options) == expected


# The paper's ablations of FocalNet-T, parameters in M: table 14 as counted, table 12 as printed.
ABLATIONS = [
    ({"focal_levels": 2}, 28.43),
    ({"focal_levels": 0}, 28.27),
    ({"mixer": "squeeze_excitation"}, 28.27),
    ({"focal_levels": 1}, 28.31),
    ({"focal_levels": 4}, 29.01),
    ({"mixer": "single_level"}, 29.02),
    ({"mixer": "pooling"}, 28.3),
    ({"mixer": "additive"}, 28.6),
    ({"mixer": "no_global"}, 28.6),
    ({"mixer": "last_level"}, 28.6),
    ({"mixer": "no_gates"}, 28.6),
]


@pytest.mark.parametrize(("options", "expected"), ABLATIONS)
def test_ablations_have_the_papers_sizes(options, expected):
    digits = len(str(expected).split(".")[1])
    millions = count_on_meta("focalnet_tiny_lrf", num_classes=1000, **options) / 1e6
    assert millions == pytest.approx(expected, abs=0.51 * 10**-digits)


def count_parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def count_on_meta(name: str, **overrides) -> int:
    with torch.device("meta"):
        return count_parameters(create_focalnet(name, **overrides))


def closed_form(c: FocalNetConfig) -> int:
    """Sum of the weights written out by layer, for an MLP ratio of 4."""
    kernel_size = {4: 7, 2: 3}[c.patch_size] if c.use_overlap else c.patch_size
    total = 3 * kernel_size**2 * c.embed_dim + 3 * c.embed_dim
    for stage, depth in enumerate(c.depths):
        dim, levels = c.embed_dim * 2**stage, c.focal_levels
        squares = sum((c.focal_windows + 2 * level) ** 2 for level in range(levels))
        block = 12 * dim**2 + dim * (levels + 1) + dim * squares + 13 * dim + levels + 1
        block += 2 * dim * (c.layer_scale is not None) + 2 * dim * c.use_post_norm_in_modulation
        block += 2 * (9 * dim + dim) * (c.block == "unicl")
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
            assert count_parameters(FocalNet(config)) == closed_form(config)


@pytest.mark.parametrize("name", ["focalnet_pico", "focalnet_nano"])
def test_small_nets_are_small_and_take_small_images(name):
    tower = create_focalnet(name).eval()
    assert 2e6 <= count_parameters(tower) <= 6e6
    for size in (48, 64, 96):
        with torch.no_grad():
            maps = tower.feature_maps(torch.randn(1, 3, size, size))
        assert min(maps[-1].shape[2:]) >= 2


def test_every_variant_tells_its_source():
    assert all(variant.source and variant.weights for variant in VARIANTS.values())
    assert isinstance(create_focalnet("focalnet_pico").layers[0].blocks[0].modulation, FocalModulation)


def test_unknown_names_and_options_are_refused():
    with pytest.raises(UserError, match=r"focalnet_tiny_xrf is not a FocalNet variant.*focalnet_tiny_srf"):
        create_focalnet("focalnet_tiny_xrf")
    with pytest.raises(UserError, match=r"droppath is not an option.*drop_path"):
        create_focalnet("focalnet_nano", droppath=0.1)
