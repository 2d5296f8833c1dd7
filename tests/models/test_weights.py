"""Checkpoints of FocalNet's authors: built from what they imply, refused with one clear sentence."""

import pickle
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from focalclip.base.errors import UserError
from focalclip.interop.load import load, load_image_encoder
from focalclip.models.focalnet import FocalNet, FocalNetConfig
from focalclip.models.focalnet.variants import FOCALNETS
from focalclip.models.weights import from_official, load_focalnet, to_official, to_timm, to_transformers
from focalclip.models.weights.architecture import variant_of

timm = pytest.importorskip("timm")

PLAIN = FocalNetConfig(embed_dim=8, depths=(1, 2, 1), num_classes=3)
LARGE_LIKE = FocalNetConfig(
    embed_dim=8, depths=(2, 1), focal_levels=3, focal_windows=5, use_overlap=True, use_post_norm=True,
    use_post_norm_in_modulation=True, layer_scale=0.1, num_classes=3,
)  # fmt: skip


DIALECTS = {"official": to_official, "timm": to_timm, "transformers": to_transformers}


def official_weights(tower: FocalNet) -> dict[str, torch.Tensor]:
    """What the authors' code would have saved for this tower."""
    weights = {}
    for name, x in tower.state_dict().items():
        name = name.replace("stem.", "patch_embed.").replace("head.fc.", "head.").replace("_post.", ".")
        name = name.replace("modulation.norm.", "modulation.ln.")
        name = re.sub(r"ls(\d)\.gamma", r"gamma_\1", name)
        name = re.sub(r"layers\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", name)
        weights[name] = x[..., None, None] if name.endswith("modulation.h.weight") else x
    return weights


def random_tower(config: FocalNetConfig) -> FocalNet:
    torch.manual_seed(0)
    tower = FocalNet(config).eval()
    for parameter in tower.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return tower


