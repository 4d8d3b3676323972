"""Tests HME networks: golden values, properties of gates, levels and heads."""

import functools

import flax
import golden_weights
import hme_weights
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lakd_jax import interop, models
from lakd_jax.hme import network as network_lib
from lakd_jax.models import chain, folding

EPOCHS = (1, 10, 100, 300)


def noise(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


attention = jax.jit(network_lib.attention, static_argnums=1)
mix = jax.jit(network_lib.mix)
score = jax.jit(network_lib.score, static_argnums=1)


@functools.cache
def network(layout="ltb"):
    """Returns a small network, its variables and (variables, images) -> outputs."""
    model = hme_weights.small(layout=layout, base="wrn_10_1")
    apply = jax.jit(functools.partial(model.apply, train=False))
    return model, hme_weights.drawn(model), apply


@functools.cache
def images():
    return noise(4, 8, 8, 3)


def count(model):
    leaves = jax.tree.leaves(hme_weights.shapes(model)["params"])
    return sum(leaf.size for leaf in leaves)


@functools.cache
def soft_logits(output):
    """Returns the golden network's logits at all golden epochs, and the recording."""
    variables, images, recorded = hme_weights.golden(output)
    model = models.create("hme", num_classes=10, output=output)
    # The weights are an argument: XLA would spend seconds folding constants.
    apply = jax.jit(
        lambda t, *of: network_lib.soften(model, t).apply(*of, train=False).logits
    )
    every = {e: apply(np.float32(10 / e), variables, images) for e in EPOCHS}
    return every, recorded


@pytest.mark.parametrize("output", ["ce", "nce"])
def test_golden_soft(output):
    ours, recorded = soft_logits(output)
    for epoch, logits in ours.items():
        expected = recorded[f"logits_soft_epoch{epoch}"]
        assert golden_weights.distance(logits, expected) < 1e-4


@pytest.mark.parametrize("output", ["ce", "nce"])
def test_golden_hard_and_gates(output):
    variables, images, recorded = hme_weights.golden(output)
    model = models.create("hme", num_classes=10, output=output)
    apply = jax.jit(lambda v, x: model.apply(v, x, train=False).logits)
    logits_hard = apply(variables, images)
    assert golden_weights.distance(logits_hard, recorded["logits_hard"]) < 1e-4
    for i, logits in enumerate(network_lib.gates(variables["params"])):
        for epoch in (1, 100):
            ours = attention(logits, 10 / epoch)
            expected = recorded[f"gate{i}_soft_epoch{epoch}"]
            assert golden_weights.distance(ours, expected) < 1e-4
        hard = attention(logits, None)
        np.testing.assert_array_equal(hard, recorded[f"gate{i}_hard"])


@pytest.mark.parametrize(
    ("output", "classes", "parameters"),
    [
        ("ce", 10, 2_993_922),
        ("nce", 10, 2_995_212),
        ("ce", 100, 22_567_212),
        ("nce", 100, 22_580_112),
    ],
)
def test_property_1_counts(output, classes, parameters):
    model = models.create("hme", num_classes=classes, output=output)
    assert count(model) == parameters
    params = hme_weights.shapes(model)["params"]
    levels = [jax.tree.leaves(params[f"stage{s}"]) for s in (1, 2, 3)]
    sizes = [sum(leaf.size for leaf in leaves) for leaves in levels]
    assert sizes == [
        77_952,
        296_448 + 8,
        444_672 + 32,
    ]  # including the gates above them


@pytest.mark.parametrize("output", ["ce", "nce", "odds"])
def test_property_1_shapes(output):
    model = models.create("hme", num_classes=7, output=output)
    out = jax.eval_shape(
        lambda x: model.init_with_output(jax.random.key(0), x, train=False)[0],
        jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32),
    )
    assert out.logits.shape == (2, 7)
    # Concatenated experts: 2 of 64 channels, 4 of 64, 8 of 32.
    shapes = [(2, 16, 16, 128), (2, 8, 8, 256), (2, 4, 4, 256)]
    assert [f.shape for f in out.features] == shapes
    assert out.stem.shape == (2, 32, 32, 3)
    assert out.pooled.shape == (2, 256)


