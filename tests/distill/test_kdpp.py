"""KD++: the classes' centres, the embedding; its loss is among `loss_cases`."""

import functools

import jax
import numpy as np
import toys

from lakd_jax import config as config_lib
from lakd_jax import distill
from lakd_jax.distill import kdpp


def test_centres_are_the_means_of_all_that_was_seen():
    centres = kdpp.Centres(4)
    batches = [
        (toys.noise(k, 6, 8) + 5, np.array([0, 1, 1, 2, 0, 1]) * k) for k in (0, 1)
    ]
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
    student, teacher = (
        toys.outputs(toys.noise(seed, 6, 3), toys.noise(seed, 6, features))
        for seed, features in ((6, width), (7, 4))
    )
    return toys.signals(student, teacher, epoch=epoch, key=jax.random.key(3))


KDPP = distill.create("kdpp", config_lib.default()["kdpp"].to_dict())


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
    embedding, x = kdpp.Embedding(4, 0.5), toys.noise(5, 6, 8)
    params = {"dense": {"kernel": toys.noise(8, 8, 4), "bias": toys.noise(9, 4)}}
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
