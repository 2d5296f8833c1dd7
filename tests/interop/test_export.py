"""Exports, reloaded by the libraries that they are for, in a process that does not know focalclip where that works."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image

import focalclip
from focalclip.base.errors import UserError
from focalclip.cli.export import main
from focalclip.config import ImageTowerConfig, ModelConfig, TextTowerConfig
from focalclip.interop.export import FORMATS, export
from focalclip.interop.register import after_import
from focalclip.models.clip import FocalCLIP

TEXTS = ["a cat", "two dogs!", "rain on a window, seen from the street below", "Ünïcode & <b>3.14</b>"]
TEXT = TextTowerConfig(context_length=8, width=32, heads=2, layers=1)
# The tower of `small` no library names; that of `named` they all have.
CONFIGS = {
    "small": ModelConfig(
        embed_dim=32,
        image=ImageTowerConfig(name="focalnet_pico", image_size=32, init="fan_in", feature_norm="batch"),
        text=TEXT,
    ),
    "named": ModelConfig(
        embed_dim=32,
        image=ImageTowerConfig(name="focalnet_tiny_srf", image_size=64, resize_mode="squash", init="fan_in"),
        text=TEXT.model_copy(update={"causal": False}),
    ),
}
RESULT = {
    "tasks": {"digits": {"metric": "accuracy", "value": 0.25, "interval": [0.2, 0.31], "n": 5000, "chance": 0.1}},
}
PROVENANCE = {
    "focalclip": "0.1.0",
    "run": "trial",
    "step": 7,
    "samples": 112,
    "config": {
        "runs_dir": "/secret/place",
        "seed": 3,
        "data": {"train": ["cc3m/{00000..00331}.tar"], "batch_size": 16},
        "optim": {"lr": 1e-3, "warmup_steps": 2, "weight_decay": 0.1},
        "train": {"precision": "fp32"},
    },
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Run directories of untrained models whose normalisation has seen data, one with a result."""
    root = tmp_path_factory.mktemp("runs")
    torch.manual_seed(0)
    for name, config in CONFIGS.items():
        model = FocalCLIP(config)
        side = config.image.image_size
        model.encode_image(torch.randn(8, 3, side, side))
        focalclip.save(model.eval(), root / name / "model", PROVENANCE if name == "small" else None)
    (root / "small/eval").mkdir()
    (root / "small/eval/trial.json").write_text(json.dumps(RESULT))
    (root / "small/eval/retrieval-pairs.json").write_text(json.dumps(RESULT | {"benchmark": "retrieval"}))
    probes = {"tasks": {"digits": {"metric": "accuracy", "zero_shot": 0.25, "probes": []}}}
    (root / "small/eval/probe-trial.json").write_text(json.dumps(probes))
    return root


@pytest.fixture(scope="module")
def exports(runs, tmp_path_factory) -> Path:
    """``KIND_RUN`` folders."""
    root = tmp_path_factory.mktemp("exports")
    for run, kinds in {"small": list(FORMATS), "named": ["timm", "transformers"]}.items():
        for kind in kinds:
            export(runs / run, root / f"{kind}_{run}", kind)
    return root


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 57, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def models(runs) -> dict[str, FocalCLIP]:
    return {name: focalclip.load(runs / name) for name in CONFIGS}


def expected(model: FocalCLIP, picture: Image.Image) -> dict[str, torch.Tensor]:
    images = model.preprocess(picture)[None]
    with torch.no_grad():
        return {
            "images": images,
            "features": model.visual.trunk(images),
            "image": model.encode_image(images),
            "text": model.encode_text(model.tokenizer(TEXTS)),
        }