def test_property_2_rows():
    logits = noise(6, 4)
    for t in (0.01, 1.0, 30.0):
        soft = np.asarray(attention(logits, t))
        np.testing.assert_allclose(soft.sum(-1), 1, rtol=1e-6)
    assert np.all(np.asarray(attention(logits, 1.0)) > 0)
    hard = np.asarray(attention(logits, None))
    np.testing.assert_array_equal(hard.argmax(-1), logits.argmax(-1))
    np.testing.assert_array_equal(np.sort(hard, -1)[:, ::-1], np.eye(4)[[0] * 6])
    ties = np.zeros((6, 4), np.float32)
    ties[:, 1:3] = 1.0
    np.testing.assert_array_equal(attention(ties, None), np.eye(4)[[1] * 6])


def softmax(x):
    powers = np.exp(x - x.max(-1, keepdims=True), dtype=np.float64)
    return powers / powers.sum(-1, keepdims=True)


def test_property_3_temperature():
    logits = noise(5, 8, seed=1)
    for t in (0.1, 1.0, 10.0):
        released = softmax(np.log(softmax(logits / 0.5)) / t)
        np.testing.assert_allclose(
            attention(logits, t), released, rtol=1e-4, atol=1e-30
        )
    np.testing.assert_allclose(attention(logits, 1e6), 1 / 8, rtol=1e-4)
    lead = np.zeros((1, 8), np.float32)
    lead[0, 3] = 0.1
    assert np.max(attention(lead, 10 / 300)) > 0.98


def test_property_4_shift_and_permutation():
    logits, maps = noise(6, 4), noise(2, 3, 3, 4, 5, seed=1)
    for t in (None, 0.7):
        weights = attention(logits, t)
        moved = attention(logits + noise(6, 1, seed=2), t)
        np.testing.assert_allclose(moved, weights, rtol=1e-5)
        order = np.array([2, 0, 3, 1])
        permuted = mix(attention(logits[:, order], t), maps[..., order, :])
        np.testing.assert_allclose(permuted, mix(weights, maps), atol=1e-6)


def test_mixture_by_hand():
    maps = np.array([[1.0, 2.0], [10.0, 20.0]]).reshape(1, 1, 1, 2, 2)
    mixed = mix(np.array([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]]), maps)
    np.testing.assert_allclose(mixed[0, 0, 0], [[1, 2], [5.5, 11], [10, 20]])


def test_property_5_gates_do_not_depend_on_the_image():
    gate = network_lib._Gate(4, 2, 0.5)
    variables = {"params": {"logits": noise(4, 2)}}
    assert gate.apply(variables).shape == (4, 2)  # takes no input
    _, variables, apply = network()
    expected = apply(variables, images()).logits
    for i in range(4):  # in a batch with other images
        batch = noise(4, 8, 8, 3, seed=7)
        batch[i] = images()[i]
        logits = apply(variables, batch).logits
        np.testing.assert_allclose(logits[i], expected[i], atol=1e-5)
        assert np.abs(logits - expected)[np.arange(4) != i].max() > 1e-2


@functools.cache
def gradients(soft):
    """Returns the gradients of a loss, in evaluation mode, and the parameters."""
    model, variables, _ = network()
    model = network_lib.soften(model, 1.0) if soft else model

    @jax.jit
    @jax.grad
    def gradient(params):
        all_variables = {**variables, "params": params}
        out = model.apply(all_variables, images()[:3], train=False)
        return jnp.sum(out.logits**2)

    return jax.device_get(gradient(variables["params"])), variables["params"]


def size_of(tree):
    return sum(float(np.sum(np.abs(leaf))) for leaf in jax.tree.leaves(tree))


def test_property_6_soft_gates_learn():
    grads, _ = gradients(True)
    assert all(size_of(g) > 0 for g in network_lib.gates(grads))
    for level in ("stage1", "stage2", "stage3"):
        experts = grads[level]["block1"]
        assert all(size_of(experts[e]) > 0 for e in experts if e != "gate")


