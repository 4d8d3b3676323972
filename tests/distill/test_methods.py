"""What holds for every method that is a `term.Term`, on toy networks."""

import dataclasses
import functools
import re

import apart
import jax
import jax.numpy as jnp
import numpy as np
import precision
import pytest
import tiny
import toys

from lakd_jax import config as config_lib
from lakd_jax import distill
from lakd_jax.config import check, resolved
from lakd_jax.distill.base import registry
from lakd_jax.distill.base import term as term_lib

METHODS = sorted(
    name
    for name, entry in registry.TABLE.items()
    if issubclass(entry.cls, term_lib.Term)
)
STAGED = [name for name in METHODS if distill.facts(name).staged]
SUMS = ("dkd+at", "kd+at+sp", "lakd+dkd")
SETTINGS = {  # what the toys have not, or where the full weight needs many epochs
    "crd": {"negatives": 8},
    **dict.fromkeys(("ab", "fsp"), {"init_epochs": 100.0}),  # in which they count
    "kdpp": {"kd_warmup_epochs": 0.0},
}
# Which modules of a cut student each module's terms train; others: their own.
REACH = {
    **dict.fromkeys(("fam", "review"), np.tri(3).T),  # fused with the later ones
    **dict.fromkeys(("fsp", "kdsvd"), [[0, 0, 0], [1, 1, 0], [0, 1, 1]]),  # pairs
    "fitnet": np.diag([0, 1, 0]),  # the module of its hint
}

# What they pool, or their networks' heads, stays in the type of the networks.
IN_HALF = ("catkd", "ofd", "sdd")


def options(name):
    """The block's defaults for a toy, with a warm-up and little cross-entropy."""
    block = config_lib.default()[name].to_dict()
    wanted = {"ce_weight": 0.5, "warmup_epochs": 4.0, "init_epochs": 0}
    wanted |= SETTINGS.get(name, {})
    return block | {n: v for n, v in wanted.items() if n in block}


def networks(name, cut_scale=1.0):
    """Another width than the student's, where the method allows it."""
    width = 4 if name in ("fsp", "kdsvd") else 6
    return apart.passes(teacher=toys.Toy(width=width), cut_scale=cut_scale)


@functools.cache
def compiled(name):
    """The method's own terms: compiled once, for all tests here."""
    passes = networks(name)
    made = distill.create(name, options(name))
    lesson = dataclasses.replace(passes.lesson, method=made)
    joints = 3 if distill.facts(name).staged else 1
    return apart.Losses(lesson, passes, joints, skip=("head_ce",))


def student_gradient(name, grads, cut_scale=1.0):
    """To the student's parameters, through what it shows and through its head."""
    # What the student is does not depend on its teacher.
    passes = apart.passes(teacher=toys.Toy(width=6), cut_scale=cut_scale)
    return apart.add(passes.pull(grads.ours), grads.head)


@functools.cache
def observed(name):
    """Module losses, new statistics and gradients of the own terms in epoch 40."""
    made = compiled(name)
    ours, theirs, _ = networks(name).see()
    return made(made.args(ours, theirs))


@pytest.mark.parametrize("name", METHODS)
def test_its_terms_alone_train_the_student_and_never_the_teacher(name):
    """Promises 16, 26: the teacher's gradient is exactly 0, the student's is not."""
    value, losses, _, grads = observed(name)
    terms = {n: t for loss in losses for n, t in loss.terms.items() if n != "head_ce"}
    assert terms and np.isfinite(value) and apart.finite(terms)
    ours = student_gradient(name, grads)
    assert apart.finite(ours) and apart.nonzero(ours)
    assert not apart.nonzero((grads.theirs, grads.teacher))


@pytest.mark.parametrize("what", ["equal", "dead"])
@pytest.mark.parametrize("name", METHODS)
def test_blank_pages_stay_finite(name, what):
    """Half of the batch is one image, or one at which no unit responds."""

    def blank(x):
        half = len(x) // 2
        page = np.zeros_like(x[:1]) if what == "dead" else x[:1]
        return np.concatenate([np.repeat(page, half, 0), x[half:]])

    made = compiled(name)
    ours, theirs, _ = jax.tree.map(blank, jax.device_get(networks(name).see()))
    value, losses, _, grads = made(made.args(ours, theirs))
    assert np.isfinite(value) and apart.finite([loss.terms for loss in losses])
    assert apart.finite(grads)


@pytest.mark.parametrize("name", METHODS)
def test_a_small_step_against_the_gradient_lowers_it_as_foretold(name):
    """So it can be learnt: what falls is the value, by the step times the slope."""
    made, passes, stats = compiled(name), networks(name), observed(name)[2]
    # A second step: the first sets constants, CRD's, that the gradient takes as given.
    value, *_, grads = made(made.args(*passes.see()[:2]), stats=stats)
    ours, own = student_gradient(name, grads), grads.own
    if name == "ctkd":  # which climbs in its temperature on purpose
        own = apart.zeros(own)
    slope = apart.dot(ours, ours) + apart.dot(own, own)

    def after(length):
        params = apart.moved(passes.params, ours, length)
        shown, theirs, _ = passes.see(params)
        args = made.args(shown, theirs, apart.moved(made.params, own, length), params)
        return made(args, stats=stats)[0]

    length = 1e-2 * abs(value) / slope
    fall = (after(-length) - after(length)) / 2
    assert fall == pytest.approx(length * slope, rel=0.1)


