"""Encoders and models of other libraries behind our interface give what those libraries give."""

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import timm
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

import focalclip
from focalclip.base.errors import UserError
from focalclip.config import ImageTowerConfig, ModelConfig, TextTowerConfig
from focalclip.interop.export import export
from focalclip.interop.open_clip import OpenClipTower
from focalclip.models.clip import FocalCLIP
from focalclip.models.focalnet.variants import FOCALNETS

VIT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "patch_size": 8}
PICTURE = Image.effect_noise((50, 40), 90)


def check(encoder, pooled: torch.Tensor, strides: list[int]) -> list[torch.Tensor]:
    """Assert the pooled features of PICTURE and the shapes that the encoder tells; returns its maps."""
    images = encoder.preprocess(PICTURE)[None]
    torch.testing.assert_close(encoder(images), pooled, rtol=1e-5, atol=1e-5)
    assert pooled.shape == (1, encoder.num_features)
    maps = encoder.feature_maps(images)
    assert encoder.strides == strides
    assert [tuple(x.shape) for x in maps] == [
        (1, dim, images.shape[2] // stride, images.shape[3] // stride)
        for dim, stride in zip(encoder.feature_dims, strides, strict=True)
    ]
    assert not any(x.requires_grad for x in [*encoder.parameters(), *maps])
    preprocess = pickle.loads(pickle.dumps(encoder.preprocess))  # as for the processes of a loader
    assert torch.equal(preprocess(PICTURE)[None], images)
    copy = pickle.loads(pickle.dumps(encoder))
    torch.testing.assert_close(copy(copy.preprocess(PICTURE)[None]), encoder(images), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(copy.feature_maps(images), maps, rtol=1e-5, atol=1e-5)
    deep = Image.fromarray(np.asarray(PICTURE).astype(np.uint16) * 257)
    assert torch.equal(encoder.preprocess(deep)[None], images), "a picture of 16 bits is no white square"
    with pytest.raises(UserError, match=r"normalised floats, not torch\.uint8"):
        encoder(images.to(torch.uint8))
    return maps


OPEN_CLIP_TOWERS = {
    "vit": ({"image_size": 32, "patch_size": 8, "width": 16, "layers": 2, "head_width": 8}, [8, 8]),
    "resnet": ({"image_size": 64, "width": 8, "layers": (1, 1, 1, 1), "head_width": 64}, [4, 8, 16, 32]),
    "timm": (
        {"image_size": 64, "timm_model_name": "test_convnext", "timm_pool": "avg", "timm_proj": "linear"},
        [4, 8, 16, 32],
    ),
    "coca": (
        {"image_size": 32, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8, "output_tokens": True},
        [8],
    ),
}


def open_clip_folder(folder: Path, vision: dict) -> str:
    """A folder that open_clip loads as ``local-dir:``."""
    config = {
        "embed_dim": 12,
        "vision_cfg": vision,
        "text_cfg": {"context_length": 8, "width": 16, "heads": 2, "layers": 1},
    }
    torch.manual_seed(0)
    kind = open_clip.CustomTextCLIP if "timm_model_name" in vision else open_clip.CLIP
    weights = kind(**config).state_dict()
    preprocess = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4], "interpolation": "bicubic", "resize_mode": "squash"}
    if kind is open_clip.CustomTextCLIP:
        config["custom_text"] = True
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    save_file({name: x.contiguous() for name, x in weights.items()}, folder / "open_clip_model.safetensors")
    return f"open_clip:local-dir:{folder}"


@pytest.mark.parametrize("name", OPEN_CLIP_TOWERS)
def test_an_open_clip_tower_gives_what_its_projection_takes(name, tmp_path):
    vision, strides = OPEN_CLIP_TOWERS[name]
    source = open_clip_folder(tmp_path / "model", vision)
    encoder, whole = focalclip.load_image_encoder(source), focalclip.load(source)
    images = encoder.preprocess(PICTURE)[None]
    assert torch.equal(images, whole.preprocess(PICTURE)[None])
    with torch.no_grad():
        visual, features = whole.model.visual, encoder(images)
        project = {"timm": lambda x: visual.head(x), "resnet": lambda x: x}.get(name, lambda x: x @ visual.proj)
        expected = whole.encode_image(images)
        expected = expected[0] if isinstance(expected, tuple) else expected
        torch.testing.assert_close(project(features), expected, rtol=1e-5, atol=1e-5)
    check(encoder, features, strides)


