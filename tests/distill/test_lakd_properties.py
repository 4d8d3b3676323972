"""LAKD in training: modules learn apart, and the total is what it says.

The networks and each reading's losses are compiled once, see `apart`.
"""

import dataclasses
import functools

import apart
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from lakd_jax import models
from lakd_jax.distill import kd, lakd
from lakd_jax.distill.base import method
from lakd_jax.models import chain

OWN = np.eye(3, dtype=bool)  # each loss reaches its own module
END_TO_END = np.tri(3, dtype=bool)  # and all those before
# Its weight of the attention is (1 - alpha) att_scale.
HEAD_ALONE = toys.LITERAL | {"alpha": 1.0, "beta": 0.0}


def cut(cut_scale=0.0):
    """The passes of a student that is cut so; they show the uncut one, too."""
    return apart.passes(cut_scale=cut_scale, uncut=cut_scale == 0)


@functools.cache
def _losses(options):
    passes = cut()
    made = lakd.LAKD(lakd.Options(**dict(options)))
    return apart.Losses(dataclasses.replace(passes.lesson, method=made), passes)


def losses(options=None):
    """LAKD's losses, of weights drawn by NumPy, compiled once for each options."""
    return _losses(tuple((options or {}).items()))


@dataclasses.dataclass
class Trained:
    """A student and what its method keeps, as steps change them."""

    passes: apart.Passes
    made: apart.Losses

    def __post_init__(self):
        self.params = {"student": self.passes.params, "method": self.made.params}
        self.stats = {"student": self.passes.stats, "method": self.made.stats}

    def gradients(self, target=None, weights=(1, 1, 1)):
        """Of the modules' losses, so weighed; the value of each; and new statistics.

        `target` changes what the teacher shows.
        """
        student = self.params["student"], self.stats["student"]
        ours, theirs, new = self.passes.see(*student)
        theirs = target(theirs) if target else theirs
        args = self.made.args(ours, theirs, self.params["method"], student[0])
        _, found, own, grads = self.made(
            args, stats=self.stats["method"], weights=weights
        )
        back = apart.add(self.passes.pull(grads.ours, *student), grads.head)
        grads = {"student": back, "method": grads.own}
        return grads, found, {"student": new, "method": own}

    def labels(self, tree):
        return self.made.lesson.labels(tree)

    def by_module(self, tree):
        return toys.by_module(tree, self.labels(tree), 3)


def reached(trees, lesson):
    """Which modules have anything but zeros in each of these trees."""
    own = [toys.by_module(tree, lesson.labels(tree), 3) for tree in trees]
    return np.array([[apart.nonzero(leaves) for leaves in row] for row in own])


def jacobian(passes, made):
    """Per loss J_j and module k: whether any gradient of theta_k is not zero."""
    start = Trained(passes, made)
    rows = [start.gradients(weights=w)[0] for w in np.eye(3)]
    return reached(rows, made.lesson)


def crossing(passes):
    """The same for any losses on what each module shows, the last with the head."""
    rng, rows = np.random.default_rng(0), []
    ours, *_ = passes.see()
    for k in range(3):
        slopes = apart.zeros({n: ours[n] for n in ("student", "student_joints")})
        joints = list(slopes["student_joints"])
        joints[k] = rng.normal(size=joints[k].shape).astype(np.float32)
        slopes["student_joints"] = tuple(joints)
        if k == 2:
            logits = rng.normal(size=ours["student"].logits.shape).astype(np.float32)
            slopes["student"] = slopes["student"].replace(logits=logits)
        rows.append({"student": passes.pull(slopes)})
    return reached(rows, passes.lesson)


# Gradient isolation


@pytest.mark.parametrize("reading", toys.READINGS)
def test_property_01_and_06_losses_reach_their_own_module_and_no_teacher(reading):
    made = losses(toys.READINGS[reading])
    np.testing.assert_array_equal(jacobian(cut(), made), OWN)
    *_, grads = made(made.args(*cut().see()[:2]))
    assert apart.nonzero(grads.ours) and not apart.nonzero(grads.theirs)
    if not made.lesson.method.needs_suffix:  # which a step takes as a constant
        assert not apart.nonzero(grads.teacher)


@pytest.mark.parametrize("module_input", ["student", "teacher"])
def test_property_01_holds_whatever_a_module_is_given(module_input):
    network = models.create("resnet8", num_classes=toys.CLASSES)
    scale = 0.0 if module_input == "student" else 1.0
    fields = {"cut_scale": scale, "module_input": module_input}
    passes = apart.passes(student=network, teacher=network, **fields)
    np.testing.assert_array_equal(crossing(passes), OWN)


def test_property_01_is_broken_on_purpose_by_global_attention():
    found = jacobian(cut(), losses({"att_global": True}))
    np.testing.assert_array_equal(found, END_TO_END)


def test_property_02_a_target_touches_its_own_module_then_later_ones():
    def other(theirs):
        first, second, third = theirs["teacher_joints"]
        return theirs | {"teacher_joints": (first, 2 * second[:, ::-1], third)}

    def trained(target):
        state, owned = Trained(cut(), losses()), []
        for _ in range(2):
            grads, _, state.stats = state.gradients(target)
            state.params = apart.moved(state.params, grads, 0.1)
            owned.append(state.by_module(state.params))
        return owned

    equal = [
        [
            all((a == b).all() for a, b in zip(*module, strict=True))
            for module in zip(*step, strict=True)
        ]
        for step in zip(trained(None), trained(other), strict=True)
    ]
    assert equal == [[True, False, True], [True, False, False]]


