"""Counts a network's parameters and operations, and its features' shapes."""

import collections.abc
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from lakd_jax import models
from lakd_jax.models import chain


@dataclasses.dataclass(frozen=True)
class Description:
    """The size and cost of a network.

    Attributes:
        name: its name in the registry.
        image_size: height and width of the images that the counts are for.
        parameters: number of trainable parameters.
        macs: multiply-accumulates of convolutions and the classifier for one image.
        features: the shape (H, W, C) of each feature.
    """

    name: str
    image_size: int
    parameters: int
    macs: int
    features: tuple[tuple[int, int, int], ...]

    def __str__(self) -> str:
        shapes = " ".join(f"{h}x{w}x{c}" for h, w, c in self.features)
        return (
            f"{self.name:<22}{self.image_size:>5}{self.parameters / 1e6:>9.3f} M"
            f"{self.macs / 1e6:>10.1f} M  {shapes}"
        )


HEADER = (
    f"{'network':<22}{'image':>5}{'parameters':>11}{'MACs':>12}  features, stem first"
)


def describe(
    name: str, *, num_classes: int = 100, image_size: int = 0, **options: Any
) -> Description:
    """Describes the network `name`; `str` of the result is one line of the table.

    Args:
        name, num_classes, **options: arguments of `models.create`.
        image_size: height and width; 0 for the size the network is published for.

    Raises:
        ValueError: as for `models.create`.
    """
    model = models.create(name, num_classes=num_classes, **options)
    side = image_size or model.IMAGE_SIZE
    images = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    variables = chain.variable_shapes(model, side)
    run = jax.make_jaxpr(lambda v, x: model.apply(v, x, train=False), return_shape=True)
    program, outputs = run(variables, images)
    return Description(
        name=name,
        image_size=side,
        parameters=sum(x.size for x in jax.tree.leaves(variables["params"])),
        macs=_macs(program.jaxpr),
        features=tuple(x.shape[1:] for x in outputs.features),
    )


def table() -> collections.abc.Iterator[str]:
    """Yields one line per network, with 100 classes (1000 for ImageNet's networks)."""
    yield HEADER
    for name in models.names():
        imagenet = models.family(name).IMAGE_SIZE > 64
        yield str(describe(name, num_classes=1000 if imagenet else 100))
    yield "wrn_D_K of any other depth D = 6n + 4 and width K is available as well"


def _macs(jaxpr: Any) -> int:
    """Counts multiply-accumulates of a program's convolutions and matrix products."""
    total = 0
    for equation in jaxpr.eqns:
        out = equation.outvars[0].aval
        if equation.primitive.name == "conv_general_dilated":
            numbers = equation.params["dimension_numbers"]
            kernel = equation.invars[1].aval.shape
            # Each output value takes the I / groups * H * W entries of one filter.
            total += out.size * math.prod(kernel) // kernel[numbers.rhs_spec[0]]
        elif equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += out.size * math.prod(left[axis] for axis in contracted)
        nested = [p for p in equation.params.values() if hasattr(p, "jaxpr")]
        total += sum(_macs(program.jaxpr) for program in nested)
    return total
