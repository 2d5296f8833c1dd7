"""Fine-tuning as a configuration of the trainer: shards out of a task, and a start from trained weights."""

import shutil

import helpers_run
import numpy as np
import pytest
import torch
from coloured_tasks import coloured, write_task
from wds_folder import write_folder, zero_shot

import focalclip
from focalclip.base.errors import UserError
from focalclip.cli.make_shards import main
from focalclip.config import ImageTowerConfig, ModelConfig, TextTowerConfig
from focalclip.data.index import index_shards
from focalclip.data.reader import Request
from focalclip.data.samples import ShardReader
from focalclip.data.sources import open_source
from focalclip.data.write import write_pictures
from focalclip.evaluation.data import decode, read_task_folder
from focalclip.interop.start import start_from
from focalclip.models.clip import FocalCLIP

NAMES, TEMPLATES = ("red", "green", "blue"), ("{c}", "something {c}")


def tiny(text=None, **image):
    """The model of ``helpers_run.TINY``, with fresh weights and without the normalisation."""
    torch.manual_seed(0)
    settings = {"name": "focalnet_pico", "image_size": 32, "init": "fan_in"} | image
    tower = {"context_length": 8, "width": 32, "heads": 2, "layers": 1} | (text or {})
    config = ModelConfig(embed_dim=32, image=ImageTowerConfig(**settings), text=TextTowerConfig(**tower))
    return FocalCLIP(config).eval()


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    labels = [i % 3 for i in range(48)]
    return write_task(tmp_path_factory.mktemp("task") / "colours", labels, labels, names=NAMES, templates=TEMPLATES)


@pytest.fixture(scope="module")
def exported(task, tmp_path_factory):
    """A model whose features differ between pictures, as trained ones do: those of fresh weights are nearly one."""
    model = tiny(feature_norm="batch").train()
    images = torch.stack([model.preprocess(decode(e.read())) for e in read_task_folder(task).entries])
    with torch.no_grad():
        for _ in range(40):  # until the running statistics are those of the pictures; an export folds them in
            model.encode_image(images)
    return focalclip.save(model, tmp_path_factory.mktemp("source") / "exported")


def members(folder):
    shards = sorted(folder.glob("*.tar"))
    reader = ShardReader(shards, keep=4)
    return [reader.read(i, j) for i, count in enumerate(index_shards(shards)) for j in range(count)]


def test_make_shards_writes_prompts_as_captions_and_labels_as_classes(task, tmp_path, capsys):
    assert main([str(task), str(tmp_path / "all")]) == 0
    assert "48 images of 3 classes, 2 prompts each" in capsys.readouterr().out
    samples = members(tmp_path / "all")
    assert [int(sample.label) for sample in samples] == [i % 3 for i in range(48)]
    assert samples[1].image == coloured(1, 1)
    assert b'["green", "something green"]' in samples[1].json
    assert main([str(task), str(tmp_path / "few"), "--shots", "5"]) == 0
    assert np.bincount([int(sample.label) for sample in members(tmp_path / "few")]).tolist() == [5, 5, 5]
    assert main([str(task), str(tmp_path / "few")]) == 2
    assert "holds shards already, by other rules (pictures 15, not left away); name another" in capsys.readouterr().err


def test_images_of_several_labels_share_a_class_where_they_share_all_labels(tmp_path):
    vectors = [[1, 0, 1], [0, 0, 0], [1, 0, 0], [1, 0, 1]]
    folder = write_folder(tmp_path / "t", vectors, names=NAMES, kind="multilabel")
    assert write_pictures(open_source(str(folder), Request("test")), tmp_path / "shards").samples == 3
    both, one, again = members(tmp_path / "shards")
    assert both.label == again.label != one.label
    assert b'["a red.", "a blue."]' in both.json


