"""Pretrain: see ``python scripts/pretrain.py --help``."""

from focalclip.cli.pretrain import main

if __name__ == "__main__":
    raise SystemExit(main())