def test_property_6_hard_gates_and_dead_experts_do_not():
    grads, params = gradients(False)
    assert all(size_of(g) == 0 for g in network_lib.gates(grads))
    alive = np.arange(3)
    for level, logits in zip(
        ("stage3", "stage2", "stage1"), network_lib.gates(params)[::-1], strict=True
    ):
        alive = np.unique(np.argmax(logits, -1)[alive])
        experts = grads[level]["block1"]
        names = [f"expert{i + 1}" for i in range(logits.shape[1])]
        learnt = [i for i, name in enumerate(names) if size_of(experts[name]) > 0]
        np.testing.assert_array_equal(learnt, alive)


def test_property_7_pooling():
    half = [[1, 0, 0, 0], [0.5, 0.5, 0, 0], [0, 1, 0, 0], [0, 0.5, 0.5, 0]]
    half += [[0, 0, 1, 0], [0, 0, 0.5, 0.5], [0, 0, 0, 1]]
    np.testing.assert_array_equal(network_lib.bins(4, 7), half)
    for size in range(1, 12):
        matrix, x = network_lib.bins(size, 7), np.random.default_rng(size).random(size)
        expected = [
            x[int(np.floor(i * size / 7)) : int(np.ceil((i + 1) * size / 7))].mean()
            for i in range(7)
        ]
        np.testing.assert_allclose(matrix @ x, expected, rtol=1e-5)
        np.testing.assert_allclose(matrix.sum(1), 1, rtol=1e-6)  # preserves constants
        np.testing.assert_array_equal(
            matrix[[0, -1]][:, [0, -1]] > 0, size == 1 or np.eye(2)
        )
    np.testing.assert_array_equal(network_lib.bins(8, 1), np.full((1, 8), 1 / 8))


def test_property_7_pool_then_mix_is_mix_then_pool():
    maps, logits, bins = (
        noise(2, 4, 4, 8, 3),
        noise(5, 8, seed=1),
        network_lib.bins(4, 7),
    )

    @jax.jit
    def both(maps, logits):
        weights = network_lib.attention(logits, 1.0)
        pool = functools.partial(jnp.einsum, "ih,bhwpc,jw->bijpc", bins)
        return network_lib.mix(weights, pool(maps, bins)), pool(
            network_lib.mix(weights, maps), bins
        )

    one, other = both(maps, logits)
    np.testing.assert_allclose(one, other, atol=1e-5)