@pytest.mark.parametrize("config", [PLAIN, LARGE_LIKE], ids=["plain", "large-like"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_official_files_load_and_give_the_features(config, suffix, tmp_path):
    tower, path = random_tower(config), tmp_path / f"focalnet{suffix}"
    weights = {name: x.contiguous() for name, x in official_weights(tower).items()}
    torch.save({"model": weights}, path) if suffix == ".pth" else save_file(weights, path)
    loaded = from_official(path, post_norm=config.use_post_norm, drop_path=0.2).eval()
    assert loaded.config.drop_path == 0.2
    assert loaded.config.num_classes == 0
    images = torch.randn(2, 3, 37, 44)
    torch.testing.assert_close(loaded(images), tower.forward_features(images).mean((2, 3)))
    with_head = from_official(str(path), post_norm=config.use_post_norm, with_head=True).eval()
    torch.testing.assert_close(with_head(images), tower(images))
    assert all(p.is_contiguous() and p.requires_grad for p in loaded.parameters())


def test_official_names_are_those_that_timm_converts():
    """The renames of this file's reference agree with timm's own reader of the authors' checkpoints."""
    model = timm.models.focalnet.FocalNet(
        embed_dim=8, depths=(2, 1), focal_levels=(3, 3), focal_windows=(5, 5), use_overlap_down=True,
        use_post_norm=True, use_post_norm_in_modulation=True, layerscale_value=0.1, num_classes=3,
    ).eval()  # fmt: skip
    weights = official_weights(random_tower(LARGE_LIKE))
    model.load_state_dict(timm.models.focalnet.checkpoint_filter_fn({"model": dict(weights)}, model))
    ours = from_official(weights, post_norm=True, with_head=True).eval()
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(ours(images), model(images))


@pytest.mark.parametrize("name", FOCALNETS)
def test_every_variant_is_recognised_from_its_weights(name):
    dialect = "official" if FOCALNETS[name].block == "focal" else "timm"  # K-LITE's names are in test_klite.py
    flags = {"normalize_modulator": False} if name in ("focalnet_large_fl4", "focalnet_xlarge_fl4") else {}
    with torch.device("meta"):
        weights = DIALECTS[dialect](FocalNet(FOCALNETS[name]).state_dict())
        tower = load_focalnet(weights, **flags)
    start = FOCALNETS[name].layer_scale and tower.config.layer_scale  # where it started does not show in the weights
    assert tower.config == replace(FOCALNETS[name], layer_scale=start)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_an_encoder_passes_flags_on(suffix, tmp_path):
    tower, path = random_tower(LARGE_LIKE), tmp_path / f"focalnet{suffix}"
    weights = {name: x.contiguous() for name, x in official_weights(tower).items()}
    torch.save({"model": weights}, path) if suffix == ".pth" else save_file(weights, path)
    encoder = load_image_encoder(path, post_norm=True, normalize_modulator=True)
    expected = from_official(path, post_norm=True, normalize_modulator=True).eval()
    picture = encoder.preprocess(Image.new("RGB", (300, 200), "red"))[None]
    assert picture.shape == (1, 3, 224, 224)
    with torch.no_grad():
        assert torch.equal(encoder(picture), expected(picture))
    with pytest.raises(UserError, match="postnorm is not a flag"):
        load_image_encoder(path, postnorm=True)


def test_a_variant_is_known_by_its_architecture():
    config = FOCALNETS["focalnet_xlarge_fl4"]
    assert variant_of(replace(config, drop_path=0.1, normalize_modulator=True)) == "focalnet_xlarge_fl4"
    assert variant_of(replace(config, embed_dim=8)) is None


def test_disputed_flag_must_be_given():
    with torch.device("meta"):
        weights = official_weights(FocalNet(FOCALNETS["focalnet_large_fl4"]))
    with pytest.raises(UserError, match=r"give normalize_modulator.*large_fl4"):
        from_official(weights)


def test_half_precision_weights_become_float32():
    weights = {name: x.half() for name, x in official_weights(random_tower(PLAIN)).items()}
    assert {p.dtype for p in from_official(weights).parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"embed_dim": 16}, r"embed_dim=16 contradicts the weights, which imply 8"),
        ({"depths": (1, 1, 1)}, r"depths=\(1, 1, 1\) contradicts the weights, which imply \(1, 2, 1\)"),
        ({"layer_scale": 1e-4}, r"layer_scale=0\.0001 contradicts the weights, which imply None"),
        ({"use_overlap": True}, r"use_overlap=True contradicts"),
        ({"num_classes": 3}, r"num_classes=3 contradicts"),
        ({"postnorm": True}, r"postnorm is not a flag.*post_norm"),
    ],
)
def test_contradicting_flags_are_refused(flags, message):
    with pytest.raises(UserError, match=message):
        from_official(official_weights(random_tower(PLAIN)), **flags)


def test_agreeing_flags_are_welcome():
    tower = from_official(official_weights(random_tower(PLAIN)), embed_dim=8, depths=(1, 2, 1), use_overlap=False)
    assert tower.config.embed_dim == 8


def edit(change) -> dict[str, torch.Tensor]:
    weights = official_weights(random_tower(PLAIN))
    change(weights)
    return weights


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("norm.bias"), r"1 missing: norm\.bias"),
        (lambda w: w.pop("layers.1.blocks.1.mlp.fc2.weight"), r"1 missing: layers\.1\.blocks\.1\.mlp\.fc2\.weight"),
        (lambda w: w.update({"norm.extra": torch.zeros(1)}), r"1 unexpected: norm\.extra"),
        (lambda w: w.update({"pos_embed": torch.zeros(1)}), r"no part of a FocalNet: pos_embed;"),
        (lambda w: w.update({"norm.bias": torch.zeros(3)}), r"1 of another shape: norm\.bias"),
        (lambda w: w.update({"patch_embed.proj.weight": torch.zeros(8, 3, 4, 8)}), r"patches of \[4, 8\] pixels"),
        (lambda w: w.update({"epoch": 3}), r"expected named tensors"),
    ],
)
def test_weights_are_loaded_strictly(change, message):
    with pytest.raises(UserError, match=message):
        from_official(edit(change))


