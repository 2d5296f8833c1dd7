"""``focalclip-zeroshot``: measure a model zero-shot on a benchmark."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from focalclip.cli.args import check_output, command_parser, guarded, positive_int, usable_device
from focalclip.cli.report import run_comparison, write_reports

EXAMPLES = """\
examples:
  python eval/zeroshot.py --benchmark demo                          the newest run on the demo tasks
  python eval/zeroshot.py --benchmark elevater --data-root DATA     ELEVATER from DATA/wds_vtab-dtd, DATA/wds_cars ...
  python eval/zeroshot.py --benchmark elevater --tasks dtd gtsrb    two tasks, downloaded from the hub if need be
  python eval/zeroshot.py --benchmark my_tasks/ --model open_clip:ViT-B-32-quickgelu/openai
  python eval/zeroshot.py --benchmark my_tasks.yaml --output result.json --report result.html table.tex
  python eval/zeroshot.py --compare runs/a runs/b                   paired on the same images: difference, interval, p
  python eval/zeroshot.py --benchmark elevater --report elevater.zip          for ELEVATER's server

A benchmark is elevater (20 data sets and ImageNet-1K beside them), demo, a folder whose subfolders are tasks in the wds
layout, or a YAML file of tasks. Where --data-root is given nothing is downloaded; tasks that are not there are listed
with what to do. A run directory keeps the result in its eval/ folder, with a page to read (.html) and the answers to
the single images (.predictions/), from which eval/report.py writes any report later.

To fetch one data set of ELEVATER into DATA:
  hf download clip-benchmark/wds_vtab-dtd --repo-type dataset --exclude 'train/*' --local-dir DATA/wds_vtab-dtd

exit status: 0 something was evaluated; 1 nothing could be; 2 a mistake on the command line
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    arguments = _parser().parse_args(argv)
    return guarded(lambda: _run(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "zeroshot", "Zero-shot classification with intervals, chance levels and provenance.", EXAMPLES
    )
    parser.add_argument("--benchmark", default="demo", help="elevater, demo, FOLDER or FILE.yaml (default: demo)")
    parser.add_argument(
        "--model",
        help="run directory, exported folder, open_clip:NAME/TAG, transformers:NAME (default: newest in runs/)",
    )
    parser.add_argument("--data-root", metavar="DIR", help="folder that holds one folder per task")
    parser.add_argument("--tasks", nargs="+", metavar="ID", help="only these tasks")
    parser.add_argument(
        "--batch-size", type=positive_int, default=256, metavar="N", help="images per step (default: 256)"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: cuda where there is one)")
    parser.add_argument("--output", metavar="FILE", help="write the result as JSON")
    parser.add_argument(
        "--report", nargs="+", metavar="FILE", help="write a page, table or submission: .html .csv .md .tex .zip"
    )
    parser.add_argument("--keep-all", action="store_true", help="keep the scores of all classes (a .zip needs them)")
    parser.add_argument("--compare", nargs=2, metavar=("A", "B"), help="compare two results or runs, evaluate nothing")
    return parser


def _run(args: argparse.Namespace) -> int:
    if args.compare:
        a, b = args.compare
        return run_comparison(a, b, args.output)
    import focalclip
    from focalclip.evaluation.report.write import check_format
    from focalclip.evaluation.tasks import load_benchmark
    from focalclip.evaluation.zeroshot import evaluate
    from focalclip.models.sources.loading import newest_run

    device = usable_device(args.device)
    if args.output:
        check_output(Path(args.output))
    reports = [check_format(file) for file in args.report or []]
    for path in reports:
        check_output(path, "--report")
    keep_all = args.keep_all or any(path.suffix == ".zip" for path in reports)
    source = args.model or str(newest_run())
    benchmark = load_benchmark(args.benchmark, args.data_root)
    benchmark.select(args.tasks)  # a misspelt task is known before the weights are read
    model = focalclip.load(source)
    result = evaluate(
        model, benchmark, batch_size=args.batch_size, device=device, tasks=args.tasks, keep_all=keep_all
    ).with_source(source)
    print("\n" + result.table())
    outputs = [Path(args.output)] if args.output else []
    if result.tasks and (Path(source) / "config.yaml").is_file():
        # a choice of tasks gets a name of its own, so that it never overwrites the full result
        outputs.append(Path(source) / "eval" / ("-".join([benchmark.name, *(args.tasks or [])]) + ".json"))
        reports.append(outputs[-1].with_suffix(".html"))
    for path in outputs:
        print(f"\nwritten to {result.write(path)}")
    if not result.tasks:
        print("error: nothing could be evaluated; see above what is missing", file=sys.stderr)
        return 1
    write_reports(result, reports)
    return 0
