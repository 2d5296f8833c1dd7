"""``focalclip compare-towers``: image towers at equal parameters and equal training time."""

import argparse
import textwrap
from collections.abc import Sequence

from focalclip.base.errors import UserError, require
from focalclip.cli.command import command_parser, guarded, not_negative, output_folder, positive_int
from focalclip.config import RunConfig, load_config
from focalclip.studies.towers.plan import TOWERS

EXAMPLES = f"""\
examples:
  python scripts/compare_towers.py                                             all towers, 3 seeds of 600 CPU seconds
  python scripts/compare_towers.py --towers focalnet swin convnext --jobs 2    three towers, two runs at a time
  python scripts/compare_towers.py --cpu-seconds 20 --seeds 0 --output try     a first look
  python scripts/compare_towers.py --report-only                               the table of what is there

towers:
{textwrap.indent(textwrap.fill(" ".join(TOWERS), 110, break_on_hyphens=False), "  ")}

The same command continues where it was stopped: finished runs are skipped, killed ones resumed, failed ones tried
again. Written are table.md, results.json and plot.png, and a run directory for each tower and seed.
docs/compare-towers.md says what is equal and what is not.

exit status: 0 all is there; 1 a run failed or is not finished; 2 a mistake on the command line
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    arguments = _parser().parse_args(argv)
    return guarded(lambda: _run(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "compare-towers", "Train image towers of equal size for equal time, and compare them zero-shot.", EXAMPLES
    )
    parser.add_argument("--towers", nargs="+", metavar="NAME", default=list(TOWERS), help="which (default: all)")
    parser.add_argument(
        "--seeds", nargs="+", type=not_negative, metavar="N", default=[0, 1, 2], help="(default: 0 1 2)"
    )
    parser.add_argument(
        "--cpu-seconds", type=float, default=600.0, metavar="S",
        help="training time of each run, in CPU seconds of one thread; on a GPU seconds on the clock (default: 600)",
    )  # fmt: skip
    parser.add_argument("--jobs", type=positive_int, default=1, metavar="N", help="runs at a time (default: 1)")
    parser.add_argument(
        "--config", metavar="FILE_OR_NAME", help="everything but the image tower (default: focalclip_pico)"
    )
    parser.add_argument(
        "--output", default="runs/compare_towers", metavar="DIR", help="where to (default: runs/compare_towers)"
    )
    parser.add_argument("--report-only", action="store_true", help="train nothing")
    return parser


def _run(args: argparse.Namespace) -> int:
    from focalclip.studies.towers import report
    from focalclip.studies.towers.plan import make_plan, read_plan
    from focalclip.studies.towers.report import write_plot
    from focalclip.studies.towers.runs import Run, run_all, terminable

    require("comparing towers", "eval", "scipy", "matplotlib")
    towers, seeds, folder = (
        list(dict.fromkeys(args.towers)),
        list(dict.fromkeys(args.seeds)),
        output_folder(args.output),
    )
    _check(towers, args.cpu_seconds)
    # seed by seed, so that a comparison that was stopped has something of every tower
    runs = [Run(tower, seed, folder) for seed in seeds for tower in towers]
    if args.report_only:
        plan = read_plan(folder)
        if plan is None:
            raise UserError(f"--report-only: there is no comparison in {folder}; name its folder with --output")
    else:
        base = _base(args.config, args.jobs)
        with terminable():
            plan = make_plan(base, args.cpu_seconds, towers, folder)
            run_all([run for run in runs if run.tower in plan.costs], plan, args.jobs)
    rows = report.collect(plan, runs)
    print("\n" + report.markdown(plan, rows, seeds))
    written = report.write(plan, rows, seeds, folder)
    if write_plot(plan, rows, folder / "plot.png"):
        written.append(folder / "plot.png")
    print(f"written: {', '.join(map(str, written))}")
    return 1 if any(row.remarks for row in rows) else 0


def _check(towers: Sequence[str], seconds: float) -> None:
    for tower in towers:
        if tower not in TOWERS:
            raise UserError(f"--towers {tower}: not one of {', '.join(TOWERS)}")
    if not 0 < seconds < float("inf"):
        raise UserError(f"--cpu-seconds {seconds:g}: must be a positive number")


def _base(path: str | None, jobs: int) -> RunConfig:
    """The base configuration; its corpus and benchmark are prepared once, before the runs need them."""
    import torch

    from focalclip.cli.pretrain import DEFAULT_CONFIG, check_benchmark, training_shards
    from focalclip.studies.towers.plan import check_base

    if jobs > 1 and torch.cuda.is_available():
        raise UserError(f"--jobs {jobs}: runs on one GPU would slow each other down; use --jobs 1")
    source = path or DEFAULT_CONFIG
    base = load_config(source)
    check_base(base, source)
    require("training", "train")
    training_shards(base)
    check_benchmark(base)
    return base
