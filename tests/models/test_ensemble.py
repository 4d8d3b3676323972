"""Several networks as one: how logits are combined, and whose maps are compared."""

import jax
import jax.numpy as jnp
import numpy as np
import tiny

from lakd_jax.models import chain, ensemble, heads

LOGITS = [jnp.array([[2.0, 0.0], [0.0, 0.0]]), jnp.array([[0.0, 1.0], [4.0, 0.0]])]


def entropies():
    """Returns those of `LOGITS`, (2, 2): network, example."""
    odds = np.exp(np.array(LOGITS))
    p = odds / odds.sum(-1, keepdims=True)
    return -(p * np.log(p)).sum(-1)


def test_mean_and_confidence():
    np.testing.assert_allclose(
        ensemble.combined(LOGITS, "mean"), [[1.0, 0.5], [2.0, 0.0]]
    )
    h = entropies()
    assert h[1, 0] > h[0, 0] and h[0, 1] > h[1, 1]  # who is sure differs by example
    first = (1 - h[0] / h.sum(0))[:, None]
    expected = first * LOGITS[0] + (1 - first) * LOGITS[1]
    found = ensemble.combined(LOGITS, "confidence")
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert found[1, 0] > 2  # the one that is sure counts more than in the mean


def test_weights_sum_to_one_and_are_defined_where_all_are_certain():
    same = [LOGITS[0]] * 3
    certain = [jnp.array([[1000.0, 0.0]])] * 2
    for logits in (same, certain, same[:1]):
        np.testing.assert_allclose(
            ensemble.combined(logits, "confidence"), logits[0], rtol=1e-6
        )


def test_everything_but_the_logits_is_of_the_first():
    models = [tiny.SMALL(num_classes=3), tiny.SMALL(num_classes=3, widths=(2, 2, 2))]
    every = [tiny.variables(model) for model in models]
    scales = (1.0, 2.0)  # as if each had a normalisation of its own

    class Times(float):
        def __call__(self, images):
            return images * self

    members = tuple(
        ensemble.Member(m, Times(k)) for m, k in zip(models, scales, strict=True)
    )
    network = ensemble.Ensemble(
        members=members, stage_sizes=(1, 1, 1), num_classes=3, combine="mean"
    )
    images = jnp.asarray(np.random.default_rng(0).uniform(size=(2, 8, 8, 3)), "f4")
    variables = {"params": {f"teacher{i}": v for i, v in enumerate(every, 1)}}
    outputs = network.apply(variables, images, train=False)
    alone = [
        model.apply(v, 255 * images * k, train=False)
        for model, v, k in zip(models, every, scales, strict=True)
    ]
    np.testing.assert_allclose(
        outputs.logits, (alone[0].logits + alone[1].logits) / 2, rtol=1e-5
    )
    for found, expected in zip(outputs.features, alone[0].features, strict=True):
        np.testing.assert_array_equal(found, expected)
    shapes = chain.variable_shapes(network)["params"]["teacher2"]
    assert jax.tree.map(np.shape, every[1]) == jax.tree.map(lambda x: x.shape, shapes)
    matrix, _ = heads.classifier(*ensemble.first(network, variables))
    np.testing.assert_array_equal(matrix, heads.classifier(models[0], every[0])[0])
    assert ensemble.first(models[0], every[0]) == (models[0], every[0])
