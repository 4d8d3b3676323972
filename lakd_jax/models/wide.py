"""Gradients of kernels that are summed over the devices in float32.

With a compute dtype of bfloat16 such a gradient leaves its product as bfloat16, and XLA
sums it over the devices before it is converted to float32. Here the product that makes
it is float32, and so is the sum; it is rounded once, behind the sum.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

_PRODUCTS = {"conv_general_dilated": nn.Conv, "dot_general": nn.Dense}


def sums(wanted: bool) -> contextlib.AbstractContextManager[Any]:
    """Returns a context in which layers have such gradients, if that is wanted.

    It holds for every `nn.Conv` and `nn.Dense` that is traced inside. Others, such as
    convolutions with virtual attention, stay as they are.
    """

    def widened(
        call: Callable[..., Any],
        arguments: tuple[Any, ...],
        options: dict[str, Any],
        context: nn.module.InterceptorContext,
    ) -> Any:
        for name, kind in _PRODUCTS.items():
            if isinstance(context.module, kind) and context.method_name == "__call__":
                # Modules are frozen; this one is a copy for the call at hand.
                object.__setattr__(context.module, name, functools.partial(_wide, name))
        return call(*arguments, **options)

    return nn.intercept_methods(widened) if wanted else contextlib.nullcontext()


def _wide(
    name: str, x: jax.Array, kernel: jax.Array, *args: Any, **options: Any
) -> jax.Array:
    """Computes what `jax.lax` has under this name."""

    def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return getattr(jax.lax, name)(x, kernel, *args, **options)

    def forward(x: jax.Array, kernel: jax.Array) -> Any:
        return product(x, kernel), (x, kernel)

    def backward(kept: Any, gradient: jax.Array) -> Any:
        x, kernel = kept
        of_x = jax.vjp(lambda x: product(x, kernel), x)[1](gradient)
        x, wide, gradient = (a.astype(jnp.float32) for a in (x, kernel, gradient))
        of_kernel = jax.vjp(lambda kernel: product(x, kernel), wide)[1](gradient)
        return *of_x, of_kernel[0].astype(kernel.dtype)

    run = jax.custom_vjp(product)
    run.defvjp(forward, backward)
    return run(x, kernel)
