"""A run that cannot go on keeps what it has: a second run of the name, lost processes, signals, a disk that refuses."""

import json
import os
import pty
import resource
import select
import shutil
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path

import helpers_run
import psutil
import pytest
import torch
from wds_folder import write_folder

from focalclip.base import files
from focalclip.base.errors import MachineError, UserError
from focalclip.base.ranks import Interrupted, joined
from focalclip.config import DataConfig
from focalclip.data.loader import TrainLoader
from focalclip.training.stop import StopRequest

pytestmark = pytest.mark.faults

LONG = ["--train.steps", "20000", "--train.save-every", "20000"]


def begin(tmp_path, shards, *args, ranks=0, lines=3):
    process = helpers_run.start(tmp_path, shards, *LONG, *args, ranks=ranks)
    helpers_run.wait_for_lines(tmp_path / "runs/tiny", lines)
    return process


def loader_process(process):
    """The newest child; its number need not be the highest, as the system begins again at the end."""
    return max(psutil.Process(process.pid).children(), key=psutil.Process.create_time)


@pytest.mark.parametrize("ranks", [pytest.param(0, marks=pytest.mark.long), 2])
def test_a_run_directory_belongs_to_one_run(ranks, tmp_path, shards):
    process = begin(tmp_path, shards)
    run_dir = tmp_path / "runs/tiny"
    config = (run_dir / "config.yaml").read_bytes()
    for args in (["--seed", "2"], ["--resume"]):
        second = helpers_run.run(tmp_path, shards, *args, ranks=ranks)
        assert second.returncode == 2
        who = f"error: {run_dir}: process {process.pid} on {socket.gethostname()} is using this run directory; "
        assert second.stderr.count(who) == 1
        assert "Traceback" not in second.stderr
    assert (run_dir / "config.yaml").read_bytes() == config
    before = len(helpers_run.losses(run_dir))
    helpers_run.wait_for_lines(run_dir, before + 3)
    process.send_signal(signal.SIGUSR1)
    assert "SIGUSR1 received: saved step" in process.communicate(timeout=30)[0]
    assert process.returncode == 75
    assert not (run_dir / ".owner").exists()


def test_a_killed_run_frees_its_directory_at_once(tmp_path, shards):
    process = begin(tmp_path, shards)
    os.kill(process.pid, signal.SIGKILL)  # its loader process lives on for a while
    resumed = helpers_run.run(tmp_path, shards, "--resume")
    assert resumed.returncode == 0, resumed.stderr


def test_an_owner_on_another_host_is_believed_while_it_still_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_SILENCE", 3.0)
    record = tmp_path / "run" / ".owner"
    record.parent.mkdir()
    record.write_text(json.dumps({"host": "elsewhere", "pid": 7}))
    with files.owned(record.parent):
        assert json.loads(record.read_text()) == {"host": socket.gethostname(), "pid": os.getpid()}
        with pytest.raises(UserError, match=f"process {os.getpid()} on"), files.owned(record.parent):
            pass
    assert record.parent.is_dir()
    assert not record.exists()

    record.write_text(json.dumps({"host": "elsewhere", "pid": 7}))
    sign = threading.Timer(1.5, os.utime, [record])
    sign.start()
    with (
        pytest.raises(UserError, match="process 7 on elsewhere is using this run directory"),
        files.owned(record.parent),
    ):
        pass


def test_a_directory_that_was_made_for_nothing_is_removed(tmp_path):
    with files.owned(tmp_path / "run"):
        pass
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("ranks", [pytest.param(0, marks=pytest.mark.long), 2])
def test_a_killed_loader_process_costs_nothing(ranks, tmp_path, shards):
    process = begin(tmp_path, shards, "--data.workers", "2", ranks=ranks)
    started = time.monotonic()
    loader_process(process).kill()
    out, err = process.communicate(timeout=60)
    assert time.monotonic() - started < 10  # 5 s on an idle machine
    assert process.returncode == 1
    assert err.count("error: data.workers: loader process ") == 1, err
    assert "Traceback" not in out + err
    run_dir = tmp_path / "runs/tiny"
    steps = len(helpers_run.losses(run_dir))
    assert (run_dir / "checkpoints" / f"step-{steps}").is_dir()
    assert f"saved step {steps} in" in out


@pytest.fixture
def batches(shards):
    data = DataConfig(batch_size=8, workers=2)
    loader = TrainLoader(sorted(shards.glob("*.tar")), data, 64, lambda texts: torch.zeros(len(texts), 4).long(), 0)
    iterator = iter(loader)
    yield loader, iterator
    iterator.close()


def test_a_loader_process_that_ended_is_reported_after_the_batches_fetched_before(batches):
    loader, iterator = batches
    next(iterator)
    worker = loader_process(psutil.Process())
    worker.kill()
    started = time.monotonic()
    time.sleep(0.2)  # no handler raises meanwhile
    for _ in range(2):
        next(iterator)
    assert f"process {worker.pid} has ended (SIGKILL)" in str(loader.fault)
    with pytest.raises(MachineError, match="SIGKILL"):
        next(iterator)
    assert time.monotonic() - started < 4
    assert not [child for child in psutil.Process().children() if child.pid == worker.pid]


