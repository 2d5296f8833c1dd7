"""docs/pretraining.md: every command that a CPU can run is run as it stands, made small by ``SMALLER``.

What is replaced: numbers of pixels, pairs and epochs, and the configuration that all begin with, by one with the same
settings and a small model; machines by this one. ``srun``, ``scontrol`` and ``sbatch`` are not here: for the job
script, ``srun`` starts the tasks on this machine and passes signals on as SLURM's does, and ``scontrol requeue`` writes
down that it was asked for. ``ssh``, by which DeepSpeed asks whether the hosts of a list can be reached, always says so.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from focalclip.config import ModelConfig, load_config
from focalclip.models.clip import FocalCLIP
from focalclip.studies.bench.data import Photo, _write_photographs
from focalclip.studies.bench.synthetic import SyntheticTask

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/pretraining.md").read_text()
SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))
SMALLER = {
    "base: focalclip_tiny_lrf": "base: small.yaml",
    "--resize 256 --min-side 128": "--resize 40 --min-side 32",
    "batch_size: 512": "batch_size: 8",
    "val: 0.02": "val: 0.2",
    "epochs: 30": "epochs: 1",
    "deepspeed --no_python": "deepspeed --num_gpus 2 --no_python",
    "node-1 slots=8\nnode-2 slots=8": "localhost slots=2",
}
PICTURES = 40
SRUN = """\
#!/usr/bin/env bash
# srun [--OPTION ...] COMMAND: SLURM_NTASKS tasks on this machine; signals are passed on; the highest status is its own
while [[ $1 == --* ]]; do shift; done
tasks=()
trap 'kill -USR1 "${tasks[@]}"' USR1
for ((task = 0; task < SLURM_NTASKS; task++)); do
  SLURM_PROCID=$task SLURM_LOCALID=$task "$@" & tasks+=($!)
done
highest=0
for task in "${tasks[@]}"; do
  while :; do
    wait "$task"; status=$?
    if ((status > 128)) && kill -0 "$task" 2>/dev/null; then continue; fi
    break
  done
  if ((status > highest)); then highest=$status; fi
done
exit $highest
"""
SCONTROL = """\
#!/usr/bin/env bash
if [[ $1 == show ]]; then echo 127.0.0.1; else echo "$@" >> scontrol.log; fi
"""


def blocks(section: str, language: str = "bash") -> list[str]:
    """Code blocks of a section, made small."""
    found = re.findall(rf"```{language}\n(.*?)```", SECTIONS[section], re.DOTALL)
    for large, small in SMALLER.items():
        found = [block.replace(large, small) for block in found]
    return found


@pytest.fixture
def place(tmp_path) -> Path:
    """A user's folder: photographs with captions, a task, and the commands that the page calls."""
    _write_photographs(tmp_path / "photos", Photo(64, 48, 6.0), PICTURES, different=PICTURES)
    labels = np.arange(8) % 2
    SyntheticTask(("cat", "dog"), ("a {c}",), labels, 0, ((32, 32),)).write(tmp_path / "my_tasks" / "animals")
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(small_config()))
    commands = tmp_path / "commands"
    commands.mkdir()
    ours = "import sys; from focalclip.cli import main; sys.argv[0] = 'focalclip'; raise SystemExit(main())"
    for name, text in {
        "focalclip": f'#!/bin/sh\nexec "{sys.executable}" -c "{ours}" "$@"\n',
        "python": f'#!/bin/sh\nexec "{sys.executable}" "$@"\n',
        "srun": SRUN,
        "scontrol": SCONTROL,
        "sbatch": "#!/bin/sh\n",
        "ssh": "#!/bin/sh\nexec hostname\n",
    }.items():
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    return tmp_path


def small_config() -> dict:
    """``focalclip_tiny_lrf`` with a small model at 32 px, one loader process, and a line of the log for each step."""
    values = load_config("focalclip_tiny_lrf").model_dump(mode="json")
    values["model"] |= {"embed_dim": 32}
    values["model"]["image"] |= {"name": "focalnet_pico", "image_size": 32}
    values["model"]["text"] |= {"context_length": 32, "width": 32, "heads": 2, "layers": 1}
    values["data"] |= {"workers": 1}
    values["train"] |= {"log_every": 1}
    return values


def environment(place: Path, **more: str) -> dict[str, str]:
    """Variables of the page's commands, which come first on the path."""
    path = f"{place / 'commands'}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    own = {"PATH": path, "PYTHONPATH": str(ROOT), "FOCALCLIP_CACHE": str(place / "cache"), "OMP_NUM_THREADS": "1"}
    return os.environ | own | {"DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"} | more


