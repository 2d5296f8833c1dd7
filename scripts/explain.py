"""Explain: see ``python scripts/explain.py --help``."""

from focalclip.cli.explain import main

if __name__ == "__main__":
    raise SystemExit(main())
