"""Command lines: the console script ``focalclip`` and the table of its commands, each of which has a file here.

``scripts/NAME.py`` and ``eval/NAME.py`` of a checkout run the same commands.
"""

import importlib
import sys
from collections.abc import Sequence

from focalclip.base import __version__
from focalclip.base.strict import nearest

# By name: folder of the script in a checkout, and what it does. The code is ``focalclip.cli.NAME:main``.
COMMANDS = {
    "pretrain": ("scripts", "train an image tower and a text tower on image-text pairs"),
    "zeroshot": ("eval", "measure a model zero-shot on a benchmark"),
    "probe": ("eval", "few-shot and full linear probes and k-NN on frozen features"),
    "retrieval": ("eval", "image-text retrieval both ways"),
    "report": ("eval", "pages, tables or a submission from a result; or compare two results"),
    "make-shards": ("scripts", "write training shards"),
    "export": ("scripts", "write a trained model for open_clip, timm, transformers or ONNX"),
    "extract": ("scripts", "pooled features of a folder of pictures"),
    "explain": ("scripts", "gate maps, modulator maps and similarities to captions, as pictures"),
    "compare-towers": ("scripts", "train image towers of equal size for equal time and compare them"),
    "bench": ("scripts", "measure speed against other libraries"),
    "check-reference": ("scripts", "compare a result with published numbers"),
}

_OTHER_NAMES = {
    "train": "pretrain",
    "finetune": "pretrain",
    "eval": "zeroshot",
    "evaluate": "zeroshot",
    "test": "zeroshot",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``focalclip COMMAND ...`` and return its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    launcher = [word for word in words[:1] if word.startswith("--local_rank=")]  # by `deepspeed --no_python focalclip`
    name, *rest = words[len(launcher) :] or ["--help"]
    if name in ("--help", "-h", "help"):
        print(_help())
        return 0
    if name in ("--version", "version"):
        print(f"focalclip {__version__}")
        return 0
    if name not in COMMANDS:
        hint = (
            f"; did you mean {_OTHER_NAMES[name]}?" if name in _OTHER_NAMES else nearest(name, [*COMMANDS, "--version"])
        )
        print(f"error: {name} is not a command of focalclip{hint}", file=sys.stderr)
        return 2
    return importlib.import_module(f"focalclip.cli.{name.replace('-', '_')}").main(rest)


def _help() -> str:
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:{width}}{summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: focalclip COMMAND [ARGUMENT ...]    (focalclip COMMAND --help has its arguments and examples)",
            "       focalclip --version",
            "",
            "commands:",
            *lines,
        ]
    )
