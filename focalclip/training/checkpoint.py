"""Checkpoints, complete or absent.

    checkpoints/step-N/
        manifest.json            TrainState, ranks, ZeRO stage, and the size of every file
        buffers.pt               running statistics
        *.pt                     DeepSpeed's shards: weights, AdamW's moments, the schedule

A checkpoint is written under a temporary name; once all ranks have finished, the manifest is added and the folder
renamed. So a folder ``step-N`` is complete; a file in it whose size differs from the manifest was damaged later. The
order of samples is a function of the seed and the position, and the generator is seeded at every step, so no state of
random generators is saved.
"""

import json
import os
import pickle
import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from focalclip.base.errors import UserError, first_line
from focalclip.base.files import write_json
from focalclip.base.ranks import barrier, main_only, world_size
from focalclip.config import RunConfig

MANIFEST, BUFFERS = "manifest.json", "buffers.pt"


@dataclass
class TrainState:
    """All of a run's state that is not inside the engine."""

    step: int = 0
    """Optimiser steps done."""
    samples: int = 0
    """Samples consumed: the position at which the loader continues."""
    faults: int = 0
    """Broken samples replaced so far, on all ranks."""
    losses: list[float] = field(default_factory=list)
    """Losses of the steps since the last line of the log; the next line has the mean of all steps since then."""
    data: str = ""
    """Fingerprint of the shards."""


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
    main_only(lambda: _make_room(folder))
    engine.save_checkpoint(str(folder), tag=temporary.name, save_latest=False)  # DeepSpeed moves `latest` too early
    barrier()
    buffers = {name: buffer.cpu() for name, buffer in engine.module.named_buffers()}
    main_only(lambda: torch.save(buffers, temporary / BUFFERS))
    facts = {"state": asdict(state), "ranks": world_size(), "zero_stage": config.train.zero_stage}
    main_only(lambda: _complete_with(facts, temporary, final, config.train.keep_checkpoints))
    return final


def newest(folder: Path) -> Path | None:
    """The complete checkpoint with the most steps, or None."""
    found = _complete(folder)
    return found[-1] if found else None


def read(path: Path, config: RunConfig) -> Checkpoint:
    """Read the manifest of ``path`` and check that the checkpoint is undamaged and fits this run.

    Raises:
        UserError: if a file is missing or has another size, or the ZeRO stage differs.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        files = manifest["files"]
        saved = Checkpoint(path, TrainState(**manifest["state"]), manifest["ranks"], manifest["zero_stage"])
    except (OSError, json.JSONDecodeError, KeyError, TypeError):
        raise UserError(f"{path / MANIFEST}: missing or damaged; {_remedy(path)}") from None
    for name, size in files.items():
        actual = (path / name).stat().st_size if (path / name).is_file() else None
        if actual != size:
            what = "is missing" if actual is None else f"has {actual} bytes instead of {size}"
            raise UserError(f"{path / name} {what}: this checkpoint is damaged; {_remedy(path)}")
    if saved.zero_stage != config.train.zero_stage:
        raise UserError(
            f"{path}: written with train.zero_stage={saved.zero_stage}, this run has {config.train.zero_stage}; "
            f"add --train.zero-stage {saved.zero_stage}"
        )
    return saved


def load(engine: Any, saved: Checkpoint, path: Path) -> None:
    """Restore the engine from ``path``: the checkpoint that :func:`read` accepted, or its universal form.

    Raises:
        UserError: if DeepSpeed cannot read it.
    """
    try:
        loaded, _ = engine.load_checkpoint(str(path.parent), tag=path.name)
    except (RuntimeError, OSError, EOFError, KeyError, AssertionError, pickle.UnpicklingError) as error:
        raise UserError(f"{path}: cannot be loaded ({first_line(error)}); {_remedy(path)}") from None
    if loaded is None:
        raise UserError(f"{path}: DeepSpeed found no checkpoint in it; {_remedy(path)}")
    # DeepSpeed's universal form has parameters only: running statistics would be reset without an error.
    buffers = torch.load(saved.path / BUFFERS, weights_only=True)
    for name, buffer in engine.module.named_buffers():
        buffer.copy_(buffers[name])


def _make_room(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for unfinished in folder.glob(".step-*.tmp"):  # of a killed run
        shutil.rmtree(unfinished)


def _complete_with(facts: dict[str, Any], temporary: Path, final: Path, keep: int) -> None:
    """Add the manifest, give the folder its name, and remove the oldest ones."""
    sizes = {str(path.relative_to(temporary)): path.stat().st_size for path in _files(temporary)}
    write_json(temporary / MANIFEST, facts | {"files": sizes})
    for path in [*_files(temporary), temporary]:
        _sync(path)
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    for old in _complete(final.parent)[:-keep]:
        shutil.rmtree(old)


def _complete(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def _remedy(path: Path) -> str:
    others = [other.name for other in _complete(path.parent) if other != path]
    fall_back = f"continue from {others[-1]}" if others else "start over under another --name"
    return f"remove the folder {path} to {fall_back}"


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _sync(path: Path) -> None:
    """Flush to disk: after a crash the renamed folder must not be there without its contents."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
