"""Networks: shortcuts, joints, folding, precision."""

import functools

import golden_weights
import hme_weights
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from lakd_jax import models
from lakd_jax.models import chain, folding, layers, resnet, vam


@functools.cache
def network(name="resnet8", **options):
    """Returns a small network and variables for it; "ltb" and "split" are HMEs."""
    if name in ("ltb", "split"):
        model = hme_weights.small(layout=name, base="wrn_10_1")
        return model, hme_weights.drawn(model)
    model = models.create(name, num_classes=5, **options)
    return model, toys.network(model, 1)


def run(model, variables, x, **options):
    return jax.jit(functools.partial(model.apply, train=False, **options))(variables, x)


def train_mode(model):
    return functools.partial(model.apply, train=True, mutable=["batch_stats"])


@functools.cache
def batch(channels=3):
    noise = np.random.default_rng(3).standard_normal((4, 8, 8, channels))
    return noise.astype(np.float32)


@pytest.mark.parametrize("stride", [1, 2])
def test_identity_block_with_silent_convolutions_is_its_shortcut(stride):
    # Zeros silence both convolutions, which leaves relu(pad_shortcut(x)).
    block, x = resnet.BasicBlock(6, stride, "identity", layers.Style()), batch()
    init = functools.partial(block.init, train=False)
    shapes = jax.eval_shape(init, jax.random.key(0), x)
    silent = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    out, preact = run(block, silent, x)
    kept = x[:, ::stride, ::stride]
    expected = np.pad(kept, ((0, 0), (0, 0), (0, 0), (1, 2)))
    np.testing.assert_array_equal(preact, expected)
    np.testing.assert_array_equal(out, np.maximum(preact, 0))


# Joints


def test_joints_resolve():
    model = models.create("resnet14", num_classes=5)
    blocks = [f"stage{s}.block{b}" for s in (1, 2, 3) for b in (1, 2)]
    assert model.unit_names == ("stem", *blocks)
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
    out = run(model, variables, batch(), joint=double)
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
    inside = chain.feature_at(out, model, "stage1.block1", preact=True)
    assert np.min(inside) < 0
    np.testing.assert_array_equal(out.blocks[0][0], np.maximum(inside, 0))


def test_entry_norms_of_the_next_unit_are_not_trained_from_below():
    """A loss on a WRN's pre-activation trains its own stage and nothing above."""
    model, variables = network("wrn_10_1")

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def gradient(params):
        isolate = functools.partial(
            train_mode(model), joint=lambda name, h: jax.lax.stop_gradient(h)
        )
        out, changed = isolate({**variables, "params": params}, batch())
        mean = changed["batch_stats"]["stage2"]["block1"]["entry_bn"]["mean"]
        return jnp.sum(out.preacts[1] ** 3), (mean, out.features[1])

    grads, (mean, feature) = gradient(variables["params"])
    trained = {
        unit for unit, tree in grads.items() if any(map(np.any, jax.tree.leaves(tree)))
    }
    assert trained == {"stage1"}
    # The norm received one batch: its running mean was updated once.
    expected = 0.1 * np.asarray(feature).mean((0, 1, 2))
    np.testing.assert_allclose(mean, expected, atol=1e-6)


def test_a_stem_outside_the_features_can_be_cut_at():
    model = models.create("mobilenet_v1", num_classes=5)
    images = np.zeros((4, 32, 32, 3), np.float32)
    apply = functools.partial(model.apply, train=False)
    shapes = jax.eval_shape(apply, chain.variable_shapes(model), images)
    assert len(shapes.features) == len(shapes.preacts) == 4
    assert chain.feature_at(shapes, model, "stem").shape == (4, 16, 16, 32)
    for preact in (False, True):
        stage = chain.feature_at(shapes, model, "stage1", preact=preact)
        assert stage.shape == (4, 8, 8, 128)
    with pytest.raises(ValueError, match="no pre-activation is recorded at 'stem'"):
        chain.feature_at(shapes, model, "stem", preact=True)


