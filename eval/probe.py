"""Probe a model's frozen features: ``python eval/probe.py --help``."""

from focalclip.cli.probe import main

if __name__ == "__main__":
    raise SystemExit(main())
