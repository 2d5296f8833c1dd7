"""Two towers, exported folders, and the frozen encoder."""

import copy
import json
import pickle
import random
import shutil
import subprocess
import sys

import pytest
import torch
from helpers import run_ranks
from torch import nn

import focalclip
from focalclip.base.errors import UserError
from focalclip.base.files import file_sha256, read_sealed_json, write_sealed_json
from focalclip.base.strict import from_dict
from focalclip.config import ImageTowerConfig, ModelConfig, TextTowerConfig
from focalclip.models.clip import FocalCLIP
from focalclip.models.image import check_image_size
from focalclip.models.norm import GlobalBatchNorm, fold_into
from focalclip.models.text import create_text_tower, create_tokenizer

TINY = ModelConfig(
    embed_dim=32,
    image=ImageTowerConfig(name="focalnet_pico", image_size=32, init="fan_in", feature_norm="batch"),
    text=TextTowerConfig(context_length=8, width=32, heads=2, layers=1),
)


@pytest.fixture(scope="module")
def model() -> FocalCLIP:
    """A tiny model whose normalisation has seen data."""
    torch.manual_seed(0)
    model = FocalCLIP(TINY)
    for _ in range(20):
        model.encode_image(torch.randn(16, 3, 32, 32))
    return model.eval()


def outputs(model) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    size = model.config.image.image_size
    images = torch.randn(4, 3, size, size, generator=generator)
    tokens = model.tokenizer(["a cat", "two dogs", "zebra", "rain on a window"])
    with torch.no_grad():
        return {"image": model.encode_image(images), "text": model.encode_text(tokens)}


def test_embeddings_have_unit_length_and_the_scale_is_bounded(model):
    image, text, scale = model(torch.randn(2, 3, 32, 32), model.tokenizer(["a", "b"])).values()
    torch.testing.assert_close(image.norm(dim=1), torch.ones(2))
    torch.testing.assert_close(text.norm(dim=1), torch.ones(2))
    assert scale.shape == (1,)
    torch.testing.assert_close(scale, torch.tensor([1 / 0.07]))
    hot = FocalCLIP(TINY.model_copy(update={"init_logit_scale": 9.0}))
    torch.testing.assert_close(hot.scale(), torch.tensor([100.0]))


def test_a_scale_above_its_bound_comes_back_down(model):
    hot = FocalCLIP(TINY.model_copy(update={"init_logit_scale": 9.0}))
    hot.scale().sum().backward()
    assert hot.logit_scale.grad > 0  # descent lowers it, where clamp alone would give 0
    hot.logit_scale.grad = None
    (-hot.scale()).sum().backward()
    assert hot.logit_scale.grad == 0  # never further out
    model.zero_grad()
    model.scale().sum().backward()
    torch.testing.assert_close(model.logit_scale.grad, torch.tensor([1 / 0.07]))  # below the bound, d exp(x) / dx
    optimizer = torch.optim.SGD([hot.logit_scale], lr=0.02)
    for _ in range(10):
        optimizer.zero_grad()
        hot.scale().sum().backward()
        optimizer.step()
    assert hot.scale() < 100


def test_unit_vectors_are_float32_in_bfloat16(model):
    half = copy.deepcopy(model).bfloat16()
    image = half.encode_image(torch.randn(2, 3, 32, 32, dtype=torch.bfloat16), normalize=True)
    text = half.encode_text(half.tokenizer(["a", "b"]), normalize=True)
    for embeds in (image, text):
        assert embeds.dtype == torch.float32
        torch.testing.assert_close(embeds.norm(dim=1), torch.ones(2))


def test_an_exported_folder_gives_the_same_model(model, tmp_path):
    folder = focalclip.save(model, tmp_path / "export", {"step": 7})
    again = focalclip.load(folder)
    for name, expected in outputs(model).items():
        torch.testing.assert_close(outputs(again)[name], expected, rtol=1e-5, atol=1e-6)
    twice = focalclip.load(focalclip.save(again, tmp_path / "again"))
    for name, expected in outputs(again).items():
        assert torch.equal(outputs(twice)[name], expected)
    assert json.loads((folder / "focalclip.json").read_text())["provenance"] == {"step": 7}