@pytest.mark.parametrize(
    ("limit", "value", "message"),
    [
        (resource.RLIMIT_FSIZE, 10_000, r"a batch of 0.1 MiB cannot be handed over \(File too large\)"),
        (resource.RLIMIT_NOFILE, None, "raise the limit of open files"),
    ],
)
def test_batches_that_cannot_be_handed_over_end_in_a_sentence(batches, limit, value, message):
    usual = resource.getrlimit(limit)
    if value is None:
        value = max(int(path.name) for path in Path("/proc/self/fd").iterdir()) + 25
    resource.setrlimit(limit, (value, usual[1]))
    kept = []
    try:
        with pytest.raises(MachineError, match=message):
            kept += batches[1]
    finally:
        resource.setrlimit(limit, usual)


def test_a_rank_that_is_killed_ends_the_others(tmp_path, shards):
    process = begin(tmp_path, shards, ranks=2)
    started = time.monotonic()
    process.processes[1].kill()
    out, err = process.communicate(timeout=30)
    assert time.monotonic() - started < 10
    assert process.processes[0].exitcode == 1
    assert err.count("error: rank 1 (process ") == 1
    assert "Traceback" not in out + err


@pytest.mark.parametrize("ranks", [pytest.param(0, marks=pytest.mark.long), 2])
def test_a_stop_is_obeyed_during_an_evaluation(ranks, tmp_path, shards):
    for i in range(60):
        write_folder(tmp_path / f"tasks/{i:02d}", [i % 3 for i in range(200)], shard_size=1000)
    args = ["--eval.benchmark", str(tmp_path / "tasks"), "--eval.every", "4", "--train.steps", "8"]
    process = helpers_run.start(tmp_path, shards, *args, "--train.save-every", "3", ranks=ranks)
    run_dir = tmp_path / "runs/tiny"
    helpers_run.wait_for_lines(run_dir, 4)
    time.sleep(1)
    started = time.monotonic()
    os.kill(process.pid, signal.SIGTERM)  # one rank alone
    out, err = process.communicate(timeout=60)
    assert time.monotonic() - started < 8
    assert process.returncode == 75, out + err
    assert "saved step 4 in" in out
    assert "Traceback" not in out + err
    assert "zeroshot" not in (run_dir / "metrics.jsonl").read_text()
    assert (run_dir / "checkpoints/step-4").is_dir()

    process = helpers_run.start(tmp_path, shards, *args[:2], "--train.steps", "8", "--resume", ranks=ranks)
    while not (run_dir / "checkpoints/step-8").is_dir():
        time.sleep(0.05)
    time.sleep(2.5)
    os.kill(process.pid, signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out.count("SIGTERM received: trained, not evaluated")) == (75, 1), out + err


@pytest.mark.parametrize("ranks", [0, 2])
def test_a_stop_during_the_last_save_is_for_the_evaluation(ranks, tmp_path, shards):
    write_folder(tmp_path / "tasks/one", [0, 1, 2])
    args = ["--eval.benchmark", str(tmp_path / "tasks"), "--train.steps", "4", "--train.save-every", "4"]
    process = helpers_run.start(tmp_path, shards, *args, ranks=ranks)
    while not list((tmp_path / "runs/tiny").glob("checkpoints/*")):
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out.count("SIGTERM received: trained, not evaluated")) == (75, 1), out + err


def test_a_request_raises_at_once_only_where_it_may(monkeypatch):
    monkeypatch.setattr(os, "environ", dict(os.environ))
    with joined(alone=True), StopRequest(torch.device("cpu")) as stop:
        with stop.obeyed_at_once():
            pass
        assert not stop.agreed()
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.agreed()
        with pytest.raises(Interrupted), stop.obeyed_at_once():
            pytest.fail("the request came before")


def test_a_signal_that_is_ignored_stays_ignored():
    usual = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with StopRequest(torch.device("cpu")) as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.agreed()
    finally:
        signal.signal(signal.SIGHUP, usual)


def test_a_closed_terminal_does_not_cost_the_checkpoint(tmp_path, shards):
    ours, theirs = pty.openpty()
    words = helpers_run.command(tmp_path, shards, *LONG)
    with subprocess.Popen(
        ["setsid", "--ctty", *words], stdin=theirs, stdout=theirs, stderr=theirs,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    ) as process:  # fmt: skip
        os.close(theirs)
        run_dir = tmp_path / "runs/tiny"
        while not (metrics := run_dir / "metrics.jsonl").is_file() or metrics.read_text().count("\n") < 3:
            if select.select([ours], [], [], 0.1)[0]:
                os.read(ours, 1000)
        os.close(ours)
        assert process.wait(timeout=60) == 75
    steps = len(helpers_run.losses(run_dir))
    assert (run_dir / "checkpoints" / f"step-{steps}").is_dir()


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("unshare") is None, reason="mounts a small file system")
def test_a_full_disk_is_named_and_loses_nothing(tmp_path, shards):
    (tmp_path / "runs").mkdir()
    command = helpers_run.command(tmp_path, shards, "--train.save-every", "1", "--train.keep-checkpoints", "9")
    runs = tmp_path / "runs"
    script = f"""
        mount -t tmpfs -o size=40m tmpfs {runs} && "$@"; echo first $?
        mount -o remount,size=900m {runs}; ls -A {runs}/tiny/checkpoints
        "$@" --resume; echo second $?; cat {runs}/tiny/metrics.jsonl
    """
    done = subprocess.run(
        ["unshare", "-m", "bash", "-c", script, "bash", *command], cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert f"error: {tmp_path}/runs/tiny/" in done.stderr, done.stderr
    assert "No space left on device; make room on that disk" in done.stderr
    assert "Traceback" not in done.stderr
    assert "first 1\n" in done.stdout
    assert ".tmp" not in done.stdout
    assert "second 0\n" in done.stdout, done.stderr
    assert done.stdout.count('"loss"') == 8
