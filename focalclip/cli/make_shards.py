"""``focalclip make-shards``: training shards out of any source that ``focalclip.data.sources`` knows."""

import argparse
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from focalclip.cli.command import command_parser, guarded, not_negative, output_folder, positive_int

if TYPE_CHECKING:
    from focalclip.data.reader import PictureSet
    from focalclip.data.rules import Rules
    from focalclip.data.write import Output, Written

EXAMPLES = """\
examples:
  python scripts/make_shards.py pairs.csv shards/pairs                                           a table with captions
  python scripts/make_shards.py pictures shards/pictures                                         a folder per class
  python scripts/make_shards.py pairs.csv shards/pairs --resize 256 --min-side 128               smaller copies
  python scripts/make_shards.py pairs.csv shards/pairs --duplicates 4 --min-words 3              filters
  python scripts/make_shards.py pairs.csv shards/pairs --part 3/16                               one job of 16
  python scripts/make_shards.py my_tasks/fashion-mnist shards/fashion-mnist                      all training images
  python scripts/make_shards.py my_tasks/fashion-mnist shards/fashion-5 --shots 5 --seed 1       5 images of each class

SOURCE is one of:
  task folder     the wds layout: classnames.txt, zeroshot_classification_templates.txt, train/0.tar ...
  class folders   CLASS NAME/*.jpg, or train/CLASS NAME/*.jpg; the folder's name is the caption
  table           .csv or .tsv; its first line names the columns: path (or filepath, image) and caption (or title, text)
  Flickr's        captions.txt, or Flickr8k.token.txt
  JSON lines      .jsonl; objects with a path and a caption, or captions, by the names of the table's columns
  caption file    .json; Karpathy's dataset_coco.json ..., or COCO's captions_train2017.json
  Parquet         a file or a folder of them, with pictures as bytes or as paths
  datasets        a folder of save_to_disk, or datasets:USER/NAME
  pictures        a folder with a.jpg and a.txt or a.json beside it, at any depth; img2dataset's files, too
  shards          a folder of tars or a pattern

Captions are the source's own. A source of classes gets all its prompts with the class name instead, and images of one
class get one class number, so that the contrastive loss takes them as positives for each other.
configs/finetune_pico.yaml trains on such shards. Images are copied byte for byte unless --resize makes them smaller.
A command that was killed is repeated: it goes on behind the shards that are finished. Beside the shards lie their
indexes, left-out.txt (what is not in them) and index.html (what is).
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
    parser.add_argument("--image-column", metavar="NAME", help="column with pictures or paths (default: by its name)")
    parser.add_argument("--caption-column", metavar="NAME", action="append", default=[], help="may be repeated")
    parser.add_argument("--label-column", metavar="NAME", help="column with classes, by name or number")
    parser.add_argument(
        "--template", metavar="TEXT", action="append", default=[], help="prompt with {c} for class names; may repeat"
    )
    parser.add_argument("--shots", type=positive_int, metavar="K", help="images of each class (default: all)")
    parser.add_argument(
        "--seed", type=not_negative, default=0, metavar="N", help="of the draw of the shots (default: 0)"
    )
    _add_rules(parser.add_argument_group("what is left out or changed (default: nothing that can be trained on)"))
    _add_output(parser.add_argument_group("how it is written (the shards' bytes depend on --samples-per-shard alone)"))
    return parser


def _add_rules(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--min-side", type=not_negative, default=0, metavar="PIXELS", help="of the shorter side")
    group.add_argument("--max-aspect", type=float, metavar="RATIO", help="of the longer side to the shorter one")
    for what, name in (("words", "words"), ("chars", "characters")):
        group.add_argument(f"--min-{what}", type=not_negative, default=0, metavar="N", help=f"{name} of a caption")
        group.add_argument(f"--max-{what}", type=positive_int, metavar="N", help=f"{name} of a caption")
    group.add_argument(
        "--duplicates", type=not_negative, metavar="BITS",
        help="leave out an image whose perceptual hash (64 bits) differs in at most so many from an earlier one's; "
        "0: the same picture, 4: also another size or quality",
    )  # fmt: skip
    group.add_argument("--resize", type=positive_int, metavar="PIXELS", help="shorter side of images that are larger")
    group.add_argument("--quality", type=positive_int, metavar="Q", help="JPEG quality of --resize (default: 95)")
    group.add_argument("--verify", action="store_true", help="decode every image, also those copied unchanged")


def _add_output(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--samples-per-shard", type=positive_int, default=1024, metavar="N", help="default: 1024")
    group.add_argument("--jobs", type=positive_int, metavar="N", help="processes (default: one per usable core)")
    group.add_argument(
        "--part", type=_part, default=(1, 1), metavar="I/N",
        help="write part I of N alone, for job arrays; all parts name one OUT",
    )  # fmt: skip
    group.add_argument(
        "--engine", choices=("local", "ray"), default="local",
        help="ray: on the cluster of RAY_ADDRESS, whose machines see SOURCE and OUT under the same paths",
    )  # fmt: skip
    group.add_argument(
        "--max-faults", type=not_negative, default=1000, metavar="N",
        help="stop after so many damaged images, which are left out, counted and named (default: 1000)",
    )  # fmt: skip


def _part(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with I from 1 to N, such as 3/16")
    return int(match[1]), int(match[2])


def _run(args: argparse.Namespace) -> int:
    from focalclip.base.errors import UserError
    from focalclip.base.files import user_path
    from focalclip.data.reader import Request
    from focalclip.data.sources import open_source
    from focalclip.data.write import write_pictures

    rules, output = _rules(args), _output(args)
    if "://" in args.output:
        raise UserError(
            f"OUT {args.output}: shards are written to a folder of this machine; name one, and copy it then"
        )
    folder = output_folder(args.output, "OUT")
    root = user_path(args.image_root) if args.image_root else None
    if wrong := [template for template in args.template if "{c}" not in template]:
        raise UserError(f"--template {wrong[0]!r}: has no {{c}}, the place of the class name; add it")
    columns = tuple(args.caption_column)
    request = Request(
        args.split, root, None, "SOURCE", args.image_column, columns, args.label_column, tuple(args.template)
    )
    pictures = open_source(args.source, request)
    if args.template:
        if pictures.class_names is None or pictures.captions is not None:
            raise UserError(f"--template: {args.source} has no classes that need prompts; leave it away")
        pictures = replace(pictures, templates=request.templates)
    chosen = None if args.shots is None else _shots(pictures, args.shots, args.seed)
    try:
        written = write_pictures(pictures, folder, chosen, rules, output)
        page = _write_page(folder) if written.samples else ""
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written ({error.strerror}); choose another, or make room and repeat the command"
        ) from None
    part = f"part {output.part[0]} of {output.part[1]}: " if output.part[1] > 1 else ""
    print(f"{part}{_summary(pictures, written)}, in {folder}")
    for line in written.remarks:
        print(f"left out {line}")
    if page:
        print(page)
    return 0


def _rules(args: argparse.Namespace) -> "Rules":
    from focalclip.base.errors import UserError
    from focalclip.data.rules import Rules

    if args.quality is not None and args.resize is None:
        raise UserError(
            "--quality is that of images made smaller, and the others keep their bytes; give --resize as well"
        )
    names = [
        "min_side",
        "max_aspect",
        "min_words",
        "max_words",
        "min_chars",
        "max_chars",
        "duplicates",
        "resize",
        "verify",
    ]
    quality = {} if args.quality is None else {"quality": args.quality}
    return Rules(**{name: getattr(args, name) for name in names}, **quality)


def _output(args: argparse.Namespace) -> "Output":
    from focalclip.base.errors import require
    from focalclip.data.write import Output

    if args.engine == "ray":
        require("--engine ray", "ray")
    return Output(args.samples_per_shard, args.jobs, args.part, args.engine, args.max_faults)


def _shots(pictures: "PictureSet", shots: int, seed: int) -> list[int]:
    from focalclip.base.errors import UserError
    from focalclip.evaluation.probes.train import choose_shots

    if pictures.labels is None:
        raise UserError(f"--shots: {pictures.place} has no classes to take images from; leave --shots away")
    return [int(i) for i in choose_shots(pictures.labels, shots, seed)]


def _write_page(folder: Path) -> str:
    """Write the overview; returns a line that says where it is, or why it is not."""
    from focalclip.base.errors import UserError, require

    try:
        require("the page index.html", "shards", "jinja2")
    except UserError as error:
        return str(error)
    from focalclip.reports.shards import write_overview

    return f"overview: {write_overview(folder)}"


def _summary(pictures: "PictureSet", written: "Written") -> str:
    resumed = f" ({written.resumed:,} of {written.shards:,} shards were there)" if written.resumed else ""
    count = f"{written.samples:,} images"
    if pictures.captions is not None:
        return f"{count} with their own captions{resumed}"
    prompts = len(pictures.templates or ("{c}",))
    return f"{count} of {len(pictures.class_names or ()):,} classes, {prompts} prompts each{resumed}"
