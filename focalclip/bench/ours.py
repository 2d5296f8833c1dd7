"""Our commands as processes of their own, for comparisons with a peer's."""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from focalclip.errors import UserError


class OurRun(NamedTuple):
    """What one run gave."""

    result: dict[str, Any]
    """The JSON that it wrote."""
    seconds: float
    """Of the whole process."""


def run_zeroshot(model: Path, tasks: Path) -> OurRun:
    """Measure an open_clip folder on a folder of wds tasks on the CPU, under CLIP_benchmark's protocol, nothing cached.

    Raises:
        UserError: if it fails, with the last line that it printed.
    """
    return _run("zeroshot", model, "--benchmark", str(tasks), "--protocol", "clip_benchmark", "--no-cache")


def run_retrieval(model: Path, folder: Path) -> OurRun:
    """Measure an open_clip folder on a wds retrieval folder on the CPU.

    Raises:
        UserError: if it fails, with the last line that it printed.
    """
    return _run("retrieval", model, "--data", str(folder))


def _run(command: str, model: Path, *words: str) -> OurRun:
    code = f"from focalclip.cli.{command} import main; raise SystemExit(main())"
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "result.json"
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", code, *words, "--model", f"open_clip:local-dir:{model}", "--device", "cpu",
             "--output", str(output)],
            capture_output=True, text=True, env=os.environ, check=False,
        )  # fmt: skip
        seconds = time.perf_counter() - start
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            raise UserError(f"eval/{command}.py failed: {lines[-1] if lines else done.stdout}")
        return OurRun(json.loads(output.read_text()), seconds)
