"""Real ranks give the run of one process, stochastic depth included; they stop and resume together, also launched."""

import os
import shutil

import helpers_run
import pytest
import torch
from tiny_shards import picture, write_tar

import focalclip


@pytest.fixture(scope="module")
def one_process(tmp_path_factory, shards):
    folder = tmp_path_factory.mktemp("one")
    result = helpers_run.run(folder, shards)
    assert result.returncode == 0, result.stderr
    return helpers_run.losses(folder / "runs" / "tiny")


@pytest.fixture(scope="module", params=[1, 2], ids=["zero1", "zero2"])
def two_ranks(request, tmp_path_factory, shards):
    """ZeRO stage and losses of an uninterrupted run on two ranks."""
    folder = tmp_path_factory.mktemp("two")
    result = helpers_run.run(folder, shards, "--train.zero-stage", str(request.param), ranks=2)
    assert result.returncode == 0, result.stdout + result.stderr
    return request.param, helpers_run.losses(folder / "runs" / "tiny")


def test_two_ranks_give_the_losses_of_one(two_ranks, one_process):
    # float32 sums in another order; AdamW's eps of 1e-5 keeps the difference from growing
    assert two_ranks[1] == pytest.approx(one_process, rel=2e-5)


def test_four_ranks_give_the_losses_of_one(tmp_path, shards, one_process):
    result = helpers_run.run(tmp_path, shards, "--train.zero-stage", "0", ranks=4)
    assert result.returncode == 0, result.stdout + result.stderr
    assert helpers_run.losses(tmp_path / "runs" / "tiny") == pytest.approx(one_process, rel=2e-5)


@pytest.mark.parametrize("two_ranks", [2], ids=["zero2"], indirect=True)
def test_two_ranks_stop_together_and_resume_bit_for_bit(two_ranks, tmp_path, shards):
    stage, expected = two_ranks
    args = ["--train.zero-stage", str(stage), "--train.save-every", "100"]
    process = helpers_run.start(tmp_path, shards, *args, ranks=2, launched=True)
    run_dir = tmp_path / "runs" / "tiny"
    helpers_run.wait_for_lines(run_dir, 2)
    process.terminate()  # the `deepspeed` command alone
    out, err = process.communicate(timeout=60)
    assert "deepspeed has ended: saved step" in out, out + err
    assert len(helpers_run.losses(run_dir)) < len(expected)

    result = helpers_run.run(tmp_path, shards, *args, "--resume", ranks=2)
    assert result.returncode == 0, result.stdout + result.stderr
    assert helpers_run.losses(run_dir) == expected


def test_a_run_continues_on_another_number_of_ranks(tmp_path, shards, one_process):
    first = helpers_run.run(tmp_path, shards, "--train.save-every", "3", ranks=2)
    assert first.returncode == 0, first.stdout + first.stderr
    run_dir = tmp_path / "runs" / "tiny"
    shutil.rmtree(run_dir / "checkpoints" / "step-8")
    whole = focalclip.load(run_dir)

    again = helpers_run.run(tmp_path, shards, "--train.save-every", "3", "--resume")
    assert again.returncode == 0, again.stdout + again.stderr
    assert "continued from step 6" in again.stdout
    assert helpers_run.losses(run_dir) == pytest.approx(one_process, rel=2e-5)
    assert [p.name for p in run_dir.glob("checkpoints/.*")] == []
    # not only the losses: the exported weights, with the normalisation's statistics folded in, agree too
    for name, expected in whole.state_dict().items():
        torch.testing.assert_close(focalclip.load(run_dir).state_dict()[name], expected, rtol=1e-3, atol=1e-4, msg=name)


def test_faults_and_bad_shards_of_two_ranks_end_in_one_sentence(tmp_path):
    # one epoch in 8 steps; the three broken samples are counted wherever they fall
    samples = [[(f"{i:03d}.png", b"broken" if i in (5, 60, 61) else picture(i)), (f"{i:03d}.txt", b"thing")]
               for i in range(128)]  # fmt: skip
    shard = write_tar(tmp_path / "0.tar", [member for sample in samples for member in sample])
    args = ["--data.max-faults", "2", "--train.log-every", "100"]
    result = helpers_run.run(tmp_path, shard, *args, ranks=2)
    assert result.returncode != 0
    assert result.stderr.count("replaced a broken sample: 0.tar: ") == 3
    assert result.stderr.count("error: data.max_faults: 3 broken samples, more than 2") == 1
    assert "Traceback" not in result.stdout + result.stderr

    os.truncate(shard, shard.stat().st_size // 2)
    result = helpers_run.run(tmp_path, shard, "--name", "cut", ranks=2)
    assert result.returncode != 0
    assert result.stderr.count(f"error: {shard}: ") == 1
    assert "Traceback" not in result.stdout + result.stderr
    assert not (tmp_path / "runs" / "cut").exists()
