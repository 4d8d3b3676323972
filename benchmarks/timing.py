"""Times subjects in turn, with statistics. Imports no JAX."""

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np


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

    def predict(self, images: np.ndarray) -> np.ndarray:
        """Returns the student's logits (N, classes) of normalised (N, H, W, 3)."""


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
