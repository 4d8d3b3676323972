"""Draws the pictures of a run: `curves`, `lines` (over epochs), `attention` (maps)."""

from lakd_jax.report.attention import Caption, Layout, ModuleMaps, attention
from lakd_jax.report.curves import curves, lines
from lakd_jax.report.grids import confusion

__all__ = [
    "Caption",
    "Layout",
    "ModuleMaps",
    "attention",
    "confusion",
    "curves",
    "lines",
]
