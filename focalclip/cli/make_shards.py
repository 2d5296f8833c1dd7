"""``focalclip-make-shards``: training shards out of a task folder."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from focalclip.cli.command import command_parser, guarded, output_folder, positive_int

EXAMPLES = """\
examples:
  python scripts/make_shards.py my_tasks/fashion-mnist shards/fashion-mnist                      all training images
  python scripts/make_shards.py my_tasks/fashion-mnist shards/fashion-5 --shots 5 --seed 1       5 images of each class

SOURCE is a task folder in the wds layout: classnames.txt, zeroshot_classification_templates.txt, train/0.tar ...
Captions are all its prompts with the class name; images of one class get one class number, so that the contrastive loss
takes them as positives for each other. configs/finetune_pico.yaml trains on such shards.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    arguments = _parser().parse_args(argv)
    return guarded(lambda: _run(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("make-shards", "Write the images of a task as training shards.", EXAMPLES)
    parser.add_argument("source", metavar="SOURCE", help="task folder")
    parser.add_argument("output", metavar="OUT", help="folder for the shards")
    parser.add_argument("--split", default="train", help="which split (default: train)")
    parser.add_argument("--shots", type=positive_int, metavar="K", help="images of each class (default: all)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the draw of the shots (default: 0)")
    return parser


def _run(args: argparse.Namespace) -> int:
    from focalclip.base.errors import UserError
    from focalclip.evaluation.data import read_task_folder
    from focalclip.evaluation.probes.draw import choose_shots, write_training_shards

    folder = output_folder(args.output)
    data = read_task_folder(Path(args.source), args.split)
    indices = range(len(data.labels)) if args.shots is None else choose_shots(data.labels, args.shots, args.seed)
    try:
        count = write_training_shards(data, [int(i) for i in indices], folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); choose another, or make room") from None
    print(f"{count:,} images of {len(data.class_names):,} classes, {len(data.templates)} prompts each, in {folder}")
    return 0
