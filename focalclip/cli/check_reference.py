"""``focalclip-check-reference``: does a result agree with what others published for the same weights?"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from focalclip.base.errors import UserError
from focalclip.base.terminal import aligned
from focalclip.cli.command import command_parser, guarded

if TYPE_CHECKING:
    from focalclip.reports.published import Comparison

EXAMPLES = """\
examples:
  python scripts/check_reference.py result.json                                 OpenAI's ViT-B/32
  python scripts/check_reference.py result.json --reference openai-vit-b-16
  python scripts/check_reference.py result.json --tasks dtd gtsrb               only these tasks must be there

The result is what eval/zeroshot.py --output writes; docs/elevater.md has the commands that make it. Cells of the
result's protocol are checked. A weak cell (recalled from a paper, or never reproduced) is shown and never fails.

exit status: 0 every cell that was asked for passes; 1 one fails, is missing or not comparable; 2 a mistake on the
command line
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    arguments = _parser().parse_args(argv)
    return guarded(lambda: _run(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("check-reference", "Compare a zero-shot result with published numbers.", EXAMPLES)
    parser.add_argument("result", metavar="RESULT.json", help="a result of eval/zeroshot.py")
    parser.add_argument(
        "--reference", default="openai-vit-b-32", metavar="NAME", help="whose numbers (default: openai-vit-b-32)"
    )
    parser.add_argument("--tasks", nargs="+", metavar="ID", help="only these tasks (default: all that were published)")
    return parser


def _run(args: argparse.Namespace) -> int:
    from focalclip.reports.published import compare, published

    known = published().references
    if args.reference not in known:
        raise UserError(f"--reference {args.reference}: not one of {', '.join(known)}")
    reference = known[args.reference]
    result = _read(Path(args.result))
    comparisons = compare(reference, result)
    names = [comparison.cell.task for comparison in comparisons]
    if unknown := [name for name in args.tasks or () if name not in names]:
        raise UserError(f"--tasks: nothing was published for {unknown[0]!r} here; known: {', '.join(names)}")
    chosen = [c for c in comparisons if not args.tasks or c.cell.task in args.tasks]
    print(f"{reference.title}, protocol {result['protocol']}, model {result.get('model', {}).get('source', '?')}\n")
    print(_table(chosen, reference.source))
    used = dict.fromkeys(comparison.cell.source or reference.source for comparison in chosen)
    print("\n" + "\n".join(f"{key}: {published().sources[key]}" for key in used))
    verdicts = [comparison.verdict for comparison in chosen]
    counts = [f"{verdicts.count(verdict)} {verdict}" for verdict in dict.fromkeys(verdicts)]
    print(f"\n{', '.join(counts)}")
    return 0 if set(verdicts) <= {"pass", "weak"} and "pass" in verdicts else 1


def _table(comparisons: Sequence["Comparison"], source: str) -> str:
    rows = [("task", "metric", "source", "published", "tolerance", "ours", "difference", "verdict")]
    for cell, verdict, value, remark in comparisons:
        rows.append(
            (
                cell.task,
                cell.metric,
                cell.source or source,
                f"{cell.value:.2f}",
                f"{cell.tolerance:.2f}" if cell.tolerance else "",
                "" if value is None else f"{value:.2f}",
                "" if value is None else f"{value - cell.value:+.2f}",
                f"{verdict}: {remark}" if remark else verdict,
            )
        )
    return "\n".join(aligned(rows, left=(0, 1, 2, 7)))


def _read(path: Path) -> dict[str, Any]:
    """A result of the harness.

    Raises:
        UserError: if it is none.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); give what eval/zeroshot.py --output wrote"
        ) from None
    except ValueError:
        raise UserError(f"{path}: is not JSON; give what eval/zeroshot.py --output wrote") from None
    if not isinstance(result, dict) or not {"protocol", "tasks", "score"} <= result.keys():
        raise UserError(f"{path}: is not a zero-shot result (no protocol, tasks, score); give one of eval/zeroshot.py")
    tasks = result["tasks"]
    if not isinstance(tasks, dict) or not all(
        isinstance(task, dict) and {"metric", "value", "n"} <= task.keys() for task in tasks.values()
    ):
        raise UserError(f"{path}: its tasks have no metric, value and n; give one of eval/zeroshot.py")
    return result
