"""Knowledge review: the public fusion's values, which stage's loss trains which."""

import pathlib
import types

import golden_weights
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lakd_jax.distill import method, review

GOLDEN = pathlib.Path(__file__).parent / "golden"
INPUTS = dict(np.load(GOLDEN / "losses_inputs.npz"))
LOSSES = dict(np.load(GOLDEN / "losses.npz"))


def nhwc(x):
    return jnp.asarray(np.moveaxis(x, 1, -1))


def oihw(name, *shape):
    return jnp.asarray(
        golden_weights.tensor(f"abf.{name}", shape).transpose(2, 3, 1, 0)
    )


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
    state = {n: {"mean": jnp.zeros(w), "var": jnp.ones(w)} for n, w in widths.items()}
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
    module = review.Fusion(5, 6)
    for size in ((8, 8), (2, 2), (3, 3)):
        (out, on), _ = module.init_with_output(
            jax.random.key(0), x, later, size, train=True
        )
        assert out.shape == (2, *size, 6) and on.shape == (2, *size, 5)


def maps(widths, seed, dtype=jnp.float32):
    """Two stages and the pooled features."""
    rng = np.random.default_rng(seed)
    shapes = [(4, 8, 8, widths[0]), (4, 4, 4, widths[1]), (4, widths[2])]
    return [jnp.asarray(rng.standard_normal(s), dtype) for s in shapes]


STUDENT, TEACHER = maps((3, 5, 5), 1), maps((6, 7, 8), 2)


def signals(student, teacher, epoch=0.0, preacts=()):
    return method.Signals(
        student=types.SimpleNamespace(logits=jnp.zeros((4, 3)), pooled=student[2]),
        teacher=types.SimpleNamespace(pooled=teacher[2]),
        labels=jnp.zeros(4, jnp.int32),
        epoch=jnp.float32(epoch),
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
    seen = signals(STUDENT, TEACHER)
    return jax.jit(lambda key: made().init(key, seen, train=True))(jax.random.key(0))


def run(variables, seen, **fields):
    apply = made(**fields).apply
    return apply(variables, seen, train=True, mutable=["batch_stats"])[0]


def test_parts_have_their_modules_names_and_only_the_last_does_not_fuse(variables):
    params = variables["params"]
    assert set(params) == {"module1", "module2", "head"}
    assert [("att" in params[n]) for n in sorted(params)] == [False, True, True]
    assert params["module1"]["conv2"]["kernel"].shape == (3, 3, 5, 6)


def test_stages_are_reviewed_from_the_last_to_the_first(variables):
    """The same by applying each fusion in turn."""

    def fuse(name, x, later, size):
        own = {kind: tree[name] for kind, tree in variables.items()}
        module = review.Fusion(5, own["params"]["conv2"]["kernel"].shape[-1])
        out = module.apply(own, x, later, size, train=True, mutable=["batch_stats"])
        return out[0]

    head, later = fuse("head", STUDENT[2][:, None, None], None, (1, 1))
    second, later = fuse("module2", STUDENT[1], later, (4, 4))
    first, _ = fuse("module1", STUDENT[0], later, (8, 8))
    theirs = TEACHER[2][:, None, None]
    last = review.hcl_loss([second, head], [TEACHER[1], theirs])
    losses = run(variables, signals(STUDENT, TEACHER))
    assert len(losses) == 2 and list(losses[0].terms) == ["review"]
    first = review.hcl_loss([first], [TEACHER[0]])
    np.testing.assert_allclose(losses[0].terms["review"], first, rtol=1e-5)
    np.testing.assert_allclose(losses[1].terms["review"], last, rtol=1e-5)


def test_the_first_stages_loss_trains_later_stages_and_no_loss_the_teacher(variables):
    def loss(k, params, student, teacher):
        whole = {**variables, "params": params}
        return run(whole, signals(student, teacher))[k].terms["review"]

    def touched(k, where):
        arguments = (k, variables["params"], STUDENT, TEACHER)
        grads = jax.jit(jax.grad(loss, argnums=where), static_argnums=0)(*arguments)
        return [bool(np.any(np.asarray(g))) for g in jax.tree.leaves(grads)]

    assert touched(0, 2) == [True, True, True]
    assert touched(1, 2) == [False, True, True]
    assert not any(touched(0, 3) + touched(1, 3))


def test_weight_grows_in_twenty_epochs(variables):
    for epoch, share in ((0.0, 0.05), (9.5, 0.5), (30.0, 1.0)):
        first = run(variables, signals(STUDENT, TEACHER, epoch))[0]
        np.testing.assert_allclose(first.weights["review"], 5.0 * share, rtol=1e-6)


def test_preactivations_of_the_student_where_asked(variables):
    others = maps((3, 5, 5), 3)
    mixed = [*others[:2], STUDENT[2]]
    wanted = run(variables, signals(mixed, TEACHER))
    seen = signals(STUDENT, TEACHER, preacts=others[:2])
    got = run(variables, seen, student_preact=True)
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_array_equal(a.terms["review"], b.terms["review"])


def test_bfloat16_gives_finite_float32(variables):
    halves = [[x.astype(jnp.bfloat16) for x in own] for own in (STUDENT, TEACHER)]
    for loss in run(variables, signals(*halves)):
        value = loss.terms["review"]
        assert value.dtype == jnp.float32 and np.isfinite(value) and value > 0
