"""What the paper claims of focal modulation (arXiv:2203.11926, sections 3 and 4), measured."""

import pytest
import torch
from torch import nn

from focalclip.models.cost import count, count_multiply_adds
from focalclip.models.focalnet import FocalNet, FocalNetConfig
from focalclip.models.focalnet.mixers import MixerSpec, build_mixer
from focalclip.models.focalnet.modulation import FocalModulation

# (C, L, first kernel, parameters): counted with the authors' code
MODULES = [
    (96, 2, 3, 40_803), (96, 3, 3, 45_604), (128, 3, 3, 77_188),
    (192, 3, 5, 178_756), (352, 4, 3, 556_517), (768, 3, 3, 2_429_188),
]  # fmt: skip
# (L, first kernel, receptive field): SRF, LRF, the 4-level nets, and large_fl3
FIELDS = [(2, 3, 7), (3, 3, 13), (4, 3, 21), (3, 5, 19)]


@pytest.mark.parametrize(("dim", "levels", "window", "expected"), MODULES)
def test_parameters_are_the_papers_and_the_projection_that_it_leaves_out(dim, levels, window, expected):
    with torch.device("meta"):
        module = FocalModulation(dim, num_levels=levels, window=window)
    parameters = sum(p.numel() for p in module.parameters())
    kernels = dim * sum((window + 2 * level) ** 2 for level in range(levels))
    papers = 3 * dim**2 + dim * (levels + 1) + kernels
    output_projection, biases = dim**2, 4 * dim + levels + 1
    assert parameters == expected == papers + output_projection + biases


@pytest.mark.parametrize(("dim", "levels", "window", "expected"), MODULES)
def test_cost_is_the_papers_and_the_projection_that_it_leaves_out(dim, levels, window, expected):
    with torch.device("meta"):
        module = FocalModulation(dim, num_levels=levels, window=window)
    kernels = dim * sum((window + 2 * level) ** 2 for level in range(levels))
    papers = 3 * dim**2 + dim * (2 * levels + 3) + kernels
    gates_and_modulation = dim * (levels + 2)  # products without weights, which are not counted: L + 1 gates and q
    counted = count_multiply_adds(module, torch.empty(1, 9, 11, dim, device="meta"))
    assert counted == 99 * (papers - gates_and_modulation + dim**2)


def local_modulation(levels: int, window: int) -> FocalModulation:
    """Focal modulation whose global level is switched off by its gate."""
    torch.manual_seed(0)
    module = FocalModulation(4, num_levels=levels, window=window).double()
    with torch.no_grad():
        for focal_layer in module.focal_layers:
            focal_layer[0].weight.abs_()  # nothing cancels
        module.f.weight[-1], module.f.bias[-1] = 0, 0
    return module


