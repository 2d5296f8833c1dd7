"""Any model with four attributes can be measured: plain objects, open_clip's, transformers', a user's function."""

import copy
import json
import sys
import warnings
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import transformers
from test_sources import OPEN_CLIP_TOWERS, VIT, open_clip_folder, transformers_folder
from wds_folder import tiny_model, write_folder, zero_shot

import focalclip
from focalclip.base.errors import UserError
from focalclip.config import ModelConfig, TextTowerConfig
from focalclip.evaluation.features.texts import encode_prompts
from focalclip.models.clip import FocalCLIP

PROMPTS = ["a", "a photo of a dog", "b c", "itap of the large F-16A/B, a type of aircraft!", "cat", "a very long text"]
ALPHABET = "abcdefghijklmnopqrstuvwxyz"


class PlainModel:
    """Three functions and a preprocessing, written as a user would who never heard of ``nn.Module``."""

    def preprocess(self, picture):
        return torch.from_numpy(np.asarray(picture.resize((4, 4)), dtype=np.float32)).permute(2, 0, 1) / 255 - 0.5

    def tokenizer(self, texts):
        return torch.tensor([[len(text), text.count("e"), text.count("r")] for text in texts])

    def encode_image(self, images):
        return images.mean((2, 3)) + 1

    def encode_text(self, tokens):
        return tokens.float()


def test_an_object_with_three_functions_is_measured(tmp_path):
    folder = write_folder(tmp_path / "t", [0, 1, 2, 0, 1])
    result = zero_shot(PlainModel(), folder, cache_dir=tmp_path / "c", outputs=[tmp_path / "r.json"])
    assert result.tasks["t"].n == 5
    assert result.model["sha256"] == "unknown"
    assert (result.model["precision"], result.model["device"], result.model["parameters"]) == ("float32", "cpu", None)
    assert result.tasks["t"].settings_sha256 == ""  # nothing can be taken over of a model that may be another by now
    assert zero_shot(PlainModel(), folder, device="cpu").score == result.score


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A user's module in the working directory."""
    (tmp_path / "my_models.py").write_text(
        "from test_any_model import PlainModel\nfrom wds_folder import tiny_model\n"
        "class Half:\n    encode_image = tokenizer = None\nvalue = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(tmp_path)])
    yield
    sys.modules.pop("my_models", None)


def test_a_users_function_is_a_source(module):
    assert isinstance(focalclip.load("my_models:PlainModel"), PlainModel)
    assert focalclip.load("my_models:tiny_model") is tiny_model()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("my_modles:load", "my_modles:load: no module my_modles here or among the installed ones"),
        ("my_models:lode", "my_models:lode: my_models has no function lode"),
        ("my_models:value", "my_models has no function value"),
        ("my_models:Half", "my_models:Half: what it returns has no encode_text, preprocess"),
    ],
)
def test_a_function_that_is_none_is_told(module, source, message):
    with pytest.raises(UserError, match=message):
        focalclip.load(source)


@pytest.mark.trap("5.3", "a model's name is evaluated as code")
def test_trap_a_model_name_is_never_evaluated(module, tmp_path):
    """The toolkit of ELEVATER evaluates a model's name as code."""
    for source in (
        "my_models:open('hacked', 'w')",
        "__import__('pathlib').Path('hacked').touch()",
        "my_models:a.b",
        "a b:c",
    ):
        with pytest.raises(UserError):
            focalclip.load(source)
    assert not (tmp_path / "hacked").exists()


