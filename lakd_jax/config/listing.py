"""Lists the blocks of the config and their fields, those of methods included."""

from typing import NamedTuple

from lakd_jax import fields
from lakd_jax.config import blocks, optimiser
from lakd_jax.distill.base import registry


class Block(NamedTuple):
    """A block of the config, of a method or not.

    Attributes:
      name: for example "student.vam"; "" for the fields outside of any block.
      options: its fields, in order.
      about: a note on all of it; may be "".
      method: whether it is a method's.
    """

    name: str
    options: tuple[fields.Option, ...]
    about: str
    method: bool = False


CLASSES: dict[str, type] = {
    "": blocks.Run,
    "data": blocks.Data,
    "student": blocks.Student,
    "student.vam": blocks.Vam,
    "teacher": blocks.Teacher,
    "optim": optimiser.Optim,
    "hme": blocks.Hme,
    "local": blocks.Local,
    "checkpoint": blocks.Checkpoint,
}


def every() -> list[Block]:
    """Returns all blocks, in the order in which the config has them."""
    found = [
        Block(name, fields.options(cls), vars(cls).get("about", ""))
        for name, cls in CLASSES.items()
    ]
    after = list(CLASSES).index("hme")
    return [*found[:after], *of_methods(), *found[after:]]


def of_methods() -> list[Block]:
    """Returns the blocks of the methods that have options of their own."""
    return [
        Block(name, entry.block, entry.fact("about", ""), method=True)
        for name, entry in registry.TABLE.items()
        if entry.block
    ]


def options() -> dict[str, fields.Option]:
    """Returns every field of the config by its name, such as "data.pad"."""
    return {
        f"{block.name}.{option.name}".lstrip("."): option
        for block in every()
        for option in block.options
    }
