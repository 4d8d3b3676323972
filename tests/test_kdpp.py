"""KD++: the public code's values, the classes' centres, the embedding."""

import jax
import jax.numpy as jnp
import numpy as np
import toys

from lakd_jax import config_methods
from lakd_jax.distill import kdpp

OPTIONS = config_methods.blocks()["kdpp"].to_dict()


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


STUDENT, TEACHER = np.float32(1.1) * draw(2, 6, 8), draw(3, 6, 8)
LABELS = np.arange(6) % 3
CENTRES = draw(4, 3, 8)[LABELS]


def test_value_and_gradient_are_the_public_ones():
    """Computed with the public code of KD++; two of the students are the longer."""
    value, grad = jax.value_and_grad(kdpp.nd_loss)(STUDENT, TEACHER, CENTRES)
    np.testing.assert_allclose(
        [value, jnp.linalg.norm(grad)], [1.0359124, 0.12687117], rtol=1e-4
    )


def test_example_by_example():
    values = []
    for s, t, c in zip(STUDENT, TEACHER, CENTRES, strict=True):
        cosine = s @ c / np.linalg.norm(s) / np.linalg.norm(c)
        values.append(1 - cosine * min(1, np.linalg.norm(s) / np.linalg.norm(t)))
    got = kdpp.nd_loss(STUDENT, TEACHER, CENTRES)
    np.testing.assert_allclose(got, np.mean(values), rtol=1e-5)


def test_least_where_features_point_to_their_centre_and_are_long_enough():
    towards = CENTRES / np.linalg.norm(CENTRES, axis=1, keepdims=True)
    lengths = np.linalg.norm(TEACHER, axis=1, keepdims=True)
    for factor, least in ((1.0, 0.0), (3.0, 0.0), (0.25, 0.75)):
        value = kdpp.nd_loss(factor * lengths * towards, TEACHER, CENTRES)
        np.testing.assert_allclose(value, least, atol=1e-6)


def test_only_the_student_gets_a_gradient():
    grads = jax.grad(kdpp.nd_loss, argnums=(0, 1, 2))(STUDENT, TEACHER, CENTRES)
    assert [bool(np.any(np.asarray(g))) for g in grads] == [True, False, False]


def test_zeros_give_finite_gradients_and_bfloat16_float32():
    zeros = np.zeros_like(STUDENT)
    for args in ((zeros, TEACHER, CENTRES), (zeros, zeros, zeros)):
        assert np.all(np.isfinite(jax.grad(kdpp.nd_loss)(*args)))
    value, grad = jax.value_and_grad(kdpp.nd_loss)(STUDENT, TEACHER, zeros)
    assert value == 1 and not np.any(np.asarray(grad))
    halves = [jnp.asarray(x, jnp.bfloat16) for x in (STUDENT, TEACHER, CENTRES)]
    value = kdpp.nd_loss(*halves)
    assert value.dtype == jnp.float32 and np.isfinite(value)


def test_centres_are_the_means_of_all_that_was_seen():
    centres = kdpp.Centres(4)
    batches = [(draw(k, 6, 8) + 5, np.array([0, 1, 1, 2, 0, 1]) * k) for k in (0, 1)]
    state = centres.init(jax.random.key(0), *batches[0], train=True)
    assert not any(np.any(np.asarray(x)) for x in jax.tree.leaves(state))
    seen = {}
    for features, labels in batches:
        got, state = centres.apply(
            state, features, jnp.asarray(labels), train=True, mutable=["batch_stats"]
        )
        for feature, label in zip(features, labels, strict=True):
            seen.setdefault(int(label), []).append(feature)
        wanted = [np.mean(seen[int(label)], 0) for label in labels]
        np.testing.assert_allclose(got, wanted, rtol=1e-5)
    np.testing.assert_array_equal(state["batch_stats"]["counts"], [8, 3, 1, 0])
    asked = np.array([3, 1, 3, 1, 3, 1])
    still, same = centres.apply(
        state, batches[0][0], asked, train=False, mutable=["batch_stats"]
    )
    np.testing.assert_allclose(still[1], np.mean(seen[1], 0), rtol=1e-5)
    assert not np.any(np.asarray(still[0]))  # never seen
    assert jax.tree.all(jax.tree.map(jnp.array_equal, same, state))


def test_a_student_of_the_teachers_width_is_not_embedded():
    for width, embedded in ((4, False), (6, True)):
        lesson, params, stats, _ = toys.made(
            OPTIONS, name="kdpp", teacher=toys.Toy(width=width), cut_scale=1.0
        )
        assert ("head" in params["method"]) == embedded
        assert set(stats["method"]["head"]) >= {"centres"}


def test_embedding_drops_in_training_only():
    embedding, x = kdpp.Embedding(4, 0.5), draw(5, 6, 8)
    variables = embedding.init(jax.random.key(0), x, jax.random.key(1), train=True)

    def run(seed, train):
        out, _ = embedding.apply(
            variables, x, jax.random.key(seed), train=train, mutable=["batch_stats"]
        )
        return np.asarray(out)

    assert not np.allclose(run(1, True), run(2, True))
    np.testing.assert_array_equal(run(1, True), run(1, True))
    np.testing.assert_array_equal(run(1, False), run(2, False))


def test_weights_by_epoch():
    lesson, params, stats, batch = toys.made(OPTIONS, name="kdpp", cut_scale=1.0)
    for epoch, share in ((0.5, 0.05), (9.0, 0.5), (40.0, 1.0)):
        (loss,), _ = lesson.losses(params, stats, *batch, epoch=epoch)
        assert loss.weights["nd"] == 2.0 and loss.weights["head_ce"] == 1.0
        np.testing.assert_allclose(loss.weights["head_kd"], share, rtol=1e-6)
