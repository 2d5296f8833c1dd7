"""Draws inside the model (stochastic depth) depend on seed and step alone, whatever else draws random numbers."""

from contextlib import closing

import helpers_run
import pytest
import torch
import yaml

from focalclip.base.strict import from_dict
from focalclip.config import RunConfig
from focalclip.data.loader import Dealing, TrainLoader
from focalclip.models.clip import FocalCLIP
from focalclip.training.checkpoint import TrainState
from focalclip.training.log import TrainLog
from focalclip.training.loop import Trainer, train
from focalclip.training.optim import create_optimizer
from focalclip.training.step import create_loss

STEPS = 6


class PlainEngine:
    """The engine's calls that the loop makes, over torch's optimiser at a constant rate."""

    def __init__(self, config):
        torch.manual_seed(config.seed)
        self.module = FocalCLIP(config.model).train()
        self.optimizer = create_optimizer(self.module, config.optim)

    def __call__(self, images, tokens):
        return self.module(images, tokens)

    def train(self):
        self.module.train()

    def backward(self, loss):
        loss.backward()

    def step(self):
        self.optimizer.step()
        self.optimizer.zero_grad()

    def get_lr(self):
        return [self.optimizer.param_groups[0]["lr"]]

    def get_global_grad_norm(self):
        return 1.0

    def was_step_applied(self):
        return True


class StopAfter:
    def __init__(self, state, step):
        self.state, self.step = state, step

    def agreed(self, *, is_faulty):
        return self.state.step == self.step


@pytest.fixture
def losses(tmp_path, shards):
    """Losses of a run, stopped and continued after each of ``stops``; ``draw`` is called between steps."""

    def run(drop_path, stops=(), draw=lambda: None):
        values = yaml.safe_load(helpers_run.TINY) | {"runs_dir": str(tmp_path), "eval": {"every": 1}}
        values["model"]["image"]["drop_path"] = drop_path
        values["train"]["steps"] = STEPS
        config = from_dict(RunConfig, values, "tiny")
        config.run_dir.mkdir(exist_ok=True)
        (config.run_dir / "metrics.jsonl").unlink(missing_ok=True)
        engine, state = PlainEngine(config), TrainState()  # weights and moments stay, as from an exact checkpoint
        for stop in (*stops, STEPS):
            loader = TrainLoader(
                sorted(shards.glob("*.tar")),
                config.data,
                32,
                engine.module.tokenizer,
                config.seed,
                Dealing(start=state.samples),
            )
            loss = create_loss(config.loss, FocalCLIP.outputs)
            with closing(TrainLog(config, STEPS, state)) as log:
                end = StopAfter(state, stop)
                parts = config, engine, loss, loader, state, STEPS, log, end
                train(Trainer(*parts, save=lambda run: True, roll_back=None, evaluate=lambda run: draw()))
        return helpers_run.losses(config.run_dir)

    return run


def test_other_draws_between_steps_change_nothing(losses):
    undisturbed = losses(drop_path=0.5)
    assert losses(drop_path=0.5, draw=lambda: torch.rand(3)) == undisturbed
    assert losses(drop_path=0.0) != undisturbed  # stochastic depth does draw


def test_without_stochastic_depth_a_run_resumes_bit_for_bit(losses):
    assert losses(drop_path=0.0, stops=[3]) == losses(drop_path=0.0)


def test_with_stochastic_depth_a_run_resumes_bit_for_bit(losses):
    assert losses(drop_path=0.5, stops=[3]) == losses(drop_path=0.5)
