"""Every mixer: its formulas, its shape, and what makes it the mixer that its name says."""

import math

import pytest
import torch
from naive_modulation import naive_modulation
from torch import nn

from focalclip.base.errors import UserError
from focalclip.models.cost import count_multiply_adds
from focalclip.models.focalnet import FocalNet, FocalNetConfig
from focalclip.models.focalnet.mixers import FOCAL, MIXERS, NEED_LEVELS, MixerSpec, build_mixer

SPECS = [
    (MixerSpec(dim=48, num_levels=2), (8, 8)),
    (MixerSpec(dim=64, num_levels=3, window=5, block=1), (14, 21)),
    (MixerSpec(dim=100, num_levels=1, block=1, use_norm=True, normalize=True), (5, 16)),
    (MixerSpec(dim=24, num_levels=0), (7, 3)),
]


def focal(num_gates, kernels):
    """Formulas of the operator: 4 C^2 + C gates + C sum(k^2) weights, 4 C + gates biases, 2 C of the norm."""

    def formulas(spec: MixerSpec, height: int, width: int) -> tuple[int, int]:
        dim, gates = spec.dim, num_gates(spec.num_levels)
        sizes = kernels([spec.window + 2 * level for level in range(spec.num_levels)])
        weights = 4 * dim**2 + dim * gates + dim * sum(k**2 for k in sizes)
        return weights + 4 * dim + gates + 2 * dim * spec.use_norm, height * width * weights

    return formulas


