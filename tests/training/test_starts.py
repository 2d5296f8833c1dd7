"""Starts from trained towers: every source for either tower, what is fitted, what is said and what is refused."""

import json
import re
import shlex

import helpers_run
import open_clip
import pytest
import timm
import torch
import transformers
from random_weights import randomise
from safetensors.torch import save_file
from tiny_shards import write_shards

import focalclip
from focalclip.base.errors import UserError
from focalclip.config import ImageTowerConfig, ModelConfig, RunConfig, TextTowerConfig
from focalclip.interop.start import check_sources, start, start_from
from focalclip.models.clip import FocalCLIP

TEXT = {"context_length": 8, "width": 32, "heads": 2, "layers": 2}
FOCALNET = {"name": "focalnet_pico", "image_size": 32}
VIT = {"name": "timm:test_vit", "image_size": 160, "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


def tiny(image=None, text=None, embed_dim=32):
    """A model with fresh weights, in evaluation mode."""
    torch.manual_seed(1)
    sections = {"image": ImageTowerConfig(**FOCALNET | (image or {})), "text": TextTowerConfig(**TEXT | (text or {}))}
    return FocalCLIP(ModelConfig(embed_dim=embed_dim, **sections)).eval()


def trained(image=None, text=None, embed_dim=32):
    """A model whose every parameter has a value that matters."""
    return randomise(tiny(image, text, embed_dim))


def equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return focalclip.save(trained(), tmp_path_factory.mktemp("exported") / "model")


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """timm's smallest ViT with a head of 5 classes, as a folder that timm loads; and the model."""
    torch.manual_seed(2)
    model = randomise(timm.create_model("test_vit", num_classes=5))
    folder = tmp_path_factory.mktemp("vit")
    facts = {"mean": [0.5] * 3, "std": [0.5] * 3, "classifier": "head", "first_conv": "patch_embed.proj"}
    facts |= {"input_size": [3, 160, 160], "fixed_input_size": True, "num_classes": 5}
    config = {"architecture": "test_vit", "num_classes": 5, "pretrained_cfg": facts}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), folder / "model.safetensors")
    return folder, model


def files_of_focalnet(folder, tower):
    weights = tower.state_dict()
    torch.save({"model": focalclip.weights.to_official(weights)}, folder / "official.pth")
    save_file({n: x.contiguous() for n, x in focalclip.weights.to_timm(weights).items()}, folder / "timm.safetensors")
    torch.save(focalclip.weights.to_transformers(weights), folder / "transformers.bin")
    return [folder / "official.pth", folder / "timm.safetensors", folder / "transformers.bin"]


def test_a_focalnet_starts_from_a_file_in_any_dialect(tmp_path):
    source = trained()
    for path in files_of_focalnet(tmp_path, source.visual.trunk):
        model = tiny({"pretrained": str(path)})
        text, projection = model.text.state_dict(), model.visual.proj.weight.clone()
        said = start(model)
        assert equal(model.visual.trunk, source.visual.trunk)
        assert torch.equal(model.visual.proj.weight, projection)
        assert text.keys() == model.text.state_dict().keys()
        tensors = len(source.visual.trunk.state_dict())
        assert said == [
            f"image tower: {path}, {tensors} tensors; the projection is fresh",
            "text tower: fresh weights",
        ]


def test_either_tower_starts_from_an_export_a_run_and_open_clip(exported, tmp_path):
    source = focalclip.load(exported)
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("{}")
    (run / "model").symlink_to(exported)
    for name in (str(exported), str(run), f"open_clip:local-dir:{exported}"):
        model = tiny({"pretrained": name}, {"pretrained": name})
        said = start(model)
        assert equal(model.visual, source.visual)
        assert equal(model.text, source.text)
        assert [line.rpartition("; ")[2] for line in said] == ["its projection too"] * 2
        other = tiny({"pretrained": name}, {"pretrained": name}, embed_dim=16)
        said = start(other)
        assert equal(other.visual.trunk, source.visual.trunk)
        assert [line.rpartition("; ")[2] for line in said] == ["the projection is fresh"] * 2


