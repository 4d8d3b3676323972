"""Computes means over a few seeds with 95 % intervals, alone and in pairs."""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence

from scipy import stats

LEVEL = 0.95


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean and half the width of its interval.

    Attributes:
      half: None for a single value, from which no spread can be computed.
      count: number of values.
    """

    mean: float
    half: float | None
    count: int

    def text(self, *, sign: bool = False) -> str:
        """Returns fractions as percentage points, "92.31 +- 0.45 (3)"."""
        middle = "" if self.half is None else f" +- {100 * self.half:.2f}"
        mean = f"{100 * self.mean:+.2f}" if sign else f"{100 * self.mean:.2f}"
        return f"{mean}{middle} ({self.count})"


def of(values: Sequence[float]) -> Interval | None:
    """Computes Student's t interval of the mean; None if there are no values."""
    if not values:
        return None
    mean, count = statistics.fmean(values), len(values)
    if count == 1:
        return Interval(mean, None, 1)
    reach = float(stats.t.ppf((1 + LEVEL) / 2, count - 1))
    half = reach * statistics.stdev(values) / math.sqrt(count)
    return Interval(mean, half, count)


def paired(values: Mapping[int, float], others: Mapping[int, float]) -> Interval | None:
    """Computes the interval of values - others over the seeds that both have."""
    shared = sorted(values.keys() & others.keys())
    return of([values[seed] - others[seed] for seed in shared])
