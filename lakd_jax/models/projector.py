"""What a network has between its last map and a classifier that is another network's.

A student that learns the teacher's last map (`distill.simkd`) keeps the teacher's
classifier, and a projector to the channels that this reads, as its head. The names and
shapes of its arrays describe it, so that a file needs nothing else to be read.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

BORROWED = "borrowed"  # the classifier, in the place of a family's own
_NAME = "projector"


@dataclasses.dataclass(frozen=True)
class Options:
    """The projector and the size of the classifier behind it.

    `width` is the channels that the classifier reads, `inner` those of the projector's
    first two convolutions. `pooled` is the height and width to which it pools a larger
    map first; () leaves the map as it is.

    Raises:
        ValueError: a value out of range.
    """

    width: int
    inner: int
    pooled: tuple[int, ...] = ()

    def __post_init__(self):
        sizes = (self.width, self.inner, *self.pooled)
        if len(self.pooled) not in (0, 2) or min(sizes) < 1:
            raise ValueError(f"{self} has sizes below 1, or `pooled` is no pair")

    @property
    def name(self) -> str:
        """The name of the projector's variables, which has the size that it pools to.

        Pooling has no arrays that would say it.
        """
        return _NAME + "x".join(map(str, self.pooled))


def is_borrowed(path: Sequence[str]) -> bool:
    """Returns whether the parameter at `path` is of a borrowed classifier."""
    return BORROWED in path[-2:]


def in_head(path: Sequence[str]) -> bool:
    """Returns whether the layer at `path` ("head", ...) is one of a projector."""
    return path[0] == "head" and path[1].startswith(_NAME)


def any_of(path: Sequence[str]) -> bool:
    """Returns whether the layer at `path` is of a projector or behind one."""
    return in_head(path) or is_borrowed(path)


def of_torch(shapes: Mapping[str, tuple[int, ...]]) -> Options | None:
    """Infers the projector from PyTorch keys and shapes; None if there is none."""
    for key, shape in shapes.items():
        found = re.fullmatch(rf"{_NAME}(?:(\d+)x(\d+))?\.conv3\.weight", key)
        if found and len(shape) == 4:
            pooled = tuple(int(side) for side in found.groups() if side)
            return Options(shape[0], shape[1], pooled)
    return None


def words(options: Options | Mapping[str, Any] | None) -> str:
    """Returns what to say of such a student behind its name; "" of any other."""
    return ", with a projector and its teacher's classifier" if options else ""
