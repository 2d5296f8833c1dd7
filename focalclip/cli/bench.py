"""``focalclip bench``: speed and exactness against the peers, side by side in one run."""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from focalclip.base.terminal import aligned
from focalclip.cli.command import check_output, command_parser, guarded, positive_int

if TYPE_CHECKING:
    from focalclip.studies.bench import BenchResult
    from focalclip.studies.bench.parity import NumberPair

EXAMPLES = """\
examples:
  python scripts/bench.py eval --output eval.json                          ELEVATER's 20 tasks against clip_benchmark
  python scripts/bench.py eval --tasks mnist dtd --rounds 1 --images 16    a first look
  python scripts/bench.py parity                                           our numbers equal clip_benchmark's

eval makes task folders with the true class names and prompts and a model of random weights, then runs eval/zeroshot.py
and clip_benchmark 1.6.2 on them in turn, as commands, in float32 on the CPU. clip_benchmark gets an environment of its
own, made with uv and kept in the cache. Nothing of ours is cached. Close other programs: both sides want every core.

parity writes an open_clip model of random weights, six task folders and a retrieval set from seeds, runs both commands
on them in float32 on the CPU, and compares all numbers to 1e-6. tests/studies/test_clip_benchmark_parity.py holds ours
to the numbers that --output writes, on every machine.

exit status: 0 measured, and in parity all numbers agree; 1 some do not; 2 a mistake on the command line, or one of the
sides could not be run
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    arguments = _parser().parse_args(argv)
    return guarded(lambda: arguments.run(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("bench", "Speed and exactness against the peers, side by side in one run.", EXAMPLES)
    commands = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    evaluation = commands.add_parser("eval", help="zero-shot classification against clip_benchmark")
    evaluation.add_argument("--tasks", nargs="+", metavar="ID", help="only these of ELEVATER's (default: its 20)")
    evaluation.add_argument("--images", type=positive_int, default=64, metavar="N", help="per task (default: 64)")
    evaluation.add_argument(
        "--rounds", type=positive_int, default=3, metavar="N", help="runs of each side (default: 3)"
    )
    evaluation.add_argument(
        "--model", default="ViT-S-32-alt", metavar="NAME", help="architecture of open_clip (default: ViT-S-32-alt)"
    )
    evaluation.add_argument("--output", metavar="FILE", help="write the result as JSON")
    evaluation.set_defaults(run=_run_eval)
    parity = commands.add_parser("parity", help="are our numbers those of clip_benchmark?")
    parity.add_argument("--output", metavar="FILE", help="write its numbers, with versions and hashes, as JSON")
    parity.set_defaults(run=_run_parity)
    return parser


def _run_eval(args: argparse.Namespace) -> int:
    from focalclip.studies.bench.evaluation import timed

    if args.output:
        check_output(Path(args.output))
    with tempfile.TemporaryDirectory() as folder:
        result = timed(args.model, args.images, args.rounds, args.tasks, Path(folder))
    facts = result.facts
    print(f"eval: {facts['model']}; {facts['tasks']} tasks, {facts['classes']:,} classes; peer {facts['peer_name']}\n")
    print(_speed_table(result))
    print(f"\nlargest difference between any two numbers of the two: {facts['largest_difference']:.1e}")
    if args.output:
        print(f"\nwritten to {result.write(Path(args.output))}")
    return 0


def _speed_table(result: "BenchResult") -> str:
    rows = [("case", "ours", "peer", "times as fast", "min - max")]
    for row in (row.to_json() for row in result.rows):
        ours, peer = (f"{row[side]:,.2f} {row['unit']}" for side in ("ours", "peer"))
        spread = f"{row['ratio_min']:.2f} - {row['ratio_max']:.2f}"
        rows.append((row["case"], ours, peer, f"{row['ratio']:.2f}", spread))
    return "\n".join(aligned(rows))


def _run_parity(args: argparse.Namespace) -> int:
    from focalclip.studies.bench.parity import compare

    if args.output:
        check_output(Path(args.output))
    with tempfile.TemporaryDirectory() as folder:
        parity = compare(Path(folder))
    print(_parity_table(parity.pairs))
    closest = min(parity.margins, key=parity.margins.__getitem__)
    print(f"\nclosest decision: {parity.margins[closest]:.1e} of cosine from a tie, in {closest}")
    print(f"{len(parity.pairs) - len(parity.unequal)} of {len(parity.pairs)} numbers agree to 1e-6")
    if args.output and not parity.unequal:
        print(f"written to {parity.write(Path(args.output))}")
    return 1 if parity.unequal else 0


def _parity_table(pairs: "Sequence[NumberPair]") -> str:
    rows = [("task", "metric", "clip_benchmark", "ours", "difference")]
    for pair in pairs:
        ours, apart = ("missing", "") if pair.ours is None else (f"{pair.ours:.9f}", f"{pair.ours - pair.theirs:+.1e}")
        rows.append((pair.task, pair.metric, f"{pair.theirs:.9f}", ours, apart))
    return "\n".join(aligned(rows, left=(0, 1)))
