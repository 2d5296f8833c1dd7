"""Benchmarks against the peers, side by side in one run; their result as JSON: rows of our numbers and a peer's."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from focalclip.base.files import write_json
from focalclip.base.machine import machine


@dataclass(frozen=True)
class BenchRow:
    """One case, measured several times on both sides in turn."""

    case: str
    ours: Sequence[float]
    """One number per round."""
    peer: Sequence[float]
    unit: str = "s"
    """Less is better."""

    @property
    def ratios(self) -> list[float]:
        """How many times as fast we are, round by round."""
        return [peer / ours for ours, peer in zip(self.ours, self.peer, strict=True)]

    def to_json(self) -> dict[str, Any]:
        """Medians over the rounds, and each round."""
        return {
            "case": self.case,
            "ours": round(statistics.median(self.ours), 3),
            "peer": round(statistics.median(self.peer), 3),
            "ratio": round(statistics.median(self.ratios), 3),
            "ratio_min": round(min(self.ratios), 3),
            "ratio_max": round(max(self.ratios), 3),
            "unit": self.unit,
            "rounds": [[round(a, 3), round(b, 3)] for a, b in zip(self.ours, self.peer, strict=True)],
        }


@dataclass(frozen=True)
class BenchResult:
    """A benchmark's rows, and what they were measured on."""

    what: str
    rows: tuple[BenchRow, ...]
    facts: dict[str, Any]
    """Peer, model, sizes, versions ..."""

    def write(self, path: Path) -> Path:
        """Write the JSON, whole or not at all."""
        content = {"what": self.what, "rows": [row.to_json() for row in self.rows], **self.facts, "machine": machine()}
        return write_json(path, content)
