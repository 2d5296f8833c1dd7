"""What a model's preprocessing and tokenizer give is checked once, before the first task."""

import numpy as np
import pytest
import torch
from coloured_tasks import ColourModel, write_bench, write_class_folders
from PIL import Image
from wds_folder import zero_shot

from focalclip.base.errors import UserError
from focalclip.evaluation.features.extract import extract
from focalclip.evaluation.features.model import check_model
from focalclip.evaluation.probes.run import probe
from focalclip.evaluation.retrieval.pairs import open_pairs
from focalclip.evaluation.retrieval.run import evaluate
from focalclip.interop.encoder import ImageEncoder
from focalclip.models.focalnet import FocalNet, FocalNetConfig


class Other(ColourModel):
    """A model of which one function is another."""

    def __init__(self, name, function):
        setattr(self, name, function)


def pixels(picture):
    return ColourModel().preprocess(picture)


def stopped(*_):
    raise ValueError("no such picture")


FAULTS = {
    "an array": (
        "preprocess",
        lambda p: pixels(p).numpy(),
        r"gives a ndarray of float32 and shape \(3, 4, 4\), not one",
    ),
    "a dictionary": ("preprocess", lambda p: {"pixel_values": pixels(p)}, "gives a dict, not one float tensor"),
    "a batch": ("preprocess", lambda p: pixels(p)[None], r"shape \(1, 3, 4, 4\), not one float tensor"),
    "integers": ("preprocess", lambda p: (pixels(p) * 255).byte(), r"a Tensor of torch\.uint8 and shape"),
    "nan": ("preprocess", lambda p: pixels(p) / 0, "gives values that are not finite"),
    "the picture's shape": (
        "preprocess",
        lambda p: torch.zeros(3, p.height, p.width),
        r"different proportions different shapes, \(3, 64, 48\) and \(3, 48, 64\)",
    ),
    "an error": ("preprocess", stopped, "preprocess fails on an RGB picture of 48 x 64: ValueError: no such picture"),
    "another size": (
        "encode_image",
        lambda x: torch.nn.functional.linear(x.flatten(1), torch.ones(3, 7)),
        r"encode_image does not take what comes before it, of shape \(2, 3, 4, 4\): RuntimeError",
    ),
    "feature maps": ("encode_image", lambda x: x, r"encode_image gives a Tensor .*, not embeddings \(2, D\)"),
    "lists": ("tokenizer", lambda texts: [[1]] * len(texts), "tokenizer gives a list of 2 texts, not int64 tokens"),
    "one row": ("tokenizer", lambda texts: torch.ones(1, 5, dtype=torch.long), r"shape \(1, 5\) of 2 texts, not int64"),
    "another width": ("encode_text", lambda t: torch.ones(len(t), 5), "encode_image gives 3 numbers, encode_text 5"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_does_not_fit_is_one_sentence_before_any_task(tmp_path, fault):
    name, function, message = FAULTS[fault]
    with pytest.raises(UserError, match=message):
        zero_shot(Other(name, function), write_bench(tmp_path, "nothing", "is", "there"))


def test_probes_and_retrieval_check_as_well(tmp_path):
    model = Other(*FAULTS["nan"][:2])
    write_class_folders(tmp_path / "t")
    with pytest.raises(UserError, match="not finite"):
        probe(model, write_bench(tmp_path, "t"), progress=False)
    (tmp_path / "p.csv").write_text("path,caption\nt/test/red/test0.png,a red thing\n")
    with pytest.raises(UserError, match="not finite"):
        evaluate(model, open_pairs(tmp_path / "p.csv"), progress=False)


def test_extraction_checks_what_an_encoders_preprocess_gives(tmp_path):
    tower = FocalNet(FocalNetConfig(embed_dim=8, depths=(1, 1), focal_levels=2, focal_windows=3))
    encoder = ImageEncoder(tower, lambda: lambda picture: torch.zeros(3, picture.height, picture.width))
    write_class_folders(tmp_path / "t")
    with pytest.raises(UserError, match=r"ImageEncoder\.preprocess gives pictures of different proportions"):
        extract(encoder, tmp_path / "t", tmp_path / "f.npz", progress=False)


def test_a_sound_model_passes_and_one_picture_is_not_the_models_fault(tmp_path):
    check_model(ColourModel())
    write_class_folders(tmp_path / "t")
    Image.fromarray(np.zeros((1, 400, 3), np.uint8)).save(tmp_path / "t" / "test" / "red" / "line.png")

    def preprocess(picture):
        if picture.height < 4:
            raise ValueError("too flat")
        return pixels(picture)

    task = zero_shot(Other("preprocess", preprocess), write_bench(tmp_path, "t")).tasks["t"]
    assert (task.n, task.value) == (9, 1)
    assert "line.png (the model's preprocess fails, ValueError: too flat" in task.broken[0]
