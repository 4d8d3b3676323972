"""One wording for every value that must be one of a few names."""

import difflib
from collections.abc import Iterable


def check(field: str, value: str, valid: Iterable[str]) -> None:
    """Raises ValueError if `value` is not in `valid`, with the nearest name.

    Args:
      field: what the message calls the value, such as `lakd.attention`.
      value: what was given.
      valid: all names that are allowed.
    """
    names = list(valid)
    if value in names:
        return
    near = difflib.get_close_matches(str(value), names, 1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(
        f"{field} is {value!r}; {hint}It must be one of {', '.join(names)}"
    )