RELOAD = """
import json, sys
import numpy as np, onnxruntime, timm, torch, transformers
from PIL import Image

root, texts = sys.argv[1], json.loads(sys.argv[2])
picture = Image.open(root + "/picture.png")
results = {}

tower = timm.create_model(f"local-dir:{root}/timm_named", pretrained=True).eval()
images = timm.data.create_transform(**timm.data.resolve_model_data_config(tower))(picture)[None]
plain = timm.create_model("focalnet_tiny_srf", num_classes=0, checkpoint_path=f"{root}/timm_named/model.safetensors")
with torch.no_grad():
    results["timm_named"] = {"images": images, "features": tower(images)}
    results["timm_checkpoint"] = {"features": plain.eval()(images)}

folder = root + "/transformers_named"
tower, info = transformers.FocalNetModel.from_pretrained(folder, subfolder="image_tower", output_loading_info=True)
assert not any(info.values()), info
processor = transformers.AutoImageProcessor.from_pretrained(folder, subfolder="image_tower", backend="pil")
images = processor(picture, return_tensors="pt")
with torch.no_grad():
    results["transformers_tower"] = {**images, "features": tower(**images).pooler_output}

inputs = torch.load(root + "/inputs.pt")
image_tower, text_tower = (
    onnxruntime.InferenceSession(f"{root}/onnx_small/{name}_tower.onnx") for name in ("image", "text")
)
image_embeds, image_features = image_tower.run(None, {"images": inputs["images"].numpy()})
results["onnx"] = {"image_embeds": image_embeds, "image_features": image_features}
results["onnx"]["text_embeds"] = text_tower.run(None, {"tokens": inputs["tokens"].numpy()})[0]
results["onnx"] = {name: torch.from_numpy(x) for name, x in results["onnx"].items()}

for load, source in (
    (timm.create_model, f"local-dir:{root}/timm_small"), (transformers.AutoModel.from_pretrained, folder)
):
    try:
        load(source)
    except (RuntimeError, ValueError) as error:
        assert "Unknown model" in str(error) or "model type `focalclip`" in str(error), error
    else:
        raise AssertionError(source)

assert "focalclip" not in sys.modules
import focalclip

tower = timm.create_model(f"local-dir:{root}/timm_small", pretrained=True).eval()
images = timm.data.create_transform(**timm.data.resolve_model_data_config(tower))(picture)[None]
with torch.no_grad():
    results["timm_small"] = {"images": images, "features": tower(images)}
for name in ("small", "named"):
    folder = f"{root}/transformers_{name}"
    model, info = transformers.AutoModel.from_pretrained(folder, trust_remote_code=False, output_loading_info=True)
    assert not any(info.values()), info
    processor = transformers.AutoProcessor.from_pretrained(folder)
    processor.image_processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    inputs = processor(text=texts, images=picture, return_tensors="pt", padding=True)
    classify = transformers.pipeline(
        "zero-shot-image-classification", model=folder, image_processor=processor.image_processor
    )
    with torch.no_grad():
        results[f"transformers_{name}"] = {
            "images": inputs["pixel_values"],
            "image": model.get_image_features(inputs["pixel_values"]).pooler_output,
            "text": model.get_text_features(inputs["input_ids"], inputs["attention_mask"]).pooler_output,
            "logits": model(**inputs).logits_per_image,
        }
    scores = classify(picture, candidate_labels=texts, hypothesis_template="{}")
    results[f"pipeline_{name}"] = {one["label"]: one["score"] for one in scores}
torch.save(results, root + "/results.pt")
"""


