"""Maps of gates, modulators and captions: the numbers against a slow reading of the paper, and the pictures."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import focalclip
from focalclip.base.errors import UserError
from focalclip.cli.explain import main
from focalclip.config import ImageTowerConfig, ModelConfig, TextTowerConfig
from focalclip.explanation import figures
from focalclip.models.clip import FocalCLIP
from focalclip.models.focalnet import FocalNet, FocalNetConfig

SIDE = 32


@pytest.fixture(scope="module")
def tower() -> FocalNet:
    torch.manual_seed(0)
    return FocalNet(FocalNetConfig(embed_dim=8, depths=(1, 2), focal_levels=2, init="fan_in")).eval()


@pytest.fixture(scope="module")
def model() -> FocalCLIP:
    torch.manual_seed(0)
    image = ImageTowerConfig(name="focalnet_pico", image_size=SIDE, init="fan_in", feature_norm="batch")
    text = TextTowerConfig(context_length=8, width=32, heads=2, layers=1)
    model = FocalCLIP(ModelConfig(embed_dim=32, image=image, text=text))
    model.encode_image(torch.randn(8, 3, SIDE, SIDE))
    return model.eval()


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def slow_maps(tower: FocalNet, images: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Gates and modulator of a block of the second stage, equation by equation."""
    stage = tower.layers[1]
    x = stage.downsample(tower.feature_maps(images)[0].permute(0, 2, 3, 1))
    for earlier in stage.blocks[:block]:
        x = earlier(x)
    operator, dim = stage.blocks[block].modulation, x.shape[-1]
    projected = stage.blocks[block].norm1(x) @ operator.f.weight.T + operator.f.bias
    context, gates = projected[..., dim : 2 * dim].permute(0, 3, 1, 2), projected[..., 2 * dim :].permute(0, 3, 1, 2)
    total = torch.zeros_like(context)
    for level, layer in enumerate(operator.focal_layers):
        kernel = layer[0].weight
        context = F.gelu(F.conv2d(context, kernel, padding=kernel.shape[-1] // 2, groups=dim))
        total = total + context * gates[:, level, None]
    total = total + F.gelu(context.mean((2, 3), keepdim=True)) * gates[:, -1, None]
    modulator = F.conv2d(total, operator.h.weight.reshape(dim, dim, 1, 1), operator.h.bias)
    return gates, modulator.square().sum(1).sqrt()


@pytest.mark.parametrize("block", [0, 1])
def test_maps_are_those_of_the_paper(block, tower, images):
    with torch.no_grad():
        gates, modulator = slow_maps(tower, images, block)
    result = focalclip.explain(tower, images, stage=-1, block=block)
    assert (result.stage, result.block) == (1, block)
    torch.testing.assert_close(result.gates, gates)
    torch.testing.assert_close(result.modulator, modulator)
    assert [tuple(kernel.shape) for kernel in result.kernels] == [(3, 3), (5, 5)]
    weight = tower.layers[1].blocks[block].modulation.focal_layers[1][0].weight
    torch.testing.assert_close(result.kernels[1], weight.detach().mean((0, 1)))


def test_a_tower_of_timm_gives_the_same_maps(images):
    import timm

    torch.manual_seed(0)
    ours = focalclip.create_image_tower("focalnet_tiny_srf")
    theirs = timm.create_model("focalnet_tiny_srf", num_classes=0)
    theirs.load_state_dict(focalclip.weights.to_timm(ours.state_dict()))
    for stage, block in ((0, 0), (2, -1)):
        one = focalclip.explain(ours, images, stage=stage, block=block)
        other = focalclip.explain(theirs, images, stage=stage, block=block)
        assert (one.stage, one.block) == (other.stage, other.block)
        torch.testing.assert_close(one.gates, other.gates, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(one.modulator, other.modulator, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("mixer", "names", "num_kernels"),
    [
        ("focal_modulation", ["level 1 (3x3)", "level 2 (5x5)", "global"], 2),
        ("no_global", ["gate 1", "gate 2"], 2),
        ("pooling", ["level 1", "level 2", "global"], 0),
    ],
)
def test_ablations_name_their_gates(mixer, names, num_kernels, images):
    result = focalclip.explain(FocalNet(FocalNetConfig(embed_dim=8, depths=(1, 1), mixer=mixer)), images)
    assert result.gate_names == names
    assert result.gates.shape[1] == len(names)
    assert len(result.kernels) == num_kernels
    with pytest.raises(UserError, match="stage 1, block 0: this kind of modulation has no gates"):
        focalclip.explain(FocalNet(FocalNetConfig(embed_dim=8, depths=(1, 1), mixer="no_gates")), images)


def test_the_mean_of_the_projected_positions_is_the_embedding(model, images):
    """The similarity maps belong to what the model says of the whole picture."""
    captions = ["a dog", "two cats"]
    similarity = focalclip.explain(model, images, text=captions).similarity
    with torch.no_grad():
        positions = model.visual.trunk.forward_features(images)
        folded = model.visual.proj(model.visual.norm(positions.permute(0, 2, 3, 1).reshape(-1, positions.shape[1])))
        folded = folded.reshape(2, *positions.shape[2:], -1)
        torch.testing.assert_close(folded.mean((1, 2)), model.encode_image(images))
        text = model.encode_text(model.tokenizer(captions), normalize=True)
    for b, i, j, t in np.ndindex(*folded.shape[:3], 2):
        position = folded[b, i, j] / folded[b, i, j].norm()
        torch.testing.assert_close(similarity[b, t, i, j], position @ text[t])
    whole = focalclip.explain(model, images[:1], text="a dog").similarity
    torch.testing.assert_close(whole[0, 0], similarity[0, 0])


def test_nothing_stays_on_the_model(tower, model, images):
    def hooks(net):
        return sum(len(module._forward_hooks) for module in net.modules())

    before = hooks(model)
    model.visual.train()
    focalclip.explain(model, images)
    assert model.visual.training
    assert not model.training
    model.eval()
    assert hooks(model) == before
    with pytest.raises(RuntimeError):
        focalclip.explain(tower, torch.zeros(1, 7, SIDE, SIDE))  # seven channels
    assert hooks(tower) == 0
    assert all(parameter.grad is None for parameter in model.parameters())


def test_what_cannot_be_explained_is_said(tower, images):
    with pytest.raises(UserError, match="no focal modulation to explain"):
        focalclip.explain(torch.nn.Conv2d(3, 4, 1), images)
    with pytest.raises(UserError, match="stage: 2 is not there; choose one of 0 to 1"):
        focalclip.explain(tower, images, stage=2)
    with pytest.raises(UserError, match="block of stage 1: -3 is not there"):
        focalclip.explain(tower, images, block=-3)
    with pytest.raises(UserError, match="captions need a two-tower model"):
        focalclip.explain(tower, images, text="a dog")


def test_overlays_show_the_map_where_it_is_high():
    values = torch.zeros(4, 4)
    values[:, 3] = 2.0
    shown = np.asarray(figures.overlay(np.full((SIDE, SIDE, 3), 0.5, dtype=np.float32), values)).astype(int)
    assert shown.shape == (224, 224, 3)
    assert shown[:, -1, 0].min() > shown[:, -1, 2].max() + 60  # yellow
    assert shown[:, 0, 2].min() > shown[:, 0, 1].max() + 30  # violet
    assert (np.asarray(figures.overlay(np.zeros((SIDE, SIDE, 3)), torch.ones(2, 2))).std((0, 1)) == 0).all()


def test_the_command_writes_overlays_and_a_sheet_alike_each_time(model, tmp_path, capsys):
    focalclip.save(model, tmp_path / "run/model")
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    rng = np.random.default_rng(0)
    for name, shape in {"b.png": (40, 70, 3), "a $x$.jpg": (64, 64)}.items():
        Image.fromarray(rng.integers(0, 255, shape, dtype=np.uint8)).save(pictures / name)
    (pictures / "notes.txt").write_text("no picture")
    arguments = ["--model", str(tmp_path / "run"), "--stage", "0", "--text", "a dog", "日本", "--", str(pictures)]
    for output in ("one", "two"):
        assert main(["--output", str(tmp_path / output), *arguments]) == 0
    written = sorted(path.name for path in (tmp_path / "one").iterdir())
    maps = ["global", "level1", "level2", "modulator", "text1-a-dog", "text2-日本"]
    singles = [f"{prefix}-{item}.png" for prefix in ("000-a $x$", "001-b") for item in maps]
    assert written == sorted([*singles, "kernels.png", "sheet.png"])
    for name in written:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    assert "2 pictures, 6 maps each" in capsys.readouterr().out


def test_the_picture_shown_is_the_one_that_the_net_saw(model, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "p.png")
    _, row = figures.explain_picture(model, tmp_path / "p.png")
    np.testing.assert_allclose(row.pixels, pixels / 255, atol=1e-5)


@pytest.mark.parametrize(
    "words",
    ["P --text A B --", "--text A B -- P --output OUT", "P --text A B", "--text A B --output OUT P",
     "P --output OUT --text A B -- P"],
)  # fmt: skip
def test_captions_end_where_the_help_says(words, model, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    focalclip.save(model, tmp_path / "run/model")
    Image.new("RGB", (SIDE, SIDE)).save(tmp_path / "P", "PNG")
    assert main(["--model", "run", *words.split()]) == 0
    assert f"{words.count('P')} pictures, 6 maps each" in capsys.readouterr().out.replace("OUT", "")
    assert (tmp_path / ("OUT" if "OUT" in words else "explained") / "000-P-text2-B.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name picture files, or folders of them"),
        (["--text", "a dog", "dog.jpg"], "-- ends the captions: --text 'a dog' 'a cat' -- dog.jpg"),
        (["nowhere.png"], "nowhere.png: no such picture or folder"),
        (["{folder}"], "no pictures directly in this folder"),
        (["{folder}/x/bad.png", "--model", "{folder}/run"], "bad.png: cannot be read as a picture"),
        (["{folder}/x/bad.png", "--output", "{folder}/x/bad.png"], "is a file; name a folder"),
    ],
)
def test_mistakes_get_one_sentence(arguments, message, model, tmp_path, capsys):
    (tmp_path / "x").mkdir()
    (tmp_path / "x/bad.png").write_text("no picture")
    focalclip.save(model, tmp_path / "run/model")
    assert main([word.format(folder=tmp_path) for word in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
