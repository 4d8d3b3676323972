"""Gradients of kernels that are summed in float32."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_train_step as steps
from flax import linen as nn

from lakd_jax.models import wide
from lakd_jax.training import step as step_lib


class Small(nn.Module):
    """A strided, grouped convolution and a dense layer."""

    dtype: str

    @nn.compact
    def __call__(self, x):
        conv = nn.Conv(6, (3, 3), (2, 2), feature_group_count=2, dtype=self.dtype)
        return nn.Dense(3, dtype=self.dtype, name="dense")(conv(x).mean((1, 2)))


def gradients(dtype, wanted):
    model = Small(dtype)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, 8, 8, 4)).astype("float32")
    variables = model.init(jax.random.key(0), x)

    def loss(variables, x):
        with wide.sums(wanted):
            return jnp.sum(jnp.square(model.apply(variables, x).astype("float32")))

    gradient = jax.grad(loss, (0, 1))
    return gradient(variables, x), str(jax.make_jaxpr(gradient)(variables, x))


def test_float32_stays_as_it_is():
    jax.tree.map(
        np.testing.assert_array_equal,
        *(gradients("float32", wanted)[0] for wanted in (False, True)),
    )


def test_gradients_of_kernels_leave_their_products_as_float32():
    (usual, before), (found, after) = (gradients("bfloat16", w) for w in (False, True))

    def close(ours, theirs):
        scale = np.abs(theirs).max()
        np.testing.assert_allclose(ours, theirs, atol=0.05 * scale)

    jax.tree.map(close, found, usual)
    jax.tree.map(close, found, gradients("float32", False)[0])
    # Of the convolution and of the dense layer; what goes to the images stays narrow.
    for name, shape in (("conv_general_dilated", "3,3,2,6"), ("dot_general", "3,6")):
        assert re.search(rf"bf16\[{shape}\] = {name}", before)
        assert re.search(rf"f32\[{shape}\] = {name}", after)
        assert not re.search(rf"bf16\[{shape}\] = {name}", after)
    assert re.search(r"bf16\[4,8,8,4\] = conv_general_dilated", after)


@pytest.mark.parametrize("wanted", [False, True])
def test_the_step_does_so_where_it_is_asked(tmp_path, wanted):
    setting = steps.small(tmp_path, 1, dtype="bfloat16", optim__wide_sums=wanted)
    run = functools.partial(step_lib.train_step, setting[0])
    program = str(jax.make_jaxpr(run)(*setting[1:], steps.rows(1)[0]))
    wide_products = re.findall(r":f32\[3,3,\d+,\d+\] = conv_general_dilated", program)
    assert bool(wide_products) == wanted