def test_a_tower_of_timm_starts_from_timm_at_its_own_and_at_another_resolution(vit, tmp_path):
    folder, theirs = vit
    for source in (f"timm:local-dir:{folder}", str(folder / "model.safetensors")):
        model = tiny(VIT | {"pretrained": source})
        said = start(model)
        theirs.reset_classifier(0)
        assert equal(model.visual.trunk.trunk, theirs.eval())
        assert "fitted" not in said[0]
        smaller = tiny(VIT | {"pretrained": source, "image_size": 96, "options": {"img_size": 96}})
        assert "fitted: pos_embed (1, 101, 64) to (1, 37, 64)" in start(smaller)[0]
        expected = timm.create_model(f"local-dir:{folder}", pretrained=True, img_size=96, num_classes=0)
        assert equal(smaller.visual.trunk.trunk, expected)


def test_a_vit_of_a_run_is_fitted_too(tmp_path):
    source = trained(VIT)
    folder = focalclip.save(source, tmp_path / "exported")
    model = tiny(VIT | {"pretrained": str(folder), "image_size": 96, "options": {"img_size": 96}})
    assert "fitted: pos_embed (1, 101, 64) to (1, 37, 64)" in start(model)[0]
    theirs = timm.create_model("test_vit", num_classes=0)
    theirs.load_state_dict(source.visual.trunk.trunk.state_dict())
    from timm.models.vision_transformer import checkpoint_filter_fn

    trunk = timm.create_model("test_vit", num_classes=0, img_size=96)
    expected = checkpoint_filter_fn(theirs.state_dict(), trunk)
    assert torch.equal(model.visual.trunk.trunk.pos_embed, expected["pos_embed"])


def test_positions_of_text_are_fitted_by_open_clip(exported):
    from open_clip.model import resize_text_pos_embed

    model = tiny(text={"pretrained": str(exported), "context_length": 5})
    said = start(model)
    assert "fitted: positional_embedding (8, 32) to (5, 32)" in said[1]
    weights = dict(focalclip.load(exported).text.state_dict())
    resize_text_pos_embed(weights, tiny(text={"context_length": 5}).text)
    assert torch.equal(model.text.positional_embedding, weights["positional_embedding"])


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "two", "dogs"]
    (folder / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    config = transformers.BertConfig(vocab_size=len(words), **sizes)
    model = randomise(transformers.BertModel(config, add_pooling_layer=False))
    model.save_pretrained(folder)
    return folder, model


def test_a_text_encoder_of_transformers_starts_from_what_is_published_under_its_name(bert):
    folder, theirs = bert
    name = f"transformers:{folder}"
    for pretrained in (True, name):
        text = TextTowerConfig(name=name, context_length=8, pretrained=pretrained)
        config = ModelConfig(embed_dim=32, image=ImageTowerConfig(**FOCALNET), text=text)
        model = focalclip.create_model(config)
        assert equal(model.text.transformer, theirs)
    other = text.model_copy(update={"pretrained": None})
    assert not equal(focalclip.create_model(config.model_copy(update={"text": other})).text.transformer, theirs)


def test_a_focalnet_of_transformers_is_an_image_tower(tmp_path):
    config = transformers.FocalNetConfig(embed_dim=96, depths=[2, 2, 6, 2], focal_levels=[2] * 4)
    randomise(transformers.FocalNetModel(config)).save_pretrained(tmp_path)
    transformers.BitImageProcessor(image_mean=[0.485, 0.456, 0.406]).save_pretrained(tmp_path)
    image = {"name": "focalnet_tiny_srf", "image_size": 64, "pretrained": f"transformers:{tmp_path}"}
    with pytest.raises(UserError, match=r"another mean than .* set --model\.image\.mean") as wrong:
        start(tiny(image | {"mean": (0.1, 0.1, 0.1)}))
    assert str(wrong.value).endswith("--model.image.mean 0.485 0.456 0.406")
    transformers.BitImageProcessor(image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225]).save_pretrained(
        tmp_path
    )
    model = tiny(image)
    start(model)
    encoder = focalclip.load_image_encoder(f"transformers:{tmp_path}")
    assert equal(model.visual.trunk, encoder.tower)


