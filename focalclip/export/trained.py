"""A trained model and all that its run tells of it: what an export writes down."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from focalclip.errors import UserError
from focalclip.models.clip import FocalCLIP
from focalclip.models.sources import loading, store


@dataclass(frozen=True)
class Trained:
    """What is exported.

    Attributes:
        name: of the run.
        model: as its own export gives it: float32, on the CPU, the feature normalisation folded into the projection.
        provenance: what training wrote beside the weights: versions, steps, samples, the whole configuration.
        results: the zero-shot results in the run's ``eval/`` by name; probes and retrieval are left out.
    """

    name: str
    model: FocalCLIP
    provenance: dict[str, Any]
    results: dict[str, dict[str, Any]]

    @classmethod
    def read(cls, source: str | Path) -> Self:
        """Read a run directory or an exported folder.

        Raises:
            UserError: if it holds no model trained by focalclip, or a result cannot be read.
        """
        model: Any = loading.load(source)
        if not isinstance(model, FocalCLIP):
            raise UserError(f"{source}: not trained by focalclip; give a run directory or an exported folder")
        run = Path(source)
        provenance = store.provenance(run / "model" if (run / "model").is_dir() else run)
        read = {path.stem: _read_result(path) for path in sorted(run.glob("eval/*.json"))}
        results = {name: result for name, result in read.items() if _is_zero_shot(result)}
        return cls(provenance.get("run") or run.resolve().name, model, provenance, results)


def _read_result(path: Path) -> dict[str, Any]:
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(result, dict) and isinstance(result.get("tasks"), dict):
            return result
    except (json.JSONDecodeError, UnicodeDecodeError):
        pass
    raise UserError(f"{path}: not an evaluation result; remove it or evaluate again with eval/zeroshot.py")


def _is_zero_shot(result: dict[str, Any]) -> bool:
    """Probes tell several values of a task, and a retrieval set's benchmark is called so."""
    return result.get("benchmark") != "retrieval" and all("value" in task for task in result["tasks"].values())
