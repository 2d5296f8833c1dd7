"""``focalclip explain``: gate maps, modulator maps and similarities to captions, as pictures."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from focalclip import names
from focalclip.base.errors import UserError
from focalclip.cli.command import command_parser, guarded, output_folder

EXAMPLES = """\
examples:
  python scripts/explain.py cat.jpg dog.jpg                         the newest run, its last block
  python scripts/explain.py --model runs/demo --stage 0 pictures/   first stage, last block; all pictures of a folder
  python scripts/explain.py --text "a dog" "a cat" -- dog.jpg       where the picture resembles each caption
  python scripts/explain.py dog.jpg --text "a dog" "a cat"          the same
  python scripts/explain.py --model timm:focalnet_base_lrf cat.jpg  published weights

What is drawn, for each picture: the gate of each focal level and of the global one (raw, one number per position), the
length of the modulator, and with --text the cosine of each position of the last map with the caption. Each map has its
own colour scale, whose range stands below it on the sheet. Written are sheet.png, kernels.png (the depthwise kernels of
the block, mean over channels) and one overlay for each picture and map.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    arguments = _parser().parse_intermixed_args(_with_captions_last(words))
    return guarded(lambda: _run(arguments))


def _with_captions_last(words: list[str]) -> list[str]:
    """``--text A B -- IMAGE --output DIR`` with the captions at the end.

    Argparse would take options behind ``--`` for pictures, and would refuse it as the last word.
    """
    if "--text" not in words:
        return words
    start = words.index("--text")
    end = next((i for i, word in enumerate(words) if i > start and word.startswith("--")), len(words))
    behind = words[end + 1 :] if words[end : end + 1] == ["--"] else words[end:]
    return [*words[:start], *_with_captions_last(behind), *words[start:end]]


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "explain", "Draw what a FocalNet looks at: gates, modulators, similarity to captions.", EXAMPLES
    )
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="picture files, or folders of them")
    parser.add_argument("--model", help=f"{names.sources('encoder')}; with a FocalNet in it (default: newest in runs/)")
    parser.add_argument("--stage", type=int, default=-1, help="from 0; negative: from the end (default: the last)")
    parser.add_argument("--block", type=int, default=-1, help="of the stage, likewise (default: the last)")
    parser.add_argument(
        "--text", nargs="+", action="extend", default=[], metavar="CAPTION",
        help="captions, up to the next option, to -- or to the end",
    )  # fmt: skip
    parser.add_argument("--output", default="explained", metavar="DIR", help="where to (default: explained)")
    return parser


def _run(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from focalclip.explanation import figures
    from focalclip.interop.load import newest_run

    if not args.images:
        hint = "; -- ends the captions: --text 'a dog' 'a cat' -- dog.jpg" if args.text else ""
        raise UserError(f"name picture files, or folders of them{hint}")
    pictures = figures.find_pictures(args.images)
    folder = output_folder(args.output)
    source = args.model or str(newest_run())
    model = _load(source)
    rows, result = [], None
    for i, path in enumerate(tqdm(pictures, unit="picture", disable=not sys.stderr.isatty())):
        result, row = figures.explain_picture(model, path, stage=args.stage, block=args.block, text=args.text)
        folder.mkdir(parents=True, exist_ok=True)
        figures.write_overlays(row, folder, f"{i:03d}-{path.stem}")
        rows.append(row)
    assert result is not None
    height, width = result.modulator.shape[1:]
    where = f"{source}: stage {result.stage}, block {result.block}"
    sheet = figures.write_sheet(rows, f"{where}, {height} x {width} positions", folder / "sheet.png")
    if result.kernels:
        figures.write_kernels(result, f"{where}, kernels", folder / "kernels.png")
    print(f"{where}; {len(rows)} pictures, {len(rows[0].maps)} maps each; see {sheet}")
    return 0


def _load(source: str) -> Any:
    """Both towers where there are two: captions need the second."""
    import focalclip

    library = names.SOURCES.get(names.split(source)[0])
    is_tower = library.model is None if library else Path(source).is_file()
    return focalclip.load_image_encoder(source) if is_tower else focalclip.load(source)
