"""Report or compare results: ``python eval/report.py --help``."""

from focalclip.cli.report import main

if __name__ == "__main__":
    raise SystemExit(main())
