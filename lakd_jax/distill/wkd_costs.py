"""How far classes are from each other, for transport between them (`wkd`)."""

import os
import zipfile

import jax
import jax.numpy as jnp
import numpy as np

from lakd_jax import errors, paths
from lakd_jax.distill.base import numerics

# What NumPy raises for files that are not its own, damaged or empty.
_UNREADABLE = (
    *(OSError, ValueError, IndexError, EOFError, zipfile.BadZipFile),
    errors.ConfigError,
)
_ROUNDING = 1e-6  # distances that are negative by less count as 0


def sharpened(distances: jax.Array, sharpness: float) -> jax.Array:
    """Returns 1 - exp(-sharpness * distances); the distances themselves for 0."""
    return 1 - jnp.exp(-sharpness * distances) if sharpness else distances


def classifier_distances(matrix: jax.Array) -> jax.Array:
    """1 - cosine of the weights of each two classes.

    Args:
      matrix: (D, classes), of the layer that gives the logits.

    Returns:
      (classes, classes) float32.
    """
    rows = numerics.unit(matrix.astype(jnp.float32).T)
    return 1 - jnp.matmul(rows, rows.T, precision=jax.lax.Precision.HIGHEST)


def read_distances(path: str | os.PathLike) -> np.ndarray:
    """Reads distances of classes (classes, classes) float32 from an .npy or .npz file.

    Raises:
      ValueError: there is no such file, it has several arrays, or its array is not
        square, not finite or negative. The message begins with "must be".
    """
    try:
        held = np.load(paths.local(path, "the path"), allow_pickle=False)
        names = getattr(held, "files", None)
        found = np.asarray(held if names is None else held[names[0]], np.float32)
    except _UNREADABLE as e:
        raise ValueError(f"must be an .npy or .npz file, is {path!r}: {e}") from None
    fault = ""
    if names and len(names) > 1:
        fault = f"one array, has {', '.join(names)}"
    elif found.ndim != 2 or found.shape[0] != found.shape[-1]:
        fault = f"a square of classes by classes, has shape {found.shape}"
    elif not np.all(np.isfinite(found)) or np.any(found < -_ROUNDING):
        fault = "finite numbers from 0 on, has others"
    if fault:
        raise ValueError(f"must be a file that holds {fault}: {path}")
    return found


def path_fault(path: str) -> str:
    """Returns why `path` is no file of distances; "" if it is one, or is empty."""
    try:
        if path:
            read_distances(path)
    except ValueError as e:
        return str(e)
    return ""
