"""One wording for every value that must be one of a few names."""

import difflib
from collections.abc import Iterable


def fault(value: object, valid: Iterable[str]) -> str:
    """What is wrong with a value that is not in `valid`; "" if it is.

    For example "is 'kdd'; did you mean 'kd'? It must be one of none, kd, lakd".
    """
    names = list(valid)
    if value in names:
        return ""
    near = difflib.get_close_matches(str(value), names, 1)
    hint = f"did you mean {near[0]!r}? It" if near else "it"
    return f"is {value!r}; {hint} must be one of {', '.join(names)}"


def check(field: str, value: object, valid: Iterable[str]) -> None:
    """Raises ValueError if `value` is not in `valid`, with the nearest name.

    Args:
      field: what the message calls the value, such as `lakd.attention`.
      value: what was given.
      valid: all names that are allowed.
    """
    if found := fault(value, valid):
        raise ValueError(f"{field} {found}")
