"""``focalclip export``: a trained model for open_clip, timm, transformers or ONNX."""

import argparse
from collections.abc import Sequence

from focalclip.base.errors import UserError
from focalclip.cli.command import command_parser, guarded, output_folder

FORMATS = ("open_clip", "timm", "transformers", "onnx")

EXAMPLES = """\
examples:
  python scripts/export.py runs/demo out --format open_clip         both towers, for open_clip's local-dir:out
  python scripts/export.py runs/demo out --format timm              the image tower, for timm's local-dir:out
  python scripts/export.py runs/demo out --format transformers      both towers and, beside them, FocalNetModel
  python scripts/export.py runs/demo out --format onnx              both towers as graphs for any batch size
  python scripts/export.py runs/demo out --format timm --license mit --push-to-hub me/my-model

The folder gets a model card, README.md, with the code that loads it, the training data and the run's results. Where a
library knows the tower only after `import focalclip`, the command says so.

exit status: 0 written; 2 a mistake, or a format that cannot hold the model
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    arguments = _parser().parse_args(argv)
    return guarded(lambda: _run(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("export", "Write a trained model for another library, with a model card.", EXAMPLES)
    parser.add_argument("run", metavar="RUN", help="run directory or exported folder")
    parser.add_argument("out", metavar="OUT", help="folder to write, not there yet or empty")
    parser.add_argument("--format", required=True, choices=FORMATS, help="the library that it is for")
    parser.add_argument(
        "--license", default="unknown", metavar="ID", help="licence of the weights, for the card: mit, cc-by-sa-4.0 ..."
    )
    parser.add_argument("--push-to-hub", metavar="ORG/NAME", help="upload the folder to the Hugging Face hub as well")
    parser.add_argument("--private", action="store_true", help="make the repository on the hub a private one")
    return parser


def _run(args: argparse.Namespace) -> int:
    from focalclip.interop.export import check_can_push, export, push_to_hub

    if args.push_to_hub:
        check_can_push(args.push_to_hub)  # before the work, not after it
    output_folder(args.out, "OUT")
    try:
        notes = export(args.run, args.out, args.format, license_id=args.license)
    except OSError as error:
        raise UserError(f"OUT {args.out}: cannot be written ({error.strerror}); choose another, or make room") from None
    print(f"written to {args.out}; its README.md shows how to load it")
    for note in notes:
        print(f"note: {note}")
    if args.push_to_hub:
        print(f"uploaded to {push_to_hub(args.out, args.push_to_hub, private=args.private)}")
    return 0
