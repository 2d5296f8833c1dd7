"""``model.image.options``: what an image tower is built with beside its name."""

import pytest
import torch
from torch import nn

import focalclip
from focalclip.base.errors import UserError
from focalclip.base.strict import dump_yaml, from_dict, load_yaml
from focalclip.config import ModelConfig, RunConfig
from focalclip.interop import folder as store
from focalclip.interop.export import export
from focalclip.models.clip import FocalCLIP
from focalclip.training.resume import check_same_run

SWIN = {
    "name": "timm:swin_tiny_patch4_window7_224",
    "image_size": 32,
    "options": {
        "img_size": 32,
        "patch_size": 2,
        "window_size": 4,
        "embed_dim": 8,
        "depths": [2, 1],
        "num_heads": [1, 2],
    },
}
PICO = {"name": "focalnet_pico", "image_size": 32}
TEXT = {"context_length": 8, "width": 16, "heads": 2, "layers": 1}


def config(**image) -> ModelConfig:
    return from_dict(ModelConfig, {"embed_dim": 16, "image": image, "text": TEXT}, "test")


def test_options_reach_timm_and_focalnet():
    swin = FocalCLIP(config(**SWIN)).visual.trunk
    assert swin.feature_dims == [8, 16]
    assert swin.strides == [2, 4]
    focalnet = FocalCLIP(config(**PICO, options={"depths": [1, 2], "embed_dim": 8})).visual.trunk
    assert [len(stage.blocks) for stage in focalnet.layers] == [1, 2]
    assert focalnet.feature_dims == [8, 16]


def test_options_survive_yaml_and_are_compared_on_resume(tmp_path):
    run = RunConfig(model=config(**SWIN))
    path = tmp_path / "config.yaml"
    path.write_text(dump_yaml(run))
    assert load_yaml(RunConfig, path) == run
    check_same_run(load_yaml(RunConfig, path), run)
    for changed in ({"img_size": 32}, SWIN["options"] | {"embed_dim": 16}, SWIN["options"] | {"mlp_ratio": 2.0}):
        other = RunConfig(model=config(**SWIN | {"options": changed}))
        with pytest.raises(UserError, match=r"another model\.image\.options"):
            check_same_run(run, other)


@pytest.mark.parametrize("image", [SWIN, PICO | {"mixer": "window_attention"}, PICO | {"mixer": "additive"}])
def test_an_export_is_read_back_and_does_not_pretend_that_open_clip_could(image, tmp_path):
    model = FocalCLIP(config(**image)).eval()
    store.save(model, tmp_path / "model")
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [store.OURS, store.WEIGHTS]
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(focalclip.load(tmp_path / "model").encode_image(images), model.encode_image(images))
    why = {"open_clip": "a tower with options, another mixer, or one .*; use onnx", "timm": ".* as this model has it"}
    for kind, reason in why.items():
        with pytest.raises(UserError, match=f"{kind} cannot build {reason}"):
            export(tmp_path / "model", tmp_path / kind, kind)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (
            SWIN | {"options": {"img_siez": 32}},
            r"options: timm:swin.* refuses .* unexpected keyword argument 'img_siez'",
        ),
        (SWIN | {"options": {"depths": "many"}}, r"options: timm:swin.* refuses \{'depths': 'many'\}"),
        ({"name": "timm:poolformer_s12", "options": {"depths": [1, 1]}}, r"refuses .* multiple values .* 'depths'"),
        (PICO | {"options": {"dephts": [1]}}, "dephts is not an option of a FocalNet"),
        (PICO | {"options": {"depths": "many"}}, "focalnet_pico: cannot be built with .*'many'"),
        (PICO | {"options": {"mixer": "additive", "in_chans": 1}}, "options: in_chans, mixer cannot be set here"),
    ],
)
def test_options_that_do_not_suit_get_one_sentence(image, message):
    with pytest.raises(UserError, match=message):
        FocalCLIP(config(**image))


def test_fan_in_scales_the_maps_of_a_timm_tower_and_nothing_else():
    torch.manual_seed(0)
    usual = FocalCLIP(config(**SWIN)).visual.trunk
    scaled = FocalCLIP(config(**SWIN, init="fan_in")).visual.trunk
    maps = {name for name, module in usual.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    for name, module in scaled.named_modules():
        if name in maps:
            gain = 1 if isinstance(module, nn.Linear) else 3**-0.5  # uniform within 1 / sqrt(fan-in)
            expected = gain * module.weight[0].numel() ** -0.5
            assert module.weight.std().item() == pytest.approx(expected, rel=0.2), name
    rest = [name for name, _ in usual.named_parameters() if name.rpartition(".")[0] not in maps]
    assert any("relative_position_bias_table" in name for name in rest)
    for name in rest:
        before, after = usual.get_parameter(name), scaled.get_parameter(name)
        assert after.std(correction=0).item() == pytest.approx(before.std(correction=0).item(), rel=0.3, abs=1e-6), name
