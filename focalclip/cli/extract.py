"""``focalclip extract``: features of a folder of pictures, in one file."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from focalclip import names
from focalclip.cli.command import check_output, command_parser, guarded, positive_int, usable_device

EXAMPLES = """\
examples:
  python scripts/extract.py pictures/ features.npz                          the newest run
  python scripts/extract.py --model timm:focalnet_base_lrf pictures/ features.parquet
  python scripts/extract.py --model focalnet_large_lrf_384_fl4.pth --normalize-modulator pictures/ features.npz

Written are the names of the pictures (relative to the folder, subfolders included), their pooled features, and the
model with the SHA-256 of its weights. To read them:
  file = numpy.load("features.npz"); file["names"], file["features"]
  table = pandas.read_parquet("features.parquet")
Pictures that cannot be read are left out, counted and named on stderr and in the file.

exit status: 0 features were written, 2 a mistake on the command line or in the data
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    arguments = _parser().parse_args(argv)
    return guarded(lambda: _run(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "extract", "Pooled features of every picture in a folder, from a frozen image tower.", EXAMPLES
    )
    parser.add_argument("folder", metavar="FOLDER", help="folder of pictures")
    parser.add_argument("output", metavar="OUT", help="OUT.npz or OUT.parquet; replaced if it exists")
    parser.add_argument(
        "--model",
        help=f"{names.sources('encoder')} (default: newest in runs/)",
    )
    parser.add_argument(
        "--batch-size", type=positive_int, default=64, metavar="N", help="pictures per step (default: 64)"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: cuda where there is one)")
    parser.add_argument(
        "--dtype", choices=("float32", "float16"), default="float32", help="of the features (default: float32)"
    )
    for flag in ("--post-norm", "--normalize-modulator"):
        parser.add_argument(
            flag, action=argparse.BooleanOptionalAction, help="for FocalNet files, which the weights do not determine"
        )
    return parser


def _run(args: argparse.Namespace) -> int:
    import focalclip
    from focalclip.evaluation.features.extract import check_format, extract, find_pictures
    from focalclip.interop.load import newest_run

    device, output = usable_device(args.device), Path(args.output)
    check_format(output)
    check_output(output, "OUT")
    find_pictures(Path(args.folder))  # a wrong folder is known before the weights are read
    source = args.model or str(newest_run())
    given = {"post_norm": args.post_norm, "normalize_modulator": args.normalize_modulator}
    flags = {name: value for name, value in given.items() if value is not None}
    encoder = focalclip.load_image_encoder(source, device, **flags)
    done = extract(encoder, args.folder, output, source=source, batch_size=args.batch_size, dtype=args.dtype)
    print(f"{done.num_pictures:,} pictures, {done.num_features:,} features each, written to {output}")
    print(f"model {source}, weights sha256 {done.model_sha256}")
    if done.num_others:
        print(f"skipped: {done.num_others:,} other files in {args.folder}, without the suffix of a picture")
    if done.broken:
        print(f"left out, {len(done.broken):,} pictures that cannot be read:", file=sys.stderr)
        print("\n".join(f"  {name}" for name in done.broken), file=sys.stderr)
    return 0
