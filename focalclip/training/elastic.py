"""Continuing on another number of ranks: ZeRO cuts shards for the ranks that wrote them, so they are recut first."""

import shutil
import subprocess
import sys
from pathlib import Path

from focalclip.distributed import main_only
from focalclip.errors import UserError
from focalclip.training.checkpoint import Checkpoint


def loadable(saved: Checkpoint, ranks: int) -> tuple[Path, bool]:
    """The folder that ``ranks`` ranks can load, and whether it is in DeepSpeed's universal form.

    Shards of ZeRO 1 and 2 for another number of ranks are converted into ``.universal/step-N`` beside it
    (:func:`clean_up` removes it after loading); ZeRO 0 keeps whole copies and needs no conversion.

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
    target = saved.path.parent / ".universal" / saved.path.name
    main_only(lambda: _recut(saved, target, ranks))
    return target, True


def _recut(saved: Checkpoint, target: Path, ranks: int) -> None:
    clean_up(target)
    target.parent.mkdir()
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--input_folder", str(saved.path), "--output_folder", str(target)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        last = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"{saved.path}: cannot be recut for {ranks} ranks ({last}); start with {saved.ranks} ranks")


def clean_up(converted: Path) -> None:
    """Remove what :func:`loadable` converted."""
    shutil.rmtree(converted.parent, ignore_errors=True)
