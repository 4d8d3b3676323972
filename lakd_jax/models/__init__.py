"""Networks by name.

A family is one file with a `chain.Chain` subclass and a table `NETWORKS` from name
to a partial of it; adding the file to `_FAMILIES` is all it takes to register it.
Families that are built from other parts of the package stand in `_ELSEWHERE`.
`register` is for networks that are kept elsewhere.
"""

import functools
import importlib
from typing import Any

import jax.numpy as jnp

from lakd_jax import fields
from lakd_jax.models import chain, mobilenet, resnet, shufflenet, vgg, wrn

_FAMILIES = (resnet, wrn, vgg, mobilenet, shufflenet)
_ELSEWHERE = {"hme": "lakd_jax.hme.network"}  # imported when it is first made
_NETWORKS: dict[str, Any] = {  # partials of Chain classes
    name: build for family in _FAMILIES for name, build in family.NETWORKS.items()
} | dict.fromkeys(_ELSEWHERE)

_BUILT_IN = frozenset(_NETWORKS)


def register(name: str, build: Any) -> None:
    """Enters a network; an earlier one of that name that was no built-in one goes.

    Args:
        name: for `student.name` and `create`.
        build: a `chain.Chain` subclass, or a `functools.partial` of one, that takes
            `num_classes` and `dtype`.

    Raises:
        ValueError: the name is a built-in network's, or `build` makes no chain.
    """
    if name in _BUILT_IN or wrn.from_name(name):
        raise ValueError(f"network {name!r} is built in: register another name")
    partial = (
        build if isinstance(build, functools.partial) else functools.partial(build)
    )
    if not (isinstance(partial.func, type) and issubclass(partial.func, chain.Chain)):
        raise ValueError(
            f"network {name!r}: {build!r} must be a subclass of lakd_jax.models.chain."
            "Chain, or a functools.partial of one"
        )
    _NETWORKS[name] = partial


def names() -> list[str]:
    """Names of all registered networks, family by family."""
    return list(_NETWORKS)


def family(name: str) -> type[chain.Chain]:
    """The class of the network `name`; ValueError as for `create`."""
    return _builder(name).func


def _builder(name: str) -> Any:
    """The partial that makes the network; wide ResNets of any size are known."""
    if name in _ELSEWHERE:
        return importlib.import_module(_ELSEWHERE[name]).NETWORKS[name]
    builder = _NETWORKS.get(name) or wrn.from_name(name)
    if builder is None:
        fields.check("network", name, names())
    return builder


def create(name: str, *, num_classes: int, **options: Any) -> chain.Chain:
    """Make a network; its variables come from `init` or from files.

    Args:
        name: one of `names()`, or "wrn_D_K" of any depth D = 6n + 4 and width K.
        num_classes: width of the logits, at least 1.
        **options: `dtype` (compute type, float32 unless given), `folded` (without
            batch norms, see `folding`), `vam` (`vam.Options`, None unless given; not
            for HMEs, whose gates are others) and
            what the family offers: for the CIFAR ResNets of three stages `shortcut`,
            "projection" (unless given) or "identity".

    Raises:
        ValueError: unknown name (tells the nearest), option or value.
    """
    allowed = family(name).OPTIONS
    if isinstance(num_classes, bool) or not isinstance(num_classes, int):
        raise ValueError(f"num_classes must be an integer, not {num_classes!r}")
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, not {num_classes}")
    common = ("dtype", "folded", "vam") if family(name).GATED else ("dtype", "folded")
    options = {"dtype": jnp.float32} | options
    options["dtype"] = _float_dtype(options["dtype"])
    for option, value in options.items():
        fields.check(f"option of {name}", option, [*allowed, *common])
        if option in allowed:
            fields.check(f"{option} of {name}", value, list(allowed[option]))
    return _builder(name)(num_classes=num_classes, **options)


def _float_dtype(dtype: Any) -> jnp.dtype:
    """One object for "bfloat16" and jnp.bfloat16, so that equal models are equal."""
    try:
        result = jnp.dtype(dtype)
    except TypeError as error:
        raise ValueError(f"unknown dtype {dtype!r}") from error
    if not jnp.issubdtype(result, jnp.floating):
        raise ValueError(f"dtype must be a floating type, not {result}")
    return result
