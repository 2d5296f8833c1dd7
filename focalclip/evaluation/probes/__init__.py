"""Probes: classifiers trained on the features of a frozen image tower."""
