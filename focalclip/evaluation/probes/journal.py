"""Finished probes, one JSON line each, so that a command that was killed or is repeated trains none of them twice."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from focalclip.errors import UserError
from focalclip.evaluation.probes.result import ProbeRun, RunKey

FORMAT = 1  # raised whenever a change to the probes could change a number: older lines are passed over then


@dataclass(frozen=True)
class Origin:
    """What decides a probe's number besides shots, method and seed."""

    model_sha256: str
    protocol: str
    task: str
    version: int
    metric: str
    resize: str
    train_sha256: str
    test_sha256: str
    format: int = FORMAT


class Journal:
    """A file of finished probes that is only ever added to.

    Args:
        path: JSON lines; created at the first addition. None: nothing is known and nothing kept.

    Raises:
        UserError: if the file holds something else.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._known: dict[Origin, dict[RunKey, ProbeRun]] = {}
        if path is None or not path.exists():
            return
        whole, _, cut = path.read_bytes().rpartition(b"\n")
        if cut:  # a process was killed while it wrote
            path.write_bytes(whole + b"\n" if whole else b"")
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                values: dict[str, Any] = json.loads(line)
                origin, run = values["origin"], values["run"]
                if origin["format"] == FORMAT:
                    self._note(Origin(**origin), ProbeRun(**run | {"interval": tuple(run["interval"])}))
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{path}: line {number} is no finished probe; remove the file") from None

    def runs(self, origin: Origin) -> dict[RunKey, ProbeRun]:
        """The finished probes of this origin."""
        return self._known.get(origin, {})

    def add(self, origin: Origin, run: ProbeRun) -> None:
        """Keep a finished probe."""
        self._note(origin, run)
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(json.dumps({"origin": asdict(origin), "run": asdict(run)}) + "\n")

    def _note(self, origin: Origin, run: ProbeRun) -> None:
        self._known.setdefault(origin, {})[run.key] = run
