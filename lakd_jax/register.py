"""Networks, methods, data, trackers of your own, by name, beside the built-in ones.

docs/your_own.md has worked examples. Register in the file that has `get_config`, and
the command line knows the name as well. Registering a name again replaces what was
there, so that a notebook's cell may run twice.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from lakd_jax import config as config_lib
from lakd_jax import models, trackers
from lakd_jax.data import sources
from lakd_jax.distill.base import method as method_lib
from lakd_jax.distill.base import registry
from lakd_jax.interop import layout
from lakd_jax.models import frozen
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


def teacher_from(
    fn: Callable[..., Any],
    *,
    name: str,
    features: Sequence[str] | None = None,
    variables: Any = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    image_size: int = 0,
    classes: Sequence[str] = (),
) -> None:
    """Makes any function of images known as `teacher.name`: a frozen teacher.

    `fn(images)` takes normalised images (B, H, W, 3) float32, of any B, and returns
    logits (B, classes), or (logits, {name: feature map (B, h, w, c)}). It is traced by
    JAX, so all it computes is JAX's: a Flax NNX module after `model.eval()`, a Keras 3
    model on the JAX backend with `training=False`, a Linen `apply`. Evaluation mode is
    up to you. The arrays that it closes over are the teacher's weights; do not change
    them afterwards. It is run as a whole: methods and options that run parts of a
    teacher are refused, as are, without maps, those that compare features.

    Args:
      fn: the function, not within `jax.jit`.
      name: for `teacher.name`; `teacher.init` stays empty.
      features: names of the maps to compare, in order from the image to the head; None
        for all, in the order of the dictionary; () for none. They pair with the
        student's joints as the ends of stages do.
      variables: if given, its weights, and `fn(variables, images)` is called.
      mean: per channel, that it was trained with, of pixels in 0..1; None for that of
        the data. `teacher.mean` overrides it.
      std: the same of the deviation.
      image_size: height and width of its images, to which the data's are resized; 0 for
        those of the data. `teacher.image_size` overrides it.
      classes: names of its classes, in order; () for those of the data in theirs.

    Raises:
      errors.TeacherError: it cannot be traced, returns something else, or holds weights
        where they cannot be taken out.
      ValueError: a built-in network's name.
    """
    function = frozen.of(
        fn,
        name=name,
        features=features,
        variables=variables,
        image_size=image_size,
        mean=tuple(mean) if mean else None,
        std=tuple(std) if std else None,
        classes=tuple(classes),
    )
    sizes = (1,) * len(function.maps)
    network(
        name, functools.partial(frozen.Frozen, function=function, stage_sizes=sizes)
    )


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
