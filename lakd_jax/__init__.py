"""Knowledge distillation for image classifiers in JAX and Flax."""

from lakd_jax.version import VERSION as __version__

__all__ = ["__version__"]
