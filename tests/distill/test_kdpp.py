"""KD++: the public code's values, the classes' centres, the embedding."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import precision

from lakd_jax import config as config_lib
from lakd_jax import distill
from lakd_jax.distill import kdpp
from lakd_jax.distill.base import method

OPTIONS = config_lib.default()["kdpp"].to_dict()


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


STUDENT, TEACHER = np.float32(1.1) * draw(2, 6, 8), draw(3, 6, 8)
LABELS = np.arange(6) % 3
CENTRES = draw(4, 3, 8)[LABELS]


program = jax.jit(jax.value_and_grad(kdpp.nd_loss, argnums=(0, 1, 2)))


def test_value_and_gradient_are_the_public_ones():
    """Computed with the public code of KD++; two of the students are the longer."""
    value, (grad, *others) = program(STUDENT, TEACHER, CENTRES)
    np.testing.assert_allclose(
        [value, np.linalg.norm(grad)], [1.0359124, 0.12687117], rtol=1e-4
    )
    assert not any(np.any(np.asarray(g)) for g in others)


def test_example_by_example():
    values = []
    for s, t, c in zip(STUDENT, TEACHER, CENTRES, strict=True):
        cosine = s @ c / np.linalg.norm(s) / np.linalg.norm(c)
        values.append(1 - cosine * min(1, np.linalg.norm(s) / np.linalg.norm(t)))
    got, _ = program(STUDENT, TEACHER, CENTRES)
    np.testing.assert_allclose(got, np.mean(values), rtol=1e-5)


def test_least_where_features_point_to_their_centre_and_are_long_enough():
    towards = CENTRES / np.linalg.norm(CENTRES, axis=1, keepdims=True)
    lengths = np.linalg.norm(TEACHER, axis=1, keepdims=True)
    for factor, least in ((1.0, 0.0), (3.0, 0.0), (0.25, 0.75)):
        value, _ = program(np.float32(factor) * lengths * towards, TEACHER, CENTRES)
        np.testing.assert_allclose(value, least, atol=1e-6)


def test_zeros_give_finite_gradients_and_bfloat16_float32():
    zeros = np.zeros_like(STUDENT)
    for args in ((zeros, TEACHER, CENTRES), (zeros, zeros, zeros)):
        assert np.all(np.isfinite(program(*args)[1][0]))
    value, (grad, *_) = program(STUDENT, TEACHER, zeros)
    assert value == 1 and not np.any(np.asarray(grad))
    halves = precision.halves((STUDENT, TEACHER, CENTRES))
    assert precision.arithmetic(kdpp.nd_loss, *halves) == {"float32"}


def test_centres_are_the_means_of_all_that_was_seen():
    centres = kdpp.Centres(4)
    batches = [(draw(k, 6, 8) + 5, np.array([0, 1, 1, 2, 0, 1]) * k) for k in (0, 1)]
    apply = jax.jit(
        functools.partial(centres.apply, mutable=["batch_stats"]),
        static_argnames="train",
    )
    init = jax.jit(functools.partial(centres.init, train=True))
    state = init(jax.random.key(0), *batches[0])
    assert not any(np.any(np.asarray(x)) for x in jax.tree.leaves(state))
    seen = {}
    for features, labels in batches:
        got, state = apply(state, features, labels, train=True)
        for feature, label in zip(features, labels, strict=True):
            seen.setdefault(int(label), []).append(feature)
        wanted = [np.mean(seen[int(label)], 0) for label in labels]
        np.testing.assert_allclose(got, wanted, rtol=1e-5)
    np.testing.assert_array_equal(state["batch_stats"]["counts"], [8, 3, 1, 0])
    asked = np.array([3, 1, 3, 1, 3, 1])
    still, same = apply(state, batches[0][0], asked, train=False)
    np.testing.assert_allclose(still[1], np.mean(seen[1], 0), rtol=1e-5)
    assert not np.any(np.asarray(still[0]))  # never seen
    jax.tree.map(np.testing.assert_array_equal, same, state)


def signals(width, epoch=0.0):
    """Of a student with so many features; the teacher has four."""

    def outputs(seed, width):
        shapes = {"logits": (6, 3), "pooled": (6, width)}
        return types.SimpleNamespace(**{n: draw(seed, *s) for n, s in shapes.items()})

    return method.Signals(
        student=outputs(6, width),
        teacher=outputs(7, 4),
        labels=jnp.asarray(LABELS),
        epoch=epoch,
        student_joints=(),
        teacher_joints=(),
        key=jax.random.key(3),
    )


KDPP = distill.create("kdpp", OPTIONS)


def test_a_student_of_the_teachers_width_is_not_embedded():
    for width, embedded in ((4, False), (6, True)):
        made = jax.eval_shape(
            lambda key, w=width: KDPP.init(key, signals(w), train=True),
            jax.random.key(0),
        )
        assert ("params" in made) == embedded
        wanted = {"centres", "embedding"} if embedded else {"centres"}
        assert set(made["batch_stats"]["head"]) == wanted


def test_embedding_drops_in_training_only():
    embedding, x = kdpp.Embedding(4, 0.5), draw(5, 6, 8)
    params = {"dense": {"kernel": draw(8, 8, 4), "bias": draw(9, 4)}}
    params["bn"] = {"scale": np.ones(8), "bias": np.zeros(8)}
    stats = {"bn": {"mean": np.zeros(8), "var": np.ones(8)}}

    @functools.partial(jax.jit, static_argnums=1)
    def run(key, train):
        variables = {"params": params, "batch_stats": stats}
        out, _ = embedding.apply(
            variables, x, key, train=train, mutable=["batch_stats"]
        )
        return out

    one, two = map(jax.random.key, (1, 2))
    assert not np.allclose(run(one, True), run(two, True))
    np.testing.assert_array_equal(run(one, True), run(one, True))
    np.testing.assert_array_equal(run(one, False), run(two, False))


def test_weights_by_epoch():
    @jax.jit
    def weights(epoch):
        (loss,), _ = KDPP.init_with_output(
            jax.random.key(0), signals(4, epoch), train=True
        )
        return loss.weights

    for epoch, share in ((0.5, 0.05), (9.0, 0.5), (40.0, 1.0)):
        found = weights(epoch)
        assert found["nd"] == 2.0 and found["head_ce"] == 1.0
        np.testing.assert_allclose(found["head_kd"], share, rtol=1e-6)
