"""Presents a run to its user: progress display, metrics, tables and pictures."""
