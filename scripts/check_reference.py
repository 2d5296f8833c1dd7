"""Check a result against published numbers: see ``python scripts/check_reference.py --help``."""

from focalclip.cli.check_reference import main

if __name__ == "__main__":
    raise SystemExit(main())
