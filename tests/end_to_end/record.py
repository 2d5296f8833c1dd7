"""Record the numbers of a checkout, to compare two checkouts on one machine bit for bit.

    python tests/end_to_end/record.py before           # in one checkout, or with --root in any
    python tests/end_to_end/record.py after            # in the other
    python tests/end_to_end/record.py --compare before after

A recording takes minutes and runs with one thread: 20 steps of the default configuration, and 20 of it with stochastic
depth, ZeRO 1, two ranks and accumulation 2; the SHA-256 of the exported weights; results of the demo benchmark, of a
probe and of a retrieval with the default run; parameters and multiply-adds of every FocalNet variant.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "support"))

VARIANTS = """
import json, torch
from focalclip.models.cost import count
from focalclip.models.focalnet.variants import FOCALNETS, create_focalnet
costs = {}
for name in FOCALNETS:
    with torch.device("meta"):
        costs[name] = count(create_focalnet(name), 224)._asdict()
print(json.dumps(costs))
"""


def record(root: Path, out: Path) -> None:
    """Run the commands of the checkout ``root`` and write ``out/numbers.json`` beside their logs.

    Raises:
        SystemExit: if a command fails; its log is named.
    """
    from coloured_tasks import write_task
    from tiny_shards import picture, write_shards

    out = out.resolve()
    if out.exists():
        raise SystemExit(f"error: {out} exists; name a new folder")
    data = out / "data"
    test_images = [picture(i) for i in range(90)]  # of any colours: a probe gets some right, and every bit can move one
    write_task(data / "tasks" / "colours", [0, 1, 2] * 20, [0, 1, 2] * 30, test_images=test_images)
    write_shards(data / "pairs", [60])

    def run(log: str, *command: str) -> str:
        print(f"{log} ...", flush=True)
        environment = os.environ | {"PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1"}
        environment |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        with (out / f"{log}.log").open("w") as file:
            done = subprocess.run(
                [sys.executable, *command], cwd=out, env=environment, stdout=file, stderr=subprocess.STDOUT, check=False
            )
        if done.returncode:
            raise SystemExit(f"error: {log} failed with status {done.returncode}; see {file.name}")
        return Path(file.name).read_text()

    train = [f"{root}/scripts/pretrain.py", "--runs-dir", "runs", "--train.steps", "20", "--train.log-every", "1"]
    train += ["--optim.warmup-steps", "10"]
    deepspeed = ["-m", "deepspeed.launcher.runner", "--num_gpus", "2"]
    drop = ["--model.image.drop-path", "0.1", "--train.zero-stage", "1", "--train.accumulation", "2"]
    model = ["--model", "runs/default", "--no-cache", "--output"]
    probe = ["--benchmark", str(data / "tasks"), "--shots", "5", "full", "--seeds", "0", "1"]
    run("default", *train, "--name", "default")
    run("drop", *deepspeed, *train, "--name", "drop", *drop, "--eval.benchmark", "null")
    run("probe", f"{root}/eval/probe.py", *probe, *model, "probe.json")
    run("retrieval", f"{root}/eval/retrieval.py", "--data", str(data / "pairs" / "00000.tar"), *model, "retrieval.json")
    runs = {name: out / "runs" / name for name in ("default", "drop")}
    numbers = {
        "losses": {name: _losses(folder / "metrics.jsonl") for name, folder in runs.items()},
        "weights": {name: _sha256(folder / "model" / "open_clip_model.safetensors") for name, folder in runs.items()},
        "demo": _result(runs["default"] / "eval" / "demo.json"),
        "probe": _result(out / "probe.json"),
        "retrieval": _result(out / "retrieval.json"),
        "variants": json.loads(run("variants", "-c", VARIANTS).splitlines()[-1]),
    }
    (out / "numbers.json").write_text(json.dumps(numbers, indent=1))
    shutil.rmtree(data)


def _losses(path: Path) -> list[float]:
    return [line["loss"] for line in map(json.loads, path.read_text().splitlines()) if "loss" in line]


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _result(path: Path) -> dict:
    """What was measured: every number of a result but durations and the description of the machine."""
    result = json.loads(path.read_text())
    return {name: _numbers(result[name]) for name in ("score", "score_interval", "scores", "tasks") if name in result}


def _numbers(value: object) -> object:
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items() if "second" not in key and not isinstance(item, str)}
    return [_numbers(item) for item in value] if isinstance(value, list) else value


def differences(first: Path, second: Path) -> list[str]:
    """A line for each number that differs between two recordings, or that only one of them has."""
    before, after = (_flat(json.loads((folder / "numbers.json").read_text())) for folder in (first, second))
    return [
        f"{name}: {before.get(name, 'missing')} -> {after.get(name, 'missing')}"
        for name in sorted(before.keys() | after.keys())
        if name not in before or name not in after or before[name] != after[name]
    ]


def _flat(value: object, path: str = "") -> dict[str, object]:
    if not isinstance(value, (dict, list)):
        return {path: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {name: leaf for key, item in items for name, leaf in _flat(item, f"{path}.{key}".lstrip(".")).items()}


def main() -> int:
    """Record or compare; return the exit status: 1 where two recordings differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", help="new folder for numbers.json, runs and logs")
    parser.add_argument("--root", type=Path, default=ROOT, help="checkout whose commands are run (default: this one)")
    parser.add_argument("--compare", type=Path, nargs=2, metavar=("A", "B"), help="print what differs, run nothing")
    options = parser.parse_args()
    if (options.out is None) == (options.compare is None):
        parser.error("give either OUT or --compare A B")
    if options.compare is None:
        record(options.root.resolve(), options.out)
        return 0
    lines = differences(*options.compare)
    print("\n".join(lines) or "equal")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