OPEN_CLIP_LOADS = """
import os, sys, torch, torchvision  # what takes longest to import, once for both orders
small, named, bert = sys.argv[1:]

def write_outputs(folder, order):
    os.chdir(folder)
    model, _, preprocess = open_clip.create_model_and_transforms("local-dir:" + folder)
    tokens = open_clip.get_tokenizer("local-dir:" + folder)(["a cat", "two dogs", "zebra", "rain on a window"])
    images = torch.randn(4, 3, *model.visual.image_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.save({"image": model.eval().encode_image(images), "text": model.encode_text(tokens)}, order + ".pt")

child = os.fork()
if child == 0:
    import focalclip
    import open_clip
    write_outputs(small, "before")
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
import open_clip
write_outputs(named, "without")
try:
    write_outputs(small, "without")
except RuntimeError as error:
    assert "Unknown model" in str(error)
assert "focalclip" not in sys.modules
import focalclip
write_outputs(small, "after")
write_outputs(bert, "after")
"""


@pytest.fixture(scope="module")
def exports(model, small_bert, tmp_path_factory):
    """Exported folders of three models, with what open_clip makes of them in ORDER.pt.

    ORDER says when focalclip was imported: before open_clip, after it, or not at all.
    """
    image = TINY.image.model_copy(update={"name": "focalnet_tiny_srf", "image_size": 64})
    text = TextTowerConfig(name=f"transformers:{small_bert}", context_length=8)
    models = {
        "small": model,
        "named": FocalCLIP(TINY.model_copy(update={"image": image})).eval(),
        "bert": FocalCLIP(TINY.model_copy(update={"text": text})).eval(),
    }
    root = tmp_path_factory.mktemp("exports")
    folders = {name: focalclip.save(exported, root / name) for name, exported in models.items()}
    command = [sys.executable, "-c", OPEN_CLIP_LOADS, *map(str, folders.values())]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "random" not in result.stderr.lower()
    return folders


@pytest.mark.parametrize(
    ("name", "order"), [("small", "before"), ("small", "after"), ("named", "without"), ("bert", "after")]
)
def test_open_clip_reloads_an_export(name, order, exports):
    again = focalclip.load(exports[name])
    written = torch.load(exports[name] / f"{order}.pt", weights_only=True)
    for key, expected in outputs(again).items():
        torch.testing.assert_close(written[key], expected, rtol=1e-5, atol=1e-5)


def test_an_export_says_when_it_requires_focalclip(exports):
    assert not (exports["small"] / "without.pt").exists()
    said = {name: json.loads((exports[name] / "open_clip_config.json").read_text()).get("requires") for name in exports}
    assert said == {"small": "import focalclip", "named": None, "bert": "import focalclip"}


def test_an_export_keeps_the_hub_name_of_its_text_tower(small_bert, tmp_path):
    text = TextTowerConfig(name=f"transformers:{small_bert}", context_length=8)
    model = FocalCLIP(TINY.model_copy(update={"text": text}))
    hub = text.model_copy(update={"name": "transformers:org/bert"})
    model.tokenizer  # noqa: B018 - while its files can be found
    model.config = TINY.model_copy(update={"text": hub})
    folder = focalclip.save(model, tmp_path / "export")
    written = json.loads((folder / "open_clip_config.json").read_text())
    assert written["model_cfg"]["text_cfg"]["hf_model_name"] == "org/bert"
    again = focalclip.load(folder)  # from the files in the folder, without the hub
    torch.testing.assert_close(outputs(again)["text"], outputs(model.eval())["text"])


def test_a_damaged_export_is_named(model, tmp_path):
    folder = focalclip.save(model, tmp_path / "export")
    weights = folder / "open_clip_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"open_clip_model.safetensors: damaged or changed: it differs from its hash"):
        focalclip.load(folder)
    weights.unlink()
    with pytest.raises(UserError, match=r"open_clip_model.safetensors is missing"):
        focalclip.load(folder)
    with pytest.raises(UserError, match="no such folder"):
        focalclip.load(tmp_path / "nowhere")
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match="exists and is not an exported model"):
        focalclip.save(model, tmp_path / "other")


