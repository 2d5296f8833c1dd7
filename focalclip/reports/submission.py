"""The file that ELEVATER's server (EvalAI challenge 1832, "ICinW") takes: a zip that holds one JSON.

Format: ``submission_file_readme.md`` of the toolkit (Computer-Vision-in-the-Wild/Elevater_Toolkit_IC). Whether the
server still scores is not known; the format is also what others' scripts read.
"""

import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from focalclip.base.errors import UserError
from focalclip.base.files import whole_file
from focalclip.evaluation.metrics.definitions import Floats
from focalclip.evaluation.predictions import Predictions

if TYPE_CHECKING:
    from focalclip.evaluation.result import Result, TaskResult

DECIMALS = 6

_SUM_TOLERANCE = 1e-3  # the server's


@dataclass(frozen=True)
class SubmissionRecord:
    """One data set's part of a submission."""

    dataset_name: str
    probabilities: Sequence[NDArray[np.floating]]
    """One (images, classes) per seed, in the official order of the test set."""
    num_params: int
    """Backbone, and for adapted models the head, as the toolkit counts it."""
    num_visual_params: int
    num_backbone_params: int
    num_trainable_params: int = 0
    """In adaptation, the mean over seeds: 0 for zero-shot."""
    n_shot: int = 0
    """0, 5, or -1 for all."""
    seeds: tuple[int, ...] = (0,)


def write_records(records: Sequence[SubmissionRecord], model_name: str, path: Path) -> Path:
    """Write the zip; probabilities are written one image at a time, so that ImageNet's 50 million need no memory.

    Raises:
        UserError: if probabilities do not sum to 1, or seeds and predictions differ in number.
    """
    with (
        whole_file(path) as temporary,
        zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("all_predictions.json", "w", force_zip64=True) as file,
    ):
        file.write(b'{"data": [')
        for i, record in enumerate(records):
            file.write(b", {" if i else b"{")
            file.write(json.dumps(_fields(record, model_name))[1:-1].encode() + b', "predictions": [')
            for seed, probabilities in enumerate(record.probabilities):
                file.write(b", [" if seed else b"[")
                rounded = _checked(probabilities, record.dataset_name)
                for row in range(len(rounded)):
                    values = ", ".join(f"{x:.{DECIMALS}f}".rstrip("0").rstrip(".") for x in rounded[row])
                    file.write(f"{', ' if row else ''}[{values}]".encode())
                file.write(b"]")
            file.write(b"]}")
        file.write(b"]}")
    return path


def _fields(record: SubmissionRecord, model_name: str) -> dict[str, Any]:
    if len(record.seeds) != len(record.probabilities):
        counts = f"{len(record.probabilities)} predictions for {len(record.seeds)} seeds"
        raise UserError(f"{record.dataset_name}: {counts}; give one of each seed")
    return {
        "model_name": model_name,
        "dataset_name": record.dataset_name,
        "num_trainable_params": record.num_trainable_params,
        "num_params": record.num_params,
        "num_visual_params": record.num_visual_params,
        "num_backbone_params": record.num_backbone_params,
        "n_shot": record.n_shot,
        "rnd_seeds": list(record.seeds),
    }


def _checked(probabilities: NDArray[np.floating], name: str) -> Floats:
    """Rounded, after a look at the sums: also the rounded rows must add up to 1 within the server's tolerance."""
    rounded = np.round(probabilities.astype(np.float64), DECIMALS)
    worst = float(np.abs(rounded.sum(axis=1) - 1).max())
    if not worst <= _SUM_TOLERANCE or rounded.min() < 0:
        raise UserError(f"{name}: not probabilities, a row is off by {worst:.3g} from a sum of 1; pass a softmax")
    return rounded


def write_submission(result: "Result", path: Path) -> Path:
    """Write a zero-shot result of ELEVATER as a submission.

    Raises:
        UserError: if the result is of another protocol, lacks all scores, or a test set is not ELEVATER's own: every
            image of it has to be there, in its order.
    """
    if result.protocol.split(",")[0] != "elevater" or not result.tasks:  # "elevater, class prompts" will do
        raise UserError(f"{path}: a submission needs tasks under the protocol elevater; evaluate --benchmark elevater")
    backbone = int(result.model.get("parameters") or 0)
    visual = int(result.model.get("image_parameters") or 0)
    records = [
        SubmissionRecord(
            name, [_official(name, task)], num_params=backbone, num_visual_params=visual, num_backbone_params=backbone
        )
        for name, task in result.tasks.items()
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_records(records, str(result.model.get("source", "model")), path)


def notes(result: "Result") -> list[str]:
    """Warnings for a submission: missing data sets, and those whose official order is not known."""
    absent = [*result.missing, *result.failed]
    lines = [f"not in the submission: {', '.join(absent)}; the server gives no average"] if absent else []
    kept = {name: task.predictions for name, task in result.tasks.items() if task.predictions}
    unknown = [name for name, predictions in kept.items() if not len(predictions.official)]
    if unknown:
        lines.append(f"in the order of the local files, which is taken to be the official one: {', '.join(unknown)}")
    return lines


def _official(name: str, task: "TaskResult") -> Floats:
    """All probabilities in the official order."""
    predictions: Predictions | None = task.predictions
    if predictions is None:
        raise UserError(f"{name}: its predictions are not beside the result; evaluate again with --keep-all")
    if task.is_partial or "elevater" not in task.test_set.split(", "):
        raise UserError(f"{name}: a submission needs ELEVATER's own test set, this is {task.test_set}; use --tasks")
    if task.broken:
        raise UserError(f"{name}: a submission needs every image, {len(task.broken)} are damaged; download it again")
    probabilities = predictions.all_probabilities()
    return probabilities[predictions.official] if len(predictions.official) else probabilities
