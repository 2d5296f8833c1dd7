"""Measure a model zero-shot: ``python eval/zeroshot.py --help``."""

from focalclip.cli.zeroshot import main

if __name__ == "__main__":
    raise SystemExit(main())
