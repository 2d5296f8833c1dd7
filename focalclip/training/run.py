"""Assembly of one run, from configuration to exported model: its directory, its parts, and their order."""

import hashlib
import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, closing
from pathlib import Path
from typing import Any

import torch

from focalclip import names
from focalclip.base import __version__
from focalclip.base.errors import SharedError, UserError, require, system_error
from focalclip.base.files import owned, remove_leftovers, write_text, writing
from focalclip.base.ranks import (
    barrier,
    gather_objects,
    in_turns,
    is_main,
    main_only,
    rank,
    together,
    world_size,
)
from focalclip.base.strict import dump_yaml
from focalclip.config import RunConfig, SourceConfig, source_of
from focalclip.data.loader import Dealing, TrainLoader
from focalclip.data.mixing import read_segments
from focalclip.data.shards import left_out
from focalclip.interop import folder as store
from focalclip.interop import start
from focalclip.models.clip import FocalCLIP, ProjectedImageTower
from focalclip.models.image import check_patches
from focalclip.models.lock import LockedFeatures, lock_towers
from focalclip.models.text import text_entry
from focalclip.training import checkpoint, engine, optim
from focalclip.training.checkpoint import Checkpoint, TrainState
from focalclip.training.heldout import HeldOutMeasure, HeldOutPairs, open_held_out, val_shards
from focalclip.training.log import TrainLog
from focalclip.training.loop import Trainer, train
from focalclip.training.resume import check_zero_stage, clean_up, find_checkpoints, loadable
from focalclip.training.step import create_loss
from focalclip.training.stop import StopRequest

FEATURES = "features"
"""Folder of a run directory for features of locked towers, while it trains."""

Measure = Callable[[FocalCLIP], dict[str, float]]
"""From a model to numbers by name; all ranks call it together."""


def check(config: RunConfig) -> None:
    """Refuse what the engine, the tower, the loss or the optimiser cannot do, before anything is built or downloaded.

    Raises:
        UserError: naming the setting and the remedy.
    """
    require("training", "train")
    names.find(text_entry(config.model.text).build)  # whose package may be missing
    if Path(config.runs_dir).exists() and not Path(config.runs_dir).is_dir():
        raise UserError(f"runs_dir: {config.runs_dir} is a file; name a folder")
    engine.check(config)
    with torch.device("meta"):
        tower = ProjectedImageTower(config.model)
    check_patches(tower.trunk, config.model.image)
    create_loss(config.loss, FocalCLIP.outputs)
    optim.check(config.optim)


def owned_run(config: RunConfig) -> AbstractContextManager:
    """Context in which the run directory belongs to these ranks alone; nothing in it may change before.

    Raises:
        SharedError: on all ranks, naming host and process, if another run is using it.
    """
    stack = ExitStack()

    def own() -> None:
        stack.enter_context(owned(config.run_dir))
        remove_leftovers(config.run_dir)

    main_only(own)
    return stack


def run_training(
    config: RunConfig, shards: list[Path], resume: bool, stop: StopRequest, measure: Measure | None = None
) -> bool:
    """Train a run, or continue it where it stopped.

    Args:
        config: the whole configuration, which :func:`check` has accepted; within :func:`owned_run`.
        shards: the training shards.
        resume: continue the newest checkpoint of the run directory if it has one.
        stop: takes the signals over from the first step on, until the caller leaves its context: a request that comes
            after the last step is for what follows.
        measure: evaluates the model every ``config.eval.every`` steps.

    Returns:
        Whether the run is finished (false: it was asked to stop, and has saved).

    Raises:
        UserError: for anything that the user can correct, before training starts.
    """
    saved = _find_checkpoint(config, resume)
    state = saved.state if saved else TrainState()
    model, begins = in_turns(lambda: _create_model(config, is_fresh=saved is None))
    table = optim.table(model, config.optim)
    shards_of_val = in_turns(lambda: val_shards(config.data, shards))
    loader = in_turns(lambda: _create_loader(config, shards, model, state))
    if len(set(gather_objects(state.data))) > 1:
        raise SharedError("data.train: the shards differ between ranks; name files that all nodes share")
    held_out = open_held_out(config.data, shards_of_val, loader)
    total_steps = _total_steps(config, loader)
    deepspeed_engine = _create_engine(config, model, total_steps, saved)
    main_only(lambda: _write_config(config, is_fresh=saved is None))
    cached = together(lambda: _use_caches(config, model, loader, total_steps))
    if is_main():
        introduction = _introduction(config, model, loader, state, total_steps, [*begins, *cached], held_out)
        print(introduction, table, sep="\n", flush=True)
    if state.step >= total_steps:  # the run may have been killed after its last checkpoint, before the export
        _export(deepspeed_engine, config, state)
    log = together(lambda: TrainLog(config, total_steps, state))
    if loader.mixture.changes:
        log.say(f"step {state.step}: data.train: {'; '.join(loader.mixture.changes)}")
    stop.heed()
    with closing(log):
        evaluate = _Evaluation(config, measure, held_out)
        loss = create_loss(config.loss, model.outputs)
        run = Trainer(
            config, deepspeed_engine, loss, loader, state, total_steps, log, stop, _save, _roll_back, evaluate
        )
        finished = train(run)
    if not finished:
        if is_main():
            reason = f"{stop.reason}: " if stop.reason else ""
            print(f"{reason}saved step {state.step} in {config.run_dir}; continue with the same command and --resume")
        together(loader.raise_fault)
    else:
        main_only(lambda: shutil.rmtree(config.run_dir / FEATURES, ignore_errors=True))
    return finished


