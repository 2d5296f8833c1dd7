"""Our zero-shot command as a process of its own, for comparisons with a peer's."""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from focalclip.errors import UserError

_COMMAND = "from focalclip.cli.zeroshot import main; raise SystemExit(main())"


class OurRun(NamedTuple):
    """What one run gave."""

    result: dict[str, Any]
    """The JSON that it wrote."""
    seconds: float
    """Of the whole process."""


def run(model: Path, tasks: Path, *options: str) -> OurRun:
    """Measure an open_clip folder on a folder of wds tasks on the CPU, under CLIP_benchmark's protocol, nothing cached.

    Raises:
        UserError: if it fails, with the last line that it printed.
    """
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "result.json"
        words = ["--benchmark", str(tasks), "--model", f"open_clip:local-dir:{model}", "--protocol", "clip_benchmark"]
        words += ["--device", "cpu", "--no-cache", "--output", str(output), *options]
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", _COMMAND, *words], capture_output=True, text=True, env=os.environ, check=False
        )
        seconds = time.perf_counter() - start
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            raise UserError(f"eval/zeroshot.py failed: {lines[-1] if lines else done.stdout}")
        return OurRun(json.loads(output.read_text()), seconds)