@pytest.mark.parametrize("name", ["resnet14", "ltb", "split"])
def test_running_from_any_joint_gives_the_same_logits(name):
    model, variables = network(name)
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
    if name == "resnet14":
        out = rests[joints.index("stage2.block1")]
        assert [len(stage) for stage in out.blocks] == [0, 1, 2]
        assert len(out.features) == len(out.preacts) == 2
    with pytest.raises(ValueError, match="joint is"):
        run(model, variables, batch(), after="stage9")


# Folding (parity of folded networks is in test_models_golden)


def test_folding_by_hand():
    """y = scale (conv - mean) / sqrt(var + 1e-5) + bias."""
    model, variables = network()
    variables = jax.tree.map(np.copy, variables)
    stem = variables["params"]["stem"]
    stem["bn"] = {"scale": np.full(16, 3.0), "bias": np.full(16, 0.5)}
    statistics = {"mean": np.full(16, 2.0), "var": np.full(16, 4.0 - 1e-5)}
    variables["batch_stats"]["stem"]["bn"] = statistics
    folded_model, folded = folding.fold(model, variables)
    conv = folded["params"]["stem"]["conv"]
    np.testing.assert_allclose(conv["kernel"], 1.5 * stem["conv"]["kernel"], rtol=1e-6)
    np.testing.assert_allclose(conv["bias"], np.full(16, 0.5 - 1.5 * 2.0), rtol=1e-6)
    assert folded_model == model.clone(folded=True)
    with pytest.raises(ValueError, match="not those of ResNet"):
        folding.fold(models.create("resnet14", num_classes=5), variables)


# Training mode, precision, compilation


def test_training_updates_running_statistics_as_pytorch_does():
    norm, x = layers.norm(layers.Style(), train=True, name="bn"), batch(16)
    _, changed = norm.init_with_output(jax.random.key(0), x)
    new = norm.apply(changed, x, mutable=["batch_stats"])[1]["batch_stats"]
    np.testing.assert_allclose(new["mean"], 0.1 * x.mean((0, 1, 2)), atol=1e-5)
    np.testing.assert_allclose(new["var"], 0.9 + 0.1 * x.var((0, 1, 2)), rtol=1e-4)


def test_statistics_in_one_pass_are_equal_unless_means_are_large():
    x, found = batch(), {}
    for one_pass in (False, True):
        model, _ = network(one_pass=one_pass)
        norm = layers.norm(model.style, train=True, name=None)
        variables = norm.init(jax.random.key(0), x)
        for mean in (0.5, 1000):
            moved = norm.apply(variables, x + mean, mutable=["batch_stats"])[1]
            found[one_pass, mean] = 10 * (moved["batch_stats"]["var"] - 0.9)
    var = np.var(batch(), (0, 1, 2))
    for key in ((False, 0.5), (True, 0.5), (False, 1000)):
        np.testing.assert_allclose(found[key], var, rtol=2e-4)
    assert np.abs(found[True, 1000] - var).max() > 1e-3


@pytest.mark.parametrize("shortcut", ["projection", "identity"])
def test_bfloat16_keeps_parameters_statistics_and_logits_in_float32(shortcut):
    model, variables = network(shortcut=shortcut)
    half = model.clone(dtype=jnp.dtype("bfloat16"))
    out, changed = jax.jit(train_mode(half))(variables, batch())
    assert out.logits.dtype == out.pooled.dtype == jnp.float32
    assert {f.dtype for f in (*out.features, *out.preacts)} == {jnp.dtype("bfloat16")}
    for leaf in jax.tree.leaves((changed, chain.variable_shapes(half))):
        assert leaf.dtype == jnp.float32
    plain, _ = jax.jit(train_mode(model))(variables, batch())
    assert 0 < golden_weights.distance(out.logits, plain.logits) < 5e-2


def test_networks_of_equal_options_are_equal():
    """By equality and hash, under jit, they share one program."""
    same = [{"dtype": "float32"}, {"dtype": jnp.float32}, {}]
    gates = [{"vam": vam.Options()}, {"vam": vam.Options("static", 4, 1.0, True, 0.0)}]
    (one,), (gated,) = (
        {models.create("vgg8", num_classes=5, **options) for options in every}
        for every in (same, gates)
    )
    assert len({one, gated, models.create("vgg8", num_classes=6)}) == 3
