"""ConvNeXt and EfficientNet: options, initial values, folding, precision.

Agreement with the public implementations is in test_models_golden.
"""

import functools

import flax
import golden_weights
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from flax import linen as nn

from lakd_jax import models
from lakd_jax.models import chain, convnext, efficientnet, folding, layers

CLASSES = 5
ConvNeXt = functools.partial(
    convnext.ConvNeXt,
    stage_sizes=(1, 2, 1, 1),
    widths=(8, 8, 16, 16),
    num_classes=CLASSES,
    patch=2,
)
EfficientNet = functools.partial(
    efficientnet.EfficientNet,
    stage_sizes=(1, 1, 2),
    percent=25,
    num_classes=CLASSES,
)
FAMILIES = [ConvNeXt, EfficientNet]


def images():
    return toys.noise(1, 4, 32, 32, 3)


@functools.cache
def variables_of(make):
    return toys.drawn(chain.variable_shapes(make()), 1)


def training(model, **options):
    """(variables, images, key) -> outputs in training mode, and new statistics."""

    @jax.jit
    def run(variables, x, key):
        train = functools.partial(model.apply, train=True, mutable=["batch_stats"])
        return train(variables, x, rngs={"dropout": key}, **options)

    return run


# Options


def branch(rate):
    """A block in training mode on two keys, its input, and its value in evaluation."""
    block = convnext.Block(8, False, 1.0, rate, layers.Style())
    x = toys.noise(2, 64, 4, 4, 8)
    init = functools.partial(block.init, train=False)
    variables = toys.drawn(jax.eval_shape(init, jax.random.key(0), x), 3)

    @jax.jit
    def run(variables, x, key):
        out, _ = block.apply(variables, x, train=True, rngs={"dropout": key})
        return out

    plain, _ = jax.jit(functools.partial(block.apply, train=False))(variables, x)
    outs = [run(variables, x, jax.random.key(n)) for n in (0, 0, 1)]
    return x, plain, outs


