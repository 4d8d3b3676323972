"""Image data: sources as uint8 arrays, batch order and augmentation.

All randomness is a pure function of its inputs: the order of (seed, step), the
augmentation of (key, epoch, example), the held-out split of the labels alone.
"""

from lakd_jax.data.dataset import Dataset, Split
from lakd_jax.data.sources import load

__all__ = ["Dataset", "Split", "load"]
