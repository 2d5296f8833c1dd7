"""Checkpoints, complete or absent.

    checkpoints/step-N/
        manifest.json            TrainState, ranks, ZeRO stage, SHA-256 of every file and of itself
        buffers.pt               running statistics
        *.pt                     DeepSpeed's shards: weights, AdamW's moments, the schedule

A checkpoint is written under a temporary name; once all ranks have finished, the manifest is added and the folder
renamed. So a folder ``step-N`` is complete; a file in it whose hash differs from the manifest was damaged later, and
none of it is loaded. Nothing that is not finite is written, and loading runs no code that a file may hold. The order of
samples is a function of the seed and the position, draws inside the model are as well (:mod:`focalclip.models.draws`),
and the generator is seeded at every step, so no state of random generators is saved.
"""

import os
import pickle
import re
import shutil
import sys
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from focalclip.base.errors import SharedError, UserError, first_line
from focalclip.base.files import file_sha256, read_sealed_json, write_sealed_json
from focalclip.base.ranks import barrier, gather_objects, main_only, rank, together, world_size
from focalclip.config import RunConfig
from focalclip.training.engine import data_only

MANIFEST, BUFFERS = "manifest.json", "buffers.pt"

_MODULE = "mp_rank_00_model_states.pt"  # DeepSpeed's name for the whole model's weights, at ZeRO 0 to 2


@dataclass
class TrainState:
    """All of a run's state that is not inside the engine."""

    step: int = 0
    """Optimiser steps done."""
    samples: int = 0
    """Samples consumed: the position at which the loader continues."""
    faults: int = 0
    """Broken samples replaced so far, on all ranks."""
    skipped: int = 0
    """Steps skipped so far, as their gradients were not finite."""
    skipped_in_a_row: int = 0
    """Of them, those since the last step that was not."""
    rollbacks: int = 0
    """How often the run returned to a checkpoint."""
    losses: list[float] = field(default_factory=list)
    """Losses of the steps since the last line of the log; the next line has the mean of all steps since then."""
    data: str = ""
    """Fingerprint of the shards."""
    mixture: list[dict[str, Any]] = field(default_factory=list)
    """Of weighted sources: from which position on the run has had which weights, and where each source began then."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    path: Path
    state: TrainState
    ranks: int
    """Ranks that wrote it."""
    zero_stage: int


def save(engine: Any, folder: Path, state: TrainState, config: RunConfig) -> Path:
    """Write ``folder/step-N`` and remove the oldest ones; all ranks call this together."""
    final, temporary = folder / f"step-{state.step}", folder / f".step-{state.step}.tmp"
    main_only(lambda: _make_room(temporary))
    engine.save_checkpoint(str(folder), tag=temporary.name, save_latest=False)  # DeepSpeed moves `latest` too early
    barrier()
    buffers = {name: buffer.cpu() for name, buffer in engine.module.named_buffers()}
    main_only(lambda: torch.save(buffers, temporary / BUFFERS))
    shares = gather_objects(together(lambda: {name: file_sha256(temporary / name) for name in _own_files(temporary)}))
    facts = {
        "state": asdict(state),
        "ranks": world_size(),
        "zero_stage": config.train.zero_stage,
        "files": dict(sorted(item for share in shares for item in share.items())),
    }
    main_only(lambda: _complete_with(facts, temporary, final, config.train.keep_checkpoints))
    return final


def complete(folder: Path) -> list[Path]:
    """The complete checkpoints, those with the most steps first."""
    found = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)


def newest_sound(paths: list[Path]) -> Checkpoint | None:
    """The first of ``paths`` that is undamaged; damaged ones before it are set aside as ``step-N.damaged``.

    Every rank reads a part of the files; all ranks call this together.

    Returns:
        None where ``paths`` is empty.

    Raises:
        SharedError: if all are damaged, or one cannot be read for now.
    """
    faults = []
    for path in paths:
        damage = [fault for fault in gather_objects(together(partial(_damage, path))) if fault]
        if not damage:
            for damaged, fault in faults:
                main_only(partial(_set_aside, damaged, fault, path))
            return together(partial(_read, path))
        faults.append((path, damage[0]))
    if faults:
        others = "" if len(faults) == 1 else f", and so are the {len(faults) - 1} before it"
        raise SharedError(f"{faults[0][1]}: this checkpoint is damaged{others}; start over under another --name")
    return None


def load(engine: Any, saved: Checkpoint, path: Path) -> None:
    """Restore the engine from ``path``: the checkpoint that :func:`newest_sound` found, or its universal form.

    Raises:
        UserError: if DeepSpeed cannot read it.
    """
    remedy = f"remove the folder {saved.path} to continue from the one before it"
    try:
        with data_only():
            loaded, _ = engine.load_checkpoint(str(path.parent), tag=path.name)
            # DeepSpeed's universal form has parameters only: running statistics would be reset without an error.
            buffers = torch.load(saved.path / BUFFERS, weights_only=True)
            if path != saved.path:
                _load_locked(engine.module, saved.path)
    except (RuntimeError, OSError, EOFError, KeyError, AssertionError, pickle.UnpicklingError) as error:
        raise UserError(f"{path}: cannot be loaded ({first_line(error)}); {remedy}") from None
    if loaded is None:
        raise UserError(f"{path}: DeepSpeed found no checkpoint in it; {remedy}")
    for name, buffer in engine.module.named_buffers():
        buffer.copy_(buffers[name])


@torch.no_grad()
def _load_locked(module: Any, path: Path) -> None:
    """Load the parameters that are not trained; DeepSpeed's universal form has those of the optimiser alone."""
    locked = {name: parameter for name, parameter in module.named_parameters() if not parameter.requires_grad}
    if locked:
        weights = torch.load(path / _MODULE, weights_only=True, mmap=True, map_location="cpu")["module"]
        for name, parameter in locked.items():
            parameter.copy_(weights[name])


