"""Knowledge review: the public fusion's values, which stage's loss trains which."""

import functools
import pathlib
import types

import golden_weights
import jax
import jax.numpy as jnp
import numpy as np
import precision
import pytest
import tap_toys

from lakd_jax.distill import review
from lakd_jax.distill.base import method

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
INPUTS = dict(np.load(GOLDEN / "losses_inputs.npz"))
LOSSES = dict(np.load(GOLDEN / "losses.npz"))


def nhwc(x):
    return jnp.asarray(np.moveaxis(x, 1, -1))


def oihw(name, *shape):
    return golden_weights.tensor(f"abf.{name}", shape).transpose(2, 3, 1, 0)


def norm(name, width):
    named = {"scale": "weight", "bias": "bias"}
    return {
        ours: golden_weights.tensor(f"abf.{name}.{theirs}", (width,))
        for ours, theirs in named.items()
    }


def published():
    """The public fusion's weights, 32 channels to 64 between stages and 40 out."""
    params = {
        "conv1": {"kernel": oihw("conv1.0.weight", 64, 32, 1, 1)},
        "bn1": norm("conv1.1", 64),
        "conv2": {"kernel": oihw("conv2.0.weight", 40, 64, 3, 3)},
        "bn2": norm("conv2.1", 40),
        "att": {
            "kernel": oihw("att_conv.0.weight", 2, 128, 1, 1),
            "bias": golden_weights.tensor("abf.att_conv.0.bias", (2,)),
        },
    }
    widths = {"bn1": 64, "bn2": 40}
    state = {n: {"mean": np.zeros(w), "var": np.ones(w)} for n, w in widths.items()}
    return {"params": params, "batch_stats": state}


def test_fusion_is_the_public_one():
    x, later = nhwc(INPUTS["feat_student_1"]), nhwc(INPUTS["abf_residual"])

    def fused(x):
        module = review.Fusion(64, 40)
        both, _ = module.apply(
            published(), x, later, (8, 8), train=True, mutable=["batch_stats"]
        )
        return jnp.mean(both[0] ** 2), both[0]

    (value, out), grad = jax.jit(jax.value_and_grad(fused, has_aux=True))(x)
    distance = golden_weights.distance
    assert distance(out, nhwc(LOSSES["abf_out"])) < 1e-4
    assert distance(value, LOSSES["abf_out_mean_square"]) < 1e-4
    # The mean square behind a norm hardly depends on what it normalises: gradients of
    # 1e-9 are left of numbers near 1e-3, and rounding is seen in them.
    assert distance(grad, nhwc(LOSSES["abf_out_mean_square/grad_s"])) < 5e-3


def test_other_sizes_are_repeated_or_thinned():
    x, later = jnp.ones((2, 4, 4, 3)), jnp.ones((2, 1, 1, 5))
    for size in ((8, 8), (2, 2), (3, 3)):
        start = functools.partial(review.Fusion(5, 6).init_with_output, train=True)
        (out, on), _ = jax.eval_shape(
            lambda key, n=size, run=start: run(key, x, later, n), jax.random.key(0)
        )
        assert out.shape == (2, *size, 6) and on.shape == (2, *size, 5)


def maps(widths, seed):
    """Two stages and the pooled features."""
    rng = np.random.default_rng(seed)
    shapes = [(4, 8, 8, widths[0]), (4, 4, 4, widths[1]), (4, widths[2])]
    return [jnp.asarray(rng.standard_normal(s), jnp.float32) for s in shapes]


STUDENT, TEACHER = maps((3, 5, 5), 1), maps((6, 7, 8), 2)


def signals(student, teacher, epoch=0.0, preacts=()):
    return method.Signals(
        student=types.SimpleNamespace(logits=jnp.zeros((4, 3)), pooled=student[2]),
        teacher=types.SimpleNamespace(pooled=teacher[2]),
        labels=jnp.zeros(4, jnp.int32),
        epoch=jnp.asarray(epoch, jnp.float32),
        student_joints=tuple(student[:2]),
        teacher_joints=(),
        student_preacts=tuple(preacts),
        teacher_preacts=tuple(teacher[:2]),
    )


