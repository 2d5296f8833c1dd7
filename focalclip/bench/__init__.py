"""Comparisons with other libraries, side by side on one machine: equal numbers (``parity``) and times."""