def test_property_8_scores():
    units = noise(4, 3, 2)
    np.testing.assert_array_equal(score(units, "nce"), np.max(units, -1))
    odds = np.log(softmax(units)[..., 1] / softmax(units)[..., 0])
    np.testing.assert_allclose(score(units, "odds"), odds, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(score(units[..., :1], "ce"), units[..., 0])
    larger = jax.jit(jax.grad(lambda u: jnp.sum(network_lib.score(u, "nce"))))(units)
    np.testing.assert_array_equal(larger[..., 0] == 1, units[..., 0] > units[..., 1])


def test_property_8_a_head_moves_its_own_column_only():
    _, variables, apply = network()
    flat = flax.traverse_util.flatten_dict(variables)
    for path, leaf in flat.items():
        if path[:2] == ("params", "head") and path[2] != "gate":
            flat[path] = leaf.copy()
            flat[path][1] += 0.1  # the second class
    moved = flax.traverse_util.unflatten_dict(flat)
    before, after = (apply(v, images()).logits for v in (variables, moved))
    changed = np.any(np.abs(after - before) > 0, 0)
    np.testing.assert_array_equal(changed, [False, True, False])


def test_property_9_a_single_parent_is_the_identity():
    maps = noise(2, 3, 3, 1, 4)
    for t in (None, 0.3):
        weights = attention(noise(5, 1), t)
        np.testing.assert_array_equal(weights, np.ones((5, 1)))
        mixed = mix(weights, maps)
        for child in range(5):
            np.testing.assert_array_equal(mixed[..., child, :], maps[..., 0, :])


# The chain's contract


@pytest.mark.parametrize("layout", ["ltb", "split"])
def test_restart_behind_every_joint(layout):
    model, variables, _ = network(layout)

    @jax.jit
    def restarted(variables, x):  # one program computes common parts once
        out = model.apply(variables, x, train=False)
        middles = [chain.feature_at(out, model, joint) for joint in model.unit_names]
        return out.logits, [
            model.apply(variables, h, train=False, after=joint).logits
            for joint, h in zip(model.unit_names, middles, strict=True)
        ]

    expected, rest = restarted(variables, images())
    assert len(rest) == 4
    for logits in rest:
        np.testing.assert_allclose(logits, expected, atol=1e-5)


@pytest.mark.parametrize("layout", ["ltb", "split"])
def test_folded_network_gives_the_same(layout):
    model, variables, apply = network(layout)
    folded, folded_variables = folding.fold(model, variables)
    assert set(folded_variables) == {"params"}
    apply_folded = jax.jit(functools.partial(folded.apply, train=False))
    ours = apply_folded(folded_variables, images())
    expected = apply(variables, images())
    np.testing.assert_allclose(ours.logits, expected.logits, atol=1e-4)


@pytest.mark.parametrize("layout", ["ltb", "split"])
def test_weights_survive_export_and_import(layout):
    model = hme_weights.small("nce", layout=layout, base="wrn_10_1")
    variables = hme_weights.drawn(model)
    weights = interop.to_torch("hme", variables)
    options = interop.options_from_torch("hme", weights)
    made = models.create("hme", **options)
    assert made == (model if layout == "split" else models.create("hme", num_classes=3))
    jax.tree.map(
        np.testing.assert_array_equal, interop.from_torch("hme", weights), variables
    )
    assert models.family("hme").options_from_variables(variables) == options


def test_dropout_only_in_training_and_by_its_key():
    model, variables, _ = network()
    head = {"params": variables["params"]["head"]}
    features = noise(2, 8, 8, 8 * 32)

    @jax.jit
    def logits(key):
        rngs = {"dropout": key}
        return model.make_head(None).apply(head, features, train=True, rngs=rngs)[0]

    keys = jax.random.split(jax.random.key(0))
    one, again, other = (logits(k) for k in (keys[0], keys[0], keys[1]))
    np.testing.assert_array_equal(one, again)
    assert np.any(one != other)
    train = functools.partial(model.apply, train=True, mutable=["batch_stats"])
    with pytest.raises(flax.errors.InvalidRngError):
        jax.eval_shape(train, variables, images())


def test_initial_values():
    model = models.create("hme", num_classes=3, output="ce")

    @jax.jit
    def drawn(key):  # XLA drops what is not returned, which compiles faster
        params = model.init(key, images(), train=False)["params"]
        biases = flax.traverse_util.flatten_dict(params)
        biases = [v for path, v in biases.items() if path[-1] == "bias"]
        head, level = params["head"], params["stage2"]["block1"]
        kernels = head["fc1"]["kernel"], level["expert1"]["conv1"]["kernel"]
        return network_lib.gates(params), biases, *kernels

    gates, biases, dense, kernel = jax.device_get(drawn(jax.random.key(0)))
    for logits in gates:
        assert 0 <= logits.min() < logits.max() < 1
    assert abs(float(dense.std()) - 0.01) < 5e-4
    assert abs(float(kernel.std()) / np.sqrt(2 / (9 * 64)) - 1) < 0.05
    assert len(biases) > 20 and not any(np.any(b) for b in biases)
    assert np.any(dense[0] != dense[1])


def test_split_layout_halves_and_counts():
    model = models.create(
        "hme", num_classes=10, layout="split", base="wrn_10_1", output="nce"
    )
    out = jax.eval_shape(
        lambda x: model.init_with_output(jax.random.key(0), x, train=False)[0],
        jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32),
    )
    # Four experts of a quarter of WRN-10-1's 16, 32, 64 channels.
    shapes = [(2, 32, 32, 16), (2, 16, 16, 32), (2, 8, 8, 64)]
    assert [f.shape for f in out.features] == shapes
    assert out.stem.shape == (2, 32, 32, 16)
    assert [
        g.shape for g in network_lib.gates(hme_weights.shapes(model)["params"])
    ] == [
        (4, 4),
        (4, 4),
        (10, 4),
    ]


def test_gates_of_another_network():
    with pytest.raises(KeyError):
        network_lib.gates(
            {"stage2": {"block1": {}}, "stage3": {"block1": {}}, "head": {}}
        )
