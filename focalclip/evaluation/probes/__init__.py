"""Probes: what a frozen image tower's features are worth to a classifier that is trained on them."""
