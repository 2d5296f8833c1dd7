"""How long each tower is trained: equal seconds, turned into steps once and for all, so every schedule is exact."""

import json
import multiprocessing
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from focalclip.comparison.cost import Measured, StepCost, measure
from focalclip.comparison.towers import IMAGE_SIZE, REFERENCE, TOWERS
from focalclip.config import RunConfig, from_dict
from focalclip.errors import UserError
from focalclip.files import write_json

FILE = "plan.json"


@dataclass(frozen=True)
class Plan:
    """What all runs of a comparison share, and what a step of each tower costs."""

    base: RunConfig
    seconds: float
    """Training time of each run."""
    device: str
    costs: dict[str, StepCost]
    failed: dict[str, str]
    """Towers that could not be trained at all when they were measured, and why."""

    def steps(self, tower: str) -> int:
        """Training steps of this tower."""
        return max(1, round(self.seconds / self.costs[tower].seconds))

    def run_config(self, tower: str, seed: int, folder: Path) -> RunConfig:
        """The whole configuration of one run; the warm-up takes the same part of the steps as in the base."""
        config = tower_config(self.base, tower).model_dump(mode="json")
        steps = self.steps(tower)
        assert self.base.train.steps is not None
        config |= {"name": run_name(tower, seed), "runs_dir": str(folder), "seed": seed}
        config["train"]["steps"] = steps
        config["optim"]["warmup_steps"] = round(steps * self.base.optim.warmup_steps / self.base.train.steps)
        return from_dict(RunConfig, config, tower)

    def write(self, folder: Path) -> None:
        """Keep the plan in ``folder``."""
        values = {
            "seconds": self.seconds,
            "device": self.device,
            "costs": {name: cost._asdict() for name, cost in self.costs.items()},
            "failed": self.failed,
            "base": self.base.model_dump(mode="json"),
        }
        write_json(folder / FILE, values)


def run_name(tower: str, seed: int) -> str:
    """Name of a run's directory."""
    return f"{tower}-seed{seed}"


def tower_config(base: RunConfig, tower: str) -> RunConfig:
    """``base`` with another image tower."""
    values: dict[str, Any] = base.model_dump(mode="json")
    values["model"]["image"] |= TOWERS[tower].image
    return from_dict(RunConfig, values, tower)


def check_base(base: RunConfig, source: str) -> None:
    """Refuse what the table of towers was not made for.

    Raises:
        UserError: naming the setting.
    """
    image = base.model.image
    if (image.name, image.image_size, image.is_as_named) != (REFERENCE, IMAGE_SIZE, True):
        raise UserError(
            f"{source}: the towers are sized for model.image.name={REFERENCE} at image_size={IMAGE_SIZE}, without "
            "options or another mixer; start from configs/focalclip_pico.yaml"
        )
    if base.train.steps is None:
        raise UserError(f"{source}: train.steps must be given, because optim.warmup_steps becomes a part of them")
    if base.eval.benchmark is None:
        raise UserError(f"{source}: eval.benchmark is null, so nothing would be compared; name a benchmark")


def read_plan(folder: Path) -> Plan | None:
    """The plan kept in ``folder``, if there is one.

    Raises:
        UserError: if it cannot be read.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text())
        costs = {name: StepCost(**cost) for name, cost in values["costs"].items()}
        base = from_dict(RunConfig, values["base"], str(path))
        return Plan(base, values["seconds"], values["device"], costs, values["failed"])
    except (json.JSONDecodeError, KeyError, TypeError):
        raise UserError(f"{path}: is not the plan of a comparison; choose another --output") from None


def make_plan(base: RunConfig, seconds: float, towers: Sequence[str], folder: Path) -> Plan:
    """The plan kept in ``folder``, with the towers that it lacks measured and added.

    Raises:
        UserError: if the plan there is for another configuration, time or device.
    """
    before = read_plan(folder)
    if before and before.seconds != seconds:
        raise UserError(
            f"--cpu-seconds {seconds:g}: {folder} holds runs of {before.seconds:g} s; choose another --output"
        )
    if before and before.base != base:
        raise UserError(f"{folder}: holds runs of another base configuration; choose another --output")
    costs = before.costs if before else {}
    missing = [tower for tower in towers if tower not in costs]
    if before and not missing:
        return before
    common = next(iter(costs), None)  # measured again beside the new ones: the machine may be busier now than it was
    found = _in_another_process({name: tower_config(base, name) for name in [common, *missing] if name})
    if before and found.device != before.device:
        raise UserError(f"{folder}: holds runs on {before.device}, this is {found.device}; choose another --output")
    if common in found.failed:
        raise UserError(f"{common}: cannot be trained any more: {found.failed[common]}; choose another --output")
    scale = costs[common].seconds / found.costs[common].seconds if common else 1.0
    added = {name: c._replace(seconds=c.seconds * scale) for name, c in found.costs.items() if name != common}
    plan = Plan(base, seconds, found.device, costs | added, found.failed)
    plan.write(folder)
    return plan


def _in_another_process(configs: dict[str, RunConfig]) -> Measured:
    """:func:`measure` there; it ends with this one, or soon after it."""
    spawn = multiprocessing.get_context("spawn")
    receiver, sender = spawn.Pipe(duplex=False)
    process = spawn.Process(target=_send_measured, args=(sender, configs), daemon=True)
    process.start()
    sender.close()  # so that its end there is the only one, and closes with it
    try:
        return receiver.recv()
    except EOFError:
        raise RuntimeError("measuring the cost of a step ended early; its own message is above") from None
    finally:
        process.terminate()
        process.join()


def _send_measured(sender: Connection, configs: dict[str, RunConfig]) -> None:
    sender.send(measure(configs))
