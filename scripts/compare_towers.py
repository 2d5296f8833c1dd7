"""Compare image towers: see ``python scripts/compare_towers.py --help``."""

from focalclip.cli.compare_towers import main

if __name__ == "__main__":
    raise SystemExit(main())
