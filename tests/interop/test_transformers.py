"""Features equal transformers' FocalNet for the same random weights."""

import pytest
import torch
from random_weights import FLAG_COMBINATIONS, randomise

from focalclip.base.errors import UserError
from focalclip.models.focalnet import FocalNet, FocalNetConfig
from focalclip.models.weights import state_dict_from_transformers, to_transformers

transformers = pytest.importorskip("transformers")

MAX_DIFFERENCE = 1e-5  # float32; features are of order 1
MINI = {"embed_dim": 16, "depths": (1, 2, 1, 1)}
CONFIGS = {
    "srf": FocalNetConfig(**MINI),
    "lrf-overlap": FocalNetConfig(**MINI, focal_levels=3, use_overlap=True),
    "post-norm": FocalNetConfig(**MINI, use_post_norm=True, layer_scale=0.1, focal_windows=5, use_overlap=True),
    "everything": FocalNetConfig(
        **MINI, use_post_norm=True, use_post_norm_in_modulation=True, normalize_modulator=True, layer_scale=0.1,
        focal_levels=4,
    ),
}  # fmt: skip


def theirs_like(config: FocalNetConfig, kind: str = "FocalNetModel") -> torch.nn.Module:
    """A randomised model of transformers, norms, biases and scales included."""
    hf_config = transformers.FocalNetConfig(
        image_size=64,
        patch_size=config.patch_size,
        embed_dim=config.embed_dim,
        depths=list(config.depths),
        focal_levels=list(config.stage_levels),
        focal_windows=list(config.stage_windows),
        use_conv_embed=config.use_overlap,
        use_post_layernorm=config.use_post_norm,
        use_post_layernorm_in_modulation=config.use_post_norm_in_modulation,
        normalize_modulator=config.normalize_modulator,
        use_layerscale=config.layer_scale is not None,
        num_labels=config.num_classes or 2,
    )
    return randomise(getattr(transformers, kind)(hf_config))


@pytest.mark.parametrize("size", [(64, 64), (96, 160)])
@pytest.mark.parametrize("name", CONFIGS)
def test_features_match(name, size):
    config = CONFIGS[name]
    theirs, ours = theirs_like(config), FocalNet(config).eval()
    ours.load_state_dict(state_dict_from_transformers(theirs.state_dict(), post_norm=config.use_post_norm))
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        expected = theirs(images)
        tokens = ours.forward_features(images).flatten(2).transpose(1, 2)
        assert expected.pooler_output.abs().max() > 0.1
        assert (tokens - expected.last_hidden_state).abs().max() <= MAX_DIFFERENCE
        assert (ours(images) - expected.pooler_output.flatten(1)).abs().max() <= MAX_DIFFERENCE


SMALL = {"embed_dim": 16, "depths": (1, 2), "focal_levels": (3, 1), "focal_windows": (5, 3)}
ISOTROPIC = {"embed_dim": 16, "depths": (2,), "focal_levels": 3, "patch_size": 16}


NETS = {name: FocalNetConfig(**SMALL, **flags) for name, flags in FLAG_COMBINATIONS.items()} | {
    f"isotropic-{name}": FocalNetConfig(**ISOTROPIC, **flags)
    for name, flags in FLAG_COMBINATIONS.items()
    if "use_overlap" not in flags  # overlapping stems have stride 4
}


@pytest.mark.parametrize("config", NETS.values(), ids=NETS)
def test_every_combination_of_flags(config):
    theirs, ours = theirs_like(config), FocalNet(config).eval()
    ours.load_state_dict(state_dict_from_transformers(theirs.state_dict(), post_norm=config.use_post_norm))
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        expected = theirs(images).pooler_output.flatten(1)
        assert expected.abs().max() > 0.1
        assert (ours(images) - expected).abs().max() <= MAX_DIFFERENCE
    returned = to_transformers(ours.state_dict())
    assert returned.keys() == theirs.state_dict().keys()
    assert all(torch.equal(returned[name], x) for name, x in theirs.state_dict().items())


def test_logits_match_and_the_weights_travel_back():
    config = FocalNetConfig(**MINI, use_post_norm=True, num_classes=5)
    theirs, ours = theirs_like(config, "FocalNetForImageClassification"), FocalNet(config).eval()
    ours.load_state_dict(state_dict_from_transformers(theirs.state_dict(), post_norm=True))
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert (ours(images) - theirs(images).logits).abs().max() <= MAX_DIFFERENCE
    returned = to_transformers(ours.state_dict())
    expected = theirs.state_dict()
    assert returned.keys() == expected.keys()
    assert all(torch.equal(returned[key], x) for key, x in expected.items())


@pytest.mark.parametrize("name", CONFIGS)
def test_towers_become_their_models(name):
    config = CONFIGS[name]
    ours, theirs = FocalNet(config).eval(), theirs_like(config)
    theirs.load_state_dict(to_transformers(ours.state_dict()))
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert (ours(images) - theirs(images).pooler_output.flatten(1)).abs().max() <= MAX_DIFFERENCE


def test_other_models_are_refused_by_name():
    theirs = theirs_like(CONFIGS["srf"], "FocalNetForMaskedImageModeling")
    with pytest.raises(UserError, match=r"no part of a FocalNet: decoder\.0\.bias"):
        state_dict_from_transformers(theirs.state_dict())