def test_a_tower_without_maps_says_so():
    visual = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 4))
    tower = OpenClipTower(visual, "some/net")
    tower.measure(torch.zeros(1, 3, 8, 8))
    assert (tower.num_features, tower.strides) == (4, [])
    with pytest.raises(UserError, match="open_clip:some/net: its image tower gives pooled features alone"):
        tower.feature_maps(torch.zeros(1, 3, 8, 8))


def transformers_folder(folder: Path, model, size: int = 32) -> str:
    """A randomly initialised model as its hub page would hold it."""
    model.save_pretrained(folder)
    transformers.CLIPImageProcessor(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}, image_mean=[0.4, 0.5, 0.6]
    ).save_pretrained(folder)
    return f"transformers:{folder}"


def test_a_focalnet_of_transformers_becomes_ours(tmp_path):
    torch.manual_seed(0)
    config = transformers.FocalNetConfig(
        image_size=64, embed_dim=8, depths=[1, 1, 2, 1], focal_levels=[3, 2, 2, 0], use_post_layernorm=True,
        use_layerscale=True, use_conv_embed=True, normalize_modulator=True,
    )  # fmt: skip
    theirs = transformers.FocalNetForImageClassification(config).eval()
    encoder = focalclip.load_image_encoder(transformers_folder(tmp_path, theirs, 64))
    assert type(encoder.tower).__name__ == "FocalNet"
    images = encoder.preprocess(PICTURE)[None]
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    assert torch.equal(images, processor(PICTURE.convert("RGB"), return_tensors="pt")["pixel_values"])
    with torch.no_grad():
        pooled = theirs.focalnet(images).pooler_output.flatten(1)
    check(encoder, pooled, [4, 8, 16, 32])


def vision_models() -> dict:
    """Name: (model, its features of given images, strides)."""
    vit = transformers.ViTConfig(image_size=32, **VIT)
    dino = transformers.Dinov2WithRegistersConfig(image_size=32, num_register_tokens=3, **VIT)
    clip = transformers.CLIPConfig(
        vision_config={"image_size": 32, **VIT},
        text_config={**VIT, "vocab_size": 60, "eos_token_id": 1, "max_position_embeddings": 8},
        projection_dim=12,
    )
    resnet = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 12, 16, 20], depths=[1, 1, 1, 1])
    swin = transformers.SwinConfig(embed_dim=8, depths=[1, 1], num_heads=[1, 1], image_size=32, window_size=4)
    siglip = transformers.SiglipVisionConfig(image_size=32, **VIT)
    return {
        # saved without a pooler: its class token, as normalised for the classifier
        "vit": (transformers.ViTForImageClassification(vit), lambda m, x: m.vit(x).last_hidden_state[:, 0], [8, 8]),
        "registers": (transformers.Dinov2WithRegistersModel(dino), lambda m, x: m(x).pooler_output, [8, 8]),
        "clip": (transformers.CLIPModel(clip), lambda m, x: m.vision_model(x).pooler_output, [8, 8]),
        "clip-vision": (
            transformers.CLIPVisionModel(clip.vision_config), lambda m, x: m(x).pooler_output, [8, 8]
        ),
        "siglip-vision": (transformers.SiglipVisionModel(siglip), lambda m, x: m(x).pooler_output, [8, 8]),
        "resnet": (
            transformers.ResNetModel(resnet), lambda m, x: m(x).pooler_output.flatten(1), [4, 8, 16, 32]
        ),
        "swin": (transformers.SwinModel(swin), lambda m, x: m(x).pooler_output, [8, 8]),
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["vit", "focalnet"])
@pytest.mark.parametrize("channels", [1, 4])
def test_a_tower_of_other_channels_has_the_preprocessing_that_fits_or_says_so(kind, channels, tmp_path):
    torch.manual_seed(0)
    if kind == "vit":
        model: Any = transformers.ViTModel(transformers.ViTConfig(image_size=32, num_channels=channels, **VIT))
    else:
        model = transformers.FocalNetModel(
            transformers.FocalNetConfig(
                image_size=32,
                embed_dim=8,
                depths=[1, 1],
                focal_levels=[2, 2],
                focal_windows=[3, 3],
                num_channels=channels,
            )
        )
    encoder = focalclip.load_image_encoder(transformers_folder(tmp_path, model))
    assert encoder(torch.randn(2, channels, 32, 32)).shape == (2, 16)
    if channels == 4:
        with pytest.raises(UserError, match="takes images of 4 channels, which pictures do not have"):
            _ = encoder.preprocess
        return
    grey = Image.new("RGB", (64, 64), (200, 100, 50))
    image = pickle.loads(pickle.dumps(encoder.preprocess))(grey)
    std = sum(transformers.CLIPImageProcessor().image_std) / 3
    expected = (grey.convert("L").getpixel((0, 0)) / 255 - 0.5) / std
    torch.testing.assert_close(image, torch.full((1, 32, 32), expected))


