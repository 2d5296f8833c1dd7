"""Running the pretraining command as a user does, small enough for a test."""

import json
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
  image: {name: focalnet_pico, image_size: 32, init: fan_in, feature_norm: batch}
  text: {context_length: 8, width: 32, heads: 2, layers: 1}
data: {batch_size: 16, workers: 1}
optim: {lr: 0.001, eps: 1.0e-5, warmup_steps: 2}
train: {steps: 8, log_every: 1, save_every: 4, zero_stage: 1}
eval: {benchmark: null}
"""


def command(folder: Path, shards: Path, *args: str, ranks: int = 0) -> list[str]:
    """The command line; ``ranks`` 0 is plain python, else DeepSpeed's launcher."""
    config = folder / "tiny.yaml"
    config.write_text(TINY)
    script = [str(ROOT / "scripts/pretrain.py"), "--config", str(config), "--runs-dir", str(folder / "runs")]
    start = [sys.executable]
    if ranks:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        start += ["-m", "deepspeed.launcher.runner", "-q", "--num_gpus", str(ranks), "--master_port", str(port)]
    return [*start, *script, "--data.train", str(shards), *args]


def run(folder: Path, shards: Path, *args: str, ranks: int = 0, timeout: float = 200) -> subprocess.CompletedProcess:
    """Run to the end in a process group of its own, which is killed if it does not end."""
    process = start(folder, shards, *args, ranks=ranks)
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError("timed out:\n" + "".join(process.communicate())) from None
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def start(folder: Path, shards: Path, *args: str, ranks: int = 0) -> subprocess.Popen:
    """Start in a process group of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DEEPSPEED_TIMEOUT": "2"}
    return subprocess.Popen(
        command(folder, shards, *args, ranks=ranks),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )


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
