"""What a training step of each tower costs, measured so that a noisy machine disturbs all of them alike."""

import sys
import time
from statistics import median
from typing import Any, NamedTuple

from focalclip.config import RunConfig
from focalclip.errors import UserError, first_line

ROUNDS = 5
STEPS = 4  # timed in each round, after one that is not


class Measured(NamedTuple):
    """What :func:`measure` found."""

    device: str
    """``cpu`` or ``cuda``."""
    costs: "dict[str, StepCost]"
    failed: dict[str, str]
    """Why a tower could not be trained."""


class StepCost(NamedTuple):
    """Of one tower."""

    seconds: float
    """Per training step of the whole model: CPU seconds of one thread, or seconds on the clock on a GPU."""
    parameters: int
    """Of the image tower without its projection."""
    multiply_adds: int
    """Of the image tower, for one picture."""


def measure(configs: dict[str, RunConfig]) -> Measured:
    """Train each model for some steps on random data, all of them in turn, several times over.

    CPU time rather than the clock: it does not grow while another program has the core. It still grows while one shares
    its caches, for some minutes or for hours; therefore the towers take turns, and the median of their rounds counts.
    The engine is the one that trains; reading and decoding of pictures, equal for all, is not counted.

    This begins a process group of torch.distributed and sets the number of threads: give it a process of its own.
    """
    from focalclip.training import engine

    engine.boot()
    import torch
    from tqdm import tqdm

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

    torch.manual_seed(0)
    model = FocalCLIP(config.model)
    size = count(model.visual.trunk, config.model.image.image_size)
    trained = engine.create_engine(model, config, total_steps=1000)
    seconds = []
    for _ in range(1 + STEPS):
        before = time.process_time() if is_cpu else time.perf_counter()
        _step(trained, config)
        if not is_cpu:
            torch.cuda.synchronize()
        seconds.append((time.process_time() if is_cpu else time.perf_counter()) - before)
    return seconds[1:], size


def _step(trained: Any, config: RunConfig) -> None:
    """What :mod:`focalclip.training.loop` does with a batch."""
    import torch

    from focalclip.losses import contrastive_loss
    from focalclip.training.engine import device, input_dtype

    image, text = config.model.image, config.model.text
    size = config.data.batch_size // config.train.accumulation
    for _ in range(config.train.accumulation):
        shape = (size, 3, image.image_size, image.image_size)
        images = torch.randn(shape, device=device(), dtype=input_dtype(config))
        tokens = torch.randint(1, 1000, (size, text.context_length), device=device())
        labels = torch.full((size,), -1, device=device())
        loss = contrastive_loss(*trained(images, tokens), labels=labels)
        trained.backward(loss)
        trained.step()
