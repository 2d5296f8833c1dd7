"""Compare our numbers with CLIP_benchmark's: see ``python scripts/compare_clip_benchmark.py --help``."""

from focalclip.cli.compare_clip_benchmark import main

if __name__ == "__main__":
    raise SystemExit(main())