def _find_checkpoint(config: RunConfig, resume: bool) -> Checkpoint | None:
    """The checkpoint to continue from, the same on all ranks; None: start from step 0."""
    found = together(lambda: find_checkpoints(config, resume))
    if len(set(gather_objects(tuple(path.name for path in found)))) > 1:
        raise SharedError(f"runs_dir: {config.runs_dir} differs between ranks; name a folder that all nodes share")
    saved = checkpoint.newest_sound(found)
    if saved:
        check_zero_stage(saved, config)
    return saved


def _save(run: Trainer) -> bool:
    """Write a checkpoint, and the model in the form that others load; false, with nothing written, if not finite.

    Raises:
        MachineError: on this rank, if the disk refuses it; earlier checkpoints stay.
        SharedError: the same on all ranks.
    """
    if not all(gather_objects(engine.is_finite(run.engine))):
        return False
    folder = run.config.run_dir / "checkpoints"
    try:
        with writing(folder):
            checkpoint.save(run.engine, folder, run.state, run.config)
            _export(run.engine, run.config, run.state)
    except (OSError, SharedError) as error:
        if is_main():
            remove_leftovers(folder)  # they take the room that a resumed run needs
        raise (system_error(error) if isinstance(error, OSError) else error) from None
    return True


def _roll_back(run: Trainer, reason: str) -> None:
    """Restore the last checkpoint; the data go on, as the same batches would end in the same way.

    Raises:
        SharedError: if there is none, or the run has returned ``train.max_rollbacks`` times already.
    """
    state, limit = run.state, run.config.train.max_rollbacks
    found = together(lambda: checkpoint.complete(run.config.run_dir / "checkpoints"))
    remedy = "start another run (--name) with a lower optim.lr or more optim.warmup_steps"
    if not found or state.rollbacks >= limit:
        kept = f"{found[0]} is the last sound checkpoint" if found else "there is no checkpoint to return to"
        raise SharedError(
            f"step {state.step}: {reason}, after {state.rollbacks} of at most {limit} returns (train.max_rollbacks); "
            f"{kept}; {remedy}"
        )
    saved = checkpoint.newest_sound(found)
    assert saved is not None
    checkpoint.load(run.engine, saved, saved.path)
    run.log.say(f"step {state.step}: {reason}; returned to step {saved.state.step}, going on with the data that follow")
    state.step, state.losses, state.skipped_in_a_row = saved.state.step, saved.state.losses, 0
    state.rollbacks += 1
    run.log.rewind(state)


class _Evaluation:
    """Evaluates a copy of the model, so that hooks, train mode and random generators of the engine do not change."""

    def __init__(self, config: RunConfig, measure: Measure | None, held_out: HeldOutPairs | None) -> None:
        self._config, self._measure = config, measure
        self._held_out = HeldOutMeasure(config, held_out) if held_out else None
        self._named: set[str] = set()
        self._copy: FocalCLIP | None = None

    def __call__(self, run: Trainer) -> None:
        """Measure what is due and log it; all ranks call this together."""
        due = self._due(run)
        if not due:
            return
        start = time.perf_counter()
        with engine.full_weights(run.engine):
            weights = {name: tensor.detach().clone() for name, tensor in run.engine.module.state_dict().items()}
        if self._copy is None:
            with torch.random.fork_rng(devices=[]):
                self._copy = FocalCLIP(self._config.model).to(engine.device())
        self._copy.load_state_dict(weights)
        with run.stop.obeyed_at_once():
            found = [(name, work(self._copy), time.perf_counter()) for name, work in due.items()]
        for name, values, end in found:
            record = run.log.held_out if name == "heldout" else run.log.evaluation
            record(run.state, values, end - start)
            start = end

    def _due(self, run: Trainer) -> dict[str, Callable[[FocalCLIP], dict[str, Any]]]:
        """What is to be measured after this step, by the name of its line, and is not yet in the log."""
        step, is_last, due = run.state.step, run.state.step >= run.total_steps, {}
        every = self._config.eval.every
        if self._measure and every and step % every == 0 and not is_last:  # after the last the whole benchmark follows
            due["zeroshot"] = self._measure
        if self._held_out and (is_last or step % self._config.data.val_every == 0):
            due["heldout"] = lambda model: self._measure_held_out(run, model)
        if step == run.log.first_step:  # of this process: a run that was resumed may have measured here before
            known = gather_objects([name for name in due if is_main() and run.log.has(name, step)])[0]
            return {name: work for name, work in due.items() if name not in known}
        return due

    def _measure_held_out(self, run: Trainer, model: FocalCLIP) -> dict[str, Any]:
        assert self._held_out is not None
        values, left_out = self._held_out(model)
        for reason in left_out:
            if reason not in self._named:
                run.log.say(f"held-out pairs without {reason}")
            self._named.add(reason)
        return values


