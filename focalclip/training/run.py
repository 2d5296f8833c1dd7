"""One run from configuration to exported model: its directory, its parts, and the order in which they are made."""

from pathlib import Path
from typing import Any

import torch

from focalclip import __version__
from focalclip.config import RunConfig, Strict, dump_yaml, load_yaml
from focalclip.data.loader import TrainLoader
from focalclip.distributed import barrier, is_main, rank, world_size
from focalclip.errors import UserError
from focalclip.models import store
from focalclip.models.clip import FocalCLIP
from focalclip.training import checkpoint, elastic, engine
from focalclip.training.checkpoint import Checkpoint, TrainState
from focalclip.training.log import TrainLog
from focalclip.training.loop import Trainer, train
from focalclip.training.stop import StopRequest


def run_training(config: RunConfig, shards: list[Path], resume: bool) -> bool:
    """Train as ``config`` says, or go on where the run stopped.

    Args:
        config: the whole configuration.
        shards: the training shards.
        resume: continue the newest checkpoint of the run directory if it has one.

    Returns:
        Whether the run is finished (false: it was asked to stop, and has saved).

    Raises:
        UserError: for anything that the user can mend, before training starts.
    """
    engine.check(config, world_size())
    found = open_run_dir(config, resume)
    saved = checkpoint.read(found, config) if found else None
    state = saved.state if saved else TrainState()
    torch.manual_seed(config.seed)  # equal initial weights on every rank
    model = FocalCLIP(config.model)
    loader = _create_loader(config, shards, model, state)
    total_steps = _total_steps(config, loader)
    deepspeed_engine = _create_engine(config, model, total_steps, saved)
    if is_main():
        print(_introduction(config, model, loader, state, total_steps), flush=True)
    log = TrainLog(config.run_dir, total_steps, state, config.train.log_every)
    stop = StopRequest(engine.device())
    try:
        finished = train(Trainer(config, deepspeed_engine, loader, state, total_steps, log, stop, _save))
    finally:
        log.close()
    if not finished and is_main():
        signal = f"{stop.received} received: " if stop.received else ""
        print(f"{signal}saved step {state.step} in {config.run_dir}; the same command with --resume goes on from there")
    return finished


def _save(run: Trainer) -> None:
    """Write a checkpoint, and the model in the form that others load."""
    checkpoint.save(run.engine, run.config.run_dir / "checkpoints", run.state, run.config)
    with engine.full_weights(run.engine):
        if is_main():
            provenance = {
                "focalclip": __version__,
                "run": run.config.name,
                "step": run.state.step,
                "samples": run.state.samples,
                "config": run.config.model_dump(mode="json"),
            }
            store.save(run.engine.module, run.config.run_dir / "model", provenance)


def _create_engine(config: RunConfig, model: FocalCLIP, total_steps: int, saved: Checkpoint | None) -> Any:
    """The engine, at step 0 or restored; a checkpoint of another number of ranks is recut on the way."""
    if saved is None:
        return engine.create_engine(model, config, total_steps)
    path, is_universal = elastic.loadable(saved, world_size())
    restored = engine.create_engine(model, config, total_steps, load_universal=is_universal)
    checkpoint.load(restored, path)
    barrier()
    if is_universal and is_main():
        elastic.clean_up(path)
    return restored


def _create_loader(config: RunConfig, shards: list[Path], model: FocalCLIP, state: TrainState) -> TrainLoader:
    """The loader of this rank; the main rank goes first, since it may have to index the shards."""
    if not is_main():
        barrier()
    loader = TrainLoader(
        shards,
        config.data,
        image_size=config.model.image.image_size,
        tokenize=model.tokenizer,
        seed=config.seed,
        rank=rank(),
        world_size=world_size(),
        accumulation=config.train.accumulation,
        start=state.samples,
    )
    if is_main():
        barrier()
    return loader


def _total_steps(config: RunConfig, loader: TrainLoader) -> int:
    if config.train.steps is not None:
        return config.train.steps
    assert config.train.epochs is not None
    return max(1, round(config.train.epochs * loader.num_samples / config.data.batch_size))


def _introduction(config: RunConfig, model: FocalCLIP, loader: TrainLoader, state: TrainState, total_steps: int) -> str:
    """The derived numbers of the run, told once."""
    millions = {name: sum(p.numel() for p in tower.parameters()) / 1e6 for name, tower in model.named_children()}
    image, batch = config.model.image, config.data.batch_size
    epochs = total_steps * batch / loader.num_samples
    lines = [
        f"run        {config.run_dir}" + (f", continued from step {state.step}" if state.step else ""),
        f"model      {image.name} {millions['visual']:.2f} M + {config.model.text.name} text {millions['text']:.2f} M "
        f"parameters, {image.image_size} px",
        f"data       {loader.num_samples:,} pairs; {total_steps:,} steps x {batch} = {epochs:.1f} epochs",
        f"engine     {world_size()} x {engine.device().type}, ZeRO {config.train.zero_stage}, "
        f"{config.train.precision}, accumulation {config.train.accumulation}",
    ]
    return "\n".join(lines)


def open_run_dir(config: RunConfig, resume: bool) -> Path | None:
    """Create the run directory, or check that the one there belongs to this configuration.

    Returns:
        The checkpoint to continue from, or None to start at step 0.

    Raises:
        UserError: if the directory holds a run and ``resume`` was not asked for, or a run of another model.
    """
    folder = config.run_dir
    found = checkpoint.newest(folder / "checkpoints")
    if found and not resume:
        raise UserError(f"{folder}: holds a run at {found.name}; continue it with --resume, or choose another --name")
    if found:
        before = load_yaml(RunConfig, folder / "config.yaml")
        _same_run(before, config)
    if is_main() and not found:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "metrics.jsonl").unlink(missing_ok=True)  # of an attempt that ended before its first checkpoint
    if is_main():
        temporary = folder / ".config.yaml.tmp"
        temporary.write_text(dump_yaml(config))
        temporary.replace(folder / "config.yaml")
    return found


def _same_run(before: RunConfig, now: RunConfig) -> None:
    """A resumed run may save or log more often, but it is the same model, data order and schedule."""
    fixed = ("model", "data.train", "data.batch_size", "data.window_shards", "optim", "seed", "train.accumulation")
    for field in (*fixed, "train.steps", "train.epochs", "train.precision"):
        old, new = _field(before, field), _field(now, field)
        if old != new:
            raise UserError(
                f"{now.run_dir}: is a run with another {field} ({_difference(old, new)}); resume it with "
                f"--config {now.run_dir / 'config.yaml'}, or choose another --name"
            )


def _field(config: RunConfig, path: str) -> object:
    value: object = config
    for part in path.split("."):
        value = getattr(value, part)
    return value


def _difference(old: object, new: object) -> str:
    """Where two sections differ, down to the first field that does."""
    if isinstance(old, Strict) and isinstance(new, Strict):
        for name in type(old).model_fields:
            before, now = getattr(old, name), getattr(new, name)
            if before != now:
                inner = _difference(before, now)
                return f"{name}.{inner}" if isinstance(before, Strict) else f"{name}: {inner}"
    return f"{old} there, {new} here"
