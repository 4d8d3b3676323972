"""Networks: shortcuts, joints, names, precision."""

import functools
import math

import flax
import golden_weights
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lakd_jax import models
from lakd_jax.models import chain, layers, resnet


@functools.cache
def network(name="resnet8", shortcut="projection"):
    """Returns a small network with variables distributed as by `init`.

    Drawn by NumPy: XLA takes a second to compile each shape of random numbers.
    """
    model = models.create(name, num_classes=5, shortcut=shortcut)
    return model, drawn(model)


def drawn(model):
    generator = np.random.default_rng(1)

    def draw(path, leaf):
        if path[-1].key in ("scale", "var"):
            return np.ones(leaf.shape, np.float32)
        if len(leaf.shape) == 1:
            return np.zeros(leaf.shape, np.float32)
        deviation = math.sqrt(2 / math.prod(leaf.shape[:-1]))
        return np.float32(deviation * generator.standard_normal(leaf.shape))

    return jax.tree_util.tree_map_with_path(draw, variable_shapes(model))


@functools.cache
def variable_shapes(model):
    init = functools.partial(model.init, train=False)
    return jax.eval_shape(init, jax.random.key(0), batch())


@functools.cache
def compiled(model, after=None):
    """Returns a compiled (variables, x) -> outputs in evaluation mode."""
    return jax.jit(functools.partial(model.apply, train=False, after=after))


def run(model, variables, x, after=None):
    return compiled(model, after)(variables, x)


def train_mode(model):
    return functools.partial(model.apply, train=True, mutable=["batch_stats"])


@functools.cache
def trained(name="resnet8"):
    """Returns (outputs, updated statistics) for `batch()` in training mode."""
    model, variables = network(name)
    return jax.jit(train_mode(model))(variables, batch())


@functools.cache
def batch(size=8):
    noise = np.random.default_rng(3).standard_normal((4, size, size, 3))
    return noise.astype(np.float32)


def flat_names(tree):
    return set(flax.traverse_util.flatten_dict(tree, sep="/"))


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


# Shortcuts and sizes


def test_pad_shortcut_by_hand():
    x = np.arange(1.0, 17.0).reshape(1, 4, 4, 1) * [1.0, 100.0]
    out = jax.jit(lambda x: resnet.pad_shortcut(x, 4, 2))(x)
    corners = [[1.0, 3.0], [9.0, 11.0]]  # rows and columns 0 and 2
    zeros = np.zeros((2, 2))
    expected = np.stack([zeros, corners, 100 * np.asarray(corners), zeros], -1)
    np.testing.assert_array_equal(out[0], expected)


def test_pad_shortcut_without_stride_keeps_every_position():
    x = np.ones((1, 3, 3, 2))
    out = jax.jit(lambda x: resnet.pad_shortcut(x, 5, 1))(x)
    np.testing.assert_array_equal(out, np.broadcast_to([0, 1, 1, 0, 0], (1, 3, 3, 5)))


def test_identity_block_with_silent_convolutions_is_its_shortcut():
    # Zeros silence both convolutions, which leaves relu(pad_shortcut(x)).
    block = resnet.BasicBlock(6, 2, "identity", layers.Style())
    x = batch()
    init = functools.partial(block.init, train=False)
    shapes = jax.eval_shape(init, jax.random.key(0), x)
    silent = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    out, preact = jax.jit(functools.partial(block.apply, train=False))(silent, x)
    expected = np.pad(x[:, ::2, ::2], ((0, 0), (0, 0), (0, 0), (1, 2)))
    np.testing.assert_array_equal(preact, expected)
    np.testing.assert_array_equal(out, np.maximum(preact, 0))


@pytest.mark.parametrize(
    ("name", "shortcut", "classes", "parameters"),
    [
        # 269,722 and 1,727,962 are what the authors of the public checkpoints state.
        ("resnet20", "identity", 10, 269_722),
        ("resnet110", "identity", 10, 1_727_962),
        ("resnet20", "projection", 100, 278_324),
        ("resnet8x4", "projection", 100, 1_233_540),
        # Less three projections: (32*64 + 2*64) + (64*128 + 2*128) + (128*256 + 2*256).
        ("resnet8x4", "identity", 100, 1_233_540 - 2_176 - 8_448 - 33_280),
    ],
)
def test_parameter_counts(name, shortcut, classes, parameters):
    model = models.create(name, num_classes=classes, shortcut=shortcut)
    assert count(variable_shapes(model)["params"]) == parameters


