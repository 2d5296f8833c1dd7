"""Measure image-text retrieval: ``python eval/retrieval.py --help``."""

from focalclip.cli.retrieval import main

if __name__ == "__main__":
    raise SystemExit(main())
