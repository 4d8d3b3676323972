"""Interleaved timing, its statistics, and what the device can do at best."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp


class Unusable(Exception):
    """What was asked for cannot be measured here; says why and what to do."""


class Subject(Protocol):
    """Something that makes training steps: ours, the baseline, a peer.

    Attributes:
      name: in records and tables.
      facts: what is known of it before timing.
    """

    name: str
    facts: dict[str, Any]

    def run(self, steps: int) -> None:
        """That many steps; returns when the device has made them."""

    def peak_bytes(self) -> int | None:
        """Largest memory of the device in use so far; None where nobody counts."""


def interleaved(
    subjects: Sequence[Subject], *, rounds: int, steps: int, warm_up: int
) -> dict[str, list[float]]:
    """Seconds a step, by subject, one number a round; the subjects take turns.

    Args:
      subjects: timed in this order in every round (A, B, A, B, ...).
      rounds: that are kept.
      steps: of each subject in a round.
      warm_up: rounds before, which are not kept.
    """
    times: dict[str, list[float]] = {subject.name: [] for subject in subjects}
    for turn in range(warm_up + rounds):
        for subject in subjects:
            began = time.perf_counter()
            subject.run(steps)
            if turn >= warm_up:
                times[subject.name].append((time.perf_counter() - began) / steps)
    return times


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, quartiles and extremes of at least one number."""
    low, middle, high = values[0], values[0], values[0]
    if len(values) > 1:
        low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {
        "median": middle,
        "q1": low,
        "q3": high,
        "min": min(values),
        "max": max(values),
    }


def ratios(times: Mapping[str, Sequence[float]], of: str) -> dict[str, dict]:
    """How many times longer each other subject takes than `of`, from pairs.

    A pair is two neighbours in time, so that a load on the machine that comes and
    goes falls on both.
    """
    return {
        name: spread([t / own for t, own in zip(values, times[of], strict=True)])
        for name, values in times.items()
        if name != of
    }


def ceilings(dtype: str, side: int, mebibytes: int) -> dict[str, float]:
    """The best rates that this device shows: of a matrix product, and of a copy.

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
    """Least seconds of ten calls, each on the last one's result, after a first."""
    seconds = []
    for _ in range(11):
        began = time.perf_counter()
        x = jax.block_until_ready(program(x))
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:])


def roofline(facts: Mapping[str, Any], best: Mapping[str, float], s: float) -> dict:
    """Rates reached by a step of `s` seconds, and as a share of the roofline.

    The share is the least time that the ceilings `best` allow, that of the operations
    or that of the bytes, over the time taken. Bytes are those that XLA counts, which
    caches may save, so on CPUs the share is a rough one.
    """
    compute = facts["flops"] / best["flops_per_s"]
    memory = facts["bytes"] / best["bytes_per_s"]
    return {
        "flops_per_s": facts["flops"] / s,
        "bytes_per_s": facts["bytes"] / s,
        "roofline_share": max(compute, memory) / s,
        "bound": "compute" if compute >= memory else "memory",
    }