@pytest.fixture(scope="module")
def reloaded(exports, models, picture) -> dict[str, dict]:
    """What other libraries make of the exports, in one fresh process."""
    picture.save(exports / "picture.png")
    generator = torch.Generator().manual_seed(0)
    tokens = models["small"].tokenizer(TEXTS)
    inputs = {
        "images": torch.randn(5, 3, 32, 32, generator=generator),
        "tokens": torch.nn.functional.pad(tokens, (0, TEXT.context_length - tokens.shape[1])),
    }
    torch.save(inputs, exports / "inputs.pt")
    command = [sys.executable, "-c", RELOAD, str(exports), json.dumps(TEXTS)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "not supported" not in result.stderr
    return torch.load(exports / "results.pt", weights_only=True) | {"inputs": inputs}


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("named", "timm_named"),
        ("named", "timm_checkpoint"),
        ("named", "transformers_tower"),
        ("small", "timm_small"),
        ("small", "transformers_small"),
        ("named", "transformers_named"),
    ],
)
def test_other_libraries_give_the_same(name, source, models, picture, reloaded):
    ours = expected(models[name], picture)
    theirs = dict(reloaded[source])
    theirs["images"] = theirs.pop("pixel_values", theirs.get("images", ours["images"]))
    theirs.pop("logits", None)
    assert theirs.keys() <= ours.keys()
    for key, value in theirs.items():
        torch.testing.assert_close(value, ours[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["small", "named"])
def test_the_pipeline_of_transformers_classifies_as_we_do(name, models, picture, reloaded):
    model = models[name]
    with torch.no_grad():
        image, text, scale = model(model.preprocess(picture)[None], model.tokenizer(TEXTS)).values()
    logits = scale * image @ text.T
    torch.testing.assert_close(reloaded[f"transformers_{name}"]["logits"], logits, rtol=1e-4, atol=1e-4)
    scores = [reloaded[f"pipeline_{name}"][text] for text in TEXTS]
    torch.testing.assert_close(torch.tensor(scores), logits.softmax(-1)[0], rtol=1e-4, atol=1e-5)


def test_onnx_graphs_agree_at_another_batch_size(models, reloaded):
    model, inputs = models["small"], reloaded["inputs"]
    with torch.no_grad():
        ours = {
            "image_embeds": model.encode_image(inputs["images"], normalize=True),
            "image_features": model.visual.trunk(inputs["images"]),
            "text_embeds": model.encode_text(inputs["tokens"], normalize=True),
        }
    assert ours.keys() == reloaded["onnx"].keys()
    for key, value in ours.items():
        torch.testing.assert_close(reloaded["onnx"][key], value, rtol=0, atol=1e-4)


def test_the_card_tells_data_results_and_licence(runs, exports, tmp_path):
    card = (exports / "open_clip_small/README.md").read_text()
    _, header, text = card.split("---\n", 2)
    metadata = yaml.safe_load(header)
    assert metadata["library_name"] == "open_clip"
    assert metadata["license"] == "unknown"
    (measured,) = metadata["model-index"][0]["results"]
    assert measured["dataset"]["name"] == "digits"
    assert measured["metrics"][0]["value"] == 25.0
    assert "| digits | accuracy | 25.0 | 20.0 - 31.0 | 10.00 | 5,000 |" in text
    assert "cc3m/{00000..00331}.tar" in text
    assert "7 steps of 16 pairs (112 samples seen), seed 3" in text
    assert "/secret/place" not in card
    assert 'local-dir:open_clip_small"' in text
    (again,) = ModelCard(card).data.eval_results  # as the hub reads it
    assert (again.dataset_name, again.metric_type, again.metric_value) == ("digits", "accuracy", 25.0)
    export(runs / "named", tmp_path / "out", "timm", license_id="mit")
    bare = (tmp_path / "out/README.md").read_text()
    assert yaml.safe_load(bare.split("---\n")[1])["license"] == "mit"
    assert "does not tell how it was trained" in bare
    assert "None were measured" in bare


def test_the_open_clip_export_is_an_exported_folder_of_ours(exports, models, picture):
    again = focalclip.load(exports / "open_clip_small")
    for key, value in expected(models["small"], picture).items():
        torch.testing.assert_close(expected(again, picture)[key], value)


def test_what_a_format_cannot_hold_is_said(exports):
    assert (exports / "transformers_named/image_tower").is_dir()
    assert not (exports / "transformers_small/image_tower").exists()
    card = (exports / "transformers_small/README.md").read_text()
    assert "no image_tower/" in card
    assert "FocalNetModel" not in card
    assert "only after `import focalclip`" in (exports / "timm_small/README.md").read_text()
    assert "import focalclip" not in (exports / "timm_named/README.md").read_text()


def test_a_preprocessing_that_transformers_lacks_is_refused(tmp_path):
    image = CONFIGS["small"].image.model_copy(update={"resize_mode": "longest"})
    focalclip.save(FocalCLIP(CONFIGS["small"].model_copy(update={"image": image})), tmp_path / "model")
    with pytest.raises(UserError, match="no resize_mode=longest"):
        export(tmp_path, tmp_path / "out", "transformers")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]  # nothing half-made stays


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{runs}/small", "{runs}", "--format", "timm"], "exists already"),
        (["{runs}/nowhere", "{out}", "--format", "timm"], "no such folder"),
        (["timm:resnet18", "{out}", "--format", "timm"], "without a text tower"),
        (["{runs}/small", "{out}", "--format", "timm", "--push-to-hub", "me/model"], "cannot|offline|Log in"),
        (["{runs}/small", "{out}", "--format", "timm", "--push-to-hub", "not a name"], "--push-to-hub not a name"),
    ],
)
def test_mistakes_get_one_sentence(arguments, message, runs, tmp_path, capsys):
    status = main([word.format(runs=runs, out=tmp_path / "out") for word in arguments])
    error = capsys.readouterr().err
    assert status == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert re.search(message, error)
    assert not (tmp_path / "out").exists()


