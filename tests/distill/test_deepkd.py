"""DeepKD: the public code's values, gradients and steps; the growth of the classes."""

import functools

import commands
import golden_weights
import jax
import jax.numpy as jnp
import numpy as np
import optax
import precision
import pytest
import toys

from lakd_jax import config as config_lib
from lakd_jax import distill
from lakd_jax.config import check
from lakd_jax.distill import deepkd, dkd
from lakd_jax.distill.base import labels as labels_lib
from lakd_jax.training import dot

INPUTS = golden_weights.arrays("losses_inputs")
GOLDEN = golden_weights.arrays("deepkd")
LABELS = INPUTS["labels"].astype(np.int32)
STUDENT, TEACHER = INPUTS["logits_student"], INPUTS["logits_teacher"]
CLASSES = STUDENT.shape[-1]
TEMPERATURE = 4.0
CLOSE = 1e-5  # as the public code's float32 is to its float64, five times over


@functools.cache
def program(name):
    """Value, and gradients to both logits, of a loss at `TEMPERATURE`."""
    loss = {"tckd": deepkd.tckd_loss, "nckd": deepkd.nckd_loss}[name]
    given = {} if name == "nckd" else {"labels": LABELS, "temperature": TEMPERATURE}

    def run(student, teacher, *top):
        more = (LABELS, TEMPERATURE, *top) if top else ()
        return loss(student, teacher, *more, **given)

    return jax.jit(jax.value_and_grad(run, argnums=(0, 1)))


def close(got, key):
    return golden_weights.distance(got, GOLDEN[key]) < CLOSE


# ------------------------------------------------------------------------- the losses


@pytest.mark.parametrize("key", ["kd", "kd_topk"])
def test_the_targets_loss_is_the_public_one(key):
    value, (ours, theirs) = program("tckd")(STUDENT, TEACHER)
    assert value.dtype == np.float32
    np.testing.assert_allclose(value, GOLDEN[f"{key}/tckd"], rtol=CLOSE)
    assert close(ours, f"{key}/tckd/grad_s") and not np.any(theirs)


@pytest.mark.parametrize(("key", "top"), [("kd", CLASSES), ("kd_topk", 5)])
def test_the_others_loss_is_the_public_one(key, top):
    """The public variant on KD multiplies it by the mean of the teacher's 1 - p."""
    p = jax.nn.softmax(TEACHER / TEMPERATURE)[np.arange(len(LABELS)), LABELS]
    factor = jnp.mean(1 - p)
    value, (ours, theirs) = program("nckd")(STUDENT, TEACHER, top)
    assert value.dtype == np.float32
    np.testing.assert_allclose(factor * value, GOLDEN[f"{key}/nckd"], rtol=CLOSE)
    assert close(factor * ours, f"{key}/nckd/grad_s") and not np.any(theirs)


def test_the_classes_that_count_are_the_public_ones():
    label = np.eye(CLASSES, dtype=bool)[LABELS]
    found = label | ~np.asarray(deepkd.highest(TEACHER, 5))
    np.testing.assert_array_equal(found, GOLDEN["topk_mask"])


def test_classes_that_tie_count_alike():
    logits = np.array([[3.0, 1.0, 2.0, 1.0], [0.0, 0.0, 0.0, 0.0]], np.float32)
    expected = [[1, 0, 1, 0], [1, 1, 1, 1]], [[1, 1, 1, 1], [1, 1, 1, 1]]
    for top, marks in zip((2, 3), expected, strict=True):
        np.testing.assert_array_equal(deepkd.highest(logits, top), marks)


def test_with_all_classes_it_is_dkd():
    ours = program("tckd")(STUDENT, TEACHER)[0]
    ours += 8 * program("nckd")(STUDENT, TEACHER, CLASSES)[0]
    expected = dkd.dkd_loss(STUDENT, TEACHER, LABELS, 1.0, 8.0, TEMPERATURE)
    np.testing.assert_allclose(ours, expected, rtol=1e-6)


@pytest.mark.parametrize("name", ["tckd", "nckd"])
def test_extreme_logits_stay_finite(name):
    flat = np.zeros_like(STUDENT)
    sure = 4000 * np.eye(CLASSES, dtype=np.float32)[LABELS]
    top = (2,) if name == "nckd" else ()
    for both in ((flat, sure), (sure, flat), (-sure, sure), (sure, -sure)):
        value, (grad, _) = program(name)(*both, *top)
        assert np.isfinite(value) and np.all(np.isfinite(grad))


@pytest.mark.parametrize("name", ["tckd", "nckd"])
def test_bfloat16_is_computed_in_float32(name):
    top = (5,) if name == "nckd" else ()
    loss = getattr(deepkd, f"{name}_loss")
    run = lambda s, t: loss(s, t, LABELS, TEMPERATURE, *top)  # noqa: E731
    assert precision.arithmetic(run, *precision.halves((STUDENT, TEACHER))) == {
        "float32"
    }


# ------------------------------------------------------------------------- the method


def made(**options):
    return distill.create("deepkd", config_lib.default()["deepkd"].to_dict() | options)


