"""Times subjects in turn, with statistics, and measures a device's best rates."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp


class Unusable(Exception):
    """The requested measurement is impossible here; the message has the remedy."""


class Subject(Protocol):
    """An implementation of training steps: ours, the baseline or a peer.

    Attributes:
      name: in records and tables.
      facts: figures that are known before timing.
    """

    name: str
    facts: dict[str, Any]

    def run(self, steps: int) -> None:
        """Runs `steps` steps; returns when the device has finished them."""

    def peak_bytes(self) -> int | None:
        """Returns the device's peak memory so far; None if it is not counted."""


def interleaved(
    subjects: Sequence[Subject], *, rounds: int, steps: int, warm_up: int
) -> dict[str, list[float]]:
    """Returns seconds per step, by subject, one number per round; they take turns.

    Args:
      subjects: timed in this order in every round (A, B, A, B, ...).
      rounds: number of rounds that are timed.
      steps: of each subject in a round.
      warm_up: number of rounds before these.
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
    """Computes median, quartiles and extremes of at least one number."""
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
    """Computes how many times longer each other subject takes than `of`.

    From pairs of neighbouring rounds, so that a load on the machine that comes and
    goes affects both.
    """
    return {
        name: spread([t / base for t, base in zip(values, times[of], strict=True)])
        for name, values in times.items()
        if name != of
    }


def ceilings(dtype: str, side: int, mebibytes: int) -> dict[str, float]:
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
