"""The count of multiply-adds against a naive counter, against formulas, and against published numbers."""

from math import prod

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from focalclip.config import TextTowerConfig
from focalclip.models.cost import Cost, count, count_multiply_adds
from focalclip.models.focalnet import FocalNet, FocalNetConfig
from focalclip.models.focalnet.mixers import MIXERS
from focalclip.models.focalnet.variants import create_focalnet
from focalclip.models.image import create_image_tower
from focalclip.models.text import create_text_tower


class NaiveCounter(TorchDispatchMode):
    """Adds up, operation by operation, what multiplies by weights or by other activations."""

    def __init__(self):
        super().__init__()
        self.multiply_adds = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("convolution", "_convolution"):
            self.multiply_adds += out.numel() * prod(args[1].shape[1:])  # each output is a sum over one filter
        elif name in ("mm", "bmm"):
            self.multiply_adds += out.numel() * args[0].shape[-1]
        elif name in ("addmm", "baddbmm"):
            self.multiply_adds += out.numel() * args[1].shape[-1]
        elif name.startswith("_scaled_dot_product"):
            q, k, v = args[:3]  # (..., N, d), (..., M, d), (..., M, d_v)
            self.multiply_adds += prod(q.shape[:-1]) * k.shape[-2] * (q.shape[-1] + v.shape[-1])
        return out


def naive_count(tower: nn.Module, x: torch.Tensor) -> int:
    """Of a real forward pass, not one on the meta device."""
    torch.backends.mha.set_fastpath_enabled(False)  # one fused operation, which this counter does not know
    try:
        with torch.no_grad(), NaiveCounter() as counter:
            tower.eval()(x)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    return counter.multiply_adds


@pytest.mark.parametrize("mixer", MIXERS)
def test_it_equals_a_naive_counter(mixer):
    tower = FocalNet(FocalNetConfig(embed_dim=8, depths=(2, 1), use_overlap=True, num_classes=5, mixer=mixer))
    assert count(tower, (64, 40)).multiply_adds == naive_count(tower, torch.zeros(1, 3, 64, 40))


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "vit_tiny_patch16_224"])
def test_it_counts_timms_towers(name):
    pytest.importorskip("timm")
    tower = create_image_tower(f"timm:{name}")
    assert count(tower, 224).multiply_adds == naive_count(tower, torch.zeros(1, 3, 224, 224))


@pytest.mark.parametrize("causal", [True, False])
def test_it_counts_text_towers(causal):
    tower = create_text_tower(TextTowerConfig(width=32, heads=2, layers=2, context_length=9, causal=causal), 8)
    tokens = torch.zeros(1, 9, dtype=torch.int64)
    assert count_multiply_adds(tower, tokens.to("meta")) == naive_count(tower, tokens) > 0


def test_it_counts_layers_by_hand():
    net = nn.Sequential(nn.Conv2d(3, 8, 7, stride=4, padding=2), nn.Conv2d(8, 8, 5, padding=2, groups=4), nn.Flatten())
    expected = 8 * 8 * (8 * 3 * 49 + 8 * 2 * 25)  # 32 pixels with kernel 7, stride 4, padding 2 are 8 positions
    assert count(net, 32) == Cost(3 * 8 * 49 + 8 + 8 * 2 * 25 + 8, expected)
    assert count_multiply_adds(nn.Linear(6, 5), torch.empty(2, 3, 6, device="meta")) == 2 * 3 * 6 * 5


@pytest.mark.parametrize(("base", "expected"), [("tiny", 0.25), ("small", 0.25), ("base", 0.43)])
def test_overlapping_patches_cost_more(base, expected):
    """The paper's table 2 shows no difference: the authors' counter takes plain kernels for overlapping ones."""
    with torch.device("meta"):
        plain, overlapping = (create_focalnet(f"focalnet_{base}_srf{kind}") for kind in ("", "_overlap"))
    extra = count(overlapping, 224).multiply_adds - count(plain, 224).multiply_adds
    assert extra / 1e9 == pytest.approx(expected, abs=0.006)


def test_counting_changes_nothing():
    tower = create_focalnet("focalnet_pico").train()
    before = {name: x.clone() for name, x in tower.state_dict().items()}
    first = count(tower, 32)
    assert tower.training
    assert next(tower.parameters()).device.type == "cpu"
    assert all(torch.equal(x, before[name]) for name, x in tower.state_dict().items())
    assert count(tower.to("meta"), 32) == first
