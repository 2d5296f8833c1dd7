"""Running the pretraining command as a user does, small enough for a test.

A run is forked from a process that has imported the libraries already, so that a test pays for its work and not for
four imports of DeepSpeed; ``launched`` starts it from nothing, as a user's shell does.
"""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
TINY = """
name: tiny
seed: 1
model:
  embed_dim: 32
  image: {name: focalnet_pico, image_size: 32, init: fan_in, feature_norm: batch, drop_path: 0.2}
  text: {context_length: 8, width: 32, heads: 2, layers: 1}
data: {batch_size: 16, workers: 1}
optim: {lr: 0.001, eps: 1.0e-5, warmup_steps: 2}
train: {steps: 8, log_every: 1, save_every: 4, zero_stage: 1}
eval: {benchmark: null}
"""
_context = multiprocessing.get_context("forkserver")


def preload() -> None:
    """What processes of tests import, once for all of them; before the first is forked."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # as the engine sets it before it imports DeepSpeed
    libraries = ["torch", "torch.distributed", "torch.utils.tensorboard", "deepspeed", "open_clip"]
    late = ["deepspeed.runtime.zero.muon.muon_optimizer", "deepspeed.checkpoint.ds_to_universal"]
    ours = ["focalclip.cli.pretrain", "focalclip.training.run", "focalclip.evaluation.zeroshot"]
    _context.set_forkserver_preload([*libraries, *late, *ours])


class Forked:
    """The ranks of a forked run, with the surface of ``subprocess.Popen`` that tests use."""

    def __init__(self, words: list[str], folder: Path, ranks: int):
        preload()
        self.args = words
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        environment = os.environ | {"OMP_NUM_THREADS": "1", "DEEPSPEED_TIMEOUT": "2"}
        self._outputs, self.processes = [], []
        for rank in range(max(1, ranks)):
            number = time.monotonic_ns()
            outputs = [folder / f".{number}.{kind}.log" for kind in ("out", "err")]
            if ranks:
                place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_SIZE": ranks}
                address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                environment = environment | {name: str(value) for name, value in place.items()} | address
            process = _context.Process(target=_command, args=(words, environment, *outputs))
            process.start()
            self._outputs.append(outputs)
            self.processes.append(process)
        self.pid = self.processes[0].pid

    def send_signal(self, number: int) -> None:
        """To every process of every rank, as a terminal and a scheduler do."""
        for process in self.processes:
            os.killpg(process.pid, number)

    def communicate(self, timeout: float) -> tuple[str, str]:
        """Wait for all ranks; what they printed on both streams."""
        end = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        if any(process.is_alive() for process in self.processes):
            raise subprocess.TimeoutExpired(self.args, timeout, *self._printed())
        return self._printed()

    @property
    def returncode(self) -> int:
        """The first status of a rank that is not 0."""
        return next((process.exitcode for process in self.processes if process.exitcode), 0)

    def _printed(self) -> tuple[str, str]:
        out, err = ("".join(path.read_text() for path in paths) for paths in zip(*self._outputs, strict=True))
        return out, err


def _command(words: list[str], environment: dict[str, str], out: Path, err: Path) -> None:
    """The body of a forked rank: the command, in a process group and with streams of its own."""
    os.setsid()
    for stream, path in ((sys.stdout, out), (sys.stderr, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), stream.fileno())
    signal.signal(signal.SIGINT, signal.default_int_handler)
    multiprocessing.set_start_method(None, force=True)  # of this process: the system's own, not that of the tests
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = words[1:]
    from focalclip.cli.pretrain import main

    if "RECORDED" in os.environ:
        import recorded_run

        recorded_run.record()
    raise SystemExit(main())


def command(folder: Path, shards: Path, *args: str) -> list[str]:
    """The command line of one process."""
    config = folder / "tiny.yaml"
    config.write_text(TINY)
    script = [str(ROOT / "scripts/pretrain.py"), "--config", str(config), "--runs-dir", str(folder / "runs")]
    return [sys.executable, *script, "--data.train", str(shards), *args]


def run(
    folder: Path, shards: Path, *args: str, ranks: int = 0, launched: bool = False, timeout: float = 200
) -> subprocess.CompletedProcess:
    """Run to the end; what does not end in time is killed. ``ranks`` 0 is one process without a launcher."""
    process = start(folder, shards, *args, ranks=ranks, launched=launched)
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired as late:
        process.send_signal(signal.SIGKILL)
        raise AssertionError(f"timed out:\n{late.output}\n{late.stderr}") from None
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def start(folder: Path, shards: Path, *args: str, ranks: int = 0, launched: bool = False) -> "Forked | Launched":
    """Start in process groups of its own; ``launched`` with ranks is DeepSpeed's launcher, without it plain python."""
    words = command(folder, shards, *args)
    return Launched(words, ranks) if launched else Forked(words, folder, ranks)


class Launched(subprocess.Popen):
    """A run started from nothing: by ``python`` or, with ranks, by the ``deepspeed`` command."""

    def __init__(self, words: list[str], ranks: int):
        if ranks:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            launcher = ["-m", "deepspeed.launcher.runner", "-q", "--num_gpus", str(ranks), "--master_port", str(port)]
            words = [words[0], *launcher, *words[1:]]
        super().__init__(
            words,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "DEEPSPEED_TIMEOUT": "2"},
            start_new_session=True,
        )

    def send_signal(self, number: int) -> None:
        """To the whole process group; :meth:`terminate` reaches the command alone."""
        os.killpg(self.pid, number)

    def terminate(self) -> None:
        """SIGTERM to the command alone, as ``kill PID`` does."""
        os.kill(self.pid, signal.SIGTERM)


def metrics(run_dir: Path) -> list[dict]:
    """The lines of ``metrics.jsonl``."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def losses(run_dir: Path) -> list[float]:
    """Loss of each step; the steps must be 1, 2, 3, ..."""
    lines = metrics(run_dir)
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def wait_for_lines(run_dir: Path, count: int, timeout: float = 120) -> None:
    """Wait until ``metrics.jsonl`` has ``count`` lines."""
    path = run_dir / "metrics.jsonl"
    deadline = time.monotonic() + timeout
    while not path.is_file() or path.read_text().count("\n") < count:
        assert time.monotonic() < deadline, f"{path} did not reach {count} lines"
        time.sleep(0.02)
