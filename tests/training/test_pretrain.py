"""The pretraining command as a user runs it, on one rank: resume, signals, and mistakes."""

import itertools
import os
import re
import shutil
import signal
import statistics

import helpers_run
import pytest
import torch
from coloured_tasks import write_pure_wds

import focalclip
from focalclip.base.errors import UserError
from focalclip.cli.pretrain import check_benchmark, main
from focalclip.config import load_config
from focalclip.interop import folder as store
from focalclip.training import engine
from focalclip.training.stop import StopRequest


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory, shards):
    """Eight steps that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    result = helpers_run.run(folder, shards)
    assert result.returncode == 0, result.stderr
    return folder / "runs" / "tiny"


@pytest.mark.parametrize(("name", "log_every"), [("SIGTERM", 1), ("SIGINT", 3)])
def test_a_stopped_run_resumes_bit_for_bit(name, log_every, tmp_path, shards, whole_run):
    args = ["--train.log-every", str(log_every)]
    launched = name == "SIGTERM"  # by a shell, with nothing imported before
    process = helpers_run.start(tmp_path, shards, "--train.save-every", "100", *args, launched=launched)
    run_dir = tmp_path / "runs" / "tiny"
    helpers_run.wait_for_lines(run_dir, 1)
    process.send_signal(getattr(signal, name))
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    stopped = re.search(f"{name} received: saved step (\\d+) .* --resume", out)
    assert stopped is not None, out
    assert "Traceback" not in err
    assert log_every <= int(stopped[1]) < 8

    result = helpers_run.run(tmp_path, shards, "--resume", *args)
    assert result.returncode == 0, result.stderr
    assert f"continued from step {stopped[1]}" in result.stdout
    # a line tells the mean loss since the line before, also where the run was stopped between them
    steps = [*range(log_every, 8, log_every), 8]
    whole = helpers_run.losses(whole_run)
    means = [statistics.fmean(whole[start:end]) for start, end in itertools.pairwise([0, *steps])]
    lines = helpers_run.metrics(run_dir)
    assert [line["step"] for line in lines] == steps
    assert [line["loss"] for line in lines] == means


def test_handlers_of_signals_are_put_back():
    usual = signal.getsignal(signal.SIGTERM)
    with StopRequest(torch.device("cpu")) as stop:
        assert not stop.agreed()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.agreed()
    assert signal.getsignal(signal.SIGTERM) is usual


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


def test_what_a_killed_run_leaves_is_mended_and_what_is_damaged_is_named(tmp_path, shards):
    assert helpers_run.run(tmp_path, shards, "--train.steps", "4").returncode == 0
    run_dir = tmp_path / "runs/tiny"
    # as if killed while the exported model was replaced; meanwhile the data have moved
    (run_dir / "model").rename(run_dir / ".model.old.tmp")
    moved = shutil.copytree(shards, tmp_path / "moved")
    free = ["--model.image.activation-checkpointing", "--data.workers", "0"]
    result = helpers_run.run(tmp_path, moved, "--train.steps", "4", "--resume", *free)
    assert result.returncode == 0, result.stderr
    assert store.provenance(run_dir / "model")["step"] == 4
    assert not list(run_dir.rglob("*.tmp"))

    shard = next((run_dir / "checkpoints/step-4").glob("zero*"))
    size = shard.stat().st_size
    os.truncate(shard, size // 2)
    result = helpers_run.run(tmp_path, shards, "--train.steps", "4", "--resume")
    assert result.returncode == 2
    assert f"error: {shard} differs from its hash in manifest.json: this checkpoint is damaged" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--optim.wieght-decay", "1"], "optim.wieght_decay is not a setting; did you mean weight_decay?"),
        (["--eval.benchmark", "dmeo"], "eval.benchmark dmeo: not one of"),
        (["--eval.benchmark", "elevater", "--eval.data-root", "no"], "eval.data_root no: no such folder"),
        (["--eval.benchmark", "elevater", "--eval.tasks", "dtt"], "eval.tasks: elevater has no task 'dtt'; did you"),
        (
            ["--eval.benchmark", "elevater", "--eval.data-root", "EMPTY"],
            "on the hub: clip-benchmark/wds_vtab-caltech101; 20 more likewise); get the data first, or set null",
        ),
        (
            ["--train.epochs", "1", "--optim.warmup-steps", "8", "--name", "new"],
            "optim.warmup_steps=8 is not shorter than the run of 8 steps",
        ),
        (["--train.epochs", "0.05", "--name", "new"], "train.epochs=0.05 of 128 pairs is less than one step of"),
        (
            [
                "--model.image.name",
                "timm:vit_tiny_patch16_224",
                "--model.image.options.img_size",
                "40",
                "--model.image.image-size",
                "40",
                "--model.image.init",
                "official",
            ],
            "image_size=40 is not a multiple of the 16 pixels of a patch of timm:vit_tiny_patch16_224, so the last 8 ",
        ),
        (["--resume", "latest"], "--resume takes no value ('latest')"),
        (["--data.batch-size", "15", "--train.accumulation", "2", "--name", "new"], "15 is not divisible by 1 ranks"),
        (["--data.train", "nowhere/{00..03}.tar"], "data.train: 4 of 4 shards do not exist (nowhere/00.tar"),
        (["--data.train", "ONE", "--resume"], "data.train: other shards than"),
        (["--data.train", "ONE", "TWO", "--resume"], "or division into sources differ); give the same ones"),
        (["--model.embed-dim", "64", "--resume"], "another model.embed_dim (32 there, 64 here)"),
        (["--data.augment.flip", "0.5", "--resume"], "another data.augment.flip (0.0 there, 0.5 here)"),
        (["--train.zero-stage", "2", "--resume"], "written with train.zero_stage=1, this run has 2"),
        (["--train.precision", "fp16"], "train.precision=fp16 needs a GPU"),
        (["--loss.name", "contrastiv"], "loss.name: contrastiv is not a loss; did you mean contrastive?"),
        (["--loss.options.margin", "1"], "loss.options: margin is not a setting; there are none here"),
        (["--optim.name", "adam", "--name", "new"], "optim.name: adam is not an optimiser; did you mean adamw?"),
        (["--optim.schedule", "linear"], "optim.schedule: linear is not a schedule; known here: cosine"),
        (
            ["--loss.name", "contrastive", "--config", "nono"],
            "nono: no such configuration file; give a path, or one of",
        ),
        (["--runs-dir", "ONE"], "00000.tar is a file; name a folder"),
        (["--model.image.name", "focalnet_nono", "--name", "new"], "focalnet_nono is not a FocalNet variant"),
    ],
)
def test_mistakes_get_one_sentence(args, message, whole_run, shards, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")  # as the command sets them, and put back after the test
    monkeypatch.setenv("GOMP_SPINCOUNT", "20000")
    monkeypatch.setattr(engine, "set_up", lambda: None)  # this process sets no DeepSpeed up
    config = (whole_run / "config.yaml").read_bytes()
    (tmp_path / "empty").mkdir()
    files = {"ONE": shards / "00000.tar", "TWO": shards / "00001.tar", "EMPTY": tmp_path / "empty"}
    args = [str(files.get(arg, arg)) for arg in args]
    words = helpers_run.command(whole_run.parents[1], shards, *args)
    assert main(words[2:]) == 2
    errors = capsys.readouterr().err
    assert message in errors.strip().splitlines()[-1]
    assert "Traceback" not in errors
    assert (whole_run / "config.yaml").read_bytes() == config
    assert [path.name for path in whole_run.parent.iterdir()] == ["tiny"]


@pytest.mark.parametrize(
    ("error", "said"),
    [(KeyError("labels"), "a: KeyError: 'labels' (raised at "), (OSError(5, "I/O error", "x.tar"), "a: x.tar: I/O")],
)
def test_data_that_fail_in_an_unforeseen_way_are_a_sentence_before_training(error, said, tmp_path, monkeypatch):
    def fails(*_):
        raise error

    write_pure_wds(tmp_path / "t/a")
    monkeypatch.setattr("focalclip.evaluation.opened.open_checked", fails)
    base = load_config("focalclip_pico")
    config = base.model_copy(update={"eval": base.eval.model_copy(update={"benchmark": str(tmp_path / "t")})})
    with pytest.raises(UserError, match=re.escape(f"nothing of it could be measured ({said}")):
        check_benchmark(config)
