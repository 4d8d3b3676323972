"""Lines about a data set that its reader has to know, such as what was left out."""

import sys


def note(line: str) -> None:
    """Prints a line to stderr; with several processes, only the first does."""
    # Imported on demand: it starts JAX, which decoding processes do without.
    from lakd_jax.runtime import hosts

    if hosts.is_first():
        print(line, file=sys.stderr)


def listed(names: list[str], most: int = 5) -> str:
    """Returns the names separated by commas; of more than `most`, the first ones."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def report_missing(
    place: str, role: str, classes: tuple[str, ...], present: set[int]
) -> None:
    """Prints which classes of a split have no images, given the labels that do."""
    missing = [name for label, name in enumerate(classes) if label not in present]
    if missing:
        note(
            f"{place}: no {role} images of {len(missing)} of {len(classes)} classes: "
            f"{listed(missing)}"
        )