def check_cut(model, prompts=PROMPTS):
    """Rows cut behind the tokens that count, in short batches, give the embeddings of whole rows one at a time."""
    tokens = model.tokenizer(prompts)
    lengths = model.text_lengths(tokens)
    assert lengths.min() < tokens.shape[1]
    with torch.no_grad():
        whole = torch.cat([model.encode_text(tokens[i : i + 1]) for i in range(len(tokens))])
        expected = torch.nn.functional.normalize(whole, dim=-1)
        torch.testing.assert_close(encode_prompts(model, prompts, 2), expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(encode_prompts(model, prompts), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", OPEN_CLIP_TOWERS)
def test_open_clips_causal_text_towers_see_no_padding(name, tmp_path):
    model = focalclip.load(open_clip_folder(tmp_path / "model", OPEN_CLIP_TOWERS[name][0]))
    check_cut(model)
    seen = []
    blocks = getattr(model.model, "text", model.model).transformer.resblocks[0]
    with blocks.register_forward_hook(lambda _, inputs, __: seen.append(tuple(inputs[0].shape[:2]))), torch.no_grad():
        encode_prompts(model, PROMPTS, 2)
    assert sorted(seen) == [(2, 3), (2, 6), (2, 8)]  # pairs of like length, instead of 8 tokens each


def test_where_a_token_sees_those_behind_it_nothing_is_cut(tmp_path):
    config = open_clip_folder(tmp_path / "model", OPEN_CLIP_TOWERS["timm"][0])
    path = tmp_path / "model" / "open_clip_config.json"
    content = json.loads(path.read_text())
    content["model_cfg"]["text_cfg"]["no_causal_mask"] = True
    path.write_text(json.dumps(content))
    model = focalclip.load(config)
    tokens = model.tokenizer(PROMPTS)
    assert model.text_lengths(tokens) is None
    with torch.no_grad():
        whole = torch.nn.functional.normalize(model.encode_text(tokens), dim=-1)
        torch.testing.assert_close(encode_prompts(model, PROMPTS, 2), whole, rtol=0, atol=1e-6)


@pytest.mark.parametrize("causal", [True, False])
def test_our_own_text_tower_sees_no_padding(causal):
    torch.manual_seed(0)
    text = TextTowerConfig(context_length=12, width=16, heads=2, layers=2, causal=causal)
    model = FocalCLIP(ModelConfig(embed_dim=8, text=text)).eval()
    if causal:
        check_cut(model)
    else:
        assert model.text_lengths(model.tokenizer(PROMPTS)) is None


def clip_of_transformers(folder, eos):
    """A random CLIP with a tokenizer of letters."""
    torch.manual_seed(0)
    letters = {letter: i + 3 for i, letter in enumerate(ALPHABET)}
    words = {f"{letter}</w>": i + 29 for i, letter in enumerate(ALPHABET)}
    end = {1: 1, 2: 55}[eos]  # OpenAI's configurations say 2, whatever the number is; it is the largest
    vocabulary = {"<|startoftext|>": 0, "<|endoftext|>": end, **letters, **words}
    config = transformers.CLIPConfig(
        vision_config={"image_size": 32, **VIT},
        text_config={**VIT, "vocab_size": 60, "eos_token_id": eos, "max_position_embeddings": 10},
        projection_dim=12,
    )
    source = transformers_folder(folder, transformers.CLIPModel(config))
    transformers.CLIPTokenizer(vocab=vocabulary, merges=[]).save_pretrained(folder)
    return focalclip.load(source)


@pytest.mark.parametrize("eos", [1, 2])
def test_clip_of_transformers_sees_no_padding_and_is_measured(tmp_path, eos):
    model = clip_of_transformers(tmp_path / "model", eos)
    check_cut(model, ["a", "a b c", "dog", "a c", "a very long caption of many words"])
    result = zero_shot(model, write_folder(tmp_path / "t", [0, 1, 2, 0]), cache_dir=tmp_path / "c")
    assert result.tasks["t"].n == 4
    assert result.model["text_multiply_adds"] > 0


def test_siglip_of_transformers_pads_to_the_full_context_as_it_was_trained(tmp_path):
    torch.manual_seed(0)
    text = {**VIT, "vocab_size": 13, "max_position_embeddings": 8}
    theirs = transformers.SiglipModel(
        transformers.SiglipConfig(vision_config={"image_size": 32, **VIT}, text_config=text)
    )
    source = transformers_folder(tmp_path / "model", theirs.eval())
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "two", "dogs", "zebra", "rain", "on", "window"]
    (tmp_path / "model" / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizer(str(tmp_path / "model" / "vocab.txt")).save_pretrained(tmp_path / "model")
    model = focalclip.load(source)
    prompts = ["a cat", "two dogs on a window", "rain"]
    tokens = model.tokenizer(prompts)
    assert tokens.shape == (3, 8)
    assert model.text_lengths(tokens) is None
    with torch.no_grad():
        expected = theirs.get_text_features(input_ids=tokens).pooler_output
        short = theirs.get_text_features(input_ids=tokens[:1, :4]).pooler_output
        got = encode_prompts(model, prompts, 2)
    torch.testing.assert_close(got, torch.nn.functional.normalize(expected, dim=-1), rtol=0, atol=1e-6)
    short = torch.nn.functional.normalize(short, dim=-1)
    assert (got[:1] - short).abs().max() > 1e-3  # without its padding it would be another embedding
    known = write_folder(tmp_path / "t", [0, 1, 2, 0], names=("cat", "dogs", "rain"))
    assert zero_shot(model, known).tasks["t"].n == 4


@pytest.fixture(scope="module")
def architectures(tmp_path_factory):
    """``tiny`` and ``tiny-quickgelu`` among open_clip's architectures; the weights of the second."""
    folder = tmp_path_factory.mktemp("configs")
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
        "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1},
    }
    for name, extra in (("tiny", {}), ("tiny-quickgelu", {"quick_gelu": True})):
        (folder / f"{name}.json").write_text(json.dumps(config | extra))
    open_clip.add_model_config(folder)
    torch.manual_seed(0)
    return open_clip.create_model("tiny-quickgelu").eval()


def image_features(model):
    images = torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)
    with torch.no_grad():
        return model.encode_image(images)


