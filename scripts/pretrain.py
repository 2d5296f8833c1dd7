"""Pretrain: see ``python scripts/pretrain.py --help``."""

from focalclip.cli.pretrain import entry

if __name__ == "__main__":
    entry()