@pytest.mark.parametrize(
    ("image", "text", "message"),
    [
        (
            {"pretrained": "nowhere"},
            {},
            r"^model\.image\.pretrained: nowhere: no such file or folder; give one of: run",
        ),
        ({}, {"pretrained": "nowhere"}, r"^model\.text\.pretrained: nowhere: no such file or folder; give one of: run"),
        ({}, {"pretrained": "timm:test_vit"}, r"timm:test_vit: no text towers have this prefix"),
        ({}, {"pretrained": "weights.pth"}, r"a file of weights is for the image tower"),
        ({}, {"pretrained": True}, r"text\.pretrained=true: no weights are published under the name open_clip"),
    ],
)
def test_a_source_that_cannot_be_is_known_before_the_work(image, text, message):
    config = tiny(image, text).config
    with pytest.raises(UserError, match=message) as raised:
        check_sources(RunConfig(model=config))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("image", "text", "message"),
    [
        ({"name": "focalnet_nano"}, {}, r"not the weights of this FocalNet \(\d+ missing: .*layers\.1\.blocks\.1"),
        (VIT | {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}, {}, r"VisionTransformer \(\d+ missing"),
        ({"std": (0.5, 0.5, 0.5)}, {}, r"another std than model\.image\.std=.*set --model\.image\.std 0\.229 0\.224"),
        ({}, {"layers": 3}, r"not the weights of this TextTransformer \(12 missing: transformer\.resblocks\.2"),
        ({}, {"width": 64}, r"of another shape: .*ln_final"),
        ({}, {"heads": 4}, r"its embeddings of captions differ here"),
        ({}, {"causal": False}, r"its embeddings of captions differ here"),
    ],
)
def test_weights_of_another_tower_are_one_sentence(image, text, message, exported):
    key = image if image else text
    key = key | {"pretrained": str(exported)}
    with pytest.raises(UserError, match=message) as raised:
        start(tiny(key, {}) if image else tiny({}, key))
    assert "\n" not in str(raised.value)
    assert str(raised.value).startswith(f"model.{'image' if image else 'text'}.pretrained: {exported}: ")


def test_a_name_without_published_weights_says_so():
    with pytest.raises(
        UserError, match=r"^model\.image\.pretrained: timm:focalnet_pico: timm cannot build it: No pretr"
    ):
        start(tiny({"pretrained": True}))


def test_partial_weights_are_refused(vit, tmp_path):
    _, theirs = vit
    weights = {n: x for n, x in theirs.state_dict().items() if not n.startswith("blocks.1.")}
    save_file(weights, tmp_path / "part.safetensors")
    with pytest.raises(UserError, match=r"\d+ missing: blocks\.1\."):
        start(tiny(VIT | {"pretrained": str(tmp_path / "part.safetensors")}))


def test_a_run_with_feature_norm_starts_another_with_its_own_configuration(tmp_path):
    source = trained({"feature_norm": "batch"})
    generator = torch.Generator().manual_seed(3)
    source.visual.norm.running_mean.copy_(torch.randn(192, generator=generator))
    source.visual.norm.running_var.copy_(torch.rand(192, generator=generator) + 0.5)
    folder = focalclip.save(source, tmp_path / "exported")
    model = tiny({"feature_norm": "batch"})
    start_from(model, str(folder))
    torch.testing.assert_close(model.state_dict(), source.state_dict(), rtol=1e-5, atol=1e-6)
    images = torch.randn(4, 3, 32, 32, generator=generator)
    torch.testing.assert_close(model.train().encode_image(images), source.train().encode_image(images))
    exported = focalclip.load(folder)
    one = tiny({"feature_norm": "batch", "pretrained": str(folder)})
    assert start(one)[0].endswith("its projection too")
    torch.testing.assert_close(one.eval().encode_image(images), exported.encode_image(images), rtol=1e-4, atol=1e-4)
    folded = tiny()
    start_from(folded, str(folder))
    torch.testing.assert_close(folded.eval().encode_image(images), exported.encode_image(images))


def test_a_whole_model_has_what_a_tower_names_too(exported):
    model = tiny({"pretrained": "timm:anything"})
    said = start(model, str(exported))
    assert said[0] == (
        f"image tower: {exported} (train.init_from), which has this tower too: model.image.pretrained is not used"
    )
    assert equal(model, focalclip.load(exported))