def test_stochastic_depth_drops_whole_examples_and_scales_the_others():
    rate = 0.25
    x, plain, (out, again, other) = branch(rate)
    dropped = np.all(np.equal(out, x), (1, 2, 3))
    assert 4 < dropped.sum() < 32  # 16 of 64 expected
    scaled = x + (plain - x) / (1 - rate)
    np.testing.assert_allclose(out[~dropped], scaled[~dropped], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(out, again)
    assert np.any(np.not_equal(out, other))


def rates(model):
    blocks = [(s, i) for s, size in enumerate(model.stage_sizes) for i in range(size)]
    return [model.make_block(*block, None).drop_path for block in blocks]


def test_rate_of_stochastic_depth_grows_as_the_publishers_have_it():
    model = models.create("convnext_atto", num_classes=1, drop_path=0.1)
    np.testing.assert_allclose(rates(model), np.linspace(0, 0.1, 12))
    model = models.create("efficientnet_b0", num_classes=1, drop_path=0.2)
    np.testing.assert_allclose(rates(model), 0.2 * np.arange(16) / 16)
    assert layers.share_of_depth(0.3, 0, 0) == 0  # of a single block


@pytest.mark.parametrize("make", FAMILIES)
def test_only_positive_rates_read_random_numbers(make):
    x, key = images(), jax.random.key(0)
    variables = variables_of(make)
    train = functools.partial(make().apply, train=True, mutable=["batch_stats"])
    shapes, _ = jax.eval_shape(train, variables, x)
    assert shapes.logits.shape == (4, CLASSES)
    for rate in ("dropout", "drop_path"):
        model = make(**{rate: 0.5})
        train = functools.partial(model.apply, train=True, mutable=["batch_stats"])
        with pytest.raises(flax.errors.InvalidRngError, match="dropout"):
            jax.eval_shape(train, variables, x)
        out, _ = jax.eval_shape(train, variables, x, rngs={"dropout": key})
        assert out.logits.shape == (4, CLASSES)
        # The same variables, and none are needed to evaluate.
        jax.eval_shape(functools.partial(model.apply, train=False), variables, x)


def test_dropout_is_between_the_pooled_features_and_the_classifier():
    head = layers.Head(16, layers.Style(), dropout=0.5)
    x = toys.noise(4, 8, 2, 2, 16)
    dense = {"kernel": np.eye(16, dtype=np.float32), "bias": np.zeros(16, np.float32)}
    variables, rngs = {"params": {"dense": dense}}, {"dropout": jax.random.key(1)}
    logits, pooled = head.apply(variables, x, train=True, rngs=rngs)
    np.testing.assert_allclose(pooled, x.mean((1, 2)), rtol=1e-5, atol=1e-6)
    kept = np.not_equal(logits, 0)
    assert 32 < kept.sum() < 96  # half of 128 expected
    np.testing.assert_allclose(logits, np.where(kept, 2 * pooled, 0), rtol=1e-6)


@pytest.mark.parametrize("value", [1e-6, 0.5, 0.0])
def test_layer_scale_is_the_branch_s_initial_factor(value):
    model = ConvNeXt(layer_scale=value)
    x = toys.noise(5, 1, 4, 4, 8)
    block = model.make_block(0, 0, None)
    variables = block.init(jax.random.key(0), x, train=False)
    if not value:
        assert "layer_scale" not in variables["params"]
        return
    scale = variables["params"]["layer_scale"]
    np.testing.assert_array_equal(scale, np.full(8, np.float32(value)))
    off = {"params": {**variables["params"], "layer_scale": np.zeros(8, np.float32)}}
    np.testing.assert_array_equal(block.apply(off, x, train=False)[0], x)


def test_patch_is_kernel_and_stride_of_the_stem():
    joints = ["stem", *(f"stage{k}" for k in (1, 2, 3, 4))]
    for patch, sides in ((2, (32, 32, 16, 8, 4)), (8, (8, 8, 4, 2, 1))):
        model = ConvNeXt(patch=patch)
        shapes = chain.joint_shapes(model, joints, 64)
        assert [shape[1] for shape in shapes] == list(sides)
        kernel = chain.variable_shapes(model)["params"]["stem"]["conv"]["kernel"]
        assert kernel.shape == (patch, patch, 3, 8)


def test_widths_are_rounded_as_torchvision_rounds_them():
    """To the nearest multiple of 8, but not down by more than a tenth."""
    found = [efficientnet.scaled_width(width, 110) for width in (16, 24, 40, 80, 112)]
    assert found == [16, 24, 48, 88, 120]  # published, of B2
    assert efficientnet.scaled_width(32, 35) == 16  # 11.2 is nearer to 8


# Initial values


@functools.cache
def initial(make):
    """Initial parameters by path: of the second stage's first block and the head."""
    model = make()

    @jax.jit
    def init(key):
        block = model.make_block(1, 0, None).init(key, block_input, train=False)
        return block, model.make_head(None).init(key, features, train=False)

    block_input, features = jnp.zeros((1, 4, 4, 32)), jnp.zeros((1, 2, 2, 256))
    drawn = init(jax.random.key(0, impl="unsafe_rbg"))
    return [flax.traverse_util.flatten_dict(part["params"]) for part in drawn]


def test_convnext_starts_with_small_weights_and_no_bias():
    kernels = []
    for path, leaf in (*initial(ConvNeXt)[0].items(), *initial(ConvNeXt)[1].items()):
        if path[-1] == "kernel":
            kernels.append(np.ravel(leaf))
        elif path[-1] == "bias":
            assert not np.any(leaf)
    drawn = np.concatenate(kernels)
    assert len(drawn) > 2000
    assert np.std(drawn) == pytest.approx(0.02, rel=0.05)
    assert np.max(np.abs(drawn)) > 0.05  # PyTorch cuts off at 2, not at 2 deviations


def test_efficientnet_starts_as_torchvision_does():
    block, head = initial(EfficientNet)
    bound = CLASSES**-0.5
    dense = head["dense", "kernel"]
    assert 0.9 * bound < np.max(np.abs(dense)) <= bound
    assert not np.any(head["dense", "bias"])
    for layer in ("squeeze", "excite"):
        kernel = block[layer, "kernel"]
        assert np.std(kernel) == pytest.approx((2 / kernel.shape[-1]) ** 0.5, rel=0.1)
        assert not np.any(block[layer, "bias"])


# Chain, folding, precision


@pytest.mark.parametrize("make", FAMILIES)
def test_features_begin_with_the_stem_and_are_their_own_preactivations(make):
    model = make()
    run = jax.eval_shape(
        functools.partial(model.apply, train=False), variables_of(make), images()
    )
    assert len(run.features) == 1 + len(model.stage_sizes)
    assert run.features[0] == run.stem
    assert run.preacts == run.features
    assert len(run.taps) == sum(model.stage_sizes)


@pytest.mark.parametrize("make", FAMILIES)
def test_folding_leaves_no_batch_norm_and_the_same_outputs(make):
    model = make()
    variables = variables_of(make)
    if make is EfficientNet:  # statistics that matter
        key, stats = jax.random.key(0), variables["batch_stats"]
        _, changed = training(model)(variables, images(), key)
        stats = changed["batch_stats"]
        variables = {**variables, "batch_stats": stats}
    run = jax.jit(functools.partial(model.apply, train=False))
    plain = run(variables, images())
    folded_model, folded = folding.fold(model, variables)
    assert set(folded) == {"params"}
    paths = flax.traverse_util.flatten_dict(folded["params"])
    assert not any(part.startswith("bn") for path in paths for part in path)
    if make is ConvNeXt:
        assert (
            paths.keys() == flax.traverse_util.flatten_dict(variables["params"]).keys()
        )
    out = jax.jit(functools.partial(folded_model.apply, train=False))(folded, images())
    for ours, expected in zip(
        jax.tree.leaves(out), jax.tree.leaves(plain), strict=True
    ):
        assert golden_weights.distance(ours, expected) < 1e-5


@pytest.mark.parametrize("make", FAMILIES)
def test_bfloat16_keeps_parameters_statistics_and_logits_in_float32(make):
    model = make()
    half = model.clone(dtype=jnp.dtype("bfloat16"), dropout=0.1, drop_path=0.1)
    variables, key = variables_of(make), jax.random.key(0)
    apply = functools.partial(half.apply, train=True, mutable=["batch_stats"])
    out, changed = jax.eval_shape(
        functools.partial(apply, rngs={"dropout": key}), variables, images()
    )
    assert out.logits.dtype == out.pooled.dtype == jnp.float32
    assert {f.dtype for f in out.features} == {jnp.dtype("bfloat16")}
    for leaf in jax.tree.leaves((changed, chain.variable_shapes(half))):
        assert leaf.dtype == jnp.float32


def test_mean_of_squeeze_and_excitation_is_float32():
    """In bfloat16, the sum of many equal numbers would stop growing."""
    model = EfficientNet(dtype=jnp.dtype("bfloat16"))
    block = model.make_block(1, 0, None)
    x = jnp.zeros((1, 8, 8, 8), jnp.bfloat16)
    program = jax.make_jaxpr(
        lambda key: block.init_with_output(key, x, train=False)[0]
    )(jax.random.key(0))
    sums = [e for e in equations(program.jaxpr) if e.primitive.name == "reduce_sum"]
    pooled = [e for e in sums if e.invars[0].aval.ndim == 4]
    assert pooled and all(e.invars[0].aval.dtype == jnp.float32 for e in pooled)


def equations(program):
    for equation in program.eqns:
        yield equation
        for value in equation.params.values():
            if hasattr(value, "jaxpr"):
                yield from equations(value.jaxpr)


def test_layer_norm_has_the_publishers_epsilon_and_float32_statistics():
    norm = layers.layer_norm(layers.Style(), name="norm")
    for mean, step in ((0.0, 1e-3), (1024.0, 2.0**-4)):
        x = np.array([[mean - step, mean + step]], np.float32)
        got, _ = norm.init_with_output(jax.random.key(0), x)
        expected = step / np.sqrt(step**2 + 1e-6)
        np.testing.assert_allclose(got, [[-expected, expected]], rtol=1e-4)
    half = layers.layer_norm(layers.Style(jnp.dtype("bfloat16")), name="norm")
    out, variables = half.init_with_output(jax.random.key(0), x)
    assert out.dtype == jnp.bfloat16
    assert {v.dtype for v in jax.tree.leaves(variables)} == {jnp.dtype("float32")}


def test_gelu_is_exact():
    x = np.linspace(-3, 3, 7, dtype=np.float32)
    expected = x * jax.scipy.stats.norm.cdf(x)
    np.testing.assert_allclose(layers.gelu(x), expected, rtol=1e-5, atol=1e-6)
    assert np.max(np.abs(nn.gelu(x) - expected)) > 1e-4