def openai_archive(model, path):
    """The layout of OpenAI's files: TorchScript in half precision, with three numbers beside the weights."""
    model.attn_mask = model._buffers.pop("attn_mask")  # no buffer there
    for name, value in (("input_resolution", 32), ("context_length", 12), ("vocab_size", 49408)):
        vars(model).pop(name, None)
        model.register_buffer(name, torch.tensor(value))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch would have us export otherwise now; OpenAI's files stay as they are
        traced = torch.jit.trace(model, (torch.zeros(1, 3, 32, 32), torch.zeros(1, 12, dtype=torch.long)), strict=False)
        traced.half().save(path)


def test_openais_archive_is_read_by_its_path_with_its_activation(architectures, tmp_path):
    path = tmp_path / "ViT-tiny.pt"
    openai_archive(copy.deepcopy(architectures), path)
    expected = image_features(copy.deepcopy(architectures).half().float())
    for name in ("tiny", "tiny-quickgelu"):  # the trap: open_clip's plain ViT-B-32 has another activation than OpenAI's
        model = focalclip.load(f"open_clip:{name}/{path}")
        assert next(model.parameters()).dtype == torch.float32
        torch.testing.assert_close(image_features(model), expected, rtol=1e-5, atol=1e-5)
    assert model.tokenizer(["a"]).shape == (1, 12)
    assert zero_shot(model, write_folder(tmp_path / "t", [0, 1, 2, 0])).tasks["t"].n == 4


def test_trap_the_wrong_activation_is_warned_of(architectures, tmp_path):
    torch.save(architectures.state_dict(), tmp_path / "weights.pt")
    with pytest.warns(UserWarning, match=r"read as a model with GELU; .* name open_clip:tiny-quickgelu/"):
        plain = focalclip.load(f"open_clip:tiny/{tmp_path / 'weights.pt'}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quick = focalclip.load(f"open_clip:tiny-quickgelu/{tmp_path / 'weights.pt'}")
    torch.testing.assert_close(image_features(quick), image_features(architectures))
    assert (image_features(plain) - image_features(quick)).abs().max() > 1e-4


@pytest.mark.trap("5.3", "checkpoints are loaded non-strictly")
def test_trap_partial_checkpoint_is_refused(architectures, tmp_path):
    """The toolkit of ELEVATER loads what fits and prints the rest."""
    weights = architectures.state_dict()
    lost = {name: tensor for name, tensor in weights.items() if name != "visual.proj"}
    torch.save(lost, tmp_path / "lost.pt")
    torch.save(weights | {"extra": torch.zeros(1)}, tmp_path / "more.pt")
    (tmp_path / "rubbish.pt").write_bytes(b"rubbish")
    for file in ("lost.pt", "more.pt", "rubbish.pt", "nowhere.pt"):
        with pytest.raises(
            UserError, match=rf"open_clip:tiny-quickgelu/.*{file}: open_clip cannot load it: ."
        ) as raised:
            focalclip.load(f"open_clip:tiny-quickgelu/{tmp_path / file}")
        assert "\n" not in str(raised.value)


def test_an_archive_of_another_architecture_is_refused(architectures, tmp_path):
    openai_archive(copy.deepcopy(architectures), tmp_path / "tiny.pt")
    with pytest.raises(UserError, match=r"open_clip:RN50/.*tiny.pt: open_clip cannot load it: Error.* Missing key"):
        focalclip.load(f"open_clip:RN50/{tmp_path / 'tiny.pt'}")
    with pytest.raises(UserError, match=r"open_clip:tinny/.*tiny.pt: open_clip cannot load it: it has no architecture"):
        focalclip.load(f"open_clip:tinny/{tmp_path / 'tiny.pt'}")


def test_architecture_without_weights_says_how_to_name_a_file(architectures):
    with pytest.raises(UserError, match=r"give a checkpoint as open_clip:tiny/PATH"):
        focalclip.load("open_clip:tiny")


def test_the_model_in_the_documentation_is_one(tmp_path):
    text = (Path(__file__).parents[2] / "docs" / "zero-shot.md").read_text()
    code = text.partition("```python\n")[2].partition("```")[0]
    names = {}
    exec(code, names)  # as a reader would run it
    result = zero_shot(names["load"](), write_folder(tmp_path / "t", [0, 1, 2, 0, 1]))
    assert result.tasks["t"].n == 5
