"""Measures a device's best rates, and what share of them a step reaches."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp


def measure(dtype: str, side: int, mebibytes: int) -> dict[str, float]:
    """Measures the best rates of this device: of a matrix product, and of a copy.

    Args:
      dtype: of the product.
      side: of its two square matrices.
      mebibytes: size of the array that is read once and written once.
    """
    matrix = jnp.ones((side, side), jnp.dtype(dtype)) / side  # its own square
    product = _fastest(jax.jit(lambda x: x @ x), matrix)
    array = jnp.zeros((mebibytes * 2**20 // 4,), jnp.float32)
    size = array.nbytes
    # In place: on CPUs a new array costs more than the copy, as its pages are new.
    copy = _fastest(jax.jit(lambda x: x + 1, donate_argnums=0), array)
    return {
        "matmul_side": side,
        "copy_mib": mebibytes,
        "flops_per_s": 2 * side**3 / product,
        "bytes_per_s": 2 * size / copy,
    }


def _fastest(program: Callable[[jax.Array], jax.Array], x: jax.Array) -> float:
    """Returns the least seconds of ten calls, each on the previous result."""
    seconds = []
    for _ in range(11):
        began = time.perf_counter()
        x = jax.block_until_ready(program(x))
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:])


def roofline(facts: Mapping[str, Any], best: Mapping[str, float], s: float) -> dict:
    """Computes the rates of a step of `s` seconds, also as a share of the roofline.

    The share is the least time that the ceilings `best` allow, for the operations or
    for the bytes, divided by the time taken. Bytes are those that XLA counts, some of
    which caches save, so on CPUs the share is approximate.
    """
    compute = facts["flops"] / best["flops_per_s"]
    memory = facts["bytes"] / best["bytes_per_s"]
    return {
        "flops_per_s": facts["flops"] / s,
        "bytes_per_s": facts["bytes"] / s,
        "roofline_share": max(compute, memory) / s,
        "bound": "compute" if compute >= memory else "memory",
    }
