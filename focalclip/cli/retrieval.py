"""``focalclip retrieval``: recall@1, 5 and 10 of images and texts, both ways."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from focalclip import names
from focalclip.base.errors import UserError
from focalclip.base.files import is_plain_name
from focalclip.cli.command import (
    add_cache_options,
    check_output,
    command_parser,
    feature_folder,
    guarded,
    positive_int,
    result_outputs,
    usable_device,
    without_launchers,
)

if TYPE_CHECKING:
    from focalclip.evaluation.retrieval.result import RetrievalResult

EXAMPLES = """\
examples:
  python eval/retrieval.py --data DATA/wds_flickr30k                    the newest run on a wds folder's test split
  python eval/retrieval.py --data 'shards/{000..010}.tar' --limit 5000  on the first images of training shards
  python eval/retrieval.py --data dataset_coco.json --image-root coco/ --captions-per-image 5
  python eval/retrieval.py --data pairs.csv --model open_clip:ViT-B-32-quickgelu/openai --output result.json
  torchrun --nproc-per-node 8 eval/retrieval.py --data DATA/wds_mscoco_captions      the same numbers, sooner

--data is one of:
  wds folder         the layout of CLIP_benchmark: dataset_type.txt says retrieval; test/0.tar ... hold KEY.jpg and
                     KEY.txt with one caption per line
  training shards    a folder of tars or a pattern; KEY.jpg with KEY.txt (one caption) and, or, KEY.json (captions)
  table              .csv or .tsv; its first line names the columns: path (or filepath, image) and caption (or title,
                     text); an image with several captions has several lines
  Flickr's           captions.txt, or Flickr8k.token.txt
  JSON lines         .jsonl; objects with a path and a caption, or captions, by the names of the table's columns
  caption file       .json; Karpathy's dataset_coco.json, dataset_flickr30k.json ..., or COCO's captions_val2017.json

An image's recall@K is 1 if any of its captions is among the first K; CLIP_benchmark calls that direction
text_retrieval, and text -> image image_retrieval. A run directory keeps the result in its eval/ folder.

To fetch a set: hf download clip-benchmark/wds_flickr8k --repo-type dataset --local-dir DATA/wds_flickr8k

exit status: 0 measured; 2 a mistake on the command line or in the data
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    arguments = _parser().parse_args(without_launchers(sys.argv[1:] if argv is None else argv))
    return guarded(lambda: _run(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("retrieval", "Image-text retrieval both ways, with intervals and chance levels.", EXAMPLES)
    parser.add_argument("--data", required=True, metavar="SOURCE", help="images with captions, see below")
    parser.add_argument(
        "--model",
        help=f"{names.sources('model')} (default: newest in runs/)",
    )
    parser.add_argument("--split", default="test", help="of a wds folder or of Karpathy's file (default: test)")
    parser.add_argument("--image-root", metavar="DIR", help="what a table's image paths are relative to (default: it)")
    parser.add_argument("--limit", type=positive_int, metavar="N", help="only the first N images")
    parser.add_argument(
        "--captions-per-image", type=positive_int, metavar="N", help="only the first N captions of each image"
    )
    parser.add_argument(
        "--merge-captions",
        action="store_true",
        help="equal captions are one, and all of its images are right (default: only its own image, as elsewhere)",
    )
    parser.add_argument(
        "--batch-size", type=positive_int, default=256, metavar="N", help="images per step (default: 256)"
    )
    parser.add_argument(
        "--chunk", type=positive_int, default=2048, metavar="N",
        help="scores are taken N x N at a time, which bounds the memory and changes no number (default: 2048)",
    )  # fmt: skip
    parser.add_argument(
        "--precision", choices=("fp32", "bf16", "fp16"), help="of the towers (default: as the weights are)"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: cuda where there is one)")
    parser.add_argument("--name", help="of the set, in the result (default: from --data)")
    parser.add_argument("--output", metavar="FILE", help="write the result as JSON")
    add_cache_options(parser)
    parser.add_argument("--ranks", metavar="FILE.npz", help="write the rank of every image and caption")
    return parser


def _run(args: argparse.Namespace) -> int:
    from focalclip.base.ranks import joined

    with joined():
        return _evaluate(args)


def _evaluate(args: argparse.Namespace) -> int:
    from dataclasses import replace

    import focalclip
    from focalclip.base.errors import require
    from focalclip.base.ranks import in_turns, is_main
    from focalclip.evaluation.features.model import to_precision
    from focalclip.evaluation.retrieval.pairs import open_pairs
    from focalclip.evaluation.retrieval.run import evaluate
    from focalclip.interop.load import newest_run

    require("retrieval", "eval", "scipy")
    device = usable_device(args.device)
    for flag, name in (("--output", args.output), ("--ranks", args.ranks)):
        if name:
            check_output(Path(name), flag)
    if args.name and not is_plain_name(args.name):
        raise UserError(f"--name {args.name}: cannot be the name of a file; take / and .. out of it")
    if args.ranks and Path(args.ranks).suffix != ".npz":
        raise UserError(f"--ranks {args.ranks}: the ending must be .npz")
    source = args.model or str(newest_run())
    data = in_turns(  # which writes missing indexes of shards
        lambda: open_pairs(
            args.data, split=args.split, image_root=args.image_root, limit=args.limit,
            captions_per_image=args.captions_per_image,
        )
    )  # fmt: skip
    data = replace(data, name=args.name or _name(args, data.name))
    data = data.merged() if args.merge_captions else data
    outputs = result_outputs(args.output, source, f"retrieval-{data.name}")
    model = focalclip.load(source)
    if args.precision:
        model = to_precision(model, args.precision)
    result = evaluate(
        model, data, batch_size=args.batch_size, chunk=args.chunk, device=device, source=source,
        cache_dir=feature_folder(args),
    )  # fmt: skip
    if is_main():
        _report(result, args, outputs)
    return 0


def _report(result: "RetrievalResult", args: argparse.Namespace, outputs: Sequence[Path]) -> None:
    """Print the result and write its files."""
    from focalclip.evaluation.retrieval.result import retrieval_table

    print("\n" + retrieval_table(result))
    for path in outputs:
        print(f"\nwritten to {result.write(path)}")
    if args.ranks:
        print(f"\nwritten to {result.write_ranks(args.ranks)}")


def _name(args: argparse.Namespace, name: str) -> str:
    """A part of a set, or another way to count, gets its own name, so that it never overwrites the full result."""
    parts = [
        name,
        args.split if args.split != "test" else "",
        f"first{args.limit}" if args.limit else "",
        f"{args.captions_per_image}captions" if args.captions_per_image else "",
        "merged" if args.merge_captions else "",
        args.precision if args.precision not in (None, "fp32") else "",
    ]
    return "-".join(part for part in parts if part)
