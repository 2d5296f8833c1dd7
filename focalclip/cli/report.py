"""``focalclip report``: turn a saved result into a page, a table or a submission, or compare two of them."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from focalclip.base.errors import UserError
from focalclip.base.files import user_path
from focalclip.cli.command import check_output, command_parser, guarded

EXAMPLES = """\
examples:
  python eval/report.py runs/demo                            runs/demo/eval/NAME.html, one page of each result in it,
                                                             and runs/demo/curves.svg: losses and recall over steps
  python eval/report.py result.json page.html table.tex      a page and a LaTeX table
  python eval/report.py runs/demo/eval/demo.json demo.csv demo.md
  python eval/report.py runs/demo submission.zip             for ELEVATER's server; evaluate with --keep-all first
  python eval/report.py --compare runs/a runs/b              paired on the same images: difference, interval, p
  python eval/report.py --compare a.json b.json --output difference.json

The file's ending names the format: .html (self-contained), .csv, .md, .tex, .json or .zip. Neither the model nor the
data is needed: everything comes from the result and from the answers beside it in NAME.predictions/.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    arguments = _parser().parse_args(argv)
    return guarded(lambda: _run(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "report", "A page, tables or a submission from a result; or two results compared.", EXAMPLES
    )
    parser.add_argument("result", nargs="?", help="result as JSON, or a run directory")
    parser.add_argument("files", nargs="*", metavar="FILE", help="what to write; default: a page beside the result")
    parser.add_argument("--compare", nargs=2, metavar=("A", "B"), help="compare two results, or run directories")
    parser.add_argument("--output", metavar="FILE", help="write the comparison as JSON")
    return parser


def _run(args: argparse.Namespace) -> int:
    if args.compare:
        if args.result:
            raise UserError(f"--compare takes two results and nothing else; remove {args.result}")
        a, b = args.compare
        return run_comparison(a, b, args.output)
    if not args.result:
        raise UserError("name a result's JSON or a run directory, or give --compare A B; --help has examples")
    if args.output:
        raise UserError("--output goes with --compare; for a report name the files behind the result")
    from focalclip.evaluation.result import Result, result_files

    run_dir = user_path(args.result)
    has_curves = not args.files and (run_dir / "metrics.jsonl").is_file()
    if has_curves:
        from focalclip.reports.charts import write_curves

        check_output(run_dir / "curves.svg", "the curves")
        print(f"written to {write_curves(run_dir)}")
    try:
        results = list(result_files(args.result).values())
    except UserError:
        if has_curves:  # of a run that is not evaluated yet
            return 0
        raise
    if args.files and len(results) > 1:
        raise UserError(f"{args.result} holds {len(results)} results; name one: {', '.join(map(str, results))}")
    for path in results:
        write_reports(Result.read(path), args.files or [path.with_suffix(".html")])
    return 0


def write_reports(result: Any, files: Sequence[str | Path]) -> None:
    """Write each file in the format of its ending, and print its name; for submissions also their warnings."""
    from focalclip.reports import check_format, write_report

    paths = [check_format(file) for file in files]
    for path in paths:
        check_output(path, "the report")
    for path in paths:
        print(f"written to {write_report(result, path)}")
        if path.suffix == ".zip":
            from focalclip.reports.submission import notes

            print("".join(f"  {note}\n" for note in notes(result)), end="")


def run_comparison(a: str, b: str, output: str | None) -> int:
    """Print a comparison, and write it as JSON where a file is named."""
    from focalclip.evaluation.compare import compare
    from focalclip.reports.tables import comparison_table

    if output:
        check_output(Path(output))
    comparison = compare(a, b)
    print(comparison_table(comparison))
    if output:
        print(f"\nwritten to {comparison.write(output)}")
    return 0 if comparison.tasks else 1