def _export(deepspeed_engine: Any, config: RunConfig, state: TrainState) -> None:
    provenance = {
        "focalclip": __version__,
        "run": config.name,
        "step": state.step,
        "samples": state.samples,
        "config": config.model_dump(mode="json"),
    }
    with engine.full_weights(deepspeed_engine):
        main_only(lambda: store.save(deepspeed_engine.module, config.run_dir / "model", provenance))


def _create_model(config: RunConfig, *, is_fresh: bool) -> tuple[FocalCLIP, list[str]]:
    """The model, with equal initial weights on every rank, and where they are from; a resumed run loads its own later.

    A feature_norm that came with ``train.init_from`` is locked with the image tower: its statistics belong to it.
    """
    torch.manual_seed(config.seed)
    model = FocalCLIP(config.model)
    begins = start.start(model.eval(), config.train.init_from) if is_fresh else []
    lock_towers(model, with_feature_norm=config.train.init_from is not None)
    for tower, settings in (("image", config.model.image), ("text", config.model.text)):
        if settings.lock and settings.pretrained is None and config.train.init_from is None and is_main():
            print(
                f"model.{tower}.lock: the weights that are locked are random; name trained ones in "
                f"model.{tower}.pretrained or train.init_from",
                file=sys.stderr,
            )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError("model.image.lock, model.text.lock: nothing is left to train")
    return model.train(), [f"weights    {line}" for line in begins]


def _create_engine(config: RunConfig, model: FocalCLIP, total_steps: int, saved: Checkpoint | None) -> Any:
    """The engine, at step 0 or restored; a checkpoint of another number of ranks is converted on the way."""
    if saved is None:
        return engine.create_engine(model, config, total_steps)
    path, is_universal = loadable(saved, world_size())
    restored = engine.create_engine(model, config, total_steps, load_universal=is_universal)
    checkpoint.load(restored, saved, path)
    barrier()
    if is_universal and is_main():
        clean_up(path)
    return restored


def _create_loader(config: RunConfig, shards: list[Path], model: FocalCLIP, state: TrainState) -> TrainLoader:
    """The loader of this rank; the one that comes first may have to index the shards."""
    loader = TrainLoader(
        shards,
        config.data,
        image_size=config.model.image.image_size,
        tokenize=model.tokenizer,
        seed=config.seed,
        dealing=Dealing(
            rank(), world_size(), config.train.accumulation, state.samples, tuple(read_segments(state.mixture))
        ),
    )
    segments = loader.mixture.segments
    if segments and state.data and not state.mixture:
        raise UserError(
            f"data.train: {config.run_dir} began without weights, so its sources have no places of their own to go on "
            "from; leave out the weights, or choose another --name"
        )
    fingerprint = _fingerprint(
        loader, [entry.rules for entry in config.data.entries if isinstance(entry, SourceConfig)]
    )
    if not segments and state.data not in ("", fingerprint):
        raise UserError(
            f"data.train: other shards than {config.run_dir} began with (of those that can be used, the names, numbers "
            "of samples, own settings or division into sources differ); give the same ones, or choose another --name"
        )
    state.data, state.mixture = fingerprint, [segment.to_json() for segment in segments]
    return loader


