"""What holds for every method with a block in `config_methods`, on toy networks."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
import toys

from lakd_jax import config as config_lib
from lakd_jax import config_methods, distill, validate
from lakd_jax.distill import method
from lakd_jax.train import build

METHODS = sorted(config_methods.blocks())
STAGED = [name for name in METHODS if distill.facts(name).staged]
SUMS = ("dkd+at", "kd+at+sp", "lakd+dkd")
SETTINGS = {  # what the toys have not, or where the full weight needs many epochs
    "crd": {"negatives": 8},
    **dict.fromkeys(("ab", "fsp"), {"init_epochs": 100.0}),  # in which they count
    "kdpp": {"kd_warmup_epochs": 0.0},
}


def options(name, **fields):
    """The block's defaults for a toy, without cross-entropy and warm-up."""
    block = config_methods.blocks()[name].to_dict()
    wanted = {"ce_weight": 0.0, "warmup_epochs": 0.0, "init_epochs": 0}
    wanted |= SETTINGS.get(name, {})
    return block | {n: v for n, v in wanted.items() if n in block} | fields


def teacher_of(name):
    """Another width than the student's, where the method allows it."""
    return toys.Toy() if name in ("fsp", "kdsvd") else toys.Toy(width=6)


def taught(name, **fields):
    cut = fields.pop("cut_scale", 1.0)
    granularity = "stage" if distill.facts(name).staged else "none"
    return toys.lesson(
        options(name, **fields),
        name=name,
        teacher=teacher_of(name),
        granularity=granularity,
        cut_scale=cut,
    )


@functools.cache
def observed(name):
    """Losses and gradients of the method's own terms, to student and teacher."""
    lesson, batch = taught(name), toys.images()
    params, stats = lesson.init(*batch)

    @jax.jit
    def both(params, teacher):
        def total(params, teacher):
            losses, new = lesson.losses(
                params, stats, *batch, epoch=40.0, teacher_variables=teacher
            )
            return method.total(losses), (losses, new)

        return jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(params, teacher)

    teacher = {"params": lesson.teacher_variables["params"]}
    rest = {n: v for n, v in lesson.teacher_variables.items() if n != "params"}
    (value, aux), grads = both(params, teacher | rest)
    return lesson, params, stats, value, aux, grads


@pytest.mark.parametrize("name", METHODS)
def test_its_terms_alone_train_the_student_and_never_the_teacher(name):
    """Promises 16, 26: the teacher's gradient is exactly 0, the student's is not."""
    *_, value, (losses, _), (ours, theirs) = observed(name)
    terms = {n: t for loss in losses for n, t in loss.terms.items() if n != "head_ce"}
    assert terms and all(t.dtype == jnp.float32 for t in terms.values())
    assert np.isfinite(value)
    grads = jax.tree.leaves(ours["student"])
    assert all(np.all(np.isfinite(g)) for g in grads)
    assert any(np.any(np.asarray(g)) for g in grads)
    assert not any(np.any(np.asarray(g)) for g in jax.tree.leaves(theirs["params"]))


@pytest.mark.parametrize("name", METHODS)
def test_every_variable_of_it_belongs_to_a_module(name):
    lesson, params, stats, *_, (_, new), _ = observed(name)
    count = len(lesson.partition.names)
    assert set(jax.tree.leaves(lesson.labels(params))) <= set(range(count))
    lesson.labels(stats)  # raises where a path belongs to none
    assert jax.tree.structure(new) == jax.tree.structure(stats)
    for before, after in zip(*map(jax.tree.leaves, (stats, new)), strict=True):
        assert jnp.shape(before) == jnp.shape(after)
        assert jnp.result_type(before) == jnp.result_type(after)


@pytest.mark.parametrize("name", METHODS)
def test_it_can_be_learnt(name):
    lesson, batch = taught(name, ce_weight=0.0), toys.images()
    params, stats = lesson.init(*batch)
    optimizer = optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.05))

    @jax.jit
    def step(params, stats):
        def total(params):
            losses, new = lesson.losses(params, stats, *batch, epoch=40.0)
            return method.total(losses), new

        (value, new), grads = jax.value_and_grad(total, has_aux=True)(params)
        updates, _ = optimizer.update(grads, optimizer.init(params), params)
        return optax.apply_updates(params, updates), new, value

    values = []
    for _ in range(30):
        params, stats, value = step(params, stats)
        values.append(float(value))
    assert min(values[-3:]) < values[0]


@pytest.mark.parametrize("name", STAGED)
def test_a_cut_student_learns_its_stages_from_their_own_terms(name):
    """With the cut each module is trained by terms alone, whatever comes after."""
    lesson, batch = taught(name, cut_scale=0.0), toys.images()
    params, stats = lesson.init(*batch)

    def total(params):
        losses, _ = lesson.losses(params, stats, *batch, epoch=40.0)
        return method.total(losses)

    grads = jax.jit(jax.grad(total))(params)["student"]
    own = toys.by_module(grads, lesson.labels({"student": grads}), 3)
    trained = [any(np.any(np.asarray(g)) for g in module) for module in own]
    hint = options(name).get("hint_layer")
    assert trained == [k == hint for k in (1, 2, 3)] if hint else all(trained[:-1])


