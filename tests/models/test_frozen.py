"""Functions of images as networks: what is taken out of them, and what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lakd_jax import errors
from lakd_jax.models import chain, frozen

IMAGES = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
KERNEL = jnp.linspace(-1, 1, 3 * 4).reshape(3, 4)
HEAD = jnp.linspace(-1, 1, 4 * 5).reshape(4, 5)
TABLE = np.float32([1, 2, 1, 2]).reshape(1, 1, 1, 4)


def plain(images):
    """Two maps, the second of half the size; five classes."""
    first = jax.nn.relu(images @ KERNEL) * TABLE
    second = first[:, ::2, ::2]
    return second.mean((1, 2)) @ HEAD, {"z": first, "a": second}


def network(fn=plain, features=None, **fields):
    function = frozen.of(fn, name="mine", features=features, **fields)
    sizes = (1,) * len(function.maps)
    return frozen.Frozen(
        function=function, stage_sizes=sizes, num_classes=function.num_classes
    )


def weights(model):
    arrays = model.function.arrays
    return {"params": {f"array{i}": array for i, array in enumerate(arrays)}}


def test_a_function_becomes_a_network_of_its_maps():
    model = network()
    assert model.function.num_classes == 5
    assert model.function.maps == ("z", "a")  # as in the dictionary, not sorted
    assert model.unit_names == ("stem", "stage1.block1", "stage2.block1")
    assert chain.joint_shapes(model, ("stage1", "stage2"), 8) == [
        (1, 8, 8, 4),
        (1, 4, 4, 4),
    ]
    images = jnp.asarray(np.random.default_rng(0).normal(size=(3, 8, 8, 3)), "f4")
    outputs = jax.jit(functools.partial(model.apply, train=False))(
        weights(model), images
    )
    logits, maps = plain(images)
    np.testing.assert_allclose(outputs.logits, logits, rtol=1e-6)
    np.testing.assert_allclose(outputs.pooled, maps["a"].mean((1, 2)), rtol=1e-6)
    for found, expected in zip(outputs.features, maps.values(), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-6)
    moved = model.clone(order=(4, 3, 2, 1, 0)).apply(
        weights(model), images, train=False
    )
    np.testing.assert_allclose(moved.logits, logits[:, ::-1], rtol=1e-6)


def test_its_arrays_are_arguments_and_not_constants():
    """Of a batch of any size, NumPy's as well."""
    model = network()
    shapes = [array.shape for array in model.function.arrays]
    assert shapes == [(3, 4), (1, 1, 1, 4), (4, 5)]
    for count in (1, 2, 7):
        images = jnp.ones((count, 8, 8, 3))
        run = functools.partial(model.apply, train=False)
        program = jax.make_jaxpr(run)(weights(model), images)
        assert program.consts == []
    for i in range(3):
        arrays = weights(model)["params"]
        arrays[f"array{i}"] = np.zeros_like(arrays[f"array{i}"])
        outputs = model.apply({"params": arrays}, images, train=False)
        assert not outputs.logits.any()


def test_tables_for_images_of_a_size_stay_constants():
    """They are not the weights that have changed."""

    def fn(images):
        table = np.full((len(images), 1, 1, 1), 2, np.float32)
        return (table * images).mean((1, 2))

    model, images = network(fn), jnp.ones((3, 8, 8, 3))
    outputs = model.apply(weights(model), images, train=False)
    np.testing.assert_array_equal(outputs.logits, np.full((3, 3), 2))


def test_features_are_chosen_and_put_in_order():
    assert network(features=("a", "z")).function.maps == ("a", "z")
    assert network(features=()).stage_sizes == ()
    with pytest.raises(errors.TeacherError, match="'zz'; .*must be one of z, a"):
        network(features=("zz",))


def test_variables_may_be_given():
    """Where a function is jitted by itself, its arrays cannot be found."""
    with pytest.raises(errors.TeacherError, match="3 of its arrays .*`variables`"):
        network(jax.jit(plain))

    @jax.jit
    def fn(variables, images):
        return images.mean((1, 2)) @ variables["kernel"] @ variables["heads"][0]

    model = network(fn, variables={"kernel": KERNEL, "heads": [np.asarray(HEAD)]})
    images = jnp.ones((2, 8, 8, 3))
    outputs = model.apply(weights(model), images, train=False)
    np.testing.assert_allclose(
        outputs.logits, images.mean((1, 2)) @ KERNEL @ HEAD, rtol=1e-6
    )
    zeros = jax.tree.map(jnp.zeros_like, weights(model))
    assert not model.apply(zeros, images, train=False).logits.any()


class Net(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.dense = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, images):
        features = nnx.relu(self.norm(self.conv(images)))
        return self.dense(self.dropout(features.mean((1, 2)))), {"map": features}


def test_weights_that_change_afterwards_are_noticed():
    net = Net(nnx.Rngs(0))
    with pytest.raises(errors.TeacherError, match="evaluation mode"):
        network(net)  # it would update its running averages
    net.eval()
    model = network(net)
    assert len(model.function.arrays) == 8  # of which none is of the dropout
    variables, images = weights(model), jnp.ones((2, 8, 8, 3))
    np.testing.assert_allclose(
        model.apply(variables, images, train=False).logits, net(images)[0], rtol=1e-5
    )
    net.dense.kernel[...] = jnp.ones((4, 3))
    with pytest.raises(errors.TeacherError, match="not those .* registered"):
        model.apply(variables, images, train=False)


def test_weights_of_numpy_that_change_are_noticed():
    kernel = np.ones((3, 5), np.float32)
    model = network(lambda images: images.mean((1, 2)) @ kernel)
    images = jnp.ones((2, 8, 8, 3))
    outputs = model.apply(weights(model), images, train=False)
    np.testing.assert_array_equal(outputs.logits, np.full((2, 5), 3))
    kernel = 2 * kernel
    with pytest.raises(errors.TeacherError, match="not those .* registered"):
        model.apply(weights(model), images, train=False)


@pytest.mark.parametrize(
    ("fn", "words"),
    [
        (lambda x: np.asarray(x).mean((1, 2)), "cannot be traced .*8x8 .*no NumPy"),
        (lambda x: x.reshape(4, -1), r"the logits must be \(B, classes\), not \(4, 48"),
        (lambda x: (x[:, 0, 0], {"m": x[:, 0]}), "map 'm' must be"),
        (lambda x: x, "the logits must be"),
    ],
)
def test_what_is_no_teacher_is_refused(fn, words):
    with pytest.raises(errors.TeacherError, match=f"(?s)teacher mine.*{words}"):
        network(fn, image_size=8)


def test_class_names_are_as_many_as_logits():
    with pytest.raises(errors.TeacherError, match="2 names for 5 logits"):
        network(classes=("a", "b"))
    assert network(classes=tuple("abcde")).function.classes == tuple("abcde")


def test_it_runs_as_a_whole_alone():
    model = network()
    with pytest.raises(ValueError, match="run as a whole"):
        model.apply(weights(model), jnp.ones((1, 8, 8, 3)), train=False, after="stage1")
