"""K-LITE's UniCL FocalNet: its block against an independent writing of it, and its weights under its own names."""

import re
from dataclasses import replace

import pytest
import torch
from random_weights import randomise
from torch.nn import functional as F

from focalclip.base.errors import UserError
from focalclip.models.focalnet import FocalNet
from focalclip.models.focalnet.variants import FOCALNETS
from focalclip.models.weights import from_klite, from_official, load_focalnet, to_klite

UNICL = FOCALNETS["focalnet_base_unicl"]
MINI = replace(UNICL, embed_dim=8, depths=(1, 2), focal_levels=2)


def klite_weights(tower: FocalNet) -> dict[str, torch.Tensor]:
    """What K-LITE's code would have saved for this tower (names of its image_encoder/focal.py)."""
    weights = {}
    for name, x in tower.state_dict().items():
        name = name.replace("stem.", "patch_embed.").replace("head.fc.", "head.").replace("focal_layers", "pool_layers")
        name = name.replace("modulation.f.", "attn.pre_conv.").replace("modulation.h.", "attn.v.")
        name = re.sub(r"ls(\d)\.gamma", r"gamma_\1", name.replace("modulation.", "attn."))
        name = re.sub(r"layers\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", name)
        weights[name] = x[..., None, None] if name.endswith("attn.v.weight") else x
    return weights


def naive_features(w: dict[str, torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    """Pooled features from K-LITE's weights, written in (B, C, H, W) from its definition."""

    def norm(x, name):
        return F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2], w[f"{name}.weight"], w[f"{name}.bias"]).permute(
            0, 3, 1, 2
        )

    def dense(x, name):
        return torch.einsum("bchw,dc->bdhw", x, w[f"{name}.weight"].flatten(1)) + w[f"{name}.bias"][:, None, None]

    def embed(x, name, stride, padding):
        return norm(F.conv2d(x, w[f"{name}.proj.weight"], w[f"{name}.proj.bias"], stride, padding), f"{name}.norm")

    x = embed(images, "patch_embed", 4, 3)
    for stage, depth in enumerate(MINI.depths):
        dim = MINI.dims[stage]
        for block in range(depth):
            b = f"layers.{stage}.blocks.{block}."
            x = x + F.conv2d(x, w[b + "dw1.weight"], w[b + "dw1.bias"], padding=1, groups=dim)
            q, context, gates = dense(x, b + "attn.pre_conv").split([dim, dim, 3], 1)
            total = 0
            for level, kernel in enumerate((3, 5)):
                kernels = w[b + f"attn.pool_layers.{level}.0.weight"]
                context = F.gelu(F.conv2d(context, kernels, padding=kernel // 2, groups=dim))
                total = total + context * gates[:, level : level + 1]
            total = total + F.gelu(context.mean((2, 3), keepdim=True)) * gates[:, 2:]
            branch = dense(q * dense(total / 3, b + "attn.v"), b + "attn.proj")
            x = norm(x + w[b + "gamma_1"][:, None, None] * branch, b + "norm1")
            x = x + F.conv2d(x, w[b + "dw2.weight"], w[b + "dw2.bias"], padding=1, groups=dim)
            branch = dense(F.gelu(dense(x, b + "mlp.fc1")), b + "mlp.fc2")
            x = norm(x + w[b + "gamma_2"][:, None, None] * branch, b + "norm2")
        if stage + 1 < len(MINI.depths):
            x = embed(x, f"layers.{stage}.downsample", 2, 1)
    return norm(x, "norm").mean((2, 3))


def mini_tower() -> FocalNet:
    return randomise(FocalNet(MINI)).double()


def test_features_follow_the_definition():
    tower, images = mini_tower(), torch.randn(2, 3, 48, 64, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(tower(images), naive_features(klite_weights(tower), images))


@pytest.mark.parametrize("read", [from_klite, load_focalnet])
@pytest.mark.parametrize("prefix", ["", "image_encoder.", "visual."])
@pytest.mark.filterwarnings("ignore:.*without their prefix")
def test_weights_travel_in(read, prefix):
    tower = mini_tower().float()
    weights = {prefix + name: x for name, x in klite_weights(tower).items()}
    if prefix:  # a two-tower model
        weights |= {"lang_encoder.ln_final.weight": torch.ones(4), "logit_scale": torch.ones(())}
    loaded = read(weights)
    assert loaded.config == replace(MINI, layer_scale=1e-4)  # where it started does not show
    assert all(torch.equal(x, tower.state_dict()[name]) for name, x in loaded.state_dict().items())


def test_weights_travel_out():
    tower = mini_tower()
    theirs, expected = to_klite(tower.state_dict()), klite_weights(tower)
    assert theirs.keys() == expected.keys()
    assert all(torch.equal(x, expected[name]) for name, x in theirs.items())


def test_the_variant_is_recognised():
    with torch.device("meta"):
        assert from_klite(klite_weights(FocalNet(UNICL))).config == replace(UNICL, layer_scale=1e-4)


def test_the_two_kinds_of_focalnet_are_told_apart():
    weights = klite_weights(mini_tower())
    with pytest.raises(UserError, match="klite's names; use from_klite"):
        from_official(weights)
    with pytest.raises(UserError, match="official's names; use from_official"):
        from_klite({"patch_embed.proj.weight": torch.zeros(8, 3, 4, 4)})
    with pytest.raises(UserError, match=r"1 missing: layers\.0\.blocks\.0\.dw2\.bias"):
        from_klite({name: x for name, x in weights.items() if name != "layers.0.blocks.0.dw2.bias"})
