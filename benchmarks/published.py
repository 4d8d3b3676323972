"""Looks up published accuracies in benchmarks/published.json.

The file has, by data set, pair of networks and method, top-1 (and top-5) of the test
split in percent, the letter of the source, and notes needed for a comparison. Numbers
that could not be read at their source are left out.
"""

import functools
import json
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("published.json")

# Methods whose rows are not named after them.
_ROWS = {"none": "student", "review": "ReviewKD"}


@functools.cache
def tables() -> dict[str, Any]:
    """Returns the whole file."""
    return json.loads(FILE.read_text(encoding="utf-8"))


def find(data: str, pair: str, method: str) -> dict[str, Any] | None:
    """Returns the row of a method as in `config.method`, or of "teacher"; or None.

    Args:
      data: "cifar100" or "imagenet"; there are none of other data.
      pair: "TEACHER:STUDENT".
    """
    rows = tables().get(data, {}).get(pair, {})
    wanted = _ROWS.get(method, method).lower()
    return next((row for name, row in rows.items() if name.lower() == wanted), None)


def sources(letters: set[str]) -> str:
    """Returns the sources that the letters stand for, in one line."""
    known = tables()["sources"]
    return "; ".join(f"{letter}: {known[letter]}" for letter in sorted(letters))
