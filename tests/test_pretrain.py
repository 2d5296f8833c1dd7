"""The pretraining command as a user runs it, on one rank: resume, signals, and mistakes."""

import os
import signal

import helpers_run
import pytest
import torch

import focalclip


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory, shards):
    """Eight steps that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    result = helpers_run.run(folder, shards)
    assert result.returncode == 0, result.stderr
    return folder / "runs" / "tiny"


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_stopped_run_resumes_bit_for_bit(name, tmp_path, shards, whole_run):
    process = helpers_run.start(tmp_path, shards, "--train.save-every", "100")
    run_dir = tmp_path / "runs" / "tiny"
    helpers_run.wait_for_lines(run_dir, 2)
    os.killpg(process.pid, getattr(signal, name))
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert f"{name} received: saved step" in out
    assert "--resume" in out
    assert "Traceback" not in err
    steps_done = len(helpers_run.losses(run_dir))
    assert 2 <= steps_done < 8

    result = helpers_run.run(tmp_path, shards, "--resume")
    assert result.returncode == 0, result.stderr
    assert f"continued from step {steps_done}" in result.stdout
    assert helpers_run.losses(run_dir) == helpers_run.losses(whole_run)


def test_checkpoints_and_model_of_a_finished_run(whole_run):
    assert sorted(p.name for p in (whole_run / "checkpoints").glob("step-*")) == ["step-4", "step-8"]
    assert not list(whole_run.rglob("*.tmp"))
    model = focalclip.load(whole_run)
    encoder = focalclip.load_image_encoder(whole_run)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(encoder(images), model.visual.trunk(images))
    assert list((whole_run / "tensorboard").iterdir())


def test_a_finished_run_is_not_overwritten(whole_run, shards):
    result = helpers_run.run(whole_run.parents[1], shards)
    assert result.returncode == 2
    assert result.stderr.strip().splitlines()[-1] == (
        f"error: {whole_run}: holds a run at step-8; continue it with --resume, or choose another --name"
    )


def test_a_truncated_checkpoint_is_named(tmp_path, shards):
    assert helpers_run.run(tmp_path, shards, "--train.steps", "4").returncode == 0
    shard = next((tmp_path / "runs/tiny/checkpoints/step-4").glob("zero*"))
    size = shard.stat().st_size
    os.truncate(shard, size // 2)
    result = helpers_run.run(tmp_path, shards, "--train.steps", "4", "--resume")
    assert result.returncode == 2
    assert f"{shard} has {size // 2} bytes instead of {size}" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--optim.wieght-decay", "1"], "optim.wieght_decay is not a setting; did you mean weight_decay?"),
        (["--optim.lr", "fast"], "optim.lr: input should be a valid number"),
        (["--data.batch-size", "15", "--train.accumulation", "2"], "data.batch_size=15 is not divisible by 1 ranks x"),
        (["--data.train", "nowhere/{00..03}.tar"], "data.train: 4 of 4 shards do not exist (nowhere/00.tar"),
        (["--model.embed-dim", "64", "--resume"], "another model (embed_dim: 32 there, 64 here)"),
        (["--train.zero-stage", "2", "--resume"], "written with train.zero_stage=1, this run has 2"),
        (["--train.precision", "fp16"], "train.precision=fp16 needs a GPU"),
        (["--config", "nowhere.yaml"], "nowhere.yaml: no such configuration file"),
        (["--model.image.name", "focalnet_nono"], "focalnet_nono is not a FocalNet variant"),
    ],
)
def test_mistakes_get_one_sentence(args, message, whole_run, shards):
    result = helpers_run.run(whole_run.parents[1], shards, *args)
    assert result.returncode == 2
    assert message in result.stderr.strip().splitlines()[-1]
    assert "Traceback" not in result.stderr
