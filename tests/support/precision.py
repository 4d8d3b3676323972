"""In which types a function computes, read off its trace: nothing is compiled."""

import jax
import jax.numpy as jnp
from jax.extend import core

# They move numbers or change their type. Only to one of fewer bits does that round.
MOVES = {
    *("broadcast_in_dim", "concatenate", "convert_element_type", "copy"),
    *("gather", "reshape", "rev", "select_n", "slice", "split", "squeeze"),
    *("stop_gradient", "transpose"),
}


def arithmetic(function, *args):
    """{types of floating-point results} of all that is computed, and of the result."""
    traced = jax.make_jaxpr(function)(*args)
    found = set(_types(traced.jaxpr))
    return found | {x.dtype.name for x in traced.out_avals if _is_float(x)}


def halves(tree):
    """The same arrays as shapes of bfloat16."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, "bfloat16"), tree)


def _types(jaxpr):
    for equation in jaxpr.eqns:
        inner = [x for value in equation.params.values() for x in _jaxprs(value)]
        for one in inner:
            yield from _types(one)
        moves = equation.primitive.name in MOVES and not _rounds(equation)
        if not inner and not moves:
            yield from (
                v.aval.dtype.name for v in equation.outvars if _is_float(v.aval)
            )


def _rounds(equation):
    """Whether a float becomes one of fewer bits."""
    given, made = equation.invars[0].aval, equation.outvars[0].aval
    floats = _is_float(given) and _is_float(made)
    return floats and made.dtype.itemsize < given.dtype.itemsize


def _jaxprs(value):
    for x in value if isinstance(value, tuple | list) else (value,):
        if isinstance(x, core.ClosedJaxpr):
            yield x.jaxpr
        elif isinstance(x, core.Jaxpr):
            yield x


def _is_float(aval):
    return hasattr(aval, "dtype") and jnp.issubdtype(aval.dtype, jnp.floating)