def test_global_pool_takes_any_image_size():
    model, variables = network()
    for size in (8, 12, 16):
        apply = functools.partial(model.apply, train=False)
        out = jax.eval_shape(apply, variables, batch(size))
        assert out.logits.shape == (4, 5)
        sides = [f.shape[1] for f in out.features]
        assert sides == [size, size, size // 2, size // 4]


# Joints


def test_names_and_tree():
    model, variables = network("resnet14")
    blocks = [f"stage{s}.block{b}" for s in (1, 2, 3) for b in (1, 2)]
    assert model.unit_names == ("stem", *blocks)
    assert model.stage_sizes == (2, 2, 2)
    params, stats = variables["params"], variables["batch_stats"]
    assert set(params) == {"stem", "stage1", "stage2", "stage3", "head"}
    assert set(stats) == {"stem", "stage1", "stage2", "stage3"}
    assert set(params["stage2"]) == {"block1", "block2"}
    assert flat_names(params["stage2"]["block1"]) == {
        *("conv1/kernel", "conv2/kernel", "shortcut_conv/kernel"),
        *(
            f"{bn}/{p}"
            for bn in ("bn1", "bn2", "shortcut_bn")
            for p in ("scale", "bias")
        ),
    }
    assert flat_names(params["stage1"]["block1"]) == {
        *("conv1/kernel", "conv2/kernel"),
        *("bn1/scale", "bn1/bias", "bn2/scale", "bn2/bias"),
    }
    assert flat_names(stats["stem"]) == {"bn/mean", "bn/var"}
    assert flat_names(params["head"]) == {"dense/kernel", "dense/bias"}


def test_joints_resolve():
    model, _ = network("resnet14")
    assert chain.resolve_joint(model, "stage2") == "stage2.block2"
    for name in model.unit_names:
        assert chain.resolve_joint(model, name) == name
    for unknown in ("stage4", "stage2.block3", "head", ""):
        with pytest.raises(ValueError, match="stage3.block2"):
            chain.resolve_joint(model, unknown)
    with pytest.raises(ValueError, match="did you mean 'stage1.block2'"):
        chain.resolve_joint(model, "stage1.blok2")


def test_joint_function_is_called_for_every_unit_after_recording():
    model, variables = network("resnet14")
    seen = []

    def double(name, h):
        seen.append(name)
        return 2 * h

    plain = run(model, variables, batch())
    doubled = functools.partial(model.apply, train=False, joint=double)
    out = jax.jit(doubled)(variables, batch())
    assert tuple(seen) == model.unit_names
    # The stem is recorded before doubling; the next block and the head receive double.
    np.testing.assert_allclose(out.features[0], plain.features[0], rtol=1e-6)
    rest = run(model, variables, 2 * plain.features[0], after="stem")
    np.testing.assert_allclose(out.blocks[0][0], rest.blocks[0][0], rtol=1e-5)
    pooled = 2 * np.asarray(out.features[-1]).mean((1, 2))
    np.testing.assert_allclose(out.pooled, pooled, rtol=1e-5)


def test_features_and_preacts_match_blocks():
    model, variables = network("resnet14")
    out = run(model, variables, batch())
    assert [len(stage) for stage in out.blocks] == [2, 2, 2]
    for stage in (1, 2, 3):
        feature = chain.feature_at(out, model, f"stage{stage}")
        np.testing.assert_array_equal(feature, out.features[stage])
        preact = chain.feature_at(out, model, f"stage{stage}", preact=True)
        assert np.min(preact) < 0
        np.testing.assert_array_equal(feature, np.maximum(preact, 0))
    stem = chain.feature_at(out, model, "stem", preact=True)
    np.testing.assert_array_equal(stem, out.features[0])
    with pytest.raises(ValueError, match="ends of stages"):
        chain.feature_at(out, model, "stage1.block1", preact=True)


def test_stopping_the_gradient_at_joints_isolates_units():
    model, variables = network()

    @jax.jit
    @jax.jacrev
    def gradients(params):
        out, _ = model.apply(
            {**variables, "params": params},
            batch(),
            train=True,
            joint=lambda name, h: jax.lax.stop_gradient(h),
            mutable=["batch_stats"],
        )
        return {
            "head": jnp.mean(out.logits**2),
            "stage1": jnp.mean(out.features[1] ** 2),
        }

    for unit, gradient in gradients(variables["params"]).items():
        largest = sizes(gradient)
        assert largest.pop(unit) > 0
        assert set(largest.values()) == {0.0}


def sizes(gradient):
    """Returns the largest absolute gradient of each unit."""
    return {
        unit: max(float(np.max(np.abs(g))) for g in jax.tree.leaves(tree))
        for unit, tree in gradient.items()
    }


def test_entry_norms_of_the_next_unit_are_not_trained_from_below():
    """A loss on a WRN's pre-activation trains its own stage and nothing above."""
    model = models.create("wrn_10_1", num_classes=5)
    variables = drawn(model)

    def loss(params):
        out, changed = model.apply(
            {**variables, "params": params},
            batch(),
            train=True,
            joint=lambda name, h: jax.lax.stop_gradient(h),
            mutable=["batch_stats"],
        )
        mean = changed["batch_stats"]["stage2"]["block1"]["entry_bn"]["mean"]
        return jnp.sum(out.preacts[1] ** 3), (mean, out.features[1])

    gradient, (mean, feature) = jax.jit(jax.grad(loss, has_aux=True))(
        variables["params"]
    )
    largest = sizes(gradient)
    assert largest.pop("stage1") > 0
    assert set(largest.values()) == {0.0}
    # The norm received one batch: its running mean was updated once.
    expected = 0.1 * np.asarray(feature).mean((0, 1, 2))
    np.testing.assert_allclose(mean, expected, atol=1e-6)


def test_a_stem_outside_the_features_can_be_cut_at():
    model = models.create("mobilenet_v1", num_classes=5)
    shapes = jax.eval_shape(
        lambda v, x: model.apply(v, x, train=False), variable_shapes(model), batch(32)
    )
    assert len(shapes.features) == len(shapes.preacts) == 4
    assert chain.feature_at(shapes, model, "stem").shape == (4, 16, 16, 32)
    for preact in (False, True):
        stage = chain.feature_at(shapes, model, "stage1", preact=preact)
        assert stage.shape == (4, 8, 8, 128)
    with pytest.raises(ValueError, match="no pre-activation is recorded at 'stem'"):
        chain.feature_at(shapes, model, "stem", preact=True)


def test_running_from_any_joint_gives_the_same_logits():
    model, variables = network("resnet14")
    joints = (*model.unit_names, "stage1", "stage3")

    @jax.jit
    def full_and_rests(variables, x):  # one program computes common parts once
        full = model.apply(variables, x, train=False)
        middles = [chain.feature_at(full, model, joint) for joint in joints]
        return full, [
            model.apply(variables, h, train=False, after=joint)
            for joint, h in zip(joints, middles, strict=True)
        ]

    full, rests = full_and_rests(variables, batch())
    for out in rests:
        np.testing.assert_allclose(out.logits, full.logits, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(out.pooled, full.pooled, rtol=1e-5, atol=1e-5)
    out = rests[joints.index("stage2.block1")]
    assert [len(stage) for stage in out.blocks] == [0, 1, 2]
    assert len(out.features) == len(out.preacts) == 2
    with pytest.raises(ValueError, match="joint is"):
        run(model, variables, full.features[0], after="stage9")


def test_one_pass_equals_units_in_turn():
    model, variables = network()

    @jax.jit
    def in_turn(variables, x):
        params, stats = variables["params"], variables["batch_stats"]
        stem = {"params": params["stem"], "batch_stats": stats["stem"]}
        h, _ = model.make_stem(None).apply(stem, x, train=False)
        for stage in range(3):
            name = f"stage{stage + 1}"
            block = {
                "params": params[name]["block1"],
                "batch_stats": stats[name]["block1"],
            }
            h, _ = model.make_block(stage, 0, None).apply(block, h, train=False)
        head = {"params": params["head"]}
        return model.make_head(None).apply(head, h, train=False)[0]

    full = run(model, variables, batch())
    logits = in_turn(variables, batch())
    np.testing.assert_allclose(logits, full.logits, rtol=1e-5, atol=1e-5)


# Training mode, precision, compilation


def test_training_updates_running_statistics_as_pytorch_does():
    model, variables = network()
    _, changed = trained()
    kernel = variables["params"]["stem"]["conv"]["kernel"]
    padded = np.pad(batch(), ((0, 0), (1, 1), (1, 1), (0, 0)))
    h = sum(
        padded[:, y : y + 8, x : x + 8] @ kernel[y, x]
        for y in range(3)
        for x in range(3)
    )
    assert model.make_stem(None).features == h.shape[-1]
    new = changed["batch_stats"]["stem"]["bn"]
    np.testing.assert_allclose(new["mean"], 0.1 * h.mean((0, 1, 2)), atol=1e-5)
    np.testing.assert_allclose(new["var"], 0.9 + 0.1 * h.var((0, 1, 2)), rtol=1e-4)


@pytest.mark.parametrize("shortcut", ["projection", "identity"])
def test_bfloat16_keeps_parameters_statistics_and_logits_in_float32(shortcut):
    _, variables = network(shortcut=shortcut)
    half = models.create(
        "resnet8", num_classes=5, shortcut=shortcut, dtype=jnp.bfloat16
    )
    out, changed = jax.eval_shape(train_mode(half), variables, batch())
    assert out.logits.dtype == out.pooled.dtype == jnp.float32
    assert {f.dtype for f in (*out.features, *out.preacts)} == {jnp.dtype("bfloat16")}
    for leaf in jax.tree.leaves((changed, variable_shapes(half))):
        assert leaf.dtype == jnp.float32


def test_bfloat16_gives_nearly_the_same_logits():
    _, variables = network()
    half = models.create("resnet8", num_classes=5, dtype=jnp.bfloat16)
    out, _ = jax.jit(train_mode(half))(variables, batch())
    assert 0 < golden_weights.distance(out.logits, trained()[0].logits) < 5e-2


def test_jit_gives_the_same_and_equal_models_share_the_program():
    model, variables = network()
    again = models.create("resnet8", num_classes=5, dtype="float32")
    assert again == model
    assert hash(again) == hash(model)
    assert models.create("resnet8", num_classes=6) != model
    apply = jax.jit(
        lambda model, variables, x: model.apply(variables, x, train=False),
        static_argnums=0,
    )
    out = apply(model, variables, batch())
    apply(again, variables, batch())
    assert apply._cache_size() == 1
    plain = run(model, variables, batch())
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), out, plain)


def test_initialisation_is_he_normal_and_torch_linear():
    model = models.create("resnet8x4", num_classes=100)
    x = jnp.zeros((1, 4, 4, 256))

    @jax.jit
    def init(key):
        parts = model.make_head(None), model.make_stem(None)
        return [part.init(key, x, train=False) for part in parts]

    weights, stem = jax.device_get(init(jax.random.key(2)))
    for leaf in jax.tree.leaves(weights):  # kernel and bias
        assert 0.9 / 16 < np.max(np.abs(leaf)) <= 1 / 16
    kernel = stem["params"]["conv"]["kernel"]
    assert kernel.shape == (3, 3, 256, 32)
    deviation = math.sqrt(2 / (9 * 32))
    assert np.std(kernel) == pytest.approx(deviation, rel=0.02)
    assert np.max(np.abs(kernel)) > 3 * deviation  # not truncated
    for value, leaf in (
        (1, stem["params"]["bn"]["scale"]),
        (0, stem["params"]["bn"]["bias"]),
        (0, stem["batch_stats"]["bn"]["mean"]),
        (1, stem["batch_stats"]["bn"]["var"]),
    ):
        np.testing.assert_array_equal(leaf, np.full(32, value))
