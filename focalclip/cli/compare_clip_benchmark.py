"""``scripts/compare_clip_benchmark.py``: our numbers against CLIP_benchmark's, both run as commands."""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from focalclip.base.errors import UserError
from focalclip.base.files import write_json
from focalclip.base.terminal import aligned
from focalclip.cli.command import check_output, command_parser, guarded

if TYPE_CHECKING:
    from focalclip.studies.bench.parity import Difference

EXAMPLES = """\
examples:
  python scripts/compare_clip_benchmark.py                                               compare and print
  python scripts/compare_clip_benchmark.py --output tests/data/clip_benchmark_numbers.json   and keep their numbers

Makes an environment for clip_benchmark 1.6.2 with uv (kept in the cache), writes an open_clip model of random weights
and seven wds folders from seeds, runs both commands on them in float32 on the CPU, and compares all numbers to 1e-6.
The file that --output writes is what tests/test_clip_benchmark_parity.py holds ours to on every machine.

exit status: 0 all numbers agree; 1 some do not; 2 one of the two could not be run
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    arguments = _parser().parse_args(argv)
    return guarded(lambda: _run(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("compare-clip-benchmark", "Our zero-shot numbers against clip_benchmark's.", EXAMPLES)
    parser.add_argument("--output", metavar="FILE", help="write its numbers, with versions and hashes, as JSON")
    return parser


def _run(args: argparse.Namespace) -> int:
    from focalclip.studies.bench import peers as clip_benchmark
    from focalclip.studies.bench.parity import PAIRS_NAME, TASKS, differences, write_case
    from focalclip.studies.bench.peers import run_retrieval, run_zeroshot

    if args.output:
        check_output(Path(args.output))
    python = clip_benchmark.install()
    with tempfile.TemporaryDirectory() as folder:
        case = Path(folder)
        digests, margins = write_case(case), _margins(case)
        model, tasks, retrieval = case / "model", case / "tasks", case / "retrieval"
        theirs = clip_benchmark.run(python, model, tasks, list(TASKS)).metrics
        found = clip_benchmark.run(python, model, retrieval, [PAIRS_NAME], "zeroshot_retrieval").metrics
        pairs = differences(theirs, run_zeroshot(model, tasks).result)
        pairs += differences(found, run_retrieval(model, retrieval / PAIRS_NAME).result)
    print(_table(pairs))
    closest = min(margins, key=margins.__getitem__)
    print(f"\nclosest decision: {margins[closest]:.1e} of cosine from a tie, in {closest}")
    unequal = [pair for pair in pairs if not pair.is_equal]
    print(f"{len(pairs) - len(unequal)} of {len(pairs)} numbers agree to 1e-6")
    if args.output and not unequal:
        _write(Path(args.output), clip_benchmark.installed_versions(python), digests, margins, theirs | found)
    return 1 if unequal else 0


def _margins(case: Path) -> dict[str, float]:
    """Margin of every task.

    Raises:
        UserError: if one is so small that its numbers could be others on another machine.
    """
    import focalclip
    from focalclip.evaluation.features.model import evaluating
    from focalclip.studies.bench.parity import MIN_MARGIN, PAIRS, PAIRS_NAME, TASKS, pairs_margin, task_margin

    model = focalclip.load(f"open_clip:local-dir:{case / 'model'}")
    with evaluating(model):
        margins = {name: task_margin(model, case / "tasks" / name) for name in TASKS}
        margins |= {PAIRS_NAME: pairs_margin(model, PAIRS)}
    for name, found in margins.items():
        if found < MIN_MARGIN:
            raise UserError(
                f"{name}: two scores are only {found:.1e} apart; choose another seed in bench/parity/case.py"
            )
    return margins


def _table(pairs: Sequence["Difference"]) -> str:
    rows = [("task", "metric", "clip_benchmark", "ours", "difference")]
    for pair in pairs:
        ours, apart = ("missing", "") if pair.ours is None else (f"{pair.ours:.9f}", f"{pair.ours - pair.theirs:+.1e}")
        rows.append((pair.task, pair.metric, f"{pair.theirs:.9f}", ours, apart))
    return "\n".join(aligned(rows, left=(0, 1)))


def _write(
    path: Path,
    versions: dict[str, str],
    digests: dict[str, str],
    margins: dict[str, float],
    theirs: dict[str, dict[str, float]],
) -> None:
    """Keep their numbers, with what they were made of."""
    from focalclip.studies.bench.parity import MODEL_SEED, PAIRS, PAIRS_NAME, TASKS

    seeds = {name: task.seed for name, task in TASKS.items()} | {PAIRS_NAME: PAIRS.seed}
    tasks: dict[str, Any] = {
        name: {
            "seed": seeds[name],
            "sha256": digests[name],
            "margin": float(f"{margins[name]:.2e}"),
            # JSON has no not-a-number, which they give for the top 5 of fewer than five classes
            "metrics": {metric: value for metric, value in metrics.items() if value == value},
        }
        for name, metrics in theirs.items()
    }
    content = {
        "made_by": f"python scripts/compare_clip_benchmark.py --output tests/data/{path.name}",
        "versions": versions,
        "model": {"seed": MODEL_SEED, "sha256": digests["model"]},
        "tasks": tasks,
    }
    write_json(path, content)
    print(f"written to {path}")
