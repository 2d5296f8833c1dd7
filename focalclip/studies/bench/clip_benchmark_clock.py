"""Run by CLIP_benchmark's interpreter: its unchanged command line, with timers on its text side and its image side.

python clip_benchmark_clock.py SECONDS.json eval --model ...
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SIDES = ("zero_shot_classifier", "run_classification")


def clocked(function: Callable[..., Any], name: str, seconds: dict[str, float]) -> Callable[..., Any]:
    """The same function, which adds the seconds of each call to ``seconds[name]``."""

    def timed(*args: Any, **options: Any) -> Any:
        start = time.perf_counter()
        result = function(*args, **options)
        seconds[name] += time.perf_counter() - start
        return result

    return timed


if __name__ == "__main__":
    from clip_benchmark import cli  # pyrefly: ignore[missing-import]
    from clip_benchmark.metrics import zeroshot_classification  # pyrefly: ignore[missing-import]

    output = Path(sys.argv.pop(1))
    spent = dict.fromkeys(SIDES, 0.0)
    for side in SIDES:
        setattr(zeroshot_classification, side, clocked(getattr(zeroshot_classification, side), side, spent))
    cli.main()
    output.write_text(json.dumps(spent))
