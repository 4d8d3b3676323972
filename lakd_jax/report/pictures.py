"""Draws the pictures of a run: `curves`, `lines` (over epochs), `attention` (maps)."""

from lakd_jax.report.attention import Caption, Layout, ModuleMaps, attention
from lakd_jax.report.curves import curves, lines

__all__ = ["Caption", "Layout", "ModuleMaps", "attention", "curves", "lines"]