@pytest.mark.parametrize(
    ("key", "epoch", "share"), [("dkd_e10", 9.5, 1.0), ("dkd_topk_e30", 29.0, 0.5)]
)
def test_the_methods_terms_are_the_public_ones(key, epoch, share):
    """The public epochs are counted from 1; half of ten classes are five."""
    method = made(shares=(share,), share_epochs=(0.0,))

    @jax.jit
    @functools.partial(jax.jacrev, has_aux=True)
    def terms(student):
        given = toys.outputs(student), toys.outputs(TEACHER), LABELS
        signals = toys.signals(*given, epoch=np.float32(epoch))
        (loss,) = method.apply({}, signals, train=True)
        assert set(loss.terms) == {"head_ce", "tckd", "nckd"}
        weighted = {n: loss.weights[n] * loss.terms[n] for n in ("tckd", "nckd")}
        return weighted, weighted

    grads, values = terms(STUDENT)
    for name in values:
        np.testing.assert_allclose(values[name], GOLDEN[f"{key}/{name}"], rtol=CLOSE)
        assert close(grads[name], f"{key}/{name}/grad_s")


@pytest.mark.parametrize(
    ("options", "classes", "counts"),
    [
        ({}, 100, {0.0: 5, 60.0: 29, 120.4: 53, 240.0: 100, 300.0: 100}),
        ({}, 10, {0.0: 2, 60.0: 3, 240.0: 10}),
        ({"shares": (1.0,), "share_epochs": (0.0,)}, 10, {0.0: 10, 99.0: 10}),
        (
            {"shares": (0.1, 0.5, 0.5, 1.0), "share_epochs": (0.0, 80.0, 160.0, 200.0)},
            100,
            {0.0: 10, 40.0: 30, 80.0: 50, 120.0: 50, 180.0: 75, 200.0: 100},
        ),
    ],
)
def test_classes_grow_with_the_epochs(options, classes, counts):
    method = made(**options)
    found = {e: int(method.top(jnp.float32(e), classes)) for e in counts}
    assert found == counts


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"shares": (0.1, 0.5, 1.0)},
            "shares has 3 entries, but deepkd.share_epochs 2",
        ),
        ({"share_epochs": (200.0, 100.0)}, "share_epochs must ascend"),
        ({"shares": (0.1, 1.5)}, "shares must be from 0 to 1"),
        ({"shares": (), "share_epochs": ()}, "must not be empty"),
        ({"task_delta": 1.0}, "task_delta must be between -1 and 1"),
    ],
)
def test_what_cannot_be_is_refused(fields, words):
    changes = {"method": "deepkd"} | {f"deepkd.{n}": v for n, v in fields.items()}
    config = config_lib.changed(config_lib.default(), changes)
    assert any(words in line for line in check.problems(config, 1))


def test_recipes_depend_on_the_pair():
    """Those of the public settings; what they leave open is the default."""

    def found(pair):
        block = commands.get_config("cifar100", f"{pair},deepkd").deepkd
        names = ("alpha", "beta", "task_delta", "target_delta", "others_delta")
        return tuple(block[name] for name in names)

    assert found("resnet32x4,shuffle_v2") == (1.0, 8.0, 0.075, -0.075, 0.075)
    assert found("vgg13,mobilenet_v2") == (1.0, 1.0, 0.075, -0.075, 0.08)
    assert found("cifar_resnet50,mobilenet_v2") == (1.0, 2.0, 0.075, -0.1, 0.025)
    assert found("resnet110,resnet32") == (1.0, 3.0, 0.075, -0.075, 0.0)
    mobile = commands.get_config("imagenet_lakd", "resnet50,mobilenet_v1,deepkd").deepkd
    assert (mobile.temperature, mobile.beta, mobile.others_delta) == (1.0, 2.0, 0.075)
    assert mobile.share_epochs == (0.0, 100.0)


# ---------------------------------------------------------------------- the optimiser


def groups(*shifts):
    names = ("task", "target", "others")
    return tuple(dot.Group(n, s) for n, s in zip(names, shifts, strict=True))


# As the code runs: the labels' buffer has the target's momentum. What only the labels'
# loss reaches has the mean of the momenta that the settings name.
RUN = {"w": groups(-0.075, -0.075, 0.075), "aux": groups(0.075, -0.075, 0.075)}
RATE, DECAY = 0.05, 5e-4


@jax.jit
def gradients(params):
    """Those of the three losses, of a linear student; `aux` adds to the first."""

    def losses(params):
        logits = jnp.matmul(GOLDEN["inputs/x"], params["w"], precision="highest")
        given = (logits, TEACHER, LABELS, TEMPERATURE)
        return (
            labels_lib.cross_entropy(logits + params["aux"][None], LABELS),
            deepkd.tckd_loss(*given),
            8 * deepkd.nckd_loss(*given, CLASSES),
        )

    return jax.jacrev(losses)(params)


def test_five_steps_are_the_public_ones():
    """The decay is added here: the code's is of what two buffers have moved already."""
    params = {name: jnp.asarray(GOLDEN[f"inputs/{name}0"]) for name in RUN}
    rate = optax.constant_schedule(RATE)
    optimizers = {
        name: dot.sgd(rate, shifts, momentum=0.9, weight_decay=0.0)
        for name, shifts in RUN.items()
    }
    states = {name: o.init({name: params[name]}) for name, o in optimizers.items()}
    for step in range(1, 6):
        grads = gradients(params)
        buffers = states["w"][0]
        moved = 0.825 * buffers.task["w"] + grads[0]["w"]
        moved += 0.975 * buffers.others["w"] + grads[2]["w"]
        grads[1]["w"] += DECAY * (params["w"] - RATE * moved)
        for name, optimizer in optimizers.items():
            own = dot.split(RUN[name], [{name: grad[name]} for grad in grads])
            before = {name: params[name]}
            changes, states[name] = optimizer.update(own, states[name], before)
            params |= optax.apply_updates(before, changes)
            assert close(params[name], f"optimizer/{name}_{step}")
    for name, buffer in zip(("", "tcg_", "ncg_"), states["w"][0], strict=True):
        assert close(buffer["w"], f"optimizer/momentum_{name}buffer")
