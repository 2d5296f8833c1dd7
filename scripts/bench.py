"""Measure speed against the peers: see ``python scripts/bench.py --help``."""

from focalclip.cli.bench import main

if __name__ == "__main__":
    raise SystemExit(main())
