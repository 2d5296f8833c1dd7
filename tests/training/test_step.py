"""A loss by its name: its options are checked, and it gets the outputs that its signature names."""

from typing import Annotated

import pytest
import torch
import torch.nn.functional as F
from pydantic import Field

from focalclip.base.errors import UserError
from focalclip.config import ImageTowerConfig, LossConfig, ModelConfig, TextTowerConfig
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