def _fingerprint(loader: TrainLoader, rules: Sequence[dict[str, Any]]) -> str:
    """What decides the order of samples, their classes where there are several sources, and the sources' own settings.

    It is made of the shards' names, sizes and sources in their order, wherever the shards lie.
    """
    lines = [f"{shard.name} {count}" for shard, count in zip(loader.usable.shards, loader.counts.tolist(), strict=True)]
    if any(loader.sources):
        lines = [f"{line} {source}" for line, source in zip(lines, loader.sources, strict=True)]
    lines += [json.dumps(rules, sort_keys=True)] if any(rules) else []
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _total_steps(config: RunConfig, loader: TrainLoader) -> int:
    """Length of the run, in which the warm-up fits."""
    steps, epochs = config.train.steps, config.train.epochs
    if steps is None:
        assert epochs is not None
        steps = round(epochs * loader.num_samples / config.data.batch_size)
        if steps == 0:
            raise UserError(
                f"train.epochs={epochs:g} of {loader.num_samples:,} pairs is less than one step of data.batch_size="
                f"{config.data.batch_size}; give more epochs, or train.steps"
            )
    config.optim.warmup(steps)
    return steps


def _introduction(
    config: RunConfig,
    model: FocalCLIP,
    loader: TrainLoader,
    state: TrainState,
    total_steps: int,
    begins: list[str],
    held_out: HeldOutPairs | None,
) -> str:
    """The derived numbers of the run, printed once."""
    millions = {
        name: sum(engine.num_elements(p) for p in tower.parameters()) / 1e6 for name, tower in model.named_children()
    }
    image, batch = config.model.image, config.data.batch_size
    epochs = total_steps * batch / loader.num_samples
    names = [source_of(entry) for entry in config.data.entries]
    sources, classes = loader.mixture, {"source": "classes of each source", "number": "classes by number"}
    several = len(set(loader.sources)) > 1 or len(sources.names) > 1
    of_sources = f", {classes.get(config.data.label_space, 'classes by name')} (data.label_space)" if several else ""
    table = sources.table(total_steps * batch) if len(sources.names) > 1 or sources.segments else []
    lines = [
        f"run        {config.run_dir}" + (f", continued from step {state.step}" if state.step else ""),
        *begins,
        f"model      {image.name} {millions['visual']:.2f} M + {config.model.text.name} text {millions['text']:.2f} M "
        f"parameters, {image.image_size} px",
        f"data       {loader.num_samples:,} pairs{of_sources}; {total_steps:,} steps x {batch} = {epochs:.1f} epochs",
        *[f"source     {line}" for line in table],
        *([f"held out   {held_out.introduction(config.data)}"] if held_out else []),
        *[f"left out   {line}" for line in left_out(names, loader.usable, config.data.key_rule)],
        f"engine     {world_size()} x {engine.device().type}, ZeRO {config.train.zero_stage}, "
        f"{config.train.precision}, accumulation {config.train.accumulation}",
    ]
    return "\n".join(lines)


def _use_caches(config: RunConfig, model: FocalCLIP, loader: TrainLoader, total_steps: int) -> list[str]:
    """Give towers that are locked as a whole a cache of features, where their inputs come again; a line for each."""
    lines, folder = [], config.run_dir / FEATURES
    limit = int(config.train.feature_cache_gb * 1e9)
    is_repeated = total_steps * config.data.batch_size > loader.num_samples
    reasons = {
        "train.feature_cache_gb is 0": limit == 0,
        "train.zero_stage is 3, at which all ranks compute together": config.train.zero_stage == 3,
    }
    pictures = {
        "data.augment varies the pictures": not config.data.augment.is_fixed,
        "each picture comes once": not is_repeated,
    }
    for tower, own in (("image", pictures), ("text", {})):
        settings = getattr(config.model, tower)
        if not settings.lock or settings.unlocked_groups:
            continue
        reason = next((reason for reason, holds in (reasons | own).items() if holds), None)
        if reason is None:
            width = model.visual.trunk.num_features if tower == "image" else _text_width(model)
            cache = LockedFeatures(folder / f"{tower}-{rank()}.bin", width, limit)
            if tower == "image":
                model.visual.cache = cache
            else:
                model.text_cache = cache
            size = f"{config.train.feature_cache_gb:g} GB for each rank"
            lines.append(f"features   {tower}: kept in {folder} and not computed again, up to {size}")
        else:
            lines.append(f"features   {tower}: computed at each step, as {reason}")
    return lines


def _text_width(model: FocalCLIP) -> int:
    """Width of what the projection of the text tower takes."""
    projection = getattr(model.text, text_entry(model.config.text).projection or "")
    return projection.in_features if isinstance(projection, torch.nn.Linear) else engine.shape(projection)[0]


def _write_config(config: RunConfig, *, is_fresh: bool) -> None:
    """Write the resolved configuration; after all parts are built, so that a refused command changes nothing."""
    folder = config.run_dir
    if is_fresh:
        (folder / "metrics.jsonl").unlink(missing_ok=True)  # of an attempt that ended before its first checkpoint
        shutil.rmtree(folder / FEATURES, ignore_errors=True)
    write_text(folder / "config.yaml", dump_yaml(config))
