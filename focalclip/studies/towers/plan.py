"""What a comparison consists of: the table of towers, what a training step of each costs, and the plan of the runs.

Every tower gets the same training time. It is turned into a number of steps once, from the measured cost of a step, so
that every schedule is exact; ``plan.json`` keeps the costs.
"""

import json
import multiprocessing
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

from focalclip.base.errors import UserError, first_line
from focalclip.base.files import write_json
from focalclip.base.strict import from_dict
from focalclip.config import RunConfig

if TYPE_CHECKING:
    from focalclip.data.loader import Batch

FILE = "plan.json"

REFERENCE = "focalnet_pico"

IMAGE_SIZE = 32

TOLERANCE = 0.05  # of the reference's parameters

ROUNDS = 5

STEPS = 4  # timed in each round, after one that is not


@dataclass(frozen=True)
class Tower:
    """One row of the comparison."""

    title: str
    """What it is, for the report."""
    image: dict[str, Any] = field(default_factory=dict)
    """Settings of ``model.image`` that make it; all others are those of the base configuration."""


def _vit(patch_size: int) -> dict[str, Any]:
    # ViT-Ti's width and heads, as many layers as the parameters allow
    options = {"img_size": IMAGE_SIZE, "patch_size": patch_size, "embed_dim": 192, "depth": 5, "num_heads": 3}
    return {"name": "timm:vit_tiny_patch16_224", "options": options}


_SWIN = {
    # Pairs of blocks, whose second shifts its windows; windows of 4 divide the maps of 16, 8 and 4 positions.
    "name": "timm:swin_tiny_patch4_window7_224",
    "options": {
        "img_size": IMAGE_SIZE, "patch_size": 2, "window_size": 4, "embed_dim": 24, "depths": [2, 2, 4, 4],
        "num_heads": [1, 2, 3, 6],
    },
}  # fmt: skip

_FAMILIES = {
    "focalnet": Tower("FocalNet, depths 1-1-2-4"),
    "swin": Tower("Swin, depths 2-2-4-4, windows of 4", _SWIN),
    "vit-patch4": Tower("ViT, 5 layers of 192, patches of 4", _vit(4)),
    "vit-patch8": Tower("ViT, 5 layers of 192, patches of 8", _vit(8)),
    "convnext": Tower("ConvNeXt, depths 1-1-4-6", {"name": "timm:convnext_pico_patch2"}),
    "poolformer": Tower("PoolFormer, depths 1-1-4-6", {"name": "timm:poolformer_pico_patch2"}),
}

# Mixers without projections leave a block two thirds of its parameters.
_MIXER_DEPTHS = {"poolformer": [1, 1, 4, 6], "depthwise_convolution": [1, 1, 3, 6]}

_MIXERS = (
    "additive", "no_global", "last_level", "no_gates", "single_level", "pooling", "squeeze_excitation", "poolformer",
    "depthwise_convolution", "window_attention", "shifted_window_attention", "global_attention", "focal_attention",
)  # fmt: skip


def _mixer(name: str) -> Tower:
    image: dict[str, Any] = {"mixer": name}
    depths = _MIXER_DEPTHS.get(name)
    title = f"FocalNet's blocks with the mixer {name}"
    if depths:
        title, image["options"] = f"{title}, depths {'-'.join(map(str, depths))}", {"depths": depths}
    return Tower(title, image)


TOWERS: dict[str, Tower] = _FAMILIES | {f"mixer-{name.replace('_', '-')}": _mixer(name) for name in _MIXERS}


class StepCost(NamedTuple):
    """Of one tower."""

    seconds: float
    """Per training step of the whole model: CPU seconds of one thread, or seconds on the clock on a GPU."""
    parameters: int
    """Of the image tower without its projection."""
    multiply_adds: int
    """Of the image tower, for one picture."""


