"""Metrics, intervals, paired tests, calibration, efficiency; nothing here knows a model or a file."""
