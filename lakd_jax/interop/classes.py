"""Compares the class names of weights with those of the data."""

from collections.abc import Sequence

_SHOWN = 5  # names listed per side


def order(theirs: Sequence[str], ours: Sequence[str]) -> list[int] | None:
    """Returns the index in `theirs` of each of `ours`; None if the names differ."""
    if len(theirs) != len(ours) or set(theirs) != set(ours):
        return None
    return [theirs.index(name) for name in ours]


def difference(
    theirs: Sequence[str], ours: Sequence[str], their_count: int, our_count: int
) -> str:
    """Describes how the classes of weights differ from the data's.

    Returns "" if they are the same, or may be. Names are compared where both sides
    have them. Numbers counted up from 0 are what data without names have, so they may
    stand for any others.

    Args:
      theirs: names of the weights' classes, in order; () if unknown.
      ours: names of the data's classes, in order; () if unknown.
      their_count: number of the weights' classes.
      our_count: number of the data's classes.
    """
    named = all(names and not _counted(names) for names in (theirs, ours))
    if their_count == our_count and (not named or set(theirs) == set(ours)):
        return ""
    counts = f"{their_count} classes, the data has {our_count}"
    if their_count == our_count:
        counts = "other classes than the data"
    if not named:
        return counts
    only = (set(theirs) - set(ours), set(ours) - set(theirs))
    lines = [
        f"  only in {where}: {_listed(sorted(names))}"
        for where, names in zip(("the weights", "the data"), only, strict=True)
        if names
    ]
    return "\n".join([counts, *lines])


def _counted(names: Sequence[str]) -> bool:
    return list(names) == [str(k) for k in range(len(names))]


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
