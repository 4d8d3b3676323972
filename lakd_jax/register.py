"""Networks, methods, data, trackers of your own, by name, beside the built-in ones.

docs/your_own.md has worked examples. Register in the file that has `get_config`, and
the command line knows the name as well. Registering a name again replaces what was
there, so that a notebook's cell may run twice.
"""

from typing import Any

from lakd_jax import config as config_lib
from lakd_jax import models, trackers
from lakd_jax.data import sources
from lakd_jax.distill.base import method as method_lib
from lakd_jax.distill.base import registry
from lakd_jax.interop import layout
from lakd_jax.trackers import tracker as tracker_lib


def network(name: str, build: Any) -> None:
    """Makes a network known as `student.name` and `teacher.name`.

    Args:
      name: of the network.
      build: a `models.chain.Chain` subclass whose fields have defaults but for those of
        `Chain`, or a `functools.partial` that sets them.

    Raises:
      ValueError: a built-in network's name, or `build` makes no chain.
    """
    models.register(name, build)
    layout.clear_cache()  # it may hold another network of this name


def method(name: str, cls: type[method_lib.Method]) -> None:
    """Makes a method known as `method` and in sums, with its block of the config.

    The block is called as the method is, and has the fields of the class with their
    defaults. Those declared with `fields.field` have the ranges given there. Of others,
    `ce_weight`, `weight`, `warmup_epochs` and `temperature` have the ranges that they
    have in built-in methods, and all other numbers must be finite.

    Args:
      name: a word in small letters.
      cls: a `distill.base.method.Method`, mostly a `distill.base.term.Term`; every
        field of it has a default that is a bool, an int, a float, a str or a tuple.

    Raises:
      ValueError: the name is taken or no word; or a field without such a default.
    """
    if name in config_lib.default() and name not in registry.TABLE:
        raise ValueError(f"method {name!r}: the config has this name already")
    registry.enter(name, cls)


def data(name: str, load: sources.Load) -> None:
    """Makes a data set known as `data.source`, as "NAME" or "NAME:REST".

    Args:
      name: a word in small letters.
      load: `(rest, image_size) -> lakd_jax.data.Dataset` with uint8 images, from what
        follows "NAME:" and from `data.image_size`, 0 for the images' own size. If it
        holds out no images as `minival`, `data.minival` does.

    Raises:
      ValueError: the name is built in or not a word.
    """
    sources.register(name, load)


def tracker(name: str, cls: type[tracker_lib.Tracker]) -> None:
    """Makes a tracker known in `trackers`: it receives the metrics of runs.

    Args:
      name: a word in small letters.
      cls: a `lakd_jax.trackers.tracker.Tracker`, created without arguments.

    Raises:
      ValueError: the name is built in or not a word, or `cls` is no tracker.
    """
    trackers.register(name, cls)
