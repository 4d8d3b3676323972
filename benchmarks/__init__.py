"""Longer runs and measurements; `python -m benchmarks.NAME`."""
