"""``focalclip make-shards``: training shards out of any source that ``focalclip.data.sources`` knows."""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from focalclip.cli.command import command_parser, guarded, not_negative, output_folder, positive_int

if TYPE_CHECKING:
    from focalclip.data.reader import PictureSet

EXAMPLES = """\
examples:
  python scripts/make_shards.py pairs.csv shards/pairs                                           a table with captions
  python scripts/make_shards.py pictures shards/pictures                                         a folder per class
  python scripts/make_shards.py my_tasks/fashion-mnist shards/fashion-mnist                      all training images
  python scripts/make_shards.py my_tasks/fashion-mnist shards/fashion-5 --shots 5 --seed 1       5 images of each class

SOURCE is one of:
  task folder     the wds layout: classnames.txt, zeroshot_classification_templates.txt, train/0.tar ...
  class folders   CLASS NAME/*.jpg, or train/CLASS NAME/*.jpg; the folder's name is the caption
  table           .csv or .tsv; its first line names the columns: path (or filepath, image) and caption (or title, text)
  Flickr's        captions.txt, or Flickr8k.token.txt
  JSON lines      .jsonl; objects with a path and a caption, or captions, by the names of the table's columns
  caption file    .json; Karpathy's dataset_coco.json ..., or COCO's captions_train2017.json
  shards          a folder of tars or a pattern

Captions are the source's own. A source of classes gets all its prompts with the class name instead, and images of one
class get one class number, so that the contrastive loss takes them as positives for each other.
configs/finetune_pico.yaml trains on such shards. Images are copied byte for byte.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    arguments = _parser().parse_args(argv)
    return guarded(lambda: _run(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("make-shards", "Write a data source as training shards.", EXAMPLES)
    parser.add_argument("source", metavar="SOURCE", help="what to write, see below")
    parser.add_argument("output", metavar="OUT", help="folder for the shards")
    parser.add_argument("--split", help="which split (default: train, or everything where the source has no splits)")
    parser.add_argument("--image-root", metavar="DIR", help="what a table's image paths are relative to (default: it)")
    parser.add_argument("--shots", type=positive_int, metavar="K", help="images of each class (default: all)")
    parser.add_argument(
        "--seed", type=not_negative, default=0, metavar="N", help="of the draw of the shots (default: 0)"
    )
    return parser


def _run(args: argparse.Namespace) -> int:
    from focalclip.base.errors import UserError, require
    from focalclip.base.files import user_path
    from focalclip.data.reader import Request
    from focalclip.data.sources import open_source
    from focalclip.data.write import write_pictures

    require("writing shards", "train", "webdataset")
    folder = output_folder(args.output, "OUT")
    root = user_path(args.image_root) if args.image_root else None
    pictures = open_source(args.source, Request(args.split, root, field="SOURCE"))
    chosen = None if args.shots is None else _shots(pictures, args.shots, args.seed)
    try:
        count = write_pictures(pictures, folder, chosen)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); choose another, or make room") from None
    print(f"{_summary(pictures, count)}, in {folder}")
    if left_out := (len(pictures.entries) if chosen is None else len(chosen)) - count:
        print(f"{left_out:,} left out, which have neither caption nor label")
    for remark in pictures.remarks:
        print(remark)
    return 0


def _shots(pictures: "PictureSet", shots: int, seed: int) -> list[int]:
    from focalclip.base.errors import UserError
    from focalclip.evaluation.probes.train import choose_shots

    if pictures.labels is None:
        raise UserError(f"--shots: {pictures.place} has no classes to take images from; leave --shots away")
    return [int(i) for i in choose_shots(pictures.labels, shots, seed)]


def _summary(pictures: "PictureSet", count: int) -> str:
    if pictures.captions is not None:
        return f"{count:,} images with their own captions"
    prompts = len(pictures.templates or ("{c}",))
    return f"{count:,} images of {len(pictures.class_names or ()):,} classes, {prompts} prompts each"
