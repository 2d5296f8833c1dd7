"""Export: see ``python scripts/export.py --help``."""

from focalclip.cli.export import main

if __name__ == "__main__":
    raise SystemExit(main())
