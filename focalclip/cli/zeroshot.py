"""``focalclip zeroshot``: measure a model zero-shot on a benchmark."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from focalclip import names
from focalclip.base.errors import UserError, require
from focalclip.base.files import user_path
from focalclip.cli.command import (
    add_cache_options,
    check_output,
    command_parser,
    feature_folder,
    guarded,
    positive_int,
    result_outputs,
    usable_device,
    without_launchers,
)
from focalclip.cli.report import run_comparison, write_reports

if TYPE_CHECKING:
    from focalclip.evaluation.result import Result
    from focalclip.evaluation.task import Benchmark

EXAMPLES = """\
examples:
  python eval/zeroshot.py --benchmark demo                          the newest run on the demo tasks
  python eval/zeroshot.py --benchmark elevater --data-root DATA     ELEVATER from DATA/wds_vtab-dtd, DATA/wds_cars ...
  python eval/zeroshot.py --benchmark elevater --tasks dtd gtsrb    two tasks, downloaded from the hub if need be
  python eval/zeroshot.py --benchmark my_tasks/ --model open_clip:ViT-B-32-quickgelu/openai
  python eval/zeroshot.py --benchmark my_tasks/ --model open_clip:ViT-B-32/ViT-B-32.pt      a checkpoint by its path
  python eval/zeroshot.py --benchmark my_tasks/ --model transformers:google/siglip-base-patch16-224
  python eval/zeroshot.py --benchmark my_tasks/ --model my_package.models:load              what your function returns
  python eval/zeroshot.py --benchmark my_tasks.yaml --output result.json --report result.html table.tex
  python eval/zeroshot.py --benchmark elevater --data-root DATA --report elevater.zip       for ELEVATER's server
  python eval/zeroshot.py --compare runs/a runs/b                   paired on the same images: difference, interval, p
  torchrun --nproc-per-node 8 eval/zeroshot.py --benchmark elevater --data-root DATA        the same numbers, sooner
  deepspeed eval/zeroshot.py --benchmark elevater --data-root DATA                          likewise

A benchmark is elevater (20 data sets and ImageNet-1K beside them), demo, a folder whose subfolders are tasks in the wds
layout, or a YAML file of tasks. Where --data-root is given nothing is downloaded; tasks that are not there are listed
with what to do. A run directory keeps the result in its eval/ folder, with a page to read (.html) and the answers to
the single images (.predictions/), from which eval/report.py writes any report later.

Your own model is any object with encode_image, encode_text, tokenizer and preprocess (docs/zero-shot.md).

The same command again reuses finished tasks from the file that it writes, as long as weights, precision, prompts,
task and data are the same; a killed one continues where it stopped (FILE.part). Of a run that can be read and not
written the result goes to --output alone. Image features and class vectors are
kept by content in ~/.cache/focalclip/features, so that new prompts cost seconds: a hash of weights, preprocessing,
precision and of the images' bytes names them, never a file's name. The folder may be deleted at any time; beyond 20 GB
the models not used for longest are dropped from it.

To fetch one data set of ELEVATER into DATA:
  hf download clip-benchmark/wds_vtab-dtd --repo-type dataset --exclude 'train/*' --local-dir DATA/wds_vtab-dtd

exit status: 0 something was evaluated; 1 nothing could be; 2 a mistake on the command line
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    words = sys.argv[1:] if argv is None else argv
    return guarded(lambda: run(words))


def run(argv: Sequence[str]) -> int:
    """The same for a command that is guarded itself: its ranks must learn of an error that one of them raises."""
    return _run(_parser().parse_args(without_launchers(argv)))


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "zeroshot", "Zero-shot classification with intervals, chance levels and provenance.", EXAMPLES
    )
    parser.add_argument(
        "--benchmark", default="demo", help="elevater, datacomp, vtab_plus, demo, FOLDER or FILE.yaml (default: demo)"
    )
    parser.add_argument(
        "--protocol", metavar="NAME",
        help="elevater, clip_benchmark, datacomp or unicl (default: the benchmark's own; wds for a folder or a file)",
    )  # fmt: skip
    parser.add_argument(
        "--model",
        help=f"{names.sources('model')} (default: newest in runs/)",
    )
    parser.add_argument("--data-root", metavar="DIR", help="folder that holds one folder per task")
    parser.add_argument("--tasks", nargs="+", metavar="ID", help="only these tasks")
    parser.add_argument(
        "--class-prompts", metavar="FILE",
        help="JSON of whole prompts by class name, {\"tench\": [\"A tench is ...\", ...], ...}, instead of templates",
    )  # fmt: skip
    parser.add_argument(
        "--max-images",
        type=positive_int,
        metavar="N",
        help="N evenly spaced images of each task, for a quick look; no result for reports and model cards",
    )
    parser.add_argument(
        "--batch-size", type=positive_int, default=256, metavar="N", help="images per step (default: 256)"
    )
    parser.add_argument(
        "--precision", choices=("fp32", "bf16", "fp16"), help="of the towers (default: as the weights are)"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: cuda where there is one)")
    parser.add_argument("--output", metavar="FILE", help="write the result as JSON")
    parser.add_argument(
        "--report",
        nargs="+",
        default=[],
        metavar="FILE",
        help="write page, table or submission: .html .csv .md .tex .zip",
    )
    parser.add_argument("--keep-all", action="store_true", help="keep the scores of all classes (a .zip needs them)")
    parser.add_argument("--compare", nargs=2, metavar=("A", "B"), help="compare two results or runs, evaluate nothing")
    parser.add_argument("--fresh", action="store_true", help="re-evaluate finished tasks")
    add_cache_options(parser)
    return parser


