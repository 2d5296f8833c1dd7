"""Write training shards: see ``python scripts/make_shards.py --help``."""

from focalclip.cli.make_shards import main

if __name__ == "__main__":
    raise SystemExit(main())
