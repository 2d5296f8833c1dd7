"""The focal modulation against loops, and what the tower promises: shapes, gradients, options, initialisations."""

import pytest
import torch
from naive_modulation import naive_modulation
from torch import nn
from torch.nn import functional as F

from focalclip.base.errors import UserError
from focalclip.models.focalnet import FocalNet, FocalNetConfig
from focalclip.models.focalnet.blocks import DropPath
from focalclip.models.focalnet.depthwise import DepthwiseConv, _is_slow
from focalclip.models.focalnet.modulation import FocalModulation
from focalclip.models.weights import to_timm

timm_focalnet = pytest.importorskip("timm.models.focalnet")

SMALL = {"embed_dim": 8, "depths": (1, 2, 1)}
OPTIONS = [
    {},
    {"layer_scale": 0.1, "focal_levels": 3, "focal_windows": 5},
    {"use_post_norm": True, "use_post_norm_in_modulation": True, "layer_scale": 0.1, "use_overlap": True},
    {"normalize_modulator": True, "focal_levels": (2, 1, 0), "focal_windows": (5, 3, 3)},
]


@pytest.mark.parametrize(
    ("levels", "window", "use_norm", "normalize"), [(2, 3, False, False), (3, 5, True, True), (0, 3, False, True)]
)
def test_modulation_matches_loops(levels, window, use_norm, normalize):
    torch.manual_seed(0)
    module = FocalModulation(3, num_levels=levels, window=window, use_norm=use_norm, normalize=normalize).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, 4, 5, 3, dtype=torch.float64)
    with torch.no_grad():
        divisor, gated = levels + 1 if normalize else 1, list(range(levels + 1))
        expected = torch.stack([naive_modulation(module, sample, gated=gated, divisor=divisor) for sample in x])
        torch.testing.assert_close(module(x), expected)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("size", [(48, 48), (51, 33)])
