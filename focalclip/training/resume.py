"""Continuing a run: find its checkpoint, check that it is the same run, and convert it for another number of ranks."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from focalclip.base.errors import UserError
from focalclip.base.ranks import main_only
from focalclip.base.strict import load_yaml
from focalclip.config import RunConfig
from focalclip.training import checkpoint
from focalclip.training.checkpoint import Checkpoint

_FREE_ON_RESUME: Any = {
    "name": True,
    "runs_dir": True,
    "eval": True,
    "model": {"image": {"activation_checkpointing"}},
    "data": {
        "train",
        "workers",
        "max_faults",
        "max_bad_shards",
        "val_every",
        "val_max",
    },  # the shards are compared by their fingerprint
    "train": {  # the stage is compared with the checkpoint's
        "zero_stage",
        "log_every",
        "save_every",
        "keep_checkpoints",
        "max_skipped_steps",
        "max_rollbacks",
    },
}


# DeepSpeed's own command, in a process of its own, but without running code that a file may hold
_CONVERT = """
from deepspeed.checkpoint.ds_to_universal import main, parse_arguments
from focalclip.training.engine import data_only
with data_only():
    main(parse_arguments())
"""


def find_checkpoints(config: RunConfig, resume: bool) -> list[Path]:
    """The checkpoints to continue from, the newest first, if they belong to this configuration; nothing is written yet.

    Raises:
        UserError: if the directory holds a run and ``resume`` was not asked for, or a run of another configuration.
    """
    folder = config.run_dir
    found = checkpoint.complete(folder / "checkpoints")
    if found and not resume:
        raise UserError(
            f"{folder}: holds a run at {found[0].name}; continue it with --resume, or choose another --name"
        )
    if not found and (folder / "model").exists():
        raise UserError(f"{folder}: holds a trained model and no checkpoint to continue from; choose another --name")
    if found:
        check_same_run(load_yaml(RunConfig, folder / "config.yaml"), config)
    return found


def check_zero_stage(saved: Checkpoint, config: RunConfig) -> None:
    """Check that a checkpoint was written at the ZeRO stage of this run.

    Raises:
        UserError: naming both.
    """
    if saved.zero_stage != config.train.zero_stage:
        raise UserError(
            f"{saved.path}: written with train.zero_stage={saved.zero_stage}, this run has {config.train.zero_stage}; "
            f"add --train.zero-stage {saved.zero_stage}"
        )


def check_same_run(before: RunConfig, now: RunConfig) -> None:
    """Check that a resumed run has the same model, data order and schedule; it may save or log more often.

    Raises:
        UserError: naming the first setting that differs and both its values.
    """
    there, here = before.model_dump(exclude=_FREE_ON_RESUME), now.model_dump(exclude=_FREE_ON_RESUME)
    difference = _difference(there, here)
    if difference:
        raise UserError(
            f"{now.run_dir}: is a run with another {difference}; resume it with "
            f"--config {now.run_dir / 'config.yaml'}, or choose another --name"
        )


def _difference(there: dict[str, Any], here: dict[str, Any], path: str = "") -> str | None:
    """The first setting in which two equally built dictionaries differ, and both its values."""
    for name, old in there.items():
        if isinstance(old, dict) and old.keys() == here[name].keys():
            if inner := _difference(old, here[name], f"{path}{name}."):
                return inner
        elif old != here[name]:
            return f"{path}{name} ({old} there, {here[name]} here)"
    return None


def loadable(saved: Checkpoint, ranks: int) -> tuple[Path, bool]:
    """The folder that ``ranks`` ranks can load, and whether it is in DeepSpeed's universal form.

    ZeRO divides its shards among the ranks that wrote them. Shards of ZeRO 1 and 2 for another number of ranks are
    converted into ``.universal.tmp/step-N`` beside them (:func:`clean_up` removes it after loading); ZeRO 0 keeps whole
    copies and needs no conversion.

    Raises:
        UserError: for ZeRO 3, whose conversion in DeepSpeed 0.19 mixes up the two parameter groups without an error.
    """
    if saved.ranks == ranks or saved.zero_stage == 0:
        return saved.path, False
    if saved.zero_stage == 3:
        raise UserError(
            f"{saved.path}: a ZeRO 3 checkpoint of {saved.ranks} ranks; start again with {saved.ranks} ranks "
            "(checkpoints of ZeRO 0 to 2 continue on any number)"
        )
    target = saved.path.parent / ".universal.tmp" / saved.path.name
    main_only(lambda: _convert(saved, target, ranks))
    return target, True


def _convert(saved: Checkpoint, target: Path, ranks: int) -> None:
    clean_up(target)
    target.parent.mkdir()
    command = [sys.executable, "-c", _CONVERT, "--inject_missing_state"]
    command += ["--input_folder", str(saved.path), "--output_folder", str(target)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        clean_up(target)
        last = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"{saved.path}: cannot be converted for {ranks} ranks ({last}); start with {saved.ranks} ranks")


def clean_up(converted: Path) -> None:
    """Remove what :func:`loadable` converted."""
    shutil.rmtree(converted.parent, ignore_errors=True)
