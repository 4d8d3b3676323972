"""The registry of networks.

A family is one file with a `chain.Chain` subclass and a table `NETWORKS` that maps
names to partials of it; it is registered by adding the file to `_FAMILIES`. Families
that depend on higher layers of the package are listed in `_LAZY_FAMILIES` and imported
on first use. `register` adds networks defined outside the package.
"""

import functools
import importlib
from typing import Any

import jax.numpy as jnp

from lakd_jax import fields
from lakd_jax.models import (
    chain,
    convnext,
    efficientnet,
    mobilenet,
    resnet,
    shufflenet,
    vgg,
    vit,
    wrn,
)

_FAMILIES = (resnet, wrn, vgg, mobilenet, shufflenet, convnext, efficientnet, vit)
_LAZY_FAMILIES = {"hme": "lakd_jax.hme.network"}  # network -> module, imported on use
_NETWORKS: dict[str, Any] = {  # partials of Chain classes
    name: build for family in _FAMILIES for name, build in family.NETWORKS.items()
} | dict.fromkeys(_LAZY_FAMILIES)

_BUILT_IN = frozenset(_NETWORKS)


def register(name: str, build: Any) -> None:
    """Registers a network; replaces one registered earlier under the same name.

    Args:
        name: the name accepted by `student.name` and `create`.
        build: a `chain.Chain` subclass, or a `functools.partial` of one, that takes
            `num_classes` and `dtype`.

    Raises:
        ValueError: the name is that of a built-in network, or `build` does not make a
            `chain.Chain`.
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
    """Returns the names of all registered networks, grouped by family."""
    return list(_NETWORKS)


def family(name: str) -> type[chain.Chain]:
    """Returns the class of the network `name`; raises ValueError as `create` does."""
    return _builder(name).func


def meets_in_norms(name: str) -> bool:
    """Returns whether examples of a batch are known to meet in batch norms only.

    So it is of all built-in networks but those with phases, whose losses are sown.
    """
    if family(name).PHASES:
        return False
    return name in _BUILT_IN or wrn.from_name(name) is not None


def name_of(model: chain.Chain) -> str:
    """Returns the name of a network that `create` made; else that of its class."""
    for name in names():
        build = _builder(name)
        fields_of = build.keywords.items()
        if type(model) is build.func and all(
            getattr(model, k) == v for k, v in fields_of
        ):
            return name
    return type(model).__name__


def _builder(name: str) -> Any:
    """Returns the partial that makes the network, also for wide ResNets of any size."""
    if name in _LAZY_FAMILIES:
        return importlib.import_module(_LAZY_FAMILIES[name]).NETWORKS[name]
    builder = _NETWORKS.get(name) or wrn.from_name(name)
    if builder is None:
        found = fields.fault(name, names())
        raise ValueError(
            f"network {found}. Your own, and functions (teacher_from), must be "
            "registered first"
        )
    return builder


def create(name: str, *, num_classes: int, **options: Any) -> chain.Chain:
    """Creates a network; its variables come from its `init` or from a file.

    Args:
        name: one of `names()`, or "wrn_D_K" of any depth D = 6n + 4 and width K.
        num_classes: width of the logits, at least 1.
        **options: `dtype` (compute dtype, float32 by default), `folded` (without batch
            norms, see `folding`), `one_pass` (statistics of batch norms), `vam`
            (`vam.Options`, None by default; not for HMEs, which have gates of their
            own), `projector` (`projector.Options`, None by default; for heads of
            `layers.Head`) and the options of the family: for the three-stage CIFAR
            ResNets `shortcut`, "projection" (the default) or "identity".

    Raises:
        ValueError: unknown name (the message suggests the nearest), option or value.
    """
    allowed = family(name).OPTIONS
    if isinstance(num_classes, bool) or not isinstance(num_classes, int):
        raise ValueError(f"num_classes must be an integer, not {num_classes!r}")
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, not {num_classes}")
    common = ("dtype", "folded", "one_pass", "projector")
    common += ("vam",) * family(name).GATED
    options = {"dtype": jnp.float32} | options
    options["dtype"] = _float_dtype(options["dtype"])
    for option, value in options.items():
        fields.check(f"option of {name}", option, [*allowed, *common])
        if option in allowed and (fault := option_fault(name, option, value)):
            raise ValueError(f"{option} of {name} {fault}")
    model = _builder(name)(num_classes=num_classes, **options)
    if model.projector and not model.takes_projector:
        raise ValueError(f"projector of {name}: its head is not that of `layers.Head`")
    return model


def option_fault(name: str, option: str, value: Any) -> str:
    """Returns what is wrong with the value of an option of network `name`, or ""."""
    allowed = family(name).OPTIONS[option]
    check = fields.one_of(allowed) if isinstance(allowed, tuple) else allowed
    return check(value)


def _float_dtype(dtype: Any) -> jnp.dtype:
    """Maps "bfloat16" and jnp.bfloat16 to one object, so that models compare equal."""
    try:
        result = jnp.dtype(dtype)
    except TypeError as error:
        raise ValueError(f"unknown dtype {dtype!r}") from error
    if not jnp.issubdtype(result, jnp.floating):
        raise ValueError(f"dtype must be a floating type, not {result}")
    return result
