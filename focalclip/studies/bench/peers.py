"""Both sides of a comparison as commands: CLIP_benchmark in a separate environment, and our own evaluation.

``install_clip_benchmark`` makes the environment once in the cache; ``run_clip_benchmark`` evaluates in it by
CLIP_benchmark's command line, ``run_zeroshot`` and ``run_retrieval`` by ours, each in a fresh process.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from focalclip.base.errors import UserError, install_command
from focalclip.base.files import cache_dir

CLIP_BENCHMARK = "1.6.2"

IMG2DATASET = "1.47.0"  # its pins (pyarrow, webdataset) are not ours

RECALLS = (1, 5, 10)

# CLIP_benchmark imports requests without declaring it, and turns arrays of one element into floats, which numpy 2.4
# refuses.
_ITS_OWN = (f"clip-benchmark=={CLIP_BENCHMARK}", "numpy<2.3", "requests")

# What else decides numbers and times is the same on both sides.
SHARED = ("open_clip_torch", "pillow", "timm", "torch", "torchvision", "webdataset")

_CLOCK = Path(__file__).with_name("clip_benchmark_clock.py")  # run with -P: this folder is no place to import from


@dataclass(frozen=True)
class PeerRun:
    """What one run of CLIP_benchmark's command gave."""

    metrics: dict[str, dict[str, float]]
    """By task, under its own names."""
    seconds: float
    """Of the whole process."""
    text_seconds: float
    """Of its ``zero_shot_classifier``, over all tasks."""
    image_seconds: float
    """Of its ``run_classification``, over all tasks."""


class OurRun(NamedTuple):
    """What one run of our command gave."""

    result: dict[str, Any]
    """The JSON that it wrote."""
    seconds: float
    """Of the whole process."""


def install_clip_benchmark() -> Path:
    """Make CLIP_benchmark's environment in the cache, unless it is there; returns its interpreter.

    Raises:
        UserError: if uv is missing or cannot install it.
    """
    return _environment(
        "clip_benchmark", CLIP_BENCHMARK, [*_ITS_OWN, *(f"{name}=={_public_version(name)}" for name in SHARED)]
    )


def install_img2dataset() -> Path:
    """Make img2dataset's environment in the cache, unless it is there; returns its command.

    Raises:
        UserError: if uv is missing or cannot install it.
    """
    python = _environment("img2dataset", IMG2DATASET, [f"img2dataset=={IMG2DATASET}"])
    return python.with_name("img2dataset")


def _environment(peer: str, its_version: str, requirements: Sequence[str]) -> Path:
    name = hashlib.sha256("\n".join([sys.executable, *requirements]).encode()).hexdigest()[:12]
    folder = cache_dir() / "peers" / f"{peer}-{its_version}-{name}"
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    complete = folder / "requirements.txt"
    if complete.is_file():
        return python
    uv = shutil.which("uv")
    if uv is None:
        raise UserError(f"uv is not installed, which makes an environment for {peer}; run: pip install uv")
    print(f"installing {peer} {its_version} into {folder}", file=sys.stderr)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # from there: in a checkout, uv would hold the peer to the versions of our pyproject.toml
    here = folder.parent
    _output([uv, "venv", "--quiet", "--clear", "--python", sys.executable, str(folder)], "uv venv", here)
    _output([uv, "pip", "install", "--quiet", "--python", str(python), *requirements], "uv pip install", here)
    complete.write_text("\n".join(requirements) + "\n")
    return python


def installed_versions(python: Path) -> dict[str, str]:
    """Versions of what decides its numbers."""
    names = ("clip_benchmark", "numpy", "scikit-learn", *SHARED)
    code = f"import importlib.metadata as m, json; print(json.dumps({{n: m.version(n) for n in {names!r}}}))"
    return json.loads(_output([str(python), "-c", code], "clip_benchmark's environment"))


def run_clip_benchmark(
    python: Path,
    model: Path,
    tasks: Path,
    names: Sequence[str],
    task: str = "zeroshot_classification",
    workers: int = 1,
) -> PeerRun:
    """Evaluate an open_clip folder on folders of ``tasks`` by its command line, in float32 on the CPU.

    Args:
        python: its interpreter.
        model: an open_clip model folder.
        tasks: folder of wds task folders.
        names: which of them.
        task: ``zeroshot_classification`` or ``zeroshot_retrieval``.
        workers: of its loader; no more than the shards of any task, else it fails.

    Raises:
        UserError: if it fails, with the last line that it printed.
    """
    with tempfile.TemporaryDirectory() as folder:
        words = ["eval", "--model", f"local-dir:{model}", "--pretrained", "", "--task", task]
        words += ["--dataset", *(f"wds/{name}" for name in names), "--dataset_root", f"{tasks}/{{dataset}}"]
        words += ["--no_amp", "--num_workers", str(workers), "--output", f"{folder}/{{dataset}}.json"]
        words += ["--recall_k", *map(str, RECALLS)]
        clock = Path(folder) / "clock"
        start = time.perf_counter()
        _output([str(python), "-P", str(_CLOCK), str(clock), *words], "clip_benchmark")
        seconds = time.perf_counter() - start
        metrics = {name: json.loads((Path(folder) / f"{name}.json").read_text())["metrics"] for name in names}
        spent = json.loads(clock.read_text())
    return PeerRun(metrics, seconds, spent["zero_shot_classifier"], spent["run_classification"])


def run_zeroshot(model: Path, tasks: Path) -> OurRun:
    """Measure an open_clip folder on a folder of wds tasks on the CPU, under CLIP_benchmark's protocol, nothing cached.

    Raises:
        UserError: if it fails, with the last line that it printed.
    """
    return _run_ours("zeroshot", model, "--benchmark", str(tasks), "--protocol", "clip_benchmark", "--no-cache")


def run_retrieval(model: Path, folder: Path) -> OurRun:
    """Measure an open_clip folder on a wds retrieval folder on the CPU.

    Raises:
        UserError: if it fails, with the last line that it printed.
    """
    return _run_ours("retrieval", model, "--data", str(folder))


def _run_ours(command: str, model: Path, *words: str) -> OurRun:
    code = f"from focalclip.cli.{command} import main; raise SystemExit(main())"
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "result.json"
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", code, *words, "--model", f"open_clip:local-dir:{model}", "--device", "cpu",
             "--output", str(output)],
            capture_output=True, text=True, env=os.environ, check=False,
        )  # fmt: skip
        seconds = time.perf_counter() - start
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            raise UserError(f"eval/{command}.py failed: {lines[-1] if lines else done.stdout}")
        return OurRun(json.loads(output.read_text()), seconds)


def _public_version(name: str) -> str:
    """Our version of a package, without the local label of a build such as +cpu."""
    try:
        return version(name).partition("+")[0]
    except PackageNotFoundError:
        raise UserError(f"the package {name} is not installed; run: {install_command('all')}") from None


def _output(command: list[str], what: str, folder: Path | None = None) -> str:
    """What a command that is run in ``folder`` prints on stdout.

    Raises:
        UserError: if it fails, with the last line that it printed.
    """
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("PYTHONPATH", None)  # ours is not for its environment
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, check=False)
    if done.returncode:
        lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        raise UserError(f"{what} failed with status {done.returncode}: {lines[-1].strip() if lines else 'no message'}")
    return done.stdout
