"""Ranges of fields that are more than numbers: functions from a value to its fault."""

from collections.abc import Callable

from lakd_jax import distill, fields, models, paths
from lakd_jax.config import several
from lakd_jax.data import sources
from lakd_jax.interop import published


def _known(kind: str, find: Callable[[str], object]) -> fields.Check:
    """Names that `find` knows; it raises ValueError with "KIND ..." for others."""

    def check(name: str) -> str:
        try:
            find(name)
        except ValueError as e:
            return str(e).removeprefix(f"{kind} ")
        return ""

    return check


network = _known("network", models.family)
method = _known("method", distill.parts)


def data_source(value: str) -> str:
    """The name of a data set, or its folder or file on this machine."""
    if sources.is_added(value):  # its function knows what the rest means
        return ""
    return paths.fault(value.removeprefix("folder:").removeprefix("npz:"))


def weights(value: str) -> str:
    """The name of published weights, or the path of a run or a file."""
    return (published.fault if published.is_name(value) else paths.place_fault)(value)


def teacher_entry(value: str) -> str:
    """INIT or NETWORK=INIT, or the name of a function."""
    init = several.parts(value, "")[1]
    return weights(init) if init or value else "must not be empty"


def pixel_mean(value: float) -> str:
    """The mean of pixels in 0..1."""
    return _of_pixels(value, fields.between(0, 1))


def pixel_deviation(value: float) -> str:
    """The standard deviation of pixels in 0..1."""
    if value > 1:
        return _of_pixels(value, fields.between(0, 1))
    return fields.above(0)(value)


def _of_pixels(value: float, check: fields.Check) -> str:
    fault = check(value)
    if not fault or not 1 < value <= 255:
        return fault
    return f"{fault}: of pixels in 0..1; divide by 255"


def cache(value: str) -> str:
    """A path, or a URL: JAX can keep compiled programs in a bucket."""
    return "" if "://" in value else paths.fault(value)


def share_or_method(value: float) -> str:
    """A share of the gradient, or -1 where the method decides."""
    return "" if value == -1 else fields.between(0, 1)(value)


def scale_or_published(value: float) -> str:
    """A number from 0 on, or -1 where the network decides."""
    return "" if value == -1 else fields.at_least(0)(value)


def hme_option(name: str) -> fields.Check:
    """One of what HMEs offer; that module is imported when this is first called."""
    return lambda value: models.option_fault("hme", name, value)
