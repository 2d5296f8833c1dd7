"""Extract features: see ``python scripts/extract.py --help``."""

from focalclip.cli.extract import main

if __name__ == "__main__":
    raise SystemExit(main())