def test_other_models_are_refused():
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0).state_dict()
    with pytest.raises(UserError, match=r"no part of a FocalNet: blocks\.0\.attn.* and 14\d more; .*another model's"):
        from_official(vit)
    with pytest.raises(UserError, match="not the weights of a FocalNet: no patch embedding; they begin with bn1"):
        load_focalnet(timm.create_model("resnet18", num_classes=0).state_dict())
    with pytest.raises(UserError, match="timm's names; use from_timm or load_focalnet"):
        from_official(random_tower(PLAIN).state_dict())
    with pytest.raises(UserError, match="transformers's names; use from_transformers or load_focalnet"):
        from_official({"focalnet.embeddings.patch_embeddings.projection.weight": torch.zeros(1)})
    with pytest.raises(UserError, match=r"not the weights of a FocalNet: no layers\.0\.blocks\.0\.modulation"):
        from_official({"patch_embed.proj.weight": torch.zeros(8, 3, 4, 4)})


@pytest.mark.parametrize("prefix", ["vision.", "module.", "backbone.", "module.image_encoder."])
def test_a_common_prefix_comes_off_and_is_told(prefix):
    tower = random_tower(PLAIN)
    weights = {prefix + name: x for name, x in official_weights(tower).items()}
    with pytest.warns(UserWarning, match=f"without their prefix '{re.escape(prefix)}'"):
        loaded = from_official({"model": weights}, with_head=True)
    assert all(torch.equal(x, tower.state_dict()[name]) for name, x in loaded.state_dict().items())
    if prefix == "backbone.":
        return  # of a detector the backbone is taken, see below
    with pytest.raises(UserError, match=rf"under '{re.escape(prefix)}' there are others \(neck\.conv\.weight\)"):
        from_official(weights | {"neck.conv.weight": torch.zeros(1)})


@pytest.mark.parametrize("config", [PLAIN, LARGE_LIKE], ids=["plain", "large-like"])
@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("prefix", ["", "vision."])
@pytest.mark.filterwarnings("ignore:.*without their prefix")
def test_the_names_tell_whose_they_are(dialect, config, prefix):
    tower = random_tower(config)
    weights = {prefix + name: x for name, x in DIALECTS[dialect](tower.state_dict()).items()}
    flags = {} if dialect == "timm" else {"post_norm": config.use_post_norm}  # timm's names tell it
    loaded = load_focalnet({"state_dict": weights}, with_head=True, **flags)
    assert loaded.config == replace(config, layer_scale=config.layer_scale and 1e-4)
    assert all(torch.equal(x, tower.state_dict()[name]) for name, x in loaded.state_dict().items())


def test_to_official_is_what_the_authors_would_have_saved():
    tower = random_tower(LARGE_LIKE)
    ours, expected = to_official(tower.state_dict()), official_weights(tower)
    assert ours.keys() == expected.keys()
    assert all(torch.equal(x, expected[name]) for name, x in ours.items())


def test_post_norm_is_refused_where_the_names_contradict_it():
    with pytest.raises(UserError, match="use_post_norm=False contradicts the weights, which imply True"):
        load_focalnet(to_timm(random_tower(LARGE_LIKE).state_dict()), post_norm=False)
    assert load_focalnet(to_timm(random_tower(LARGE_LIKE).state_dict()), post_norm=True).config.use_post_norm