def test_shapes_and_every_parameter_learns(options, size):
    torch.manual_seed(0)
    tower = FocalNet(FocalNetConfig(**SMALL, **options))
    images = torch.randn(2, 3, *size)
    maps = tower.feature_maps(images)
    assert tower.strides == [4, 8, 16]
    assert [m.shape[1] for m in maps] == tower.feature_dims == [8, 16, 32]
    if not options.get("use_overlap"):
        assert [m.shape[2:] for m in maps] == [(size[0] // s, size[1] // s) for s in tower.strides]
    pooled = tower(images)
    assert pooled.shape == (2, tower.num_features) == (2, 32)
    (pooled * torch.randn_like(pooled)).sum().backward()
    for name, parameter in tower.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
        assert parameter.is_contiguous(), f"{name}: DeepSpeed flattens parameters and needs them contiguous"


@pytest.mark.parametrize(
    ("patch_size", "use_overlap", "kernel", "padding"),
    [(4, False, 4, 0), (4, True, 7, 2), (2, False, 2, 0), (2, True, 3, 1), (16, False, 16, 0), (1, False, 1, 0)],
)
def test_the_stem_follows_the_patch_size(patch_size, use_overlap, kernel, padding):
    tower = FocalNet(FocalNetConfig(**SMALL, patch_size=patch_size, use_overlap=use_overlap))
    conv = tower.stem.proj
    assert (conv.kernel_size[0], conv.stride[0], conv.padding[0]) == (kernel, patch_size, padding)
    assert tower.strides == [patch_size, 2 * patch_size, 4 * patch_size]
    side = 8 * patch_size
    assert [m.shape[2] for m in tower.feature_maps(torch.randn(1, 3, side, side))] == [side // s for s in tower.strides]


def test_memory_layout_of_the_input_does_not_matter():
    tower = FocalNet(FocalNetConfig(**SMALL)).eval()
    images = torch.randn(2, 3, 48, 32)
    channels_last = images.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(tower(images), tower(channels_last))


@pytest.mark.parametrize("options", OPTIONS)
def test_activation_checkpointing_changes_nothing(options):
    results = []
    for activation_checkpointing in (False, True):
        torch.manual_seed(0)
        config = FocalNetConfig(
            **SMALL, **options, drop_path=0.3, dropout=0.1, activation_checkpointing=activation_checkpointing
        )
        tower = FocalNet(config)
        images = torch.randn(4, 3, 48, 48)
        torch.manual_seed(1)  # the masks of stochastic depth are drawn again, the same, when a block is recomputed
        output = tower(images)
        output.square().sum().backward()
        results.append([output.detach(), *(p.grad for p in tower.parameters())])
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


def test_activation_checkpointing_recomputes_blocks():
    tower = FocalNet(FocalNetConfig(**SMALL, activation_checkpointing=True))
    calls = []
    tower.layers[1].blocks[0].modulation.register_forward_pre_hook(lambda *_: calls.append(1))
    tower(torch.randn(1, 3, 48, 48)).sum().backward()
    assert len(calls) == 2


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    torch.manual_seed(0)
    layer, x = DropPath(0.25).train(), torch.rand(20_000, 2, 1, 3) + 0.5
    y = layer(x)
    dropped = (y == 0).flatten(1)
    assert torch.equal(dropped.any(1), dropped.all(1))
    assert abs(dropped.all(1).float().mean() - 0.25) < 0.015  # 5 standard deviations
    kept = ~dropped.all(1)
    torch.testing.assert_close(y[kept], x[kept] / 0.75)
    assert torch.equal(layer.eval()(x), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("kernel_size", "height", "width"), [(3, 2, 2), (3, 1, 2), (5, 4, 4), (5, 1, 3), (9, 4, 2)])
def test_depthwise_convolution_of_tiny_maps_is_the_convolution(kernel_size, height, width, dtype):
    torch.manual_seed(0)
    layer = DepthwiseConv(6, kernel_size).to(dtype)
    assert _is_slow(kernel_size, height, width)
    x = torch.randn(3, 6, height, width, dtype=dtype, requires_grad=True)
    outputs = layer(x), F.conv2d(x, layer.weight, layer.bias, padding=kernel_size // 2, groups=6)
    upstream = torch.randn_like(x)
    ours, theirs = (torch.autograd.grad(output, (x, layer.weight, layer.bias), upstream) for output in outputs)
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-12, torch.bfloat16: 0.1}[dtype]
    for a, b in zip([outputs[0], *ours], [outputs[1], *theirs], strict=True):
        assert a.dtype == dtype
        assert torch.allclose(a, b, rtol=tolerance, atol=tolerance)


def test_a_map_size_first_seen_in_inference_mode_can_be_trained_on():
    layer, x = DepthwiseConv(2, 3), torch.randn(1, 2, 2, 1)
    with torch.inference_mode():
        layer(x)
    layer(x).sum().backward()
    assert layer.weight.grad is not None


def test_drop_path_grows_linearly_and_acts_only_in_training():
    tower = FocalNet(FocalNetConfig(embed_dim=8, depths=(2, 1, 2), drop_path=0.4))
    rates = [block.drop_path1.rate for stage in tower.layers for block in stage.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    images = torch.randn(8, 3, 32, 32)
    assert not torch.equal(tower.train()(images), tower(images))
    assert torch.equal(tower.eval()(images), tower(images))


def test_dropout_acts_only_in_training():
    tower = FocalNet(FocalNetConfig(**SMALL, dropout=0.5))
    images = torch.randn(2, 3, 32, 32)
    assert not torch.equal(tower.train()(images), tower(images))
    assert torch.equal(tower.eval()(images), tower(images))


def test_bf16_autocast_stays_close_to_fp32():
    torch.manual_seed(0)
    tower = FocalNet(FocalNetConfig(**SMALL, init="fan_in"))
    images = torch.randn(4, 3, 48, 48)
    expected = tower(images)
    with torch.autocast("cpu", torch.bfloat16):
        output = tower(images)
    output.float().square().sum().backward()
    assert F.cosine_similarity(output.float(), expected).min() > 0.99
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in tower.parameters())
    assert tower.bfloat16()(images.bfloat16()).dtype == torch.bfloat16


# Of weights of a net with d=96: their fan-in, and how the authors' code, timm's and ours for small data draw them.
# 0.02: normal with this deviation; "uniform": torch's default of a convolution; "normal": deviation 1 / sqrt(fan-in).
INITS = ("official", "timm", "fan_in")
CASES = {
    "layers.0.blocks.0.modulation.f.weight": (96, 0.02, 0.02, "normal"),
    "layers.1.blocks.0.modulation.h.weight": (192, "uniform", 0.02, "normal"),
    "layers.1.blocks.0.modulation.proj.weight": (192, 0.02, 0.02, "normal"),
    "layers.1.blocks.0.mlp.fc2.weight": (768, 0.02, 0.02, "normal"),
    "layers.1.blocks.0.modulation.focal_layers.0.0.weight": (9, "uniform", 0.02, "uniform"),
    "layers.1.downsample.proj.weight": (384, "uniform", 0.02, "uniform"),
    "stem.proj.weight": (48, "uniform", 0.02, "uniform"),
    "head.fc.weight": (192, 0.02, 0.02, "normal"),
}


@pytest.mark.parametrize("init", INITS)
def test_initialisations_follow_the_table(init):
    torch.manual_seed(0)
    with torch.device("meta"):
        tower = FocalNet(FocalNetConfig(embed_dim=96, depths=(1, 1), layer_scale=0.5, num_classes=100))
    tower.to_empty(device="cpu")
    for parameter in tower.parameters():
        parameter.data.fill_(float("nan"))
    tower.init_weights(init)
    parameters = dict(tower.named_parameters())
    for name, (fan_in, *rules) in CASES.items():
        rule, limit = rules[INITS.index(init)], fan_in**-0.5
        std = {"uniform": limit / 3**0.5, "normal": limit}.get(rule, rule)
        weight, bias = parameters[name], parameters.get(name.replace("weight", "bias"))
        assert weight.std().item() == pytest.approx(std, rel=0.06), name
        if rule == "uniform":
            assert weight.abs().max() <= limit, name
        if bias is not None:
            assert (bias.abs().max() > 0) == (rule == "uniform"), name
            assert bias.abs().max() <= limit, name
    assert all((p == 0.5).all() for name, p in parameters.items() if name.endswith("gamma"))
    norms = [module for module in tower.modules() if isinstance(module, nn.LayerNorm)]
    assert all((norm.weight == 1).all() and (norm.bias == 0).all() for norm in norms)
    assert not any(p.isnan().any() for p in parameters.values())


def test_the_initialisation_called_timm_is_timms():
    torch.manual_seed(0)
    theirs = timm_focalnet.FocalNet(embed_dim=96, depths=(1, 1), num_classes=100).state_dict()
    ours = to_timm(FocalNet(FocalNetConfig(embed_dim=96, depths=(1, 1), num_classes=100, init="timm")).state_dict())
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        std = theirs[name].std(correction=0).item()
        assert weight.std(correction=0).item() == pytest.approx(std, rel=0.1 if weight.numel() > 500 else 0.5), name
        assert weight.mean().item() == pytest.approx(theirs[name].mean().item(), abs=0.2 * std), name


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"focal_levels": (2, 2)}, "focal_levels"),
        ({"focal_windows": 4}, "focal_windows"),
        ({"depths": ()}, "depths"),
        ({"patch_size": 16, "use_overlap": True}, "patch_size=16 .* 2 or 4 where use_overlap"),
        ({"patch_size": 0}, "patch_size=0"),
        ({"drop_path": 1.0}, "drop_path"),
        ({"dropout": -0.1}, "dropout"),
        ({"init": "xavier"}, "init"),
    ],
)
def test_impossible_options_are_named(options, field):
    with pytest.raises(UserError, match=field):
        FocalNetConfig(**options)


def test_too_small_images_are_refused():
    tower = FocalNet(FocalNetConfig(**SMALL))
    with pytest.raises(UserError, match=r"15x64 pixels.*16"):
        tower(torch.zeros(1, 3, 15, 64))
    assert tower(torch.zeros(1, 3, 16, 16)).shape == (1, 32)
