"""Compare our numbers with CLIP_benchmark's: ``python scripts/bench.py parity``, see its ``--help``."""

import sys

from focalclip.cli.bench import main

if __name__ == "__main__":
    raise SystemExit(main(["parity", *sys.argv[1:]]))
