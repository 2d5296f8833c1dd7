"""What is not finite is never applied and never saved: steps are skipped, runs return to a checkpoint, or stop."""

import json
import math
import shutil

import helpers_run
import pytest
import spiky_loss
import torch
from helpers import run_ranks

pytestmark = pytest.mark.faults

STAGES = [(1, 0), (2, 1), *(pytest.param(*case, marks=pytest.mark.long) for case in ((1, 1), (2, 0), (2, 2), (2, 3)))]


@pytest.fixture
def train(tmp_path, shards):
    """Trains with a loss that goes wrong at some calls; returns what was raised, lines of the log and weights."""

    def run(*args, at=(), kind="gradient", ranks=1):
        _python, _script, *argv = helpers_run.command(tmp_path, shards, "--data.workers", "0", *args)
        raised = run_ranks(spiky_loss.train, ranks, argv, at, kind)
        assert len(set(raised)) == 1
        run_dir = tmp_path / "runs" / (args[args.index("--name") + 1] if "--name" in args else "tiny")
        exported = spiky_loss.weights(run_dir) if (run_dir / "model").exists() else {}
        assert all(x.isfinite().all() for x in exported.values())
        metrics = run_dir / "metrics.jsonl"
        return raised[0], helpers_run.metrics(run_dir) if metrics.exists() else [], exported

    return run


@pytest.mark.parametrize("kind", ["gradient", pytest.param("loss", marks=pytest.mark.long)])
@pytest.mark.parametrize(("ranks", "stage"), STAGES)
def test_a_step_that_is_not_finite_is_as_if_it_had_not_been(train, ranks, stage, kind):
    """In the last step, after which the weights are exported with their running statistics."""
    args = ["--train.zero-stage", str(stage), "--optim.min-lr", "0.001"]  # a rate that does not tell the length
    raised, lines, weights = train(*args, "--train.steps", "4", at=[4], kind=kind, ranks=ranks)
    assert raised == ""
    assert [line["skipped"] for line in lines] == [0, 0, 0, 1]
    assert all(math.isfinite(line["grad_norm"]) for line in lines[:3])
    assert (lines[3]["loss"], lines[3]["grad_norm"]) == (None, None)
    raised, shorter, expected = train(*args, "--train.steps", "3", "--name", "shorter", ranks=ranks)
    assert raised == ""
    assert [line["loss"] for line in lines[:3]] == [line["loss"] for line in shorter]
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.mark.parametrize(("ranks", "stage"), [(1, 0), (2, 1), pytest.param(2, 3, marks=pytest.mark.long)])
def test_after_too_many_in_a_row_the_run_returns_and_goes_on_with_other_data(train, tmp_path, ranks, stage):
    args = ["--train.zero-stage", str(stage), "--train.save-every", "2", "--train.max-skipped-steps", "2"]
    raised, lines, _ = train(*args, at=[5, 6, 7], ranks=ranks)
    assert raised == ""
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert [line["samples"] for line in lines] == [16, 32, 48, 64, 128, 144, 160, 176]
    state = json.loads((tmp_path / "runs/tiny/checkpoints/step-8/manifest.json").read_text())["state"]
    assert (state["rollbacks"], state["skipped"], state["samples"]) == (1, 3, 176)


def test_a_run_that_returned_resumes_bit_for_bit(train, tmp_path):
    args = ["--train.save-every", "2", "--train.max-skipped-steps", "1", "--train.keep-checkpoints", "9"]
    _, lines, expected = train(*args, at=[3, 4])
    assert [line["samples"] for line in lines] == [16, 32, 80, 96, 112, 128, 144, 160]
    shutil.rmtree(tmp_path / "runs/tiny/checkpoints/step-8")
    shutil.rmtree(tmp_path / "runs/tiny/checkpoints/step-6")
    raised, again, weights = train(*args, "--resume")
    assert raised == ""
    assert [line["loss"] for line in again] == [line["loss"] for line in lines]
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_an_optimiser_that_cannot_skip_on_the_device_waits(train):
    args = ["--train.zero-stage", "0", "--optim.min-lr", "0.001", "--optim.name", "momentum"]
    raised, lines, weights = train(*args, "--train.steps", "4", at=[4])
    assert raised == ""
    assert [line["skipped"] for line in lines] == [0, 0, 0, 1]
    _, _, expected = train(*args, "--train.steps", "3", "--name", "shorter")
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("at", "message"),
    [
        (range(1, 99), "there is no checkpoint to return to"),
        (range(5, 99), "checkpoints/step-4 is the last sound checkpoint"),
    ],
)
def test_a_run_that_does_not_heal_stops_with_one_sentence(train, tmp_path, at, message):
    args = ["--train.save-every", "2", "--train.max-skipped-steps", "2"]
    raised, _, _ = train(*args, at=at)
    assert raised.startswith("SharedError: step ")
    assert "3 steps in a row had a loss or gradient that is not finite" in raised
    assert message in raised
    assert raised.endswith("start another run (--name) with a lower optim.lr or more optim.warmup_steps")
    assert len(list((tmp_path / "runs/tiny").glob("checkpoints/step-*"))) == (2 if at[0] == 5 else 0)


@pytest.mark.parametrize("stage", ["0", "1"])
def test_a_rate_beyond_all_sense_ends_without_a_file_that_is_not_finite(tmp_path, shards, stage):
    args = [
        "--optim.lr",
        "1e38",
        "--train.save-every",
        "1",
        "--train.max-skipped-steps",
        "2",
        "--optim.warmup-steps",
        "0",
    ]
    done = helpers_run.run(tmp_path, shards, *args, "--train.zero-stage", stage)
    assert done.returncode not in (0, 1)
    assert "Traceback" not in done.stderr
    assert "not finite" in done.stderr.strip().splitlines()[-1]
    for file in (tmp_path / "runs").rglob("*_states.pt"):
        _all_finite(torch.load(file, weights_only=False))


def _all_finite(value):
    if isinstance(value, torch.Tensor):
        assert not value.is_floating_point() or value.isfinite().all()
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            _all_finite(item)