def test_a_bit_that_changed_in_any_file_of_an_export_is_found(model, tmp_path):
    folder = focalclip.save(model, tmp_path / "export", {"step": 7})
    rng = random.Random(0)
    files = sorted(folder.iterdir())
    assert len(files) == 3
    for _ in range(20):
        for file in files:
            whole = file.read_bytes()
            broken = bytearray(whole)
            broken[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
            file.write_bytes(broken)
            with pytest.raises(UserError, match=f"{file.name}: "):
                focalclip.load(folder)
            file.write_bytes(whole)
    assert focalclip.load(folder)


def test_weights_that_are_not_finite_are_not_written(model, tmp_path):
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.logit_scale.fill_(float("nan"))
    with pytest.raises(UserError, match=r"1 of \d+ tensors are not finite \(logit_scale"):
        focalclip.save(broken, tmp_path / "export")
    assert list(tmp_path.iterdir()) == []


def test_weights_of_another_model_are_refused(model, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = focalclip.save(model, tmp_path / "export")
    file, ours = folder / "open_clip_model.safetensors", folder / "focalclip.json"
    weights = load_file(file)
    del weights["text.ln_final.bias"]
    save_file(weights, file)
    content = read_sealed_json(ours)
    content["files"][file.name] = file_sha256(file)
    write_sealed_json(ours, content)
    with pytest.raises(UserError, match=r"1 missing: text.ln_final.bias"):
        focalclip.load(folder)


def test_the_frozen_encoder_stays_frozen(model, tmp_path):
    focalclip.save(model, tmp_path / "run" / "model")
    encoder = focalclip.load_image_encoder(tmp_path / "run")
    images = torch.stack([encoder.preprocess(picture) for picture in pictures()])
    assert images.shape == (2, 3, 32, 32)
    features = encoder(images)
    assert features.shape == (2, encoder.num_features)
    assert not features.requires_grad
    maps = encoder.feature_maps(images)
    assert [tuple(x.shape) for x in maps] == [
        (2, dim, 32 // stride, 32 // stride) for dim, stride in zip(encoder.feature_dims, encoder.strides, strict=True)
    ]
    before = {name: x.clone() for name, x in encoder.state_dict().items()}
    head = nn.Linear(encoder.num_features, 3)
    surrounding = nn.Sequential(encoder, head).train()
    assert not any(module.training for module in encoder.modules())
    surrounding(images).sum().backward()
    assert all(p.grad is None for p in encoder.parameters())
    assert head.weight.grad is not None
    assert all(torch.equal(x, before[name]) for name, x in encoder.state_dict().items())


def test_a_bfloat16_encoder_takes_what_its_preprocessing_gives(model, tmp_path):
    focalclip.save(model, tmp_path / "export")
    encoder = focalclip.load_image_encoder(tmp_path / "export", dtype=torch.bfloat16)
    images = torch.stack([encoder.preprocess(picture) for picture in pictures()])
    assert images.dtype == torch.float32
    assert encoder(images).dtype == torch.bfloat16
    assert [x.dtype for x in encoder.feature_maps(images)] == [torch.bfloat16] * len(encoder.strides)
    again = pickle.loads(pickle.dumps(encoder))
    assert torch.equal(again(again.preprocess(pictures()[0])[None]), encoder(images[:1]))


def test_a_timm_encoder_preprocesses_as_its_weights_expect():
    import timm
    from PIL import Image

    from focalclip.interop.timm import timm_preprocess

    picture = Image.effect_noise((300, 260), 80).convert("RGB")
    trunk = timm.create_model("resnet18")
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(trunk))
    assert torch.equal(timm_preprocess("resnet18")(picture), transform(picture))
    assert timm_preprocess("focalnet_large_fl3")(picture.convert("L")).shape == (3, 384, 384)


@pytest.mark.parametrize(
    ("load", "source", "message"),
    [
        (focalclip.load, "open_clip:RN50", r"open_clip:RN50/PRETRAINED with one of openai, yfcc15m, cc12m"),
        (focalclip.load, "open_clip:coca_base", "open_clip has no weights of that name"),
        (focalclip.load, "open_clip:RN50/nothing", "open_clip cannot load it: Pretrained value 'nothing'"),
        (focalclip.load, "open_clip:local-dir:/no/where", "local-dir:/no/where: open_clip cannot load it: Directory"),
        (focalclip.load, "timm:resnet18", "load it with focalclip.load_image_encoder"),
        (focalclip.load, "focalnet_tiny_srf.pth", "load it with focalclip.load_image_encoder"),
        (
            focalclip.load,
            "nowhere",
            r"nowhere: no such folder; give one of: run .*open_clip:NAME/PRETRAINED, ",
        ),
        (focalclip.load_image_encoder, "open_clip:RN50", r"open_clip:RN50/PRETRAINED with one of openai"),
        (focalclip.load_image_encoder, "timm:focalnet_nano", "timm cannot build it: No pretrained weights exist"),
        (
            focalclip.load_image_encoder,
            "nowhere",
            r"folder; give one of: .*timm:NAME, .*, a file of FocalNet weights$",
        ),
    ],
)
def test_nothing_loads_without_trained_weights(load, source, message):
    with pytest.raises(UserError, match=message):
        load(source)


def test_flags_are_for_files_of_the_authors():
    with pytest.raises(UserError, match="timm:resnet18: normalize_modulator is for files of FocalNet weights"):
        focalclip.load_image_encoder("timm:resnet18", normalize_modulator=True)


def pictures():
    from PIL import Image

    return [Image.new("RGB", (50, 40), "red"), Image.new("L", (20, 90))]


@pytest.fixture(scope="module")
def small_bert(tmp_path_factory):
    """A Hugging Face encoder with its tokenizer, in the layout that the hub has."""
    import transformers

    folder = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "two", "dogs", "zebra", "rain", "on", "window"]
    (folder / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48
    )
    config.save_pretrained(folder)
    return folder


def test_a_hugging_face_text_tower_trains_and_travels(small_bert, tmp_path):
    text = TextTowerConfig(name=f"transformers:{small_bert}", context_length=8)
    model = FocalCLIP(TINY.model_copy(update={"text": text}))
    tokens = model.tokenizer(["a cat", "two dogs"])
    assert tokens.shape == (2, 8)
    padded = nn.functional.pad(tokens, (0, 4))
    model.eval()
    torch.testing.assert_close(model.encode_text(tokens), model.encode_text(padded))  # padding does not count
    model.train().encode_text(tokens).sum().backward()
    assert all(p.grad is not None for p in model.text.parameters())
    folder = focalclip.save(model.eval(), tmp_path / "export")
    again = focalclip.load(folder)
    torch.testing.assert_close(outputs(again)["text"], outputs(model)["text"])
    with pytest.raises(UserError, match="transformers cannot load 'nowhere/nothing'"):
        FocalCLIP(TINY.model_copy(update={"text": TextTowerConfig(name="transformers:nowhere/nothing")}))


def test_half_precision_checkpoints_become_float32(small_bert, tmp_path):
    import transformers

    shutil.copytree(small_bert, tmp_path, dirs_exist_ok=True)
    transformers.BertModel(transformers.BertConfig.from_pretrained(small_bert)).half().save_pretrained(tmp_path)
    text = TextTowerConfig(name=f"transformers:{tmp_path}", context_length=8, pretrained=True)
    model = focalclip.create_model(TINY.model_copy(update={"text": text}))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.encode_text(model.tokenizer(["a cat"])).shape == (1, 32)


def test_unsuited_encoders_are_refused_at_once(small_bert, tmp_path):
    import transformers

    transformers.GPT2Config().save_pretrained(tmp_path / "gpt2")
    transformers.CLIPConfig().save_pretrained(tmp_path / "clip")
    for name, message in [
        ("gpt2", r"gpt2' \(gpt2\) has no pad_token_id"),
        ("clip", r"clip' \(clip\) has no hidden_size"),
    ]:
        with pytest.raises(UserError, match=message):
            create_text_tower(TextTowerConfig(name=f"transformers:{tmp_path / name}"), 32)
    with pytest.raises(UserError, match=r"model.text.context_length=600 is more than .* use at most 512"):
        create_text_tower(TextTowerConfig(name=f"transformers:{small_bert}", context_length=600), 32)
    shutil.copytree(small_bert, tmp_path / "other")
    transformers.BertConfig.from_pretrained(small_bert, pad_token_id=3).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="pads with token 0, its encoder masks token 3"):
        create_tokenizer(TextTowerConfig(name=f"transformers:{tmp_path / 'other'}"))