def test_start_is_the_source_whether_exported_or_through_open_clip(exported):
    images, tokens = torch.randn(2, 3, 32, 32), tiny().tokenizer(["a cat", "two dogs"])
    source = focalclip.load(exported)
    for name in (str(exported), f"open_clip:local-dir:{exported}"):
        model = tiny()
        torch.nn.init.normal_(model.visual.proj.weight)
        start_from(model, name)
        with torch.no_grad():
            torch.testing.assert_close(model.encode_image(images), source.encode_image(images), atol=1e-5, rtol=0)
            torch.testing.assert_close(model.encode_text(tokens), source.encode_text(tokens), atol=1e-5, rtol=0)


def test_image_tower_alone_starts_from_a_file_of_focalnet_weights(tmp_path):
    trained = tiny().visual.trunk
    torch.nn.init.normal_(next(trained.parameters()))
    torch.save(focalclip.weights.to_official(trained.state_dict()), tmp_path / "tower.pth")
    model = tiny()
    text = model.text.state_dict()["token_embedding.weight"].clone()
    start_from(model, str(tmp_path / "tower.pth"))
    torch.testing.assert_close(model.visual.trunk.state_dict(), trained.state_dict())
    torch.testing.assert_close(model.text.state_dict()["token_embedding.weight"], text)


@pytest.mark.parametrize(
    ("source", "model", "message"),
    [
        ("nowhere", {}, r"train\.init_from: nowhere: no such folder"),
        (
            "timm:focalnet_tiny_lrf",
            {},
            r"train\.init_from: timm:focalnet_tiny_lrf: an image tower without a text tower",
        ),
        (
            "open_clip:local-dir:EXPORTED",
            {"feature_norm": "batch"},
            r"not the weights of this FocalCLIP \(2 missing: visual\.norm.*set model\.image\.feature_norm=none",
        ),
        (
            "EXPORTED",
            {"text": {"width": 64}},
            r"not the weights of this FocalCLIP \(\d+ of another shape: text\..*the section model",
        ),
        ("EXPORTED", {"text": {"heads": 4}}, r"its embeddings of captions differ here"),  # no weight tells the heads
        ("EXPORTED", {"mean": (0.0, 0.0, 0.0)}, r"its embeddings of images differ here"),
    ],
)
def test_a_wrong_source_is_one_clear_sentence(source, model, message, exported):
    name = source.replace("EXPORTED", str(exported))
    with pytest.raises(UserError, match=message) as raised:
        start_from(tiny(**model), name)
    assert "\n" not in str(raised.value)


def test_fine_tuning_fits_the_task_and_resumes_without_its_source(task, tmp_path, exported):
    assert main([str(task), str(tmp_path / "shards")]) == 0
    source = shutil.copytree(exported, tmp_path / "source")
    args = ["--model.image.feature-norm", "none", "--train.init-from", str(source), "--train.steps", "16"]
    args += ["--optim.lr", "0.0003", "--train.save-every", "8", "--train.keep-checkpoints", "3"]
    result = helpers_run.run(tmp_path, tmp_path / "shards", *args)
    assert result.returncode == 0, result.stderr
    assert f"weights    image tower: {source} (train.init_from)" in result.stdout
    run_dir = tmp_path / "runs" / "tiny"
    whole = helpers_run.losses(run_dir)

    def fit(model):  # the very images that were trained on, through the prompts
        return zero_shot(model, tmp_path / "seen").score

    shutil.copytree(task, tmp_path / "seen")
    shutil.rmtree(tmp_path / "seen" / "test")
    (tmp_path / "seen" / "train").rename(tmp_path / "seen" / "test")
    assert fit(focalclip.load(run_dir)) > fit(focalclip.load(source)) + 0.3

    shutil.rmtree(source)
    shutil.rmtree(run_dir / "checkpoints" / "step-16")
    again = helpers_run.run(tmp_path, tmp_path / "shards", *args, "--resume")
    assert again.returncode == 0, again.stderr
    assert "continued from step 8" in again.stdout
    assert helpers_run.losses(run_dir) == whole
