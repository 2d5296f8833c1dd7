"""``focalclip probe``: few-shot and full probes on a model's frozen features."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from focalclip import names
from focalclip.cli.command import (
    add_cache_options,
    check_output,
    command_parser,
    feature_folder,
    guarded,
    not_negative,
    positive_int,
    result_outputs,
    usable_device,
)
from focalclip.evaluation.probes.result import METHODS, ProbeSettings

EXAMPLES = f"""\
examples:
  python eval/probe.py                                              the newest run on the demo tasks
  python eval/probe.py --benchmark my_tasks/                        5, 20, 50 images per class and all of them
  python eval/probe.py --benchmark elevater --data-root DATA --shots 5 full --methods ridge
  python eval/probe.py --benchmark my_tasks/ --model open_clip:ViT-B-32-quickgelu/openai --output probes.json

methods:
{chr(10).join(f"  {name:9}  {text}" for name, text in METHODS.items())}

A task needs a train split beside its test split; of the demo tasks, which have none, every other test image of each
class trains and the rest tests (emoji-style has one image of each class and is left out). How strongly a probe is
regularised is chosen on a fifth of the training images of each class, drawn at random; then it is trained on all of
them and scored on the test images, once. Values of few shots are means over the seeds; their intervals are for both the
draw of the shots and the test images.

A run directory keeps the result and its picture in its eval/ folder; --output FILE.json writes both there (FILE.png).
Finished probes are kept beside it (.jsonl): the same command continues where it was stopped.

exit status: 0 something was evaluated; 1 nothing could be; 2 a mistake on the command line
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    arguments = _parser().parse_args(argv)
    return guarded(lambda: _run(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("probe", "Few-shot and full linear probes and k-NN on frozen image features.", EXAMPLES)
    parser.add_argument("--benchmark", default="demo", help="elevater, demo, FOLDER or FILE.yaml (default: demo)")
    parser.add_argument(
        "--model",
        help=f"{names.sources('model')} (default: newest in runs/)",
    )
    parser.add_argument("--protocol", metavar="NAME", help="as of eval/zeroshot.py (default: the benchmark's own)")
    parser.add_argument("--data-root", metavar="DIR", help="folder that holds one folder per task")
    parser.add_argument("--tasks", nargs="+", metavar="ID", help="only these tasks")
    parser.add_argument(
        "--shots", nargs="+", type=_shots, metavar="K", default=list(ProbeSettings.shots),
        help="training images per class, or full (default: 5 20 50 full)",
    )  # fmt: skip
    parser.add_argument(
        "--methods", nargs="+", choices=list(METHODS), metavar="M", default=list(METHODS),
        help="which probes (default: all four, see below)",
    )  # fmt: skip
    parser.add_argument(
        "--seeds", nargs="+", type=not_negative, metavar="N", default=list(ProbeSettings.seeds),
        help="draws of few shots (default: 0 1 2); full uses the first",
    )  # fmt: skip
    parser.add_argument(
        "--batch-size", type=positive_int, default=256, metavar="N", help="images per step (default: 256)"
    )
    parser.add_argument("--device", help="of the model: cpu, cuda, cuda:1 ... (default: cuda where there is one)")
    add_cache_options(parser)
    parser.add_argument("--output", metavar="FILE", help="write the result as JSON, and a picture beside it")
    return parser


def _shots(text: str) -> int | str:
    if text == "full":
        return text
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is neither full nor a number of images per class")
    return int(text)


def _run(args: argparse.Namespace) -> int:
    import focalclip
    from focalclip.base.errors import UserError, require
    from focalclip.evaluation.probes.run import probe
    from focalclip.evaluation.probes.table_and_plot import probe_table, write_plot
    from focalclip.evaluation.task import load_benchmark
    from focalclip.interop.load import newest_run

    require("probing", "eval", "scipy", "matplotlib")
    device = usable_device(args.device)
    if args.output:
        check_output(Path(args.output))
        if Path(args.output).suffix in (".jsonl", ".png"):
            raise UserError(f"--output {args.output}: is the name of what is written beside it; name a .json file")
    source = args.model or str(newest_run())
    benchmark = load_benchmark(args.benchmark, args.data_root, args.protocol)
    benchmark.select(args.tasks)  # a misspelt task is known before the weights are read
    name = ["probe", benchmark.name, *([benchmark.protocol] if benchmark.has_other_protocol else [])]
    outputs = result_outputs(args.output, source, "-".join([*name, *(args.tasks or [])]))
    settings = ProbeSettings(
        shots=sorted(dict.fromkeys(args.shots), key=lambda k: (k == "full", k)),
        methods=list(dict.fromkeys(args.methods)),
        seeds=list(dict.fromkeys(args.seeds)),
        tasks=args.tasks,
        batch_size=args.batch_size,
    )
    result = probe(
        focalclip.load(source),
        benchmark,
        settings,
        device=device,
        cache_dir=feature_folder(args),
        journal=outputs[0].with_suffix(".jsonl") if outputs else None,
    ).with_source(source)
    print("\n" + probe_table(result))
    if not result.tasks:
        print("error: nothing could be evaluated; see above what is missing", file=sys.stderr)
        return 1
    for path in outputs:
        print(f"\nwritten to {result.write(path)} and {write_plot(result, path.with_suffix('.png'))}")
    return 0