class Measured(NamedTuple):
    """What :func:`measure` found."""

    device: str
    """``cpu`` or ``cuda``."""
    costs: dict[str, StepCost]
    failed: dict[str, str]
    """Why a tower could not be trained."""


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
        warmup = self.base.optim.warmup(self.base.train.steps)
        config["optim"]["warmup_steps"] = round(steps * warmup / self.base.train.steps)
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
        raise UserError(
            f"{source}: train.steps must be given, because the warm-up takes the same part of them in every run"
        )
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
    except UserError:
        raise
    except (ValueError, RecursionError, KeyError, TypeError):
        raise UserError(f"{path}: is not the plan of a comparison; choose another --output") from None


def make_plan(base: RunConfig, seconds: float, towers: Sequence[str], folder: Path) -> Plan:
    """The plan kept in ``folder``, extended by the towers that are missing in it.

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
        raise RuntimeError("measuring the cost of a step ended early; see the message above") from None
    finally:
        process.terminate()
        process.join()


def _send_measured(sender: Connection, configs: dict[str, RunConfig]) -> None:
    sender.send(measure(configs))


def measure(configs: dict[str, RunConfig]) -> Measured:
    """Train each model for some steps on random data, all of them in turn, several times over.

    CPU time rather than the clock: it does not grow while another program has the core. It still grows while one shares
    its caches, for some minutes or for hours; therefore the towers take turns, and the median of their rounds counts.
    The engine is the one that trains; reading and decoding of pictures, equal for all, is not counted.

    This begins a process group of torch.distributed and sets the number of threads: run it in a separate process.
    """
    from focalclip.base.ranks import joined

    with joined(alone=True):
        return _measure(configs)


def _measure(configs: dict[str, RunConfig]) -> Measured:
    import torch
    from tqdm import tqdm

    from focalclip.training import engine

    engine.set_up()

    is_cpu = engine.device().type == "cpu"
    if is_cpu:
        torch.set_num_threads(1)
    seconds: dict[str, list[float]] = {name: [] for name in configs}
    sizes: dict[str, Any] = {}
    failed: dict[str, str] = {}
    turns = [name for _ in range(ROUNDS) for name in configs]
    for name in tqdm(turns, desc="measure a step of each tower", unit="turn", disable=not sys.stderr.isatty()):
        if name in failed:
            continue
        try:
            turn, sizes[name] = _turn(configs[name], is_cpu)
            seconds[name] += turn
        except (UserError, RuntimeError) as error:
            failed[name] = first_line(error)
    costs = {name: StepCost(median(seconds[name]), *sizes[name]) for name in configs if name not in failed}
    return Measured(engine.device().type, costs, failed)


def _turn(config: RunConfig, is_cpu: bool) -> tuple[list[float], Any]:
    """Seconds of each of some steps of a fresh model, and the size of its image tower."""
    import torch

    from focalclip.models.clip import FocalCLIP
    from focalclip.models.cost import count
    from focalclip.training import engine
    from focalclip.training.step import create_loss, micro_step

    torch.manual_seed(0)
    model = FocalCLIP(config.model)
    size = count(model.visual.trunk, config.model.image.image_size)
    trained = engine.create_engine(model, config, total_steps=1000)
    loss = create_loss(config.loss, model.outputs)
    seconds = []
    for _ in range(1 + STEPS):
        batches = [_random_batch(config) for _ in range(config.train.accumulation)]
        before = time.process_time() if is_cpu else time.perf_counter()
        for batch in batches:
            micro_step(trained, batch, loss, config)
        if not is_cpu:
            torch.cuda.synchronize()
        seconds.append((time.process_time() if is_cpu else time.perf_counter()) - before)
    return seconds[1:], size


def _random_batch(config: RunConfig) -> "Batch":
    """A micro-batch of noise and random tokens, in the shapes of this configuration."""
    import torch

    from focalclip.data.loader import Batch

    image, text = config.model.image, config.model.text
    size = config.data.batch_size // config.train.accumulation
    return Batch(
        images=torch.randint(256, (size, 3, image.image_size, image.image_size), dtype=torch.uint8),
        tokens=torch.randint(1, 1000, (size, text.context_length)),
        labels=torch.full((size,), -1),
        positions=torch.arange(size),
        ids=torch.arange(size),
        faults=[],
    )