def test_property_04_full_scale_is_end_to_end_training():
    got, want = (Trained(cut(scale), losses()).gradients()[0] for scale in (1.0, None))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), got, want)
    found = jacobian(cut(1.0), losses())
    np.testing.assert_array_equal(found, END_TO_END)


@pytest.mark.parametrize("module", [0, 1, 2])
def test_property_04_finite_differences_agree_inside_a_module(module):
    start, rng = Trained(cut(), losses()), np.random.default_rng(3)
    labels = start.labels(start.params)
    way = jax.tree.map(
        lambda p, o: rng.normal(size=p.shape) * (o == module), start.params, labels
    )
    grads, *_ = start.gradients(weights=np.eye(3)[module])

    def loss(step):
        shifted = Trained(start.passes, start.made)
        shifted.params = apart.moved(start.params, way, -step)
        return float(shifted.gradients()[1][module].total())

    step = 1e-3
    slope = (loss(step) - loss(-step)) / (2 * step)
    assert apart.dot(grads, way) == pytest.approx(slope, rel=2e-2)


def test_cut_scale_multiplies_what_crosses():
    def gradient(scale):
        grads, *_ = Trained(cut(scale), losses()).gradients(weights=(0, 0, 1))
        return grads["student"]["stage1"]["block1"]["conv"]["kernel"]

    # Two cuts lie between the last module and the first.
    np.testing.assert_allclose(
        gradient(0.5), 0.25 * gradient(1.0), rtol=1e-4, atol=1e-8
    )


# Assembly


def test_property_13_total_is_the_formula_of_its_terms():
    alpha, att_scale, beta = (toys.LITERAL[n] for n in ("alpha", "att_scale", "beta"))
    made = losses(toys.LITERAL)
    total, found, *_ = made(made.args(*cut().see()[:2]))
    metrics = method.flatten_metrics(found)
    attention = sum(metrics[f"module{k}/attention"] for k in (1, 2, 3))
    feature = sum(metrics[f"module{k}/feature"] for k in (1, 2, 3))
    head = metrics["module3/head_ce"]
    want = alpha * head + (1 - alpha) * att_scale * attention + beta * feature
    assert total == pytest.approx(float(want), rel=1e-6)


def test_property_14_without_features_early_modules_only_decay():
    """No gradient reaches them: an optimiser is left with their decay."""
    made = losses(HEAD_ALONE)
    grads, *_ = Trained(cut(), made).gradients()
    assert reached([grads], made.lesson).tolist() == [[False, False, True]]


def test_property_15_head_alone_and_uncut_is_plain_training():
    """With property 04: uncut gradients are those of a network without joints."""
    plain = apart.Losses(cut().lesson, cut(), joints=1)
    assert isinstance(plain.lesson.method, kd.Plain)
    got, want = (
        made(made.args(*cut().see()[:2]))[3].ours
        for made in (losses(HEAD_ALONE), plain)
    )
    assert apart.nonzero(want["student"].logits)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), got, want
    )


@pytest.mark.parametrize("att_global", [False, True])
def test_property_17_statistics_move_once_a_step(att_global):
    """The method's, of two calls of an adapter; the student's, of two passes."""
    start = Trained(cut(), losses({"att_global": True} if att_global else {}))
    *_, new = start.gradients()
    assert jax.tree.structure(new) == jax.tree.structure(start.stats)
    ours, *_ = cut().see()
    for k, h in enumerate(ours["student_joints"], 1):
        name = f"module{k}"
        kernel = start.made.params[name]["adapter"]["conv"]["kernel"][0, 0]
        mean = np.mean(h @ kernel, axis=(0, 1, 2))
        old = start.made.stats[name]["adapter"]["bn"]["mean"]
        got = new["method"][name]["adapter"]["bn"]["mean"]
        np.testing.assert_allclose(got, 0.9 * old + 0.1 * mean, rtol=1e-4, atol=1e-6)
    *_, once = cut(None).see()  # one pass, without joints
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        new["student"],
        once,
    )


def test_property_18_the_student_is_the_plain_network():
    """Heads and adapters are the method's; what trains the student adds nothing."""
    start = Trained(cut(), losses(toys.READINGS["aux_heads"]))
    grads, _, stats = start.gradients()
    assert set(grads["method"]["module1"]) == {"adapter", "aux_head"}
    plain = chain.variable_shapes(toys.Toy(), 8)
    found = {"params": grads["student"], "batch_stats": stats["student"]}
    assert jax.tree.map(np.shape, found) == jax.tree.map(np.shape, plain)


def test_property_19_adapters_stand_where_they_should():
    def adapters(adapter, *theirs):
        """The modules that have one, by the widths of the teacher's joints."""
        made = lakd.LAKD(lakd.Options(adapter=adapter))
        ours, seen, _ = cut().see()
        joints = tuple(jnp.zeros((8, 2, 2, width)) for width in theirs)
        signals = cut().lesson.assemble(
            ours, seen | {"teacher_joints": joints}, {}, {}, apart.batch()[1]
        )
        init = functools.partial(made.init, train=True)
        own = jax.eval_shape(init, jax.random.key(0), signals)["params"]
        return sorted(name for name in own if "adapter" in own[name])

    every = ["module1", "module2", "module3"]
    assert adapters("always", 4, 5, 6) == every
    assert adapters("shape", 6, 6, 6) == every[:2]  # the student's are 4, 5, 6
    assert adapters("shape", 4, 6, 6) == every[1:2]

    grads, *_ = Trained(cut(), losses()).gradients()
    for name in every:
        assert apart.nonzero(grads["method"][name]["adapter"]["conv"]["kernel"])