def test_unknown_names_are_errors():
    with pytest.raises(UserError, match="focalnet_nano"):
        focalclip.create_image_tower("focalnet_none")
    with pytest.raises(UserError, match="not a two-tower model"):
        focalclip.create_model("focalclip_none")
    with pytest.raises(UserError, match="is not a model of timm"):
        focalclip.create_image_tower("timm:swin_none")


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("image", {"name": "timm:resnet18", "mixer": "additive"}, "mixer would be ignored .* set mixer=focal_mod"),
        ("image", {"name": "timm:resnet18", "activation_checkpointing": True}, "set activation_checkpointing=False"),
        (
            "text",
            {"name": "transformers:bert-base-uncased", "width": 64, "heads": 2, "causal": False},
            "text: width, heads, causal would be ignored by .*; leave out, or set width=512, heads=8, causal=True",
        ),
    ],
)
def test_settings_that_a_tower_would_ignore_are_refused(section, values, message):
    with pytest.raises(UserError, match=message):
        from_dict(ModelConfig, {section: values}, "config.yaml")


def test_a_timm_tower_serves_as_image_tower():
    tower = focalclip.create_image_tower("timm:resnet18")
    assert tower(torch.randn(1, 3, 64, 64)).shape == (1, tower.num_features)
    shapes = [tuple(x.shape[1:]) for x in tower.feature_maps(torch.randn(1, 3, 64, 64))]
    assert shapes == [
        (dim, 64 // stride, 64 // stride) for dim, stride in zip(tower.feature_dims, tower.strides, strict=True)
    ]


def test_a_timm_tower_tells_the_width_of_what_it_returns():
    tower = focalclip.create_image_tower("timm:mobilenetv3_small_050").eval()
    assert tower(torch.randn(1, 3, 32, 32)).shape == (1, tower.num_features)
    with pytest.raises(UserError, match=r"model.image.drop_path=0.1: timm:vgg11 has no stochastic depth"):
        focalclip.create_image_tower("timm:vgg11", drop_path=0.1)


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        (
            "timm:vit_tiny_patch16_224",
            48,
            r"image_size=48 does not suit timm:vit_tiny_patch16_224: Input height \(48\)",
        ),
        ("timm:swin_tiny_patch4_window7_224", 48, r"image_size=48 does not suit timm:swin"),
        ("focalnet_tiny_srf", 16, r"image_size=16 does not suit focalnet_tiny_srf: .* this FocalNet needs 32"),
    ],
)
def test_a_size_that_the_tower_refuses_is_known_at_once(name, size, message):
    with pytest.raises(UserError, match=message):
        FocalCLIP(TINY.model_copy(update={"image": ImageTowerConfig(name=name, image_size=size)}))