@pytest.mark.parametrize("name", METHODS)
def test_weights_warm_up_epoch_by_epoch(name):
    lesson, batch = taught(name, warmup_epochs=4.0, ce_weight=0.5), toys.images()
    params, stats = lesson.init(*batch)

    @jax.jit
    def weights(epoch):
        losses, _ = lesson.losses(params, stats, *batch, epoch=epoch)
        return {n: w + 0.0 for loss in losses for n, w in loss.weights.items()}

    at = {epoch: weights(epoch) for epoch in (0.9, 1.0, 3.0, 40.0)}
    full = at[40.0]
    assert full.pop("head_ce") == (0.0 if name in ("ab", "fsp") else 0.5) and full
    for epoch, share in {0.9: 0.25, 1.0: 0.5, 3.0: 1.0}.items():
        for term, weight in full.items():
            np.testing.assert_allclose(at[epoch][term], share * weight, rtol=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_bfloat16_networks_give_finite_float32_terms(name):
    lesson, params, stats, *_ = observed(name)

    def half(x):
        return x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x

    def losses(params, stats):
        signals, _ = lesson.signals(
            params["student"], stats["student"], *toys.images(), epoch=40.0
        )
        rounded = {
            part: jax.tree.map(half, getattr(signals, part))
            for part in ("student_joints", "teacher_joints")
        }
        own = {"params": params["method"], "batch_stats": stats["method"]}
        signals = signals.replace(**rounded)
        return lesson.method.apply(own, signals, train=True, mutable=["batch_stats"])

    found, _ = jax.jit(losses)(params, stats)
    for loss in found:
        for term in loss.terms.values():
            assert term.dtype == jnp.float32 and np.isfinite(term)


@pytest.mark.parametrize("name", SUMS)
def test_a_sum_has_all_terms_once(name, tmp_path):
    parts = distill.parts(name)
    config = tiny.config(tmp_path, method=name)
    made = {
        n: build.method_options(config_lib.changed(config, {"method": n}))
        for n in parts
    }
    lesson = toys.lesson({}, student=toys.Toy())
    together = lesson_of(lesson, distill.create_sum(made))
    alone = [lesson_of(lesson, distill.create(n, own)) for n, own in made.items()]
    batch = toys.images()
    sums, _ = together.losses(*together.init(*batch), *batch)
    singles = [one.losses(*one.init(*batch), *batch)[0] for one in alone]
    terms = [set(loss.terms) for loss in sums]
    wanted = [set() for _ in terms]
    for losses in singles:
        for k, loss in enumerate(losses, len(wanted) - len(losses)):
            wanted[k] |= set(loss.terms)
    assert terms == wanted
    first = singles[0][-1].weights["head_ce"]
    assert sums[-1].weights["head_ce"] == first
    shared = {n for n in singles[0][-1].terms if not n.startswith(("feature", "att"))}
    for term in shared:  # those without parameters have equal values
        np.testing.assert_allclose(
            sums[-1].terms[term], singles[0][-1].terms[term], rtol=1e-5
        )


def lesson_of(lesson, made):
    return toys.Lesson(
        lesson.student,
        lesson.teacher,
        lesson.teacher_variables,
        made,
        lesson.partition,
        cut_scale=1.0,
    )


def test_sums_are_named_right():
    assert distill.parts("dkd+at") == ("dkd", "at")
    assert distill.title("dkd+at") == "DKD + AT"
    for name, line in {
        "dkd+att": "did you mean 'at'",
        "dkd+dkd": "names dkd twice",
        "none+dkd": "none has nothing to add",
        "dkd+": "method is ''",
    }.items():
        with pytest.raises(ValueError, match=line):
            distill.parts(name)


def test_what_holds_of_a_sum_holds_of_one_of_its_parts():
    facts = distill.facts("lakd+rtk")
    assert (facts.local, facts.staged, facts.cut_scale) == (False, True, 0.0)
    assert set(facts.teacher_reads) == {"logits", "joints", "taps"}
    assert facts.least_batch == 2


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"method": "dkd+at", "at__weight": -1.0}, "at.weight must be at least 0"),
        ({"method": "dkd", "local__cut_scale": 0.0}, "no loss in the modules before"),
        (
            {"method": "sp", "sp__weight": 0.0, "sp__ce_weight": 0.0},
            "nothing is learnt",
        ),
        ({"method": "kd+sdp"}, "is 'sdp'; did you mean 'sp'"),
        ({"method": "at", "local__engine": "dispatch"}, "has one loss for all of it"),
        ({"method": "lakd+dkd", "local__engine": "dispatch"}, "use local.engine=fused"),
    ],
)
def test_what_cannot_be_is_said_before_anything_runs(fields, line, tmp_path):
    found = validate.problems(tiny.config(tmp_path, **fields), 1)
    assert len(found) == 1 and re.search(line, found[0]), found


def test_every_block_has_a_range_for_every_number():
    assert set(config_methods.blocks()) <= set(distill.names())
    for name, block in config_methods.blocks().items():
        for field, value in block.items():
            wrong = -1.0 if isinstance(value, float) else -1
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue
            config = config_lib.changed(
                config_lib.default(), {f"{name}.{field}": wrong, "method": name}
            )
            assert any(
                f"{name}.{field}" in line for line in validate.problems(config, 1)
            )
