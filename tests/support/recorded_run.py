"""Which samples each step of a run has trained on, where ``RECORDED`` names a folder for it."""

import json
import os
import time
from pathlib import Path

from focalclip.training import step


def record() -> None:
    """Write down positions and samples of each micro-batch of this process, in a file of its own."""
    train_on, file = step.micro_step, Path(os.environ["RECORDED"]) / f"{time.time_ns()}.jsonl"

    def recorded(engine, batch, loss, config):
        result = train_on(engine, batch, loss, config)
        with file.open("a") as lines:
            lines.write(json.dumps([batch.positions.tolist(), batch.ids.tolist()]) + "\n")
        return result

    step.micro_step = recorded


def read(folder: Path) -> dict[int, int]:
    """The sample at each position; a run that goes back to its last checkpoint writes over what it takes again."""
    found: dict[int, int] = {}
    for file in sorted(folder.iterdir(), key=lambda path: int(path.stem)):
        for positions, ids in map(json.loads, file.read_text().splitlines()):
            found |= dict(zip(positions, ids, strict=True))
    return dict(sorted(found.items()))
