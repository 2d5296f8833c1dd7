"""Features equal timm's ``focalnet`` for the same random weights, at square and odd sizes."""

from dataclasses import replace

import pytest
import torch
from random_weights import FLAG_COMBINATIONS, randomise

from focalclip.interop.timm import tower_class
from focalclip.models.focalnet import FocalNet, FocalNetConfig
from focalclip.models.focalnet.variants import FOCALNETS, create_focalnet
from focalclip.models.weights import state_dict_from_timm, to_timm

timm = pytest.importorskip("timm")

MAX_DIFFERENCE = 1e-5  # float32; features are of order 1
MINI = {"embed_dim": 32, "depths": (1, 2, 1, 1), "layer_scale": 0.3, "use_overlap": True}
POST_NORM = FocalNetConfig(**MINI, use_post_norm=True, focal_levels=3, focal_windows=5)
EVERYTHING = FocalNetConfig(
    **MINI, use_post_norm=True, use_post_norm_in_modulation=True, normalize_modulator=True, focal_levels=(4, 3, 2, 0)
)
PRE_NORM = FocalNetConfig(**MINI, use_post_norm_in_modulation=True, focal_windows=(5, 5, 3, 3))


def timm_focalnet(config: FocalNetConfig, build=timm.models.focalnet.FocalNet) -> torch.nn.Module:
    return build(
        num_classes=config.num_classes,
        embed_dim=config.embed_dim,
        depths=config.depths,
        focal_levels=config.stage_levels,
        focal_windows=config.stage_windows,
        use_overlap_down=config.use_overlap,
        use_post_norm=config.use_post_norm,
        use_post_norm_in_modulation=config.use_post_norm_in_modulation,
        normalize_modulator=config.normalize_modulator,
        layerscale_value=config.layer_scale,
    )


def assert_same_features(ours: FocalNet, theirs: torch.nn.Module, size: tuple[int, int]) -> None:
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, expected_maps = theirs.forward_intermediates(images)
        pooled, maps = theirs(images), ours.feature_maps(images)
        assert pooled.abs().max() > 0.1
        assert (ours(images) - pooled).abs().max() <= MAX_DIFFERENCE
        assert (ours.forward_features(images) - expected).abs().max() <= MAX_DIFFERENCE
        for ours_map, theirs_map in zip(maps, expected_maps, strict=True):
            # before the final norm, values grow with depth: the same bound, relative to the largest of them
            assert (ours_map - theirs_map).abs().max() <= MAX_DIFFERENCE * max(1, theirs_map.abs().max())


@pytest.mark.parametrize("name", ["focalnet_tiny_srf", "focalnet_tiny_lrf", "focalnet_base_lrf"])
def test_published_variants(name):
    theirs = randomise(timm.create_model(name, num_classes=0))
    with torch.device("meta"):
        ours = create_focalnet(name)
    ours.load_state_dict(state_dict_from_timm(theirs.state_dict()), assign=True)
    assert_same_features(ours.eval(), theirs, (97, 75))


@pytest.mark.parametrize("size", [(64, 64), (111, 83)])
@pytest.mark.parametrize("config", [POST_NORM, EVERYTHING, PRE_NORM], ids=["post-norm", "everything", "pre-norm"])
def test_options_of_the_block(config, size):
    theirs = randomise(timm_focalnet(config))
    ours = FocalNet(config).eval()
    ours.load_state_dict(state_dict_from_timm(theirs.state_dict()))
    assert_same_features(ours, theirs, size)


OTHER_TOWERS = {
    "patch 2": FocalNetConfig(embed_dim=16, depths=(1, 1), patch_size=2, use_overlap=True),
    "patch 16": FocalNetConfig(embed_dim=16, depths=(1, 1), patch_size=16),
    "unicl": replace(FOCALNETS["focalnet_base_unicl"], embed_dim=16, depths=(1, 2), layer_scale=0.3),
}


@pytest.mark.parametrize("config", OTHER_TOWERS.values(), ids=OTHER_TOWERS)
def test_towers_that_timm_cannot_express(config):
    """What open_clip builds by name after ``import focalclip``."""
    theirs = randomise(timm_focalnet(config, tower_class(config)))
    ours = FocalNet(config).eval()
    ours.load_state_dict(state_dict_from_timm(theirs.state_dict()))
    assert {name: x.shape for name, x in to_timm(ours.state_dict()).items()} == {
        name: x.shape for name, x in theirs.state_dict().items()
    }
    assert_same_features(ours, theirs, (64, 96))
    assert [info["reduction"] for info in theirs.feature_info] == ours.strides


@pytest.mark.parametrize("flags", FLAG_COMBINATIONS.values(), ids=FLAG_COMBINATIONS)
def test_every_combination_of_flags(flags):
    config = FocalNetConfig(embed_dim=16, depths=(1, 2), focal_levels=(3, 1), focal_windows=(5, 3), **flags)
    theirs = randomise(timm_focalnet(config))
    ours = FocalNet(config).eval()
    ours.load_state_dict(state_dict_from_timm(theirs.state_dict()))
    assert_same_features(ours, theirs, (50, 41))
    returned = to_timm(ours.state_dict())
    assert returned.keys() == theirs.state_dict().keys()
    assert all(torch.equal(returned[name], x) for name, x in theirs.state_dict().items())


def test_logits_with_a_head():
    config = FocalNetConfig(embed_dim=16, depths=(1, 1), num_classes=11)
    theirs = randomise(timm_focalnet(config))
    ours = FocalNet(config).eval()
    ours.load_state_dict(state_dict_from_timm(theirs.state_dict()))
    images = torch.randn(2, 3, 32, 32)
    assert (ours(images) - theirs(images)).abs().max() <= MAX_DIFFERENCE


def test_weights_travel_back():
    ours = randomise(FocalNet(EVERYTHING))
    theirs = timm_focalnet(EVERYTHING).eval()
    theirs.load_state_dict(to_timm(ours.state_dict()))
    assert_same_features(ours, theirs, (64, 64))
    returned = state_dict_from_timm(theirs.state_dict())
    assert all(torch.equal(returned[name], x) for name, x in ours.state_dict().items())


@pytest.mark.parametrize("name", [name for name in FOCALNETS if timm.is_model(name)])
def test_every_variant_that_timm_knows_has_its_shapes(name):
    with torch.device("meta"):
        theirs, ours = timm.create_model(name, num_classes=0), create_focalnet(name)
    expected = {key: x.shape for key, x in theirs.state_dict().items()}
    assert {key: x.shape for key, x in to_timm(ours.state_dict()).items()} == expected
