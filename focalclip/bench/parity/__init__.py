"""The case on which our numbers must equal CLIP_benchmark's (``scripts/compare_clip_benchmark.py``)."""
