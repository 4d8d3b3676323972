"""Published accuracies, for the column beside ours: benchmarks/published.json.

By data set, pair of networks and method: top-1 (and top-5) of the test split in
percent, the letter of the source, and what a reader has to know to compare. Numbers
that nobody could read at their source are not in it.
"""

import functools
import json
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("published.json")

# Where a row is not called as the method in capital letters.
_ROWS = {"none": "student", "review": "ReviewKD"}


@functools.cache
def tables() -> dict[str, Any]:
    """All of the file."""
    return json.loads(FILE.read_text(encoding="utf-8"))


def find(data: str, pair: str, method: str) -> dict[str, Any] | None:
    """The number of a method as in `config.method`, or of "teacher", if there is one.

    Args:
      data: "cifar100" or "imagenet"; there are none of other data.
      pair: "TEACHER:STUDENT".
    """
    rows = tables().get(data, {}).get(pair, {})
    wanted = _ROWS.get(method, method).lower()
    return next((row for name, row in rows.items() if name.lower() == wanted), None)


def sources(letters: set[str]) -> str:
    """What the letters stand for, in one line."""
    known = tables()["sources"]
    return "; ".join(f"{letter}: {known[letter]}" for letter in sorted(letters))