def test_a_size_that_the_tower_takes_changes_nothing():
    tower = focalclip.create_image_tower("timm:swin_tiny_patch4_window7_224", drop_path=0.1)
    before, state = torch.get_rng_state(), {name: x.clone() for name, x in tower.state_dict().items()}
    check_image_size(tower, ImageTowerConfig(name="timm:swin_tiny_patch4_window7_224", image_size=224))
    assert tower.training
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(x, state[name]) for name, x in tower.state_dict().items())


def test_global_batch_norm_equals_batch_norm_and_folds_away():
    ours, theirs = GlobalBatchNorm(6), nn.BatchNorm1d(6, affine=False)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        x = 3 + 2 * torch.randn(10, 6, generator=generator)
        torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_var, theirs.running_var)
    projection = nn.Linear(6, 4)
    weight, bias = fold_into(ours.eval(), projection)
    torch.testing.assert_close(nn.functional.linear(x, weight, bias), projection(ours(x)), rtol=1e-5, atol=1e-5)
    assert ours.bfloat16().running_mean.dtype == torch.float32


def _norm_on_rank(x, target):
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    own = slice(rank * len(x) // world, (rank + 1) * len(x) // world)
    norm, x = GlobalBatchNorm(x.shape[1]), x[own].clone().requires_grad_()
    ((norm(x) - target[own]) ** 2).mean().backward()
    return {"grad": x.grad / world, "mean": norm.running_mean, "var": norm.running_var}


def test_global_batch_norm_is_the_same_on_two_ranks():
    generator = torch.Generator().manual_seed(0)
    x, target = torch.randn(2, 8, 3, generator=generator)
    norm, whole = nn.BatchNorm1d(3, affine=False), x.clone().requires_grad_()
    ((norm(whole) - target) ** 2).mean().backward()
    ranks = run_ranks(_norm_on_rank, 2, x, target)
    torch.testing.assert_close(torch.cat([result["grad"] for result in ranks]), whole.grad)
    for result in ranks:
        torch.testing.assert_close(result["mean"], norm.running_mean)
        torch.testing.assert_close(result["var"], norm.running_var)


def test_importing_focalclip_loads_nothing_heavy():
    code = "import focalclip, sys; print([m for m in ('torch', 'timm', 'open_clip', 'deepspeed') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