@pytest.mark.parametrize("name", ["vit", "registers", "clip", "clip-vision", "siglip-vision", "resnet", "swin"])
def test_any_image_model_of_transformers_is_an_encoder(name, tmp_path):
    torch.manual_seed(0)
    model, features, strides = vision_models()[name]
    encoder = focalclip.load_image_encoder(transformers_folder(tmp_path, model))
    images = encoder.preprocess(PICTURE)[None]
    with torch.no_grad():
        expected = features(model.eval(), images)
    maps = check(encoder, expected, strides)
    if name == "registers":  # the map holds patches, neither the class token nor the registers
        last = model(images, output_hidden_states=True).hidden_states[-1][:, 4:]
        torch.testing.assert_close(maps[-1].flatten(2).transpose(1, 2), last.detach(), rtol=1e-5, atol=1e-5)
    if name in ("vit", "clip"):  # learned positions are fitted to another size
        assert encoder.feature_maps(torch.zeros(1, 3, 48, 40))[-1].shape == (1, 16, 6, 5)


def test_clip_of_transformers_has_both_towers(tmp_path):
    torch.manual_seed(0)
    source = transformers_folder(tmp_path, vision_models()["clip"][0])
    letters = {letter: i + 2 for i, letter in enumerate("abcdefghijklmnopqrstuvwxyz")}
    words = {f"{letter}</w>": i + 28 for i, letter in enumerate(letters)}
    vocabulary = {"<|startoftext|>": 0, "<|endoftext|>": 1, **letters, **words}
    tokenizer = transformers.CLIPTokenizer(vocab=vocabulary, merges=[])
    tokenizer.save_pretrained(tmp_path)
    model = focalclip.load(source)
    theirs = transformers.CLIPModel.from_pretrained(tmp_path).eval()
    texts = ["a b c", "dog", "a very long caption of many words"]
    images, tokens = model.preprocess(PICTURE)[None], model.tokenizer(texts)
    assert tokens.shape == (3, 8)
    given = tokenizer(texts, padding=True, truncation=True, max_length=8, return_tensors="pt")
    with torch.no_grad():
        expected = theirs(pixel_values=images, **given)
        for normalize in (True, False):
            image, text = model.encode_image(images, normalize), model.encode_text(tokens, normalize)
            if not normalize:
                image, text = image / image.norm(dim=1, keepdim=True), text / text.norm(dim=1, keepdim=True)
            torch.testing.assert_close(image, expected.image_embeds, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(text, expected.text_embeds, rtol=1e-5, atol=1e-6)


def test_siglip_of_transformers_has_both_towers(tmp_path):
    torch.manual_seed(0)
    text = {**VIT, "vocab_size": 13, "max_position_embeddings": 8}
    config = transformers.SiglipConfig(vision_config={"image_size": 32, **VIT}, text_config=text)
    theirs = transformers.SiglipModel(config).eval()
    source = transformers_folder(tmp_path, theirs)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "two", "dogs", "zebra", "rain", "on", "window"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    model = focalclip.load(source)
    images, tokens = model.preprocess(PICTURE)[None], model.tokenizer(["a cat", "two dogs on a window"])
    assert tokens.shape == (2, 8)
    with torch.no_grad():
        expected = theirs(pixel_values=images, input_ids=tokens)
        torch.testing.assert_close(model.encode_image(images, True), expected.image_embeds, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(model.encode_text(tokens, True), expected.text_embeds, rtol=1e-5, atol=1e-6)


def test_our_own_export_comes_back_from_transformers(tmp_path):
    torch.manual_seed(0)
    config = ModelConfig(
        embed_dim=16,
        image=ImageTowerConfig(name="focalnet_pico", image_size=32, init="fan_in"),
        text=TextTowerConfig(context_length=8, width=32, heads=2, layers=1),
    )
    model = focalclip.load(focalclip.save(FocalCLIP(config), tmp_path / "model"))
    export(tmp_path / "model", tmp_path / "exported", "transformers")
    again = focalclip.load(f"transformers:{tmp_path / 'exported'}")
    images, tokens = model.preprocess(PICTURE)[None], model.tokenizer(["a cat", "two dogs"])
    assert torch.equal(again.preprocess(PICTURE)[None], images)
    assert torch.equal(again.tokenizer(["a cat", "two dogs"]), tokens)
    with torch.no_grad():
        torch.testing.assert_close(again.encode_image(images), model.encode_image(images), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(again.encode_text(tokens), model.encode_text(tokens), rtol=1e-5, atol=1e-5)
        pooled = model.visual.trunk(images)
    check(focalclip.load_image_encoder(f"transformers:{tmp_path / 'exported'}"), pooled, model.visual.trunk.strides)


def test_faulty_folders_of_transformers_are_told(tmp_path):
    torch.manual_seed(0)
    source = transformers_folder(tmp_path / "vit", vision_models()["vit"][0])
    with pytest.raises(UserError, match="a vit, and only clip and siglip have the two towers"):
        focalclip.load(source)
    weights = load_file(tmp_path / "vit" / "model.safetensors")
    lost = next(name for name in weights if "layernorm" in name.lower())
    save_file({n: x for n, x in weights.items() if n != lost}, tmp_path / "vit" / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"vit: 1 weights are missing \(.*\) and would be random"):
        focalclip.load_image_encoder(source)
    whole = (tmp_path / "vit" / "model.safetensors").read_bytes()
    (tmp_path / "vit" / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="vit: transformers cannot load it"):
        focalclip.load_image_encoder(source)
    (tmp_path / "vit" / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match=r"vit: transformers cannot load it.*Give a folder with the files of "):
        focalclip.load_image_encoder(source)
    for load in (focalclip.load, focalclip.load_image_encoder):
        with pytest.raises(UserError, match="transformers:nowhere/nothing: transformers cannot load it"):
            load("transformers:nowhere/nothing")


@pytest.fixture(scope="module")
def hub_cache(tmp_path_factory):
    """The Hugging Face cache as it is once timm has fetched focalnet_tiny_srf; yields it with the weights in it."""
    import huggingface_hub.constants as constants

    root, revision = tmp_path_factory.mktemp("hub"), "0" * 40
    torch.manual_seed(0)
    model = timm.create_model("focalnet_tiny_srf")
    repository = root / "models--timm--focalnet_tiny_srf.ms_in1k"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    snapshot = repository / "snapshots" / revision
    snapshot.mkdir(parents=True)
    save_file(model.state_dict(), snapshot / "model.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_CACHE", str(root))
        yield model.eval()
    shutil.rmtree(root)


def test_pretrained_takes_the_weights_of_timms_hub(hub_cache):
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        tower = focalclip.create_image_tower("focalnet_tiny_srf", pretrained=True, drop_path=0.3).eval()
        pooled = hub_cache.forward_head(hub_cache.forward_features(images), pre_logits=True)
        assert (tower(images) - pooled).abs().max() <= 1e-5
        assert tower.config.drop_path == 0.3
        classifier = focalclip.create_image_tower("focalnet_tiny_srf", pretrained=True, num_classes=1000).eval()
        assert (classifier(images) - hub_cache(images)).abs().max() <= 1e-5
        encoder = focalclip.load_image_encoder("timm:focalnet_tiny_srf")
        assert (encoder(images) - pooled).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("focalnet_small_lrf", {}, "timm:focalnet_small_lrf: its weights are not in .* and the hub cannot be reached"),
        ("timm:resnet18", {}, "timm:resnet18: its weights are not in .* and the hub cannot be reached"),
        ("focalnet_pico", {}, "focalnet_pico: there are no published weights; there are for focalnet_tiny_srf, "),
        ("focalnet_base_iso", {}, "focalnet_base_iso: there are no published weights"),
        ("focalnet_tiny_srf", {"num_classes": 10}, "num_classes=10, but the published weights have a head of 1000;"),
        ("focalnet_tiny_srf", {"focal_levels": 3}, "focalnet_tiny_srf: these options make another network of it"),
        ("focalnet_large_fl3", {"use_post_norm": False}, "focalnet_large_fl3: these options make another network"),
    ],
)
def test_published_weights_are_refused_where_they_cannot_be_had(name, options, message):
    with pytest.raises(UserError, match=message):
        focalclip.create_image_tower(name, pretrained=True, **options)


def test_every_published_focalnet_is_known_to_have_weights():
    with pytest.raises(UserError) as told:
        focalclip.create_image_tower("focalnet_nano", pretrained=True)
    published = [name for name in FOCALNETS if f" {name}" in str(told.value).replace(",", "")]
    sizes = [f"{size}_{field}" for size in ("tiny", "small", "base") for field in ("srf", "lrf")]
    large = [f"{size}_{levels}" for size in ("large", "xlarge", "huge") for levels in ("fl3", "fl4")]
    assert published == [f"focalnet_{name}" for name in sizes + large]


def letter_clip(folder: Path) -> str:
    """A CLIP of transformers whose words are single letters, whole."""
    torch.manual_seed(0)
    source = transformers_folder(folder, vision_models()["clip"][0])
    letters = {letter: i + 2 for i, letter in enumerate("abcdefghijklmnopqrstuvwxyz")}
    words = {f"{letter}</w>": i + 28 for i, letter in enumerate(letters)}
    vocabulary = {"<|startoftext|>": 0, "<|endoftext|>": 1, **letters, **words}
    transformers.CLIPTokenizer(vocab=vocabulary, merges=[]).save_pretrained(folder)
    return source


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        (["tokenizer.json"], "its tokenizer has no vocabulary; add the tokenizer's files"),
        (["tokenizer.json", "tokenizer_config.json"], "its tokenizer has no vocabulary"),
        (["preprocessor_config.json"], "transformers cannot load it"),
        (["model.safetensors"], "transformers cannot load it"),
    ],
)
def test_a_clip_folder_that_is_not_whole_is_refused(tmp_path, gone, message):
    """Without tokenizer files transformers makes up a tokenizer that gives every prompt the same tokens."""
    source = letter_clip(tmp_path)
    assert focalclip.load(source)
    for name in gone:
        (tmp_path / name).unlink()
    with pytest.raises(UserError, match=message):
        focalclip.load(source)


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    source = letter_clip(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="transformers cannot load it"):
        focalclip.load(source)
    vocabulary = {"<|startoftext|>": 0, "<|endoftext|>": 1, **{f"{i}</w>": i + 2 for i in range(300)}}
    transformers.CLIPTokenizer(vocab=vocabulary, merges=[]).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"its tokenizer has 302 tokens and its text tower \d+"):
        focalclip.load(source)
    vocabulary = {"<|startoftext|>": 0, "a": 1, "b": 2, "c": 3, "<|endoftext|>": 4}
    transformers.CLIPTokenizer(vocab=vocabulary, merges=[]).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="does not end a text with token 1"):
        focalclip.load(source)


def test_a_text_tower_without_its_tokenizer_is_refused(tmp_path):
    config = transformers.BertConfig(vocab_size=40, **VIT)
    transformers.BertModel(config).save_pretrained(tmp_path)
    text = TextTowerConfig(name=f"transformers:{tmp_path}", context_length=8)
    image = ImageTowerConfig(name="focalnet_pico", image_size=32)
    with pytest.raises(UserError, match=r"model\.text\.name: .*its tokenizer has no vocabulary"):
        _ = FocalCLIP(ModelConfig(embed_dim=16, image=image, text=text)).tokenizer