def _read(path: Path) -> Checkpoint:
    manifest = read_sealed_json(path / MANIFEST)
    return Checkpoint(path, TrainState(**manifest["state"]), manifest["ranks"], manifest["zero_stage"])


def _damage(path: Path) -> str | None:
    """What is wrong with the manifest or with one of this rank's share of the files.

    Raises:
        OSError: if a file is there and cannot be read, which may pass.
    """
    try:
        files = read_sealed_json(path / MANIFEST)["files"]
    except FileNotFoundError:
        return f"{path / MANIFEST} is missing"
    except (ValueError, KeyError):
        return f"{path / MANIFEST} is damaged (or of focalclip 0.1, which wrote no hashes)"
    for name in sorted(files)[rank() :: world_size()]:
        try:
            if file_sha256(path / name) != files[name]:
                return f"{path / name} differs from its hash in {MANIFEST}"
            if name.endswith(".pt"):
                with data_only():
                    torch.load(path / name, mmap=True)  # all but the numbers
        except FileNotFoundError:
            return f"{path / name} is missing"
        except (RuntimeError, EOFError, pickle.UnpicklingError):
            return f"{path / name} holds other things than data"
    return None


def _set_aside(damaged: Path, fault: str, sound: Path) -> None:
    aside = damaged.with_name(f"{damaged.name}.damaged")
    while aside.exists():
        aside = aside.with_name(f"{aside.name}+")
    damaged.rename(aside)
    print(f"{fault}: set aside as {aside.name}; going back to {sound.name}", file=sys.stderr)


def _make_room(temporary: Path) -> None:
    temporary.parent.mkdir(parents=True, exist_ok=True)
    if temporary.exists():  # of an attempt that failed, such as on a full disk
        shutil.rmtree(temporary)


def _complete_with(facts: dict[str, Any], temporary: Path, final: Path, keep: int) -> None:
    """Add the manifest, give the folder its name, and remove the oldest ones."""
    write_sealed_json(temporary / MANIFEST, facts)
    for path in [*_files(temporary), temporary]:
        _sync(path)
    replaced = final.with_name(f".{final.name}.old.tmp")
    if final.exists():
        final.rename(replaced)
    temporary.rename(final)
    _sync(final.parent)
    # first its name, so that no checkpoint is ever there in part
    oldest = [old.rename(old.with_name(f".{old.name}.gone.tmp")) for old in complete(final.parent)[keep:]]
    for path in (replaced, *oldest):
        if path.exists():
            shutil.rmtree(path)


def _own_files(folder: Path) -> list[str]:
    """This rank's share of the files, by name."""
    return [str(path.relative_to(folder)) for path in _files(folder)[rank() :: world_size()]]


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _sync(path: Path) -> None:
    """Flush to disk: after a crash the renamed folder must not be there without its contents."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