def test_an_activation_that_differs_is_found(tmp_path):
    vision = {"image_size": 64, "patch_size": 32, "width": 64, "layers": 2, "head_width": 32, "mlp_ratio": 4.0}
    config = {"embed_dim": 32, "vision_cfg": vision, "text_cfg": TEXT}
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    pixels = {"mean": mean, "std": std, "interpolation": "bicubic", "resize_mode": "shortest"}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": pixels}))
    theirs = randomise(open_clip.CLIP(**config))
    weights = {name: x.contiguous() for name, x in theirs.state_dict().items()}
    save_file(weights, tmp_path / "open_clip_model.safetensors")
    source = f"open_clip:local-dir:{tmp_path}"
    options = {"img_size": 64, "embed_dim": 64, "depth": 2, "num_heads": 2}
    image = {"image_size": 64, "options": options, "pretrained": source, "mean": mean, "std": std}
    model = tiny(image | {"name": "timm:vit_base_patch32_clip_224"}, {"pretrained": source})
    assert [line.rpartition("; ")[2] for line in start(model)] == ["its projection too"] * 2
    images, tokens = torch.randn(2, 3, 64, 64), model.tokenizer(["a cat", "two dogs"])
    with torch.no_grad():
        torch.testing.assert_close(model.encode_image(images), theirs.encode_image(images), rtol=1e-4, atol=1e-4)
        padded = torch.nn.functional.pad(tokens, (0, 8 - tokens.shape[1]))
        torch.testing.assert_close(model.encode_text(tokens), theirs.encode_text(padded), rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="its embeddings of images differ here"):
        start(tiny(image | {"name": "timm:vit_base_patch32_clip_quickgelu_224"}))
    larger = image | {"image_size": 96, "options": options | {"img_size": 96}}
    model = tiny(larger | {"name": "timm:vit_base_patch32_clip_224"})
    assert "fitted: pos_embed (5, 64) to (1, 10, 64)" in start(model)[0]
    from timm.models.vision_transformer import checkpoint_filter_fn

    expected = checkpoint_filter_fn(theirs.state_dict(), model.visual.trunk.trunk)
    assert torch.equal(model.visual.trunk.trunk.pos_embed, expected["pos_embed"])


def test_the_commands_of_the_page_run(tmp_path):
    """Those of docs/starts.md, on small towers of local files in the place of timm's."""
    block = re.search(r"```bash\n(.*?)```", (helpers_run.ROOT / "docs" / "starts.md").read_text(), re.DOTALL)[1]
    commands = [shlex.split(line) for line in block.replace("\\\n", " ").splitlines() if not line.startswith("#")]
    write_shards(tmp_path / "shards", [16])
    (tmp_path / "timm").mkdir()
    from focalclip.interop.card import Trained
    from focalclip.interop.timm import write_timm

    write_timm(Trained("warm", trained(), {}, {}), tmp_path / "timm")
    small = ["--model.image.name", "focalnet_pico", "--model.image.image-size", "32", "--data.batch-size", "8"]
    small += ["--model.text.width", "32", "--model.text.heads", "2", "--model.text.layers", "1", "--data.workers", "0"]
    small += ["--train.steps", "2", "--optim.warmup-steps", "0", "--train.precision", "fp32", "--train.log-every", "1"]
    small += ["--runs-dir", str(tmp_path / "runs")]
    here = {"shards": str(tmp_path / "shards"), "runs/warm": str(tmp_path / "runs" / "warm")}
    here |= {"timm:focalnet_tiny_lrf": f"timm:local-dir:{tmp_path / 'timm'}"}
    here |= {"runs/warm/config.yaml": str(tmp_path / "runs" / "warm" / "config.yaml")}
    assert len(commands) == 4
    for words in commands:
        lit = ["--model.image.pretrained", here["timm:focalnet_tiny_lrf"]] if "lit_tiny_lrf" in words else []
        done = [here.get(word, word) for word in words] + small + lit
        process = helpers_run.Forked(done, tmp_path, 0)
        out, err = process.communicate(120)
        assert process.returncode == 0, err
        assert "weights    image tower: " in out
        assert "parameters" in out