def _run(args: argparse.Namespace) -> int:
    if args.compare:
        a, b = args.compare
        return run_comparison(a, b, args.output)
    from focalclip.base.ranks import joined

    with joined():
        return _evaluate(args)


def _evaluate(args: argparse.Namespace) -> int:
    import focalclip
    from focalclip.base.ranks import is_main
    from focalclip.evaluation.features.model import to_precision
    from focalclip.evaluation.task import load_benchmark
    from focalclip.evaluation.zeroshot import ZeroShotOptions, evaluate
    from focalclip.interop.load import newest_run
    from focalclip.reports import check_format

    require("evaluation", "eval", "scipy")
    device = usable_device(args.device)
    if args.output:
        check_output(Path(args.output))
    if args.report and args.max_images:
        raise UserError("--report goes with all images: a part of them is no result; leave out --max-images")
    reports = [check_format(file) for file in args.report]
    for path in reports:
        check_output(path, "--report")
    class_prompts = args.class_prompts and _read_class_prompts(Path(args.class_prompts))
    source = args.model or str(newest_run())
    benchmark = load_benchmark(args.benchmark, args.data_root, args.protocol)
    benchmark.select(args.tasks)  # a misspelt task is known before the weights are read
    outputs = result_outputs(args.output, source, _name(args, benchmark))
    own = [] if args.max_images else [path for path in outputs if path.parent == user_path(source) / "eval"]
    reports += [check_format(path.with_suffix(".html")) for path in own]
    model = focalclip.load(source)
    if args.precision:
        model = to_precision(model, args.precision)
    options = ZeroShotOptions(
        tasks=args.tasks, max_images=args.max_images, class_prompts=class_prompts, batch_size=args.batch_size,
        device=device, source=source, cache_dir=feature_folder(args), outputs=outputs, fresh=args.fresh,
        keep_all=args.keep_all or any(path.suffix == ".zip" for path in reports),
    )  # fmt: skip
    result = evaluate(model, benchmark, options=options)
    if is_main():
        _print_result(result, outputs, reports)
    return 0 if result.tasks else 1


def _print_result(result: "Result", outputs: Sequence[Path], reports: Sequence[Path]) -> None:
    from focalclip.reports.tables import result_table

    print("\n" + result_table(result))
    if result.tasks:
        for path in outputs:
            print(f"\nwritten to {path}")
        write_reports(result, reports)
    else:
        print("error: nothing could be evaluated; see above what is missing", file=sys.stderr)


def _name(args: argparse.Namespace, benchmark: "Benchmark") -> str:
    """In the run: what is not the whole benchmark in the weights' own precision never overwrites the result that is."""
    name = [benchmark.name, *([benchmark.protocol] if benchmark.has_other_protocol else []), *(args.tasks or [])]
    name += [args.precision] if args.precision not in (None, "fp32") else []
    name += [f"{args.max_images}-images"] if args.max_images else []
    name += [Path(args.class_prompts).stem] if args.class_prompts else []
    return "-".join(name)


def _read_class_prompts(path: Path) -> dict[str, list[str]]:
    """Whole prompts by class name.

    Raises:
        UserError: if the file is not JSON of that form.
    """
    try:
        prompts = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"--class-prompts {path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"--class-prompts {path}: not JSON ({error})") from None
    well_formed = isinstance(prompts, dict) and all(
        isinstance(own, list) and own and all(isinstance(prompt, str) for prompt in own) for own in prompts.values()
    )
    if not well_formed:
        raise UserError(f'--class-prompts {path}: expected {{"class name": ["a prompt", ...], ...}}')
    return prompts