def made(student_preact=False):
    return review.Review(
        ce_weight=1.0, weight=5.0, warmup_epochs=20.0, student_preact=student_preact
    )


@pytest.fixture(scope="module")
def variables():
    return tap_toys.variables(made(), signals(STUDENT, TEACHER))


def run(variables, student, teacher, epoch=0.0, preacts=(), **fields):
    seen = signals(student, teacher, epoch, preacts)
    apply = made(**fields).apply
    return apply(variables, seen, train=True, mutable=["batch_stats"])[0]


def loss(student, teacher, k, variables, epoch):
    losses = run(variables, student, teacher, epoch)
    return losses[k].terms["review"], losses


@functools.cache
def program(k):
    """(student, teacher, variables, epoch) -> ((loss k, all), both gradients)."""
    both = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    return jax.jit(lambda s, t, *more: both(s, t, k, *more))


def test_parts_have_their_modules_names_and_only_the_last_does_not_fuse(variables):
    params = variables["params"]
    assert set(params) == {"module1", "module2", "head"}
    assert [("att" in params[n]) for n in sorted(params)] == [False, True, True]
    assert params["module1"]["conv2"]["kernel"].shape == (3, 3, 5, 6)


def test_stages_are_reviewed_from_the_last_to_the_first(variables):
    """The same by applying each fusion in turn."""

    def fuse(variables, name, x, later, size):
        own = {kind: tree[name] for kind, tree in variables.items()}
        module = review.Fusion(5, own["params"]["conv2"]["kernel"].shape[-1])
        out = module.apply(own, x, later, size, train=True, mutable=["batch_stats"])
        return out[0]

    @jax.jit
    def in_turn(variables, student, teacher):
        ours, theirs = (maps[2][:, None, None] for maps in (student, teacher))
        head, later = fuse(variables, "head", ours, None, (1, 1))
        second, later = fuse(variables, "module2", student[1], later, (4, 4))
        first, _ = fuse(variables, "module1", student[0], later, (8, 8))
        last = review.hcl_loss([second, head], [teacher[1], theirs])
        return review.hcl_loss([first], [teacher[0]]), last

    first, last = in_turn(variables, STUDENT, TEACHER)
    (_, losses), _ = program(0)(STUDENT, TEACHER, variables, 0.0)
    assert len(losses) == 2 and list(losses[0].terms) == ["review"]
    np.testing.assert_allclose(losses[0].terms["review"], first, rtol=1e-5)
    np.testing.assert_allclose(losses[1].terms["review"], last, rtol=1e-5)


def test_the_first_stages_loss_trains_later_stages_and_no_loss_the_teacher(variables):
    ours, theirs = zip(
        *(program(k)(STUDENT, TEACHER, variables, 0.0)[1] for k in (0, 1)), strict=True
    )
    touched = [[bool(np.any(np.asarray(g))) for g in of_loss] for of_loss in ours]
    assert touched == [[True, True, True], [False, True, True]]
    assert not any(np.any(np.asarray(g)) for g in jax.tree.leaves(theirs))


def test_weight_grows_in_twenty_epochs(variables):
    for epoch, share in ((0.0, 0.05), (9.5, 0.5), (30.0, 1.0)):
        (_, (first, _)), _ = program(0)(STUDENT, TEACHER, variables, epoch)
        np.testing.assert_allclose(first.weights["review"], 5.0 * share, rtol=1e-6)


def test_preactivations_of_the_student_where_asked(variables):
    others = maps((3, 5, 5), 3)
    (_, wanted), _ = program(0)([*others[:2], STUDENT[2]], TEACHER, variables, 0.0)

    @jax.jit
    def asked(variables, student, teacher, preacts):
        return run(variables, student, teacher, preacts=preacts, student_preact=True)

    got = asked(variables, STUDENT, TEACHER, others[:2])
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_allclose(a.terms["review"], b.terms["review"], rtol=1e-6)


def test_bfloat16_is_computed_in_float32(variables):
    def terms(student, teacher):
        return [x.terms["review"] for x in run(variables, student, teacher)]

    halves = precision.halves((STUDENT, TEACHER))
    assert precision.arithmetic(terms, *halves) == {"float32"}