@pytest.mark.parametrize("name", STAGED)
def test_a_cut_student_learns_its_stages_from_their_own_terms(name):
    """With the cut each module is trained by its own terms, unless `REACH` has more."""
    made = compiled(name)
    args = made.args(*networks(name).see()[:2])
    labels = made.lesson.labels({"student": made.head})["student"]
    reached = []
    for weights in np.eye(3):
        *_, grads = made(args, weights=weights)
        ours = student_gradient(name, grads, cut_scale=0.0)
        reached.append([apart.nonzero(x) for x in toys.by_module(ours, labels, 3)])
    np.testing.assert_array_equal(reached, REACH.get(name, np.eye(3)))


@pytest.mark.parametrize("name", METHODS)
def test_weights_warm_up_epoch_by_epoch(name):
    made = compiled(name)
    args = made.args(*networks(name).see()[:2])

    def weights(epoch):
        losses = made(args, epoch=epoch)[1]
        return {n: float(w) for loss in losses for n, w in loss.weights.items()}

    full = weights(40.0)
    assert full.pop("head_ce") == (0.0 if name in ("ab", "fsp") else 0.5) and full
    for epoch, share in {0.9: 0.25, 1.0: 0.5, 3.0: 1.0}.items():
        at = weights(epoch)
        for term, weight in full.items():
            assert at[term] == pytest.approx(share * weight, rel=1e-6)


def test_the_teacher_of_cd_decays_and_labels_wait():
    """The rates of the public CIFAR settings in epochs 60, 61, 160 (counted from 1)."""
    options = config_lib.default()["cd"].to_dict()
    options |= {"decay_epochs": (60.0, 160.0), "alone_epochs": 60.0}
    taught = distill.create("cd", options)
    joints = tuple(toys.noise(k, 6, 8 // 2**k, 8 // 2**k, 3) for k in range(3))
    outputs = toys.outputs(toys.noise(9, 6, 4))
    given = {"student_joints": joints, "teacher_joints": joints}

    @jax.jit
    def weights(epoch):
        signals = toys.signals(outputs, outputs, epoch=epoch, **given)
        losses, _ = taught.init_with_output(jax.random.key(0), signals, train=True)
        return [loss.weights for loss in losses]

    for epoch, share, labelled in (
        (58.9, 6.0, 0.0),
        (59.0, 5.4, 0.0),
        (60.0, 5.4, 1.0),
        (159.0, 4.86, 1.0),
    ):
        found = weights(epoch)
        assert len(found) == 3 and set(found[0]) == {"cd"}
        np.testing.assert_allclose([w["cd"] for w in found], [share] * 3, rtol=1e-6)
        last = [found[-1]["head_ce"], found[-1]["gkd"]]
        np.testing.assert_allclose(last, [labelled, 0.1 * labelled], rtol=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_bfloat16_networks_give_finite_float32_terms(name):
    """The types without a run; the values of activations rounded to bfloat16."""
    made = compiled(name)
    *seen, _ = networks(name).see()

    def half(tree):
        """Logits are always float32."""
        whole = {n: tree[n] for n in ("student", "teacher") if n in tree}
        return jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree) | whole

    def assessed(stats, ours, theirs):
        losses, new = made.losses(stats, 40.0, made.args(ours, theirs))
        return [loss.terms for loss in losses], new

    halves = list(map(half, seen))
    stats = jax.tree.map(jnp.asarray, made.stats)
    found = precision.arithmetic(assessed, stats, *halves)
    assert found == {"float32"} | ({"bfloat16"} if name in IN_HALF else set())
    terms, _ = jax.eval_shape(assessed, stats, *halves)
    assert {t.dtype for t in jax.tree.leaves(terms)} == {jnp.dtype("float32")}
    rounded = jax.tree.map(lambda x: np.asarray(x, np.float32), halves)
    value, losses, _, grads = made(made.args(*rounded))
    assert np.isfinite(value) and apart.finite([loss.terms for loss in losses])
    assert apart.finite(grads)


@pytest.mark.parametrize("name", SUMS)
def test_a_sum_has_all_terms_once(name, tmp_path):
    config = resolved.resolve(tiny.config(tmp_path, method=name))
    made = {n: config.method_options(n) for n in distill.parts(name)}
    passes = networks(name)
    alone = [distill.create(n, own) for n, own in made.items()]
    *singles, sums = (
        apart.Losses(dataclasses.replace(passes.lesson, method=m), passes)
        for m in (*alone, distill.create_sum(made))
    )
    ours, theirs, _ = passes.see()

    @jax.jit
    def every(ours, theirs):
        return [
            one.losses(one.stats, 40.0, one.args(ours, theirs))[0]
            for one in (sums, *singles)
        ]

    sums, *singles = every(ours, theirs)
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
        ({"method": "dkd", "local__cut_end": 0.5}, "no loss in the modules before"),
        (
            {"local__cut_end": 0.5, "local__module_input": "teacher"},
            "no gradient crosses a cut",
        ),
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
    found = check.problems(tiny.config(tmp_path, **fields), 1)
    assert len(found) == 1 and re.search(line, found[0]), found


def test_every_block_has_a_range_for_every_number():
    default = config_lib.default()
    wrong = {
        f"{name}.{field}": -1.0 if isinstance(value, float) else -1
        for name in METHODS
        for field, value in default[name].items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    found = check.problems(config_lib.changed(default, wrong), 1)
    assert set(wrong) <= {line.split()[0] for line in found}
