"""What everything else stands on; it knows nothing of the rest: records, errors, files, ranks, machine, terminal."""

__version__ = "0.1.0"
