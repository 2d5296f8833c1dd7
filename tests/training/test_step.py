"""A loss by its name: its options are checked, and it gets the outputs that its signature names."""

from typing import Annotated

import pytest
import tiny_shards
import torch
import torch.nn.functional as F
from helpers_run import losses as losses_of
from helpers_run import run
from pydantic import Field

from focalclip.base.errors import UserError
from focalclip.base.strict import from_dict
from focalclip.config import ImageTowerConfig, LossConfig, ModelConfig, RunConfig, TextTowerConfig
from focalclip.losses import LOSSES, contrastive_loss
from focalclip.models.clip import FocalCLIP
from focalclip.training.step import create_loss


def biased(image, text, bias, *, weight: Annotated[float, Field(ge=0)], labels=None, group=None):
    return (image * text).sum() * weight + bias + (0 if labels is None else labels.sum())


def unlabelled(text):
    return text.sum()


@pytest.fixture(autouse=True)
def losses(monkeypatch):
    monkeypatch.setitem(LOSSES, "biased", f"{__name__}:biased")
    monkeypatch.setitem(LOSSES, "unlabelled", f"{__name__}:unlabelled")


def test_the_model_returns_what_it_says():
    image = ImageTowerConfig(name="focalnet_pico", image_size=32)
    model = FocalCLIP(ModelConfig(embed_dim=8, image=image, text=TextTowerConfig(width=16, heads=2, layers=1))).eval()
    with torch.no_grad():
        outputs = model(torch.zeros(1, 3, 32, 32), model.tokenizer(["a"]))
    assert tuple(outputs) == FocalCLIP.outputs


@pytest.mark.parametrize("labels", [[-1, -1, -1], [5, 5, -1]])
def test_the_default_is_the_contrastive_loss_with_labels(labels):
    image, text = (F.normalize(x, dim=1) for x in torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0)))
    outputs, numbers = {"image": image, "text": text, "scale": torch.tensor([9.0])}, torch.tensor(labels)
    loss = create_loss(LossConfig(), FocalCLIP.outputs)(outputs, numbers)
    assert loss == contrastive_loss(image, text, torch.tensor([9.0]), labels=numbers)


def test_the_default_is_given_the_identities_of_pairs():
    image, text = (F.normalize(x, dim=1) for x in torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0)))
    outputs, labels, ids = {"image": image, "text": text, "scale": torch.tensor([9.0])}, torch.full((3,), -1), [6, 6, 2]
    loss = create_loss(LossConfig(), FocalCLIP.outputs)(outputs, labels, torch.tensor(ids))
    assert loss == contrastive_loss(image, text, torch.tensor([9.0]), labels=labels, ids=torch.tensor(ids))


def test_a_run_does_not_contrast_a_pair_with_itself(tmp_path):
    """One sound sample stands in the place of all the broken ones, so every batch holds copies of one pair."""
    broken = [(f"{i:06d}.{extension}", b"broken") for i in range(7) for extension in ("png", "txt")]
    tiny_shards.write_tar(tmp_path / "0.tar", [*broken, ("7.png", tiny_shards.picture(0)), ("7.txt", b"a caption")])
    settings = ["--data.batch-size", "8", "--train.steps", "2", "--optim.warmup-steps", "1"]
    done = run(tmp_path, tmp_path / "0.tar", *settings)
    assert done.returncode == 0, done.stderr
    assert losses_of(tmp_path / "runs" / "tiny") == [0.0, 0.0]


@pytest.mark.parametrize(
    ("batch_size", "accumulation", "enough"), [(1, 1, 2), (16, 16, 32), (2, 2, 4), (4, 8, 16), (5, 3, 6)]
)
def test_a_micro_batch_of_fewer_than_two_pairs_is_refused(batch_size, accumulation, enough):
    values = {"data": {"batch_size": batch_size}, "train": {"steps": 1, "accumulation": accumulation}}
    with pytest.raises(UserError, match=rf"nothing to contrast with; use a batch_size of {enough} or more$"):
        from_dict(RunConfig, values, "test")
    values["data"]["batch_size"] = enough
    from_dict(RunConfig, values, "test")


def test_a_loss_gets_the_outputs_and_options_that_it_names():
    one = torch.ones(1, 1)
    outputs = {"image": one, "text": 3 * one, "scale": one, "bias": torch.tensor(0.5), "tokens": one}
    loss = create_loss(LossConfig(name="biased", options={"weight": 2}), outputs)
    assert loss(outputs, torch.tensor([100])) == 2 * 3 + 0.5 + 100
    assert create_loss(LossConfig(name="unlabelled"), outputs)(outputs, torch.tensor([100])) == 3


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sigmod", {}, r"^loss\.name: sigmod is not a loss; known here: contrastive, biased, unlabelled$"),
        (
            "biased",
            {"weight": 1},
            r"^loss\.name: biased needs bias, which the model does not return \(it returns image, ",
        ),
        ("biased", {"weigth": 1, "weight": 1}, r"^loss\.options: weigth is not a setting; did you mean weight\?$"),
        ("biased", {"weight": -1}, r"^loss\.options: weight: input should be greater than or equal to 0 \(got -1\)$"),
        ("biased", {"weight": True}, r"^loss\.options: weight: input should be a number \(got True\)$"),
        ("biased", {}, r"^loss\.options: weight: field required$"),
        ("biased", {"weight": 1, "group": 1}, r"^loss\.options: group is not a setting; known here: weight$"),
    ],
)
def test_what_does_not_fit_is_one_clear_sentence(name, options, message):
    with pytest.raises(UserError, match=message):
        create_loss(LossConfig(name=name, options=options), FocalCLIP.outputs)
