"""The counter of multiply-adds against torch's, against formulas, and against what the paper's nets are known for."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from focalclip.models.cost import Cost, count, count_multiply_adds
from focalclip.models.focalnet import FocalNet, FocalNetConfig
from focalclip.models.focalnet.mixers import MIXERS
from focalclip.models.focalnet.variants import create_focalnet
from focalclip.models.image import create_image_tower


def torchs_count(tower: nn.Module, size: tuple[int, int]) -> float:
    """torch's counter (2 per multiply-add) on a real forward pass."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        tower.eval()(torch.zeros(1, 3, *size))
    return counter.get_total_flops() / 2


@pytest.mark.parametrize("mixer", MIXERS)
def test_it_equals_torchs_counter(mixer):
    tower = FocalNet(FocalNetConfig(embed_dim=8, depths=(2, 1), use_overlap=True, num_classes=5, mixer=mixer))
    assert count(tower, (64, 40)).multiply_adds == torchs_count(tower, (64, 40))


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "vit_tiny_patch16_224"])
def test_it_counts_timms_towers(name):
    pytest.importorskip("timm")
    tower = create_image_tower(f"timm:{name}")
    assert count(tower, 224).multiply_adds == torchs_count(tower, (224, 224))


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