@pytest.mark.parametrize(("levels", "window", "expected"), FIELDS)
def test_receptive_field(levels, window, expected):
    module, side = local_modulation(levels, window), 31
    x = torch.randn(1, side, side, 4, dtype=torch.float64, requires_grad=True)
    module(x)[0, side // 2, side // 2].square().sum().backward()
    rows, columns = (x.grad[0].abs().sum(-1) > 0).nonzero(as_tuple=True)
    margin = (side - expected) // 2
    for indices in (rows, columns):
        assert (indices.min(), indices.max()) == (margin, side - 1 - margin)
    assert len(rows) == expected**2


def test_the_global_level_sees_everything():
    module = FocalModulation(4, num_levels=2).double()
    x = torch.randn(1, 31, 31, 4, dtype=torch.float64, requires_grad=True)
    module(x)[0, 15, 15].square().sum().backward()
    assert (x.grad[0].abs().sum(-1) > 0).all()


@pytest.mark.parametrize(("levels", "window", "field"), FIELDS)
def test_equivariance_to_translation_away_from_borders(levels, window, field):
    module, reach = local_modulation(levels, window), field // 2
    x = torch.randn(1, 40, 40, 4, dtype=torch.float64)
    y, moved = module(x), module(x.roll((2, 5), dims=(1, 2)))
    inner = slice(reach, 40 - reach)
    there = moved[:, reach + 2 : 40 - reach, reach + 5 : 40 - reach]
    here = y[:, inner, inner][:, : there.shape[1], : there.shape[2]]
    torch.testing.assert_close(there, here, rtol=0, atol=1e-12)
    assert (moved - y.roll((2, 5), dims=(1, 2))).abs().max() > 1e-4  # at borders zeros come in


def test_equivariance_with_the_global_level():
    """A thing that moves before an even background leaves the mean as it is; borders alone see zeros come in."""
    torch.manual_seed(0)
    module, reach = FocalModulation(4, num_levels=3).double(), 6
    picture = torch.zeros(1, 48, 48, 4, dtype=torch.float64)
    picture[:, 18:26, 16:24] = torch.randn(8, 8, 4, dtype=torch.float64)
    y, moved = module(picture), module(picture.roll((2, 5), dims=(1, 2)))
    inner = slice(reach + 5, -reach)
    torch.testing.assert_close(moved[:, inner, inner], y.roll((2, 5), (1, 2))[:, inner, inner], rtol=0, atol=1e-12)
    gates = module.f(picture)[..., -1]
    assert gates.abs().mean() > 0.01  # the global level takes part


def test_window_attention_is_not_equivariant():
    torch.manual_seed(0)
    mixer = build_mixer("window_attention", MixerSpec(dim=32)).double()
    x = torch.randn(1, 28, 28, 32, dtype=torch.float64)
    moved, y = mixer(x.roll(3, dims=1)), mixer(x).roll(3, dims=1)
    assert (moved - y)[:, 10:18].abs().max() > 0.01
    torch.testing.assert_close(mixer(x.roll(7, dims=1)), mixer(x).roll(7, dims=1))  # but by whole windows


def test_the_modulator_depends_on_the_input():
    """A depthwise convolution is linear in the picture; here gates and q, which weigh the context, follow it too."""
    torch.manual_seed(0)
    module, conv = FocalModulation(8, num_levels=2).double(), nn.Conv2d(8, 8, 7, padding=3, groups=8).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    modulators = []
    module.h.register_forward_hook(lambda *args: modulators.append(args[2]))
    a, b = torch.randn(2, 1, 9, 9, 8, dtype=torch.float64)
    module(a), module(b)
    assert (modulators[0] - modulators[1]).abs().mean() > 0.1

    def curvature(f):
        return (f(a + b) - f(a) - f(b) + f(torch.zeros_like(a))).abs().mean()  # 0 for an affine map

    assert curvature(lambda x: conv(x.permute(0, 3, 1, 2))) < 1e-12
    assert curvature(module) > 0.1


SIZES = [224, 448, 672, 896]  # multiples of 32 * 7: no window has padding


def costs(mixer: str, sizes: list[int]) -> list[int]:
    with torch.device("meta"):
        tower = FocalNet(FocalNetConfig(embed_dim=32, depths=(1, 1, 2, 1), focal_levels=3, mixer=mixer))
    return [count(tower, size).multiply_adds for size in sizes]


@pytest.mark.parametrize("mixer", ["focal_modulation", "window_attention"])
def test_cost_is_linear_in_pixels(mixer):
    per_pixel = [cost / size**2 for cost, size in zip(costs(mixer, SIZES), SIZES, strict=True)]
    assert per_pixel == pytest.approx([per_pixel[0]] * len(SIZES), rel=1e-12)


@pytest.mark.parametrize(("mixer", "most"), [("focal_modulation", 1e-12), ("window_attention", 0.1)])
def test_cost_stays_linear_up_to_1024(mixer, most):
    """At 1024 pixels windows of 7 need padding; focal modulation needs none at any size."""
    small, large = (cost / size**2 for cost, size in zip(costs(mixer, [224, 1024]), [224, 1024], strict=True))
    assert large == pytest.approx(small, rel=most)


def test_cost_of_global_attention_is_quadratic():
    linear = costs("poolformer", SIZES)  # the same net with a mixer that costs nothing
    attention = [cost - rest for cost, rest in zip(costs("global_attention", SIZES), linear, strict=True)]
    pixels = [size**2 for size in SIZES]
    # through a p + b p^2: two points decide a and b, the others must lie on the curve
    b = (attention[1] / pixels[1] - attention[0] / pixels[0]) / (pixels[1] - pixels[0])
    a = attention[0] / pixels[0] - b * pixels[0]
    assert attention == pytest.approx([a * p + b * p**2 for p in pixels], rel=1e-9)
    assert b * pixels[-1] > 10 * a  # at 896 pixels hardly anything else counts
    assert costs("global_attention", [1024])[0] > 10 * costs("focal_modulation", [1024])[0]
