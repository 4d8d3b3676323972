"""Reads the entries of `teachers`: weights, and the network that they are of."""

from lakd_jax import models
from lakd_jax.interop import published


def parts(entry: str, network: str) -> tuple[str, str]:
    """Returns the network of an entry of `teachers`, and its weights.

    Args:
      entry: "NETWORK=INIT" or "INIT", with INIT as `teacher.init` takes it, or the name
        of a function (`lakd_jax.teacher_from`), which has its weights.
      network: of entries that do not say theirs, which is `teacher.name`.
    """
    head, equals, init = entry.partition("=")
    if equals and _known(head):
        return head, init
    if _known(entry) and models.family(entry).WHOLE:
        return entry, ""
    listed = published.TABLE.get(entry)
    return (listed.network if listed else network), entry


def _known(name: str) -> bool:
    try:
        return bool(models.family(name))
    except ValueError:
        return False
