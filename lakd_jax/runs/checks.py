"""What of a config can only be checked once the data is loaded."""

from collections.abc import Callable

from lakd_jax import distill, errors
from lakd_jax.config import resolved


def a_batch(config: resolved.Config, examples: int) -> None:
    """Raises DataError if the training images do not fill one batch."""
    if examples < config.batch_size:
        raise errors.DataError(
            f"data.source {config.data.source}: {examples} training images "
            f"do not fill one batch; lower batch_size ({config.batch_size})."
        )


def last_batch(config: resolved.Config, examples: int) -> None:
    """Raises ConfigError if an epoch's short last batch is too small, or indivisible.

    Full batches are checked with the other fields, before any data is loaded.
    """
    least = distill.facts(config.method).least_batch
    left, parts = examples % config.batch_size, config.optim.accumulate
    needed = f"method {config.method} needs at least {least}"
    if parts > 1:
        needed = f"optim.accumulate needs a multiple of {parts}"
        needed += f", at least {parts * least}" if least > 1 else ""
    if config.data.drop_last or (left % parts == 0 and not 0 < left < parts * least):
        return
    raise errors.ConfigError(
        [
            f"batch_size is {config.batch_size}, which leaves {left} of {examples} "
            f"training images for the last batch of an epoch; {needed}: set "
            "data.drop_last, or another batch_size"
        ]
    )


def two_classes(
    config: resolved.Config, classes: int, notify: Callable[[str], None]
) -> None:
    """Raises ConfigError if a method learns nothing from the teacher with two classes.

    A part of several that cannot teach is reported.
    """
    if classes != 2:
        return
    for name in distill.parts(config.method):
        fault, remark = distill.with_two_classes(name, config.method_options(name))
        if fault:
            raise errors.ConfigError([fault])
        if remark:
            notify(remark)