def run(place: Path, block: str, **more: str) -> str:
    """Run a block; returns what it printed."""
    words = ["bash", "-euo", "pipefail", "-c", block]
    done = subprocess.run(
        words, cwd=place, env=environment(place, **more), capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, f"{block}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout + done.stderr


def test_all_that_is_made_smaller_stands_on_the_page():
    assert [large for large in SMALLER if large not in PAGE] == []
    assert sorted(SECTIONS) == ["One machine", "One machine with several GPUs", "Several machines"]


@pytest.mark.long
def test_from_a_folder_of_photographs_to_an_evaluated_model(place):
    shards, config, resume, measure = blocks("One machine")
    assert f"{PICTURES} images" in run(place, shards)
    first = run(place, config)
    assert "warning" not in first
    assert (place / "runs/photos/metrics.jsonl").is_file()
    assert "32 px" in first
    assert any("heldout" in json.loads(line) for line in (place / "runs/photos/metrics.jsonl").open())
    run(place, resume)  # a finished run has nothing left to do, and says so with status 0
    run(place, measure)
    assert (place / "retrieval.json").is_file()
    assert (place / "zeroshot.json").is_file()
    assert (place / "exported/open_clip_model.safetensors").is_file()
    (python,) = blocks("One machine", "python")
    (place / "use.py").write_text(f"{python}\nassert pooled.shape[0] == 1 and len(maps) > 1, maps\n")
    run(place, "python use.py")
    (gpus,) = blocks("One machine with several GPUs")
    assert "2 x cpu" in run(place, gpus)
    hosts = blocks("Several machines")[0]
    (place / "runs/photos").rename(place / "runs/alone")
    assert "2 x cpu" in run(place, hosts)


@pytest.mark.long
def test_the_job_script_saves_when_it_is_signalled_and_is_queued_again(place):
    shards, config, *_ = blocks("One machine")
    run(place, shards)
    run(place, config.replace("focalclip pretrain", "true").replace("epochs: 1", "epochs: 1000"))
    run(place, blocks("Several machines")[1])
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node-[1-2]"}
    for tasks, start in (("2", 0), ("1", 1)):
        process = subprocess.Popen(
            ["bash", "photos.sbatch"],
            cwd=place,
            env=environment(place, **job, SLURM_NTASKS=tasks),
            stdout=(place / f"{tasks}.log").open("w"),
            stderr=subprocess.STDOUT,
        )
        log, end = place / "runs/photos/metrics.jsonl", time.monotonic() + 200
        before = log.stat().st_size if log.is_file() else 0
        while (not log.is_file() or log.stat().st_size <= before) and process.poll() is None:
            assert time.monotonic() < end, (place / f"{tasks}.log").read_text()
            time.sleep(0.2)
        process.send_signal(signal.SIGUSR1)  # to the script alone, as --signal=B: does
        status = process.wait(timeout=120)
        printed = (place / f"{tasks}.log").read_text()
        assert status == 0, printed
        assert "SIGUSR1 received: saved step" in printed
        assert ("continued from step" in printed) == (start > 0), printed
        assert (place / "scontrol.log").read_text() == "requeue 7\n" * (start + 1)


def test_the_job_script_passes_a_failure_on(place):
    run(place, blocks("Several machines")[1])
    assert subprocess.run(["bash", "-n", "photos.sbatch"], cwd=place, check=False).returncode == 0
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node-1", "SLURM_NTASKS": "1"}
    for status in (0, 2):
        (place / "commands/focalclip").write_text(f"#!/bin/sh\nexit {status}\n")
        done = subprocess.run(["bash", "photos.sbatch"], cwd=place, env=environment(place, **job), check=False)
        assert done.returncode == status
        assert not (place / "scontrol.log").exists()


@pytest.mark.long
@pytest.mark.parametrize("name", ["tiny", "small", "base"])
def test_the_table_of_memory_counts_what_autograd_keeps(name):
    row = re.search(
        rf"`focalclip_{name}_lrf` \| (.*?) GB \| (\d+) MB \| (\d+) / (\d+) \| (\d+) MB: (\d+) / ([\d,]+)", PAGE
    )
    assert row, name
    states, plain, few, many, recomputed, fewer, more = (float(word.replace(",", "")) for word in row.groups())
    config = load_config(f"focalclip_{name}_lrf").model
    sizes = {is_on: kept_per_pair(config, is_on) for is_on in (False, True)}
    parameters = sum(p.numel() for p in FocalCLIP(config).parameters())
    assert 16 * parameters / 1e9 == pytest.approx(states, abs=0.05)
    assert sizes[False] == pytest.approx(plain, rel=0.03)
    assert sizes[True] == pytest.approx(recomputed, rel=0.05)
    for size, pairs in ((plain, (few, many)), (recomputed, (fewer, more))):
        room = [1000 * (0.85 * memory - states) / size for memory in (24, 80)]
        assert all(0.93 * fits <= pair <= fits for fits, pair in zip(room, pairs, strict=True)), (size, room, pairs)


def kept_per_pair(config: ModelConfig, is_checkpointing: bool) -> float:
    """MB of what autograd keeps for one more pair; with checkpointing also of the first block when it is recomputed."""
    image = config.image.model_copy(update={"activation_checkpointing": is_checkpointing})
    model = FocalCLIP(config.model_copy(update={"image": image})).train()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    inputs: list[torch.Tensor] = []
    block = model.visual.trunk.layers[0].blocks[0]
    block.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))

    def kept(function, *args) -> int:
        storages: dict[int, torch.Tensor] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor  # alive, so that no address comes twice
            return tensor

        with (
            torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16),
        ):
            out = function(*args)
        assert out is not None
        return sum(t.untyped_storage().nbytes() for address, t in storages.items() if address not in weights)

    def of(pairs: int) -> int:
        tokens = torch.full((pairs, 77), 5)
        tokens[:, -1] = 49407
        total = kept(model, torch.zeros(pairs, 3, 224, 224), tokens)
        return total + (kept(block, inputs[-1].requires_grad_()) if is_checkpointing else 0)

    return (of(3) - of(2)) / 1e6