def test_another_number_of_classes_is_told():
    weights = official_weights(random_tower(PLAIN))
    with pytest.raises(
        UserError, match=r"num_classes=7 contradicts the weights, whose head has 3; with_head=True keeps"
    ):
        from_official(weights, with_head=True, num_classes=7)
    assert from_official(weights, with_head=True, num_classes=3).config.num_classes == 3
    headless = {name: x for name, x in weights.items() if not name.startswith("head.")}
    with pytest.raises(UserError, match="with_head=True, but the weights have no classification head"):
        from_official(headless, with_head=True)
    with pytest.raises(UserError, match=r"1 missing: head\.fc\.bias"):
        from_official({name: x for name, x in weights.items() if name != "head.bias"}, with_head=True)


def test_no_fine_tuning_is_needed_for_another_resolution():
    """The same weights take any picture: nothing in them depends on its size."""
    tower = from_official(official_weights(random_tower(PLAIN)))
    assert not any("pos" in name for name in tower.state_dict())
    for size in [(32, 32), (96, 64), (50, 130)]:
        images = torch.randn(2, 3, *size)
        features = tower(images)
        assert features.shape == (2, tower.num_features)
        assert [tuple(x.shape[2:]) for x in tower.feature_maps(images)] == [
            (size[0] // stride, size[1] // stride) for stride in tower.strides
        ]
    before = [p.clone() for p in tower.parameters()]
    optimizer = torch.optim.SGD(tower.parameters(), lr=0.1)
    tower(torch.randn(2, 3, 96, 64)).square().mean().backward()
    optimizer.step()
    assert all(not torch.equal(p, q) for p, q in zip(tower.parameters(), before, strict=True))


class Payload:
    """Stands for anything but a tensor in a pickle."""


def test_pickled_objects_are_not_unpickled(tmp_path):
    torch.save({"model": Payload()}, tmp_path / "evil.pth")
    with pytest.raises(
        UserError, match=r"evil\.pth: not a file of plain tensors \(test_weights\.Payload\), and nothing"
    ):
        from_official(tmp_path / "evil.pth")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_damaged_files_are_named(suffix, tmp_path):
    path = tmp_path / f"focalnet{suffix}"
    weights = official_weights(random_tower(PLAIN))
    torch.save({"model": weights}, path) if suffix == ".pth" else save_file(weights, path)
    truncate(path)
    with pytest.raises(UserError, match=rf"focalnet{re.escape(suffix)}: damaged or truncated"):
        from_official(path)
    path.write_bytes(b"")
    with pytest.raises(UserError, match=r"damaged"):
        from_official(path)
    path.unlink()
    with pytest.raises(UserError, match="no such file"):
        from_official(path)


def test_a_page_saved_in_place_of_the_file_is_refused(tmp_path):
    (tmp_path / "page.pth").write_text("<!DOCTYPE html><html>not found</html>")
    with pytest.raises(UserError, match=r"page\.pth: damaged, truncated or no file of torch\.save"):
        from_official(tmp_path / "page.pth")


def test_a_file_that_holds_no_state_dict_is_refused(tmp_path):
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    with pytest.raises(UserError, match="holds a Tensor, not a state dict"):
        from_official(tmp_path / "tensor.pth")


# Files are known by what is in them


NAMES = ["pytorch_model.bin", "f.ckpt", "f.pth.tar", "f.pth", "f.safetensors", "weights", "f.model", "f.PTH", "a.b.c"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("form", ["torch", "torch before 1.6", "safetensors"])
def test_a_file_is_known_by_its_content_whatever_it_is_called(name, form, tmp_path):
    tower, path = random_tower(PLAIN), tmp_path / name
    weights = {name: x.contiguous() for name, x in official_weights(tower).items()}
    if form == "safetensors":
        save_file(weights, path)
    else:
        torch.save({"state_dict": weights}, path, _use_new_zipfile_serialization=form == "torch")
    images = torch.randn(1, 3, 32, 32)
    encoder = load_image_encoder(path, normalize_modulator=False)
    with torch.no_grad():
        assert torch.equal(encoder(images), load_focalnet(path).eval()(images))


@pytest.mark.parametrize("name", NAMES)
def test_nothing_in_a_file_is_run_whatever_it_is_called(name, tmp_path):
    class Hostile:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    for save in (lambda x, path: torch.save(x, path), lambda x, path: path.write_bytes(pickle.dumps(x))):
        save({"state_dict": Hostile()}, tmp_path / name)
        with pytest.raises(UserError, match=rf"{re.escape(name)}: (not a file of plain tensors|damaged)"):
            load_image_encoder(tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_a_program_is_not_run(tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "model.pt")
    with pytest.raises(UserError, match=r"model\.pt: a program of TorchScript, and none is run; save its state dict"):
        load_image_encoder(tmp_path / "model.pt")


@pytest.mark.parametrize("content", [b"", b"{}", b"key: value", b"\x89PNG\r\n", b"PK\x03\x04"])
@pytest.mark.parametrize("name", ["notes.yaml", "f.bin", "f.safetensors"])
def test_a_file_that_holds_something_else_is_named(content, name, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{re.escape(name)}: damaged"):
        load_image_encoder(tmp_path / name)
    with pytest.raises(UserError, match="an image tower without a text tower"):
        load(tmp_path / name)


# Backbones of detectors


def detector_weights(config: FocalNetConfig, stages: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """What the authors' backbone for mmdet and mmseg would have saved: a norm for each stage that is used."""
    torch.manual_seed(1)
    body = official_weights(random_tower(replace(config, num_classes=0)))
    weights = {name: x for name, x in body.items() if not name.startswith("norm.")}
    widths = {f"norm{i}.{kind}": torch.rand(config.dims[i]) for i in stages for kind in ("weight", "bias")}
    return weights | widths


def detector_maps(weights: dict[str, torch.Tensor], images: torch.Tensor) -> list[torch.Tensor]:
    """The authors' backbone, step by step: pads to whole patches, normalises each map, pools nothing."""

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"])

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, weights[f"{name}.weight"].flatten(1), weights[f"{name}.bias"])

    def embed(x: torch.Tensor, name: str, stride: int) -> torch.Tensor:
        kernel = weights[f"{name}.proj.weight"]
        x = F.pad(x, (0, -x.shape[3] % stride, 0, -x.shape[2] % stride))
        padding = {7: 3, 3: 1}.get(kernel.shape[-1], 0)
        x = F.conv2d(x, kernel, weights[f"{name}.proj.bias"], stride=stride, padding=padding)
        return norm(x.permute(0, 2, 3, 1), f"{name}.norm").permute(0, 3, 1, 2)

    def modulate(x: torch.Tensor, name: str) -> torch.Tensor:
        kernels = [w for key, w in weights.items() if key.startswith(f"{name}.focal_layers.")]
        q, context, gates = linear(x, f"{name}.f").split([x.shape[-1], x.shape[-1], len(kernels) + 1], dim=-1)
        total, context = 0, context.permute(0, 3, 1, 2)
        for level, kernel in enumerate(kernels):
            context = F.gelu(F.conv2d(context, kernel, padding=kernel.shape[-1] // 2, groups=len(kernel)))
            total = total + context.permute(0, 2, 3, 1) * gates[..., level : level + 1]
        total = total + F.gelu(context.mean((2, 3)))[:, None, None] * gates[..., -1:]
        return linear(q * linear(total, f"{name}.h"), f"{name}.proj")

    maps, x, stage = [], embed(images, "patch_embed", 4), 0
    while f"layers.{stage}.blocks.0.norm1.weight" in weights:
        x, block = x.permute(0, 2, 3, 1), 0
        while f"layers.{stage}.blocks.{block}.norm1.weight" in weights:
            name = f"layers.{stage}.blocks.{block}"
            first, second = (weights.get(f"{name}.gamma_{i}", 1.0) for i in (1, 2))
            x = x + first * modulate(norm(x, f"{name}.norm1"), f"{name}.modulation")
            x = x + second * linear(F.gelu(linear(norm(x, f"{name}.norm2"), f"{name}.mlp.fc1")), f"{name}.mlp.fc2")
            block += 1
        if f"norm{stage}.weight" in weights:
            maps.append(norm(x, f"norm{stage}").permute(0, 3, 1, 2))
        x = x.permute(0, 3, 1, 2)
        if f"layers.{stage}.downsample.proj.weight" in weights:
            x = embed(x, f"layers.{stage}.downsample", 2)
        stage += 1
    return maps


BACKBONE = FocalNetConfig(embed_dim=8, depths=(1, 2, 1, 1), focal_windows=(9, 7, 5, 3))


@pytest.mark.parametrize("options", [{}, {"use_overlap": True}, {"layer_scale": 1e-4, "focal_levels": 3}])
@pytest.mark.parametrize("stages", [(0, 1, 2, 3), (1, 2, 3)])
@pytest.mark.parametrize("prefix", ["backbone.", "module.backbone.", "backbone.0.", ""])
@pytest.mark.filterwarnings("ignore:.*without their prefix")
def test_the_backbone_of_a_detector_gives_the_maps_that_the_detector_sees(options, stages, prefix, tmp_path):
    config = replace(BACKBONE, **options)
    weights = detector_weights(config, stages)
    file = {prefix + name: x for name, x in weights.items()}
    if prefix:
        others = ("neck.fpn_convs.0.conv.weight", "rpn_head.rpn_conv.weight", "roi_head.bbox_head.fc_cls.bias")
        file |= {prefix.replace("backbone.", "").replace("0.", "") + name: torch.ones(1) for name in others}
    meta = {"epoch": 36, "iter": 1000, "CLASSES": ("person", "dog"), "config": "model = dict()"}
    torch.save(
        {"meta": meta, "state_dict": file, "optimizer": {"state": {}, "param_groups": []}}, tmp_path / "epoch_36.pth"
    )
    encoder = load_image_encoder(tmp_path / "epoch_36.pth")
    assert encoder.strides == [4 * 2**i for i in stages]
    assert encoder.feature_dims == [config.dims[i] for i in stages]
    for size in [(64, 96), (61, 87), (33, 32)]:
        images = torch.randn(2, 3, *size)
        expected = detector_maps(weights, images)
        assert len(expected) == len(stages)
        for ours, theirs in zip(encoder.feature_maps(images), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(encoder(images), expected[-1].mean((2, 3)), rtol=1e-4, atol=1e-4)


def test_a_detectors_weights_are_loaded_strictly_too():
    weights = detector_weights(BACKBONE, (0, 1, 2, 3))
    assert load_focalnet(weights).config.detector_stages == (0, 1, 2, 3)
    assert to_official(load_focalnet(weights).state_dict()).keys() == weights.keys()
    with pytest.raises(UserError, match=r"1 missing: norms\.2\.bias"):
        load_focalnet({name: x for name, x in weights.items() if name != "norm2.bias"})
    with pytest.raises(UserError, match=r"2 missing: norm\.bias, norm\.weight"):
        load_focalnet({name: x for name, x in weights.items() if not name.startswith("norm")})
    with pytest.raises(UserError, match=r"2 unexpected: norm\.bias, norm\.weight"):
        load_focalnet(weights | {"norm.weight": torch.ones(64), "norm.bias": torch.ones(64)})


def test_what_stands_beside_a_detectors_backbone_is_told():
    weights = {f"backbone.{name}": x for name, x in detector_weights(BACKBONE, (0, 1, 2, 3)).items()}
    with pytest.warns(UserWarning, match=r"without their prefix 'backbone\.'; 2 others are left out: bbox\.w, neck\.w"):
        load_focalnet({"state_dict": weights | {"neck.w": torch.ones(1), "bbox.w": torch.ones(1)}})
