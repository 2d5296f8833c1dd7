"""Optimisers and schedules by their names, and the numbers of those that are there."""

import math

import pytest
import torch
from torch import nn

from focalclip.base.errors import UserError
from focalclip.config import OptimConfig
from focalclip.training.optim import (
    OPTIMIZERS,
    SCHEDULES,
    OptimizerEntry,
    check,
    create_optimizer,
    create_schedule,
)


def sgd(model, config, *, nesterov: bool = False):
    return torch.optim.SGD(model.parameters(), lr=config.lr, momentum=0.5, nesterov=nesterov)


def steps(progress, floor, *, count: int):
    return floor + (1 - floor) * (1 - math.floor(progress * count) / count)


@pytest.fixture(autouse=True)
def entries(monkeypatch):
    monkeypatch.setitem(OPTIMIZERS, "sgd", OptimizerEntry(f"{__name__}:sgd", ignores=("betas", "eps")))
    monkeypatch.setitem(SCHEDULES, "steps", f"{__name__}:steps")


def test_adamw_decays_matrices_alone():
    model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))
    frozen = model[1].bias.requires_grad_(False)
    optimizer = create_optimizer(model, OptimConfig(weight_decay=0.3, betas=(0.5, 0.6), eps=1e-3, lr=0.1))
    assert type(optimizer) is torch.optim.AdamW
    found = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert found == {id(model[0].weight): 0.3, id(model[0].bias): 0.0, id(model[1].weight): 0.0}
    assert id(frozen) not in found
    assert all((g["lr"], g["betas"], g["eps"]) == (0.1, (0.5, 0.6), 1e-3) for g in optimizer.param_groups)


def test_warm_up_then_a_cosine_that_reaches_the_least_rate_at_the_last_step():
    factor = create_schedule(OptimConfig(lr=1.0, min_lr=0.1, warmup_steps=4), total_steps=13)
    assert [factor(step) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factor(8) == pytest.approx(0.1 + 0.9 / 2)
    assert factor(12) == pytest.approx(0.1)
    assert factor(20) == pytest.approx(0.1)


def test_an_entry_gets_its_options():
    optimizer = create_optimizer(nn.Linear(2, 3), OptimConfig(name="sgd", options={"nesterov": True}, lr=0.25))
    assert [(group["nesterov"], group["lr"]) for group in optimizer.param_groups] == [(True, 0.25)]
    config = OptimConfig(schedule="steps", schedule_options={"count": 2}, warmup_steps=0, lr=1.0, min_lr=0.5)
    factor = create_schedule(config, total_steps=5)
    assert [factor(step) for step in range(5)] == [1.0, 1.0, 0.75, 0.75, 0.5]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "adamv"}, r"^optim\.name: adamv is not an optimiser; did you mean adamw\?$"),
        ({"schedule": "cosin"}, r"^optim\.schedule: cosin is not a schedule; did you mean cosine\?$"),
        ({"options": {"amsgrad": True}}, r"^optim\.options: amsgrad is not a setting; there are none here$"),
        (
            {"name": "sgd", "options": {"nestrov": 1}},
            r"^optim\.options: nestrov is not a setting; did you mean nesterov",
        ),
        ({"name": "sgd", "eps": 0.5}, r"^optim: eps would be ignored by optim\.name=sgd; leave out, or set eps=1e-08$"),
        ({"schedule": "steps"}, r"^optim\.schedule_options: count: field required$"),
        ({"schedule_options": {"x": 1}}, r"^optim\.schedule_options: x is not a setting; there are none here$"),
    ],
)
def test_what_does_not_fit_is_one_clear_sentence(settings, message):
    with pytest.raises(UserError, match=message):
        check(OptimConfig(**settings))
