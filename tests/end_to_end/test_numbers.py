"""Numbers that a change of structure must not move: costs of all variants, and training that repeats bit for bit.

Losses differ between processors, so none stands here; ``record.py`` compares two checkouts on one machine.
"""

import hashlib
import json
from pathlib import Path

import helpers_run
import pytest
import torch
from helpers import run_ranks

from focalclip.models.cost import count
from focalclip.models.focalnet.variants import FOCALNETS, create_focalnet

COSTS = json.loads((Path(__file__).parent / "variants.json").read_text())


def test_every_variant_is_in_the_table():
    assert set(FOCALNETS) == set(COSTS)


@pytest.mark.parametrize("name", COSTS)
def test_parameters_and_multiply_adds_of_a_variant(name):
    with torch.device("meta"):
        tower = create_focalnet(name)
    assert count(tower, 224)._asdict() == COSTS[name]


def _train_twice(argv: list[str], runs: Path) -> list[tuple[list[float], str]]:
    """Train the same model twice in one process; return losses and hash of the weights of each run."""
    from focalclip.cli.pretrain import parse, training_shards
    from focalclip.training import engine
    from focalclip.training.run import run_training
    from focalclip.training.stop import StopRequest

    engine.set_up()
    results = []
    for name in ("first", "second"):
        config, resume = parse([*argv, "--name", name])
        with StopRequest(engine.device()) as stop:
            assert run_training(config, training_shards(config), resume, stop)
        weights = (runs / name / "model" / "open_clip_model.safetensors").read_bytes()
        results.append((helpers_run.losses(runs / name), hashlib.sha256(weights).hexdigest()))
    return results


@pytest.mark.parametrize("ranks", [1, 2])
def test_training_repeats_bit_for_bit(ranks, tmp_path, shards):
    """With stochastic depth, ZeRO 1 and accumulation: nothing that is drawn or summed depends on what ran before."""
    options = ["--train.steps", "4", "--data.workers", "0", "--train.accumulation", "2"]
    _python, _script, *argv = helpers_run.command(tmp_path, shards, *options, "--model.image.drop-path", "0.1")
    for first, second in run_ranks(_train_twice, ranks, argv, tmp_path / "runs"):
        assert first == second
        assert len(set(first[0])) == 4
