"""Runs that are killed at any moment and resumed are the run that nothing disturbed, bit for bit, and leave nothing."""

import random
import signal
import subprocess
import time

import helpers_run
import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.faults

ARGS = ["--train.save-every", "2", "--train.keep-checkpoints", "2"]


def _whole(folder, shards, *args, ranks):
    start = time.monotonic()
    done = helpers_run.run(folder, shards, *ARGS, *args, ranks=ranks)
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "tiny", time.monotonic() - start


@pytest.mark.parametrize("kills", [2, pytest.param(25, marks=[pytest.mark.long, pytest.mark.timeout(1800)])])
@pytest.mark.parametrize(
    ("ranks", "stage"), [(0, 0), (2, 1), *(pytest.param(*case, marks=pytest.mark.long) for case in ((0, 1), (2, 0)))]
)
def test_killed_runs_resume_bit_for_bit(tmp_path, shards, kills, ranks, stage):
    args = ["--train.zero-stage", str(stage)]
    (tmp_path / "whole").mkdir()
    expected, seconds = _whole(tmp_path / "whole", shards, *args, ranks=ranks)
    weights = load_file(expected / "model" / "open_clip_model.safetensors")
    names = sorted(str(path.relative_to(expected)) for path in expected.rglob("*") if "tensorboard" not in str(path))
    rng = random.Random(f"{ranks} {stage}")
    done, attempt = 0, 0
    while done < kills:
        attempt += 1
        folder = tmp_path / f"attempt-{attempt}"
        folder.mkdir()
        finished = False
        while not finished:
            process = helpers_run.start(folder, shards, *ARGS, *args, "--resume", ranks=ranks)
            if done < kills:
                try:
                    process.communicate(timeout=rng.uniform(0.1, 1.1) * seconds)
                except subprocess.TimeoutExpired:
                    process.send_signal(signal.SIGKILL)
                    done += 1
            out, err = process.communicate(timeout=200)
            finished = process.returncode == 0
            assert finished or process.returncode == -signal.SIGKILL, out + err
        run_dir = folder / "runs" / "tiny"
        assert helpers_run.losses(run_dir) == helpers_run.losses(expected)
        again = load_file(run_dir / "model" / "open_clip_model.safetensors")
        assert all(torch.equal(again[name], weights[name]) for name in weights)
        found = sorted(str(path.relative_to(run_dir)) for path in run_dir.rglob("*") if "tensorboard" not in str(path))
        assert found == names
