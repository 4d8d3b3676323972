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
    """Returns a small network and its variables."""
    model = hme_weights.small(layout=layout, base="wrn_10_1")
    return model, hme_weights.drawn(model)


def run(model, variables, x):
    return jax.jit(functools.partial(model.apply, train=False))(variables, x).logits


@functools.cache
def images():
    return noise(4, 8, 8, 3)


@pytest.mark.parametrize("output", ["ce", "nce"])
def test_golden(output):
    variables, images, recorded = hme_weights.golden(output)
    model = models.create("hme", num_classes=10, output=output)

    # The weights are an argument: XLA would spend seconds folding constants.
    @jax.jit
    def logits(t, *of):
        return model.clone(temperature=t).apply(*of, train=False).logits

    found = {
        f"soft_epoch{e}": logits(np.float32(10 / e), variables, images) for e in EPOCHS
    }
    found["hard"] = run(model, variables, images)
    for name, ours in found.items():
        assert golden_weights.distance(ours, recorded[f"logits_{name}"]) < 1e-4
    for i, gate in enumerate(network_lib.gates(variables["params"])):
        for epoch in (1, 100):
            ours = attention(gate, 10 / epoch)
            expected = recorded[f"gate{i}_soft_epoch{epoch}"]
            assert golden_weights.distance(ours, expected) < 1e-4
        np.testing.assert_array_equal(attention(gate, None), recorded[f"gate{i}_hard"])


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
    params = chain.variable_shapes(model)["params"]
    sizes = {
        unit: sum(leaf.size for leaf in jax.tree.leaves(tree))
        for unit, tree in params.items()
    }
    assert sum(sizes.values()) == parameters
    # Including the gates above them.
    levels = [sizes[f"stage{s}"] for s in (1, 2, 3)]
    assert levels == [77_952, 296_448 + 8, 444_672 + 32]


# Concatenated experts: 2 of 64 channels, 4 of 64, 8 of 32.
LTB = [(16, 16, 128), (8, 8, 256), (4, 4, 256)]
# Four experts of a quarter of WRN-10-1's 16, 32, 64 channels.
SPLIT = [(32, 32, 16), (16, 16, 32), (8, 8, 64)]


@pytest.mark.parametrize("output", ["ce", "nce", "odds"])
@pytest.mark.parametrize(
    ("layout", "stem", "features", "gates"),
    [
        ("ltb", (32, 32, 3), LTB, [(4, 2), (8, 4), (7, 8)]),
        ("split", (32, 32, 16), SPLIT, [(4, 4), (4, 4), (7, 4)]),
    ],
)
def test_property_1_shapes(output, layout, stem, features, gates):
    options = {"output": output, "layout": layout, "base": "wrn_10_1"}
    model = models.create("hme", num_classes=7, **options)
    out = jax.eval_shape(
        lambda x: model.init_with_output(jax.random.key(0), x, train=False)[0],
        jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32),
    )
    assert out.logits.shape == (2, 7)
    assert [f.shape for f in out.features] == [(2, *shape) for shape in features]
    assert out.stem.shape == (2, *stem)
    assert out.pooled.shape == (2, features[-1][-1])
    params = chain.variable_shapes(model)["params"]
    assert [gate.shape for gate in network_lib.gates(params)] == gates


def test_property_2_hard_rows():
    logits = noise(6, 4)
    hard = np.asarray(attention(logits, None))
    np.testing.assert_array_equal(hard, np.eye(4)[logits.argmax(-1)])
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
    lead = np.zeros((1, 8), np.float32)
    lead[0, 3] = 0.1
    assert np.max(attention(lead, 10 / 300)) > 0.98


def test_mixture_by_hand():
    maps = np.array([[1.0, 2.0], [10.0, 20.0]]).reshape(1, 1, 1, 2, 2)
    mixed = mix(np.array([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]]), maps)
    np.testing.assert_allclose(mixed[0, 0, 0], [[1, 2], [5.5, 11], [10, 20]])


def nonzero(tree):
    return any(map(np.any, jax.tree.leaves(jax.device_get(tree))))


@pytest.mark.parametrize("soft", [pytest.param(True, marks=pytest.mark.long), False])
def test_property_6_hard_gates_and_dead_experts_do_not_learn(soft):
    model, variables = network()
    model = model.clone(temperature=1.0 if soft else None)

    @jax.jit
    @jax.grad
    def gradient(params):
        out = model.apply({**variables, "params": params}, images()[:3], train=False)
        return jnp.sum(out.logits**2)

    grads, alive = gradient(variables["params"]), np.arange(3)
    assert [nonzero(gate) for gate in network_lib.gates(grads)] == [soft] * 3
    gates = network_lib.gates(variables["params"])
    for stage, logits in zip((3, 2, 1), gates[::-1], strict=True):
        alive = np.unique(np.argmax(logits, -1)[alive])
        experts = grads[f"stage{stage}"]["block1"]
        learnt = [nonzero(experts[f"expert{i + 1}"]) for i in range(logits.shape[1])]
        assert learnt == [soft or i in alive for i in range(len(learnt))]


def test_property_7_pooling():
    half = [[1, 0, 0, 0], [0.5, 0.5, 0, 0], [0, 1, 0, 0], [0, 0.5, 0.5, 0]]
    half += [[0, 0, 1, 0], [0, 0, 0.5, 0.5], [0, 0, 0, 1]]
    np.testing.assert_array_equal(network_lib.bins(4, 7), half)
    for size in range(1, 12):
        x = np.random.default_rng(size).random(size)
        expected = [
            x[int(np.floor(i * size / 7)) : int(np.ceil((i + 1) * size / 7))].mean()
            for i in range(7)
        ]
        np.testing.assert_allclose(network_lib.bins(size, 7) @ x, expected, rtol=1e-5)
    np.testing.assert_array_equal(network_lib.bins(8, 1), np.full((1, 8), 1 / 8))


def test_property_8_scores():
    units = noise(4, 3, 2)
    np.testing.assert_array_equal(score(units, "nce"), np.max(units, -1))
    odds = np.log(softmax(units)[..., 1] / softmax(units)[..., 0])
    np.testing.assert_allclose(score(units, "odds"), odds, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(score(units[..., :1], "ce"), units[..., 0])
    larger = jax.jit(jax.grad(lambda u: jnp.sum(network_lib.score(u, "nce"))))(units)
    np.testing.assert_array_equal(larger[..., 0] == 1, units[..., 0] > units[..., 1])


# The chain's contract


@pytest.mark.parametrize("layout", ["ltb", "split"])
def test_folded_network_gives_the_same(layout):
    model, variables = network(layout)
    folded, folded_variables = folding.fold(model, variables)
    assert set(folded_variables) == {"params"}
    ours, expected = (
        run(*network, images())
        for network in ((folded, folded_variables), (model, variables))
    )
    np.testing.assert_allclose(ours, expected, atol=1e-4)


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


def test_dropout_only_in_training_and_by_its_key():
    model, variables = network()
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
