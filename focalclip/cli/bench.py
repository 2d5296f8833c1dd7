"""``focalclip bench``: speed and exactness against the peers, side by side in one run."""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
  python scripts/bench.py loader --output loader.json                      one loader process against open_clip's
  python scripts/bench.py shards --output shards.json                      make-shards against img2dataset and datasets
  python scripts/bench.py remote --output remote.json                      shards behind URLs against webdataset
  python scripts/bench.py lit --output lit.json                            a step with the image tower locked
  python scripts/bench.py loader --images 32 --rounds 1                    a first look

eval makes task folders with the true class names and prompts and a model of random weights, then runs eval/zeroshot.py
and clip_benchmark 1.6.2 on them in turn, as commands, in float32 on the CPU. clip_benchmark gets an environment of its
own, made with uv and kept in the cache. Nothing of ours is cached. Close other programs: both sides want every core.

parity writes an open_clip model of random weights, six task folders and a retrieval set from seeds, runs both commands
on them in float32 on the CPU, and compares all numbers to 1e-6. tests/studies/test_clip_benchmark_parity.py holds ours
to the numbers that --output writes, on every machine.

loader makes JPEGs like photographs of 500 x 375, 1024 x 768 and 2048 x 1536 pixels (96 kB, 365 kB, 1.36 MB), and reads
them from shards: read, decode, crop to 224 px, tokenise, batch. open_clip 3.3's own pipeline does the same with its own
chain, and a third side nothing but decoding and resizing. Processor time is what other programs disturb least.

shards writes 2,000 photographs of 1024 x 768 pixels as shards, their bytes unchanged and resized to 256: make-shards,
img2dataset (in an environment made with uv and kept in the cache; it reads file:// URLs), and datasets (imagefolder,
map, Parquet). It counts the processor time of whole commands.

remote serves 64 shards from this machine, every answer 30 ms late, and reads them once: ours, from an empty cache, and
webdataset, which pipes them through curl. Then a tenth of all requests fail (500, reset, half the bytes), and the
samples that either side loses are counted.

lit takes training steps of the engine on noise, with model.image.lock and without: time, and the memory of weights,
gradients, moments and activations.

Each side runs in a process of its own, in turns; a ratio is that of one round, and the median of the rounds is given
with their spread.

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
    _add(commands, "loader", "one process of the training loader against open_clip's", {"images": (256, "per size")})
    _add(commands, "shards", "make-shards against img2dataset and datasets", {"images": (2000, "photographs")})
    sizes = {"shards": (64, "of either size"), "samples": (100, "per shard")}
    _add(commands, "remote", "shards behind URLs against webdataset's reader", sizes)
    sizes = {"batch": (16, "pairs per step"), "steps": (3, "per round")}
    lit = _add(commands, "lit", "a step with the image tower locked against the whole step", sizes)
    lit.add_argument(
        "--tower", default="focalnet_tiny_lrf", metavar="NAME", help="image tower (default: focalnet_tiny_lrf)"
    )
    lit.add_argument("--side", type=positive_int, default=224, metavar="N", help="of the images (default: 224)")
    parity = commands.add_parser("parity", help="are our numbers those of clip_benchmark?")
    parity.add_argument("--output", metavar="FILE", help="write its numbers, with versions and hashes, as JSON")
    parity.set_defaults(run=_run_parity)
    return parser


def _add(commands: Any, name: str, summary: str, sizes: dict[str, tuple[int, str]]) -> argparse.ArgumentParser:
    """A benchmark on synthetic data that runs in a folder of its own; its sizes become arguments."""
    parser = commands.add_parser(name, help=summary)
    for size, (value, meaning) in ({**sizes, "rounds": (3, "runs of each side")}).items():
        parser.add_argument(
            f"--{size}", type=positive_int, default=value, metavar="N", help=f"{meaning} (default: {value})"
        )
    parser.add_argument("--output", metavar="FILE", help="write the result as JSON")
    parser.set_defaults(run=_run_on_synthetic_data)
    return parser


def _run_on_synthetic_data(args: argparse.Namespace) -> int:
    from focalclip.studies.bench import data

    if args.output:
        check_output(Path(args.output))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        measure = {
            "loader": lambda: data.loader(args.images, args.rounds, folder),
            "shards": lambda: data.shards(args.images, args.rounds, folder),
            "remote": lambda: data.remote(args.shards, args.samples, args.rounds, folder),
            "lit": lambda: data.lit(args.tower, args.side, args.batch, args.steps, args.rounds),
        }
        result = measure[args.what]()
    print(f"{result.what}: {result.facts['what_is_measured']}\npeer: {result.facts['peer_name']}\n")
    print(_speed_table(result))
    for case, share in result.facts.get("locked_over_unlocked", {}).items():
        print(f"\n{case}: locked takes {share:.2f} of unlocked")
    for case, lost in result.facts.get("samples_lost", {}).items():
        counts = ", ".join(f"{side} {max(runs['lost']):,}" for side, runs in lost.items())
        print(f"\nsamples lost of {result.facts['samples']:,}, {case}: {counts}")
    if args.output:
        print(f"\nwritten to {result.write(Path(args.output))}")
    return 0


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
