"""``focalclip check-reference``: does a result agree with what others published for the same weights?"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from focalclip.base.errors import UserError
from focalclip.base.terminal import aligned
from focalclip.cli.command import command_parser, guarded

if TYPE_CHECKING:
    from focalclip.reports.published import NumberCheck, PublishedModel

EXAMPLES = """\
examples:
  python scripts/check_reference.py result.json                                 OpenAI's ViT-B/32
  python scripts/check_reference.py result.json --reference openai-vit-b-16
  python scripts/check_reference.py result.json --tasks dtd gtsrb               only these tasks must be there

The result is what eval/zeroshot.py --output writes; docs/elevater.md has the commands that make it. Numbers of the
result's protocol are checked. A weak number (recalled from a paper, or never reproduced) is shown and never fails.

exit status: 0 every number that was asked for passes; 1 one fails, is missing or not comparable; 2 a mistake on the
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
    from focalclip.reports.published import check, published

    known = published().models
    if args.reference not in known:
        raise UserError(f"--reference {args.reference}: not one of {', '.join(known)}")
    model = known[args.reference]
    result = _read(Path(args.result))
    checks = check(model, result)
    names = [each.number.task for each in checks]
    if unknown := [name for name in args.tasks or () if name not in names]:
        raise UserError(f"--tasks: nothing was published for {unknown[0]!r} here; known: {', '.join(names)}")
    chosen = [each for each in checks if not args.tasks or each.number.task in args.tasks]
    print(f"{model.title}, protocol {result['protocol']}, model {result.get('model', {}).get('source', '?')}\n")
    print(_table(chosen, model))
    used = {each.number.source or model.source: published().source_of(model, each.number) for each in chosen}
    print("\n" + "\n".join(f"{key}: {source.title}, {source.url}" for key, source in used.items()))
    verdicts = [each.verdict for each in chosen]
    counts = [f"{verdicts.count(verdict)} {verdict}" for verdict in dict.fromkeys(verdicts)]
    print(f"\n{', '.join(counts)}")
    return 0 if set(verdicts) <= {"pass", "weak"} and "pass" in verdicts else 1


def _table(checks: Sequence["NumberCheck"], model: "PublishedModel") -> str:
    rows = [("task", "metric", "source", "published", "tolerance", "ours", "difference", "verdict")]
    for number, verdict, value, remark in checks:
        rows.append(
            (
                number.task,
                number.metric,
                number.source or model.source,
                f"{number.value:.2f}",
                f"{number.tolerance:.2f}" if number.tolerance else "",
                "" if value is None else f"{value:.2f}",
                "" if value is None else f"{value - number.value:+.2f}",
                f"{verdict}: {remark}" if remark else verdict,
            )
        )
    return "\n".join(aligned(rows, left=(0, 1, 2, 7)))


def _read(path: Path) -> dict[str, Any]:
    """A result of the harness.

    Raises:
        UserError: if it is not a result.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); give what eval/zeroshot.py --output wrote"
        ) from None
    except (ValueError, RecursionError):
        raise UserError(f"{path}: is not JSON; give what eval/zeroshot.py --output wrote") from None
    if not isinstance(result, dict) or not {"protocol", "tasks", "score"} <= result.keys():
        raise UserError(f"{path}: is not a zero-shot result (no protocol, tasks, score); give one of eval/zeroshot.py")
    tasks = result["tasks"]
    if not isinstance(tasks, dict) or not all(
        isinstance(task, dict) and {"metric", "value", "n"} <= task.keys() for task in tasks.values()
    ):
        raise UserError(f"{path}: its tasks have no metric, value and n; give one of eval/zeroshot.py")
    return result
