"""Knowledge review: the public fusion's values, stages in turn."""

import functools

import golden_weights
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tap_toys
import toys

from lakd_jax.distill import review

INPUTS = golden_weights.arrays("losses_inputs")
LOSSES = golden_weights.arrays("losses")


def published():
    """The public fusion's weights, 32 channels to 64 between stages and 40 out."""
    conv, norm = golden_weights.conv, golden_weights.norm
    attention = golden_weights.bias("abf.att_conv.0", 2)
    params = {
        "conv1": conv("abf.conv1.0", 64, 32, 1, 1),
        "bn1": norm("abf.conv1.1", 64),
        "conv2": conv("abf.conv2.0", 40, 64, 3, 3),
        "bn2": norm("abf.conv2.1", 40),
        "att": conv("abf.att_conv.0", 2, 128, 1, 1) | attention,
    }
    widths = {"bn1": 64, "bn2": 40}
    state = {n: {"mean": np.zeros(w), "var": np.ones(w)} for n, w in widths.items()}
    return {"params": params, "batch_stats": state}


def test_fusion_is_the_public_one():
    x, later = INPUTS["feat_student_1"], INPUTS["abf_residual"]

    def fused(x, later):
        module = review.Fusion(64, 40)
        both, _ = module.apply(
            published(), x, later, (8, 8), train=True, mutable=["batch_stats"]
        )
        return jnp.mean(both[0] ** 2), both[0]

    (value, out), grad = jax.jit(jax.value_and_grad(fused, has_aux=True))(x, later)
    distance = golden_weights.distance
    assert distance(out, LOSSES["abf_out"]) < 1e-4
    assert distance(value, LOSSES["abf_out_mean_square"]) < 1e-4
    # The mean square behind a norm hardly depends on what it normalises: gradients of
    # 1e-9 are left of numbers near 1e-3, and rounding is seen in them.
    assert distance(grad, LOSSES["abf_out_mean_square/grad_s"]) < 5e-3


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
    shapes = (4, 8, 8, widths[0]), (4, 4, 4, widths[1]), (4, widths[2])
    return [toys.noise(seed + k, *shape) for k, shape in enumerate(shapes)]


STUDENT, TEACHER = maps((3, 5, 5), 1), maps((6, 7, 8), 4)


def signals(student, teacher, preacts=()):
    logits = np.zeros((4, 3), np.float32)
    return toys.signals(
        toys.outputs(logits, student[2]),
        toys.outputs(logits, teacher[2]),
        student_joints=tuple(student[:2]),
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


@functools.partial(jax.jit, static_argnames="student_preact")
def terms(variables, student, teacher, preacts=(), **fields):
    """The values of both modules."""
    apply = functools.partial(made(**fields).apply, train=True, mutable=["batch_stats"])
    losses, _ = apply(variables, signals(student, teacher, preacts))
    return [loss.terms["review"] for loss in losses]


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
        return [review.hcl_loss([first], [teacher[0]]), last]

    got, wanted = (f(variables, STUDENT, TEACHER) for f in (terms, in_turn))
    np.testing.assert_allclose(got, wanted, rtol=1e-5)


def test_preactivations_of_the_student_where_asked(variables):
    others = maps((3, 5, 5), 7)
    wanted = terms(variables, [*others[:2], STUDENT[2]], TEACHER)
    got = terms(variables, STUDENT, TEACHER, others[:2], student_preact=True)
    np.testing.assert_allclose(got, wanted, rtol=1e-6)
