"""Measuring models: tasks, data, metrics, zero-shot runs and their reports."""