def test_the_command_says_what_the_reader_has_to_know(runs, tmp_path, capsys):
    assert main([str(runs / "small"), str(tmp_path / "out"), "--format", "timm"]) == 0
    assert "note: timm builds focalnet_pico only after `import focalclip`." in capsys.readouterr().out


def test_a_damaged_result_is_named(runs, tmp_path):
    focalclip.save(focalclip.load(runs / "small"), tmp_path / "model")
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval/demo.json").write_text("[1]")
    with pytest.raises(UserError, match=r"demo.json: not an evaluation result"):
        export(tmp_path, tmp_path / "out", "timm")


def test_transformers_loaded_after_focalclip_knows_the_model(exports, models, picture):
    import transformers

    model = transformers.AutoModelForZeroShotImageClassification.from_pretrained(exports / "transformers_small")
    images = models["small"].preprocess(picture)[None]
    with torch.no_grad():
        ours = models["small"].encode_image(images)
        torch.testing.assert_close(model.get_image_features(images).pooler_output, ours)
    tokens = models["small"].tokenizer(["a cat", "two dogs"])
    outputs = model(tokens, images.expand(2, -1, -1, -1), return_loss=True)
    outputs.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    with pytest.raises(UserError, match="FocalCLIPConfig: model is missing"):
        transformers.AutoModel.from_config(transformers.AutoConfig.for_model("focalclip"))


def test_a_hugging_face_text_tower_travels_along(tmp_path):
    import transformers

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "two", "dogs"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "bert")
    transformers.BertConfig(
        vocab_size=len(words), hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48
    ).save_pretrained(tmp_path / "bert")
    text = TextTowerConfig(name=f"transformers:{tmp_path / 'bert'}", context_length=8)
    model = FocalCLIP(CONFIGS["small"].model_copy(update={"text": text})).eval()
    focalclip.save(model, tmp_path / "model")
    export(tmp_path, tmp_path / "out", "transformers")
    assert str(tmp_path) not in "".join(path.read_text() for path in (tmp_path / "out").glob("*.[jm]*[dn]"))
    again = transformers.AutoModel.from_pretrained(tmp_path / "out")
    tokens = transformers.AutoProcessor.from_pretrained(tmp_path / "out")(
        text=["a cat", "two dogs"], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        theirs = again.get_text_features(tokens["input_ids"], tokens["attention_mask"]).pooler_output
        torch.testing.assert_close(theirs, model.encode_text(model.tokenizer(["a cat", "two dogs"])))


def test_names_are_added_right_after_an_import(tmp_path, monkeypatch):
    (tmp_path / "late_module.py").write_text("value = 1")
    monkeypatch.syspath_prepend(tmp_path)
    seen = []
    after_import("late_module", lambda module: seen.append(module.value))
    assert seen == []
    import late_module

    assert seen == [1]
    after_import("late_module", lambda module: seen.append(module.value + 1))
    assert seen == [1, 2]
    monkeypatch.delitem(sys.modules, late_module.__name__)
