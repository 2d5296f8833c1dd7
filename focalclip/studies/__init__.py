"""Comparisons that take long: image towers at equal training time, and benchmarks against peers."""