def heads(dim: int, channels: int) -> int:
    """The most heads that divide C, each of at least so many channels."""
    return max(n for n in range(1, max(dim // channels, 1) + 1) if dim % n == 0)


def windows(spec: MixerSpec, height: int, width: int) -> tuple[int, int]:
    rows, columns = min(7, height), min(7, width)
    padded = math.ceil(height / rows) * rows * math.ceil(width / columns) * columns
    projections = 4 * spec.dim**2
    parameters = projections + 4 * spec.dim + 13 * 13 * heads(spec.dim, 32)
    return parameters, height * width * projections + padded * 2 * rows * columns * spec.dim


def focal_attention(spec: MixerSpec, height: int, width: int) -> tuple[int, int]:
    dim, num_windows = spec.dim, math.ceil(height / 7) * math.ceil(width / 7)
    per_window = 49 * dim + 2 * dim**2 + 2 * 49 * (13 * 13 + 7 * 7) * dim
    parameters = 4 * dim**2 + 4 * dim + 49 + 1 + (19 * 19 + 7 * 7) * heads(dim, 32)
    return parameters, height * width * 4 * dim**2 + num_windows * per_window


# Of each mixer: parameters and multiply-adds of one picture, as docs/models.md lists them.
FORMULAS = {
    "focal_modulation": focal(lambda levels: levels + 1, lambda sizes: sizes),
    "additive": focal(lambda levels: levels + 1, lambda sizes: sizes),
    "no_global": focal(lambda levels: levels, lambda sizes: sizes),
    "last_level": focal(lambda levels: 1, lambda sizes: sizes),
    "no_gates": focal(lambda levels: 0, lambda sizes: sizes),
    "single_level": focal(lambda levels: 2, lambda sizes: [1 + sum(k - 1 for k in sizes)]),
    "pooling": focal(lambda levels: levels + 1, lambda sizes: []),
    "squeeze_excitation": focal(lambda levels: 1, lambda sizes: []),
    "poolformer": lambda spec, height, width: (0, 0),
    "depthwise_convolution": lambda spec, height, width: (50 * spec.dim, height * width * 49 * spec.dim),
    "window_attention": windows,
    "shifted_window_attention": windows,
    "global_attention": lambda spec, height, width: (
        4 * spec.dim**2 + 4 * spec.dim,
        height * width * (4 * spec.dim**2 + 2 * height * width * spec.dim),
    ),
    "focal_attention": focal_attention,
}


@pytest.mark.parametrize(
    ("name", "spec", "size"),
    [(name, *spec) for name in MIXERS for spec in SPECS if spec[0].num_levels or name not in NEED_LEVELS],
)
def test_the_formulas_equal_the_module(name, spec, size):
    with torch.device("meta"):
        mixer = build_mixer(name, spec)
    x = torch.empty(1, *size, spec.dim, device="meta")
    parameters = sum(p.numel() for p in mixer.parameters())
    assert (parameters, count_multiply_adds(mixer, x)) == FORMULAS[name](spec, *size)


@pytest.mark.parametrize("name", FOCAL)
def test_the_operator_returns_its_parts(name):
    """The parts are those of a slow reading, and the output follows from them; without contexts they are the same."""
    mixer = randomised(name, MixerSpec(dim=6, num_levels=2, normalize=True))
    x = torch.randn(2, 5, 8, 6, dtype=torch.float64)
    parts, lean = mixer.parts(x, keep_contexts=True), mixer.parts(x)
    q, contexts, gates = focal_parts(mixer, x)
    assert torch.equal(parts.q, q)
    assert torch.equal(parts.gates, gates)
    kept = {"no_global": contexts[:-1], "last_level": contexts[-2:-1]}.get(name, contexts)
    assert len(parts.contexts) == len(kept)
    assert all(torch.equal(part, expected) for part, expected in zip(parts.contexts, kept, strict=True))
    weights = gates.split(1, -1) if gates.shape[-1] else [1.0] * len(kept)
    total = sum(context * weight for context, weight in zip(kept, weights, strict=True)) / len(kept)
    torch.testing.assert_close(parts.modulator, mixer.h(total))
    combined = q + parts.modulator if name == "additive" else q * parts.modulator
    torch.testing.assert_close(mixer(x), mixer.proj(combined))
    assert lean.contexts == ()
    assert all(torch.equal(getattr(lean, part), getattr(parts, part)) for part in ("q", "gates", "modulator"))


def randomised(name: str, spec: MixerSpec) -> nn.Module:
    torch.manual_seed(0)
    mixer = build_mixer(name, spec).double().eval()
    for parameter in mixer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return mixer


@pytest.mark.parametrize("size", [(3, 5), (7, 7), (10, 16)])
@pytest.mark.parametrize("name", MIXERS)
def test_shapes_and_gradients(name, size):
    mixer = randomised(name, MixerSpec(dim=16, num_levels=2, block=1))
    x = torch.randn(2, *size, 16, dtype=torch.float64, requires_grad=True)
    y = mixer(x)
    assert y.shape == x.shape
    (y * torch.randn_like(y)).sum().backward()
    assert x.grad.isfinite().all()
    assert x.grad.abs().sum() > 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in mixer.parameters())
    torch.testing.assert_close(mixer(x[1:]), y[1:])  # pictures do not see each other


def focal_parts(mixer, x):
    """q, [Z^1..Z^{L+1}], gates of focal modulation with these weights."""
    q, context, gates = mixer.f(x).split(mixer.split_sizes, -1)
    contexts, z = [], context.permute(0, 3, 1, 2)
    for layer in mixer.focal_layers:
        z = layer(z)
        contexts.append(z.permute(0, 2, 3, 1))
    return q, [*contexts, nn.functional.gelu(z.mean((2, 3)))[:, None, None]], gates


# How each ablation of two levels weighs Z^1 to Z^3, as naive_modulation has it, and how many contexts it sums up.
ABLATIONS = {
    "focal_modulation": ({"gated": [0, 1, 2]}, 3),
    "additive": ({"gated": [0, 1, 2], "add": True}, 3),
    "no_global": ({"gated": [0, 1, None]}, 2),
    "last_level": ({"gated": [None, 0, None]}, 1),
    "no_gates": ({"gated": [-1, -1, -1]}, 3),
    "single_level": ({"gated": [0, 1]}, 2),
    "pooling": ({"gated": [0, 1, 2], "pools": (3, 5)}, 3),
    "squeeze_excitation": ({"gated": [0]}, 1),
}


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("name", FOCAL)
def test_ablations_change_the_one_thing(name, normalize):
    options, num_contexts = ABLATIONS[name]
    mixer = randomised(name, MixerSpec(dim=6, num_levels=2, normalize=normalize))
    x = torch.randn(2, 5, 8, 6, dtype=torch.float64)
    divisor = num_contexts if normalize else 1
    with torch.no_grad():
        expected = torch.stack([naive_modulation(mixer, sample, divisor=divisor, **options) for sample in x])
        torch.testing.assert_close(mixer(x), expected)


def test_kernels_of_the_ablations():
    kernels = {}
    for name in FOCAL:
        shapes = [tuple(p.shape) for p in build_mixer(name, MixerSpec(dim=4, num_levels=3)).focal_layers.parameters()]
        assert all(shape[:2] == (4, 1) for shape in shapes), name
        kernels[name] = [shape[2:] for shape in shapes]
    plain = [(3, 3), (5, 5), (7, 7)]
    assert kernels == dict.fromkeys(FOCAL, plain) | {
        "single_level": [(13, 13)],
        "pooling": [],
        "squeeze_excitation": [],
    }


def test_poolformer_is_the_mean_of_the_neighbours_minus_the_position():
    x = torch.randn(1, 4, 4, 2, dtype=torch.float64)
    y = build_mixer("poolformer", MixerSpec(dim=2))(x)
    torch.testing.assert_close(y[0, 1, 2], x[0, 0:3, 1:4].mean((0, 1)) - x[0, 1, 2])
    torch.testing.assert_close(y[0, 0, 0], x[0, :2, :2].mean((0, 1)) - x[0, 0, 0])


def attend(mixer, x, query, keys, biases):
    """One position's attention to a list of positions (each already a vector), by hand."""
    dim, heads = x.shape[-1], mixer.num_heads
    weight, bias = mixer.qkv.weight, mixer.qkv.bias
    q = (weight[:dim] @ query + bias[:dim]).view(heads, -1)
    k = torch.stack([weight[dim : 2 * dim] @ key + bias[dim : 2 * dim] for key in keys]).view(len(keys), heads, -1)
    v = torch.stack([weight[2 * dim :] @ key + bias[2 * dim :] for key in keys]).view(len(keys), heads, -1)
    logits = torch.einsum("hd,nhd->hn", q, k) / q.shape[-1] ** 0.5 + biases
    mixed = torch.einsum("hn,nhd->hd", logits.softmax(-1), v).flatten()
    return mixer.proj(mixed)


@pytest.mark.parametrize(
    ("name", "height", "width"), [("shifted_window_attention", 9, 16), ("window_attention", 9, 16)]
)
def test_window_attention_by_hand(name, height, width):
    mixer = randomised(name, MixerSpec(dim=64, block=1))
    assert mixer.num_heads == 2
    x = torch.randn(1, height, width, 64, dtype=torch.float64)
    shift = 3 if name.startswith("shifted") else 0
    y = mixer(x)
    for row, column in [(0, 0), (2, 2), (8, 15), (3, 10), (6, 4)]:
        # Windows begin at -(7 - shift) + 7 n along each axis; what lies outside the picture is in none of them.
        same = [
            (i, j) for i in range(height) for j in range(width)
            if (i - shift) // 7 == (row - shift) // 7 and (j - shift) // 7 == (column - shift) // 7
        ]  # fmt: skip
        biases = torch.stack([mixer.bias.table[:, i - row + 6, j - column + 6] for i, j in same], dim=1)
        expected = attend(mixer, x, x[0, row, column], [x[0, i, j] for i, j in same], biases)
        torch.testing.assert_close(y[0, row, column], expected)


def test_only_every_second_block_is_shifted():
    tower = FocalNet(FocalNetConfig(embed_dim=8, depths=(3,), mixer="shifted_window_attention"))
    assert [block.modulation.is_shifted for block in tower.layers[0].blocks] == [False, True, False]
    plain = FocalNet(FocalNetConfig(embed_dim=8, depths=(2,), mixer="window_attention"))
    assert not any(block.modulation.is_shifted for block in plain.layers[0].blocks)


def test_global_attention_sees_everything_and_knows_where_it_is():
    mixer = randomised("global_attention", MixerSpec(dim=16))
    x = torch.randn(1, 6, 9, 16, dtype=torch.float64, requires_grad=True)
    mixer(x)[0, 0, 0].sum().backward()
    assert (x.grad[0].abs().sum(-1) > 0).all()
    flipped = mixer(x.flip(1)).flip(1)
    assert (flipped - mixer(x)).abs().max() > 1e-3  # attention over a set would not notice


def test_focal_attention_by_hand():
    """Fine keys 3 around the window, coarse keys the pooled windows, at a map of 2 x 3 windows without padding."""
    mixer = randomised("focal_attention", MixerSpec(dim=64))
    x = torch.randn(1, 14, 21, 64, dtype=torch.float64)
    y = mixer(x)
    for row, column in [(0, 0), (8, 9), (13, 20)]:
        top, left = row // 7 * 7, column // 7 * 7
        fine = [
            (i, j) for i in range(top - 3, top + 10) for j in range(left - 3, left + 10)
            if 0 <= i < 14 and 0 <= j < 21
        ]  # fmt: skip
        coarse = [(i, j) for i in range(2) for j in range(3)]
        pooled = [
            (x[0, 7 * i : 7 * i + 7, 7 * j : 7 * j + 7].flatten(0, 1).T @ mixer.pool.weight[0]) + mixer.pool.bias
            for i, j in coarse
        ]
        biases = [mixer.fine_bias.table[:, i - row + 9, j - column + 9] for i, j in fine]
        biases += [mixer.coarse_bias.table[:, i - row // 7 + 3, j - column // 7 + 3] for i, j in coarse]
        keys = [x[0, i, j] for i, j in fine] + pooled
        expected = attend(mixer, x, x[0, row, column], keys, torch.stack(biases, dim=1))
        torch.testing.assert_close(y[0, row, column], expected)


@pytest.mark.parametrize("name", MIXERS)
def test_towers_are_built_of_every_mixer(name):
    torch.manual_seed(0)
    tower = FocalNet(FocalNetConfig(embed_dim=8, depths=(2, 1), mixer=name, drop_path=0.1)).train()
    tower(torch.randn(2, 3, 32, 40)).square().sum().backward()
    without = {n for n, p in tower.named_parameters() if p.grad is None or p.grad.abs().sum() == 0}
    # a bias before a softmax over one key, or the key bias of any softmax, has no gradient but for rounding
    assert not {n for n in without if "table" not in n}


def test_initialisation_reaches_the_position_biases():
    with torch.device("meta"):
        tower = FocalNet(FocalNetConfig(embed_dim=64, depths=(1, 1), mixer="focal_attention"))
    tower.to_empty(device="cpu")
    for parameter in tower.parameters():
        parameter.data.fill_(float("nan"))
    tower.init_weights("official")
    assert not any(p.isnan().any() for p in tower.parameters())
    assert tower.layers[0].blocks[0].modulation.fine_bias.table.std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixer": "attention"}, r"mixer='attention' is none of focal_modulation, additive"),
        ({"mixer": "no_global", "focal_levels": 0}, r"focal_levels=0: mixer=no_global needs at least one level"),
        ({"mixer": "poolformer", "normalize_modulator": True}, r"would be ignored by mixer=poolformer"),
        ({"block": "vit"}, "block='vit' is none of focal, unicl"),
        ({"block": "unicl"}, "block=unicl exists with use_post_norm=True"),
    ],
)
def test_impossible_mixers_are_named(options, message):
    with pytest.raises(UserError, match=message):
        FocalNetConfig(**options)
