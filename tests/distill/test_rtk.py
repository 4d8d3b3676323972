"""RTK (our interpretation): properties 12 to 21 of the notes, and its settings."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tap_toys

from lakd_jax import config as config_lib
from lakd_jax import distill
from lakd_jax.config import check, resolved
from lakd_jax.distill import rtk
from lakd_jax.distill import tap_attention as attention_lib
from lakd_jax.distill.base import numerics

KEY = jax.random.key(0)
SELECTIONS = rtk.CHOICES["selection"]
GROUPS = attention_lib.by_size([np.zeros((1, s, s, 1)) for s, _ in tap_toys.TEACHER])


def options(**fields):
    return rtk.Options(**({"qk_dim": 8} | fields))


@functools.cache
def pair(seed=0):
    """Taps of a student and a teacher."""
    student = tap_toys.taps(tap_toys.STUDENT, seed)
    return student, tap_toys.taps(tap_toys.TEACHER, seed + 10)


def weights(student, teacher, seed=0):
    """Of every selection: those without pooling ignore its scores."""
    module = rtk.Attend(options(selection="pooled"))
    return tap_toys.variables(module, student, teacher, seed=seed)


def attend(variables, student, teacher, **fields):
    """Attention and distances of RTK in training mode."""
    (attention, distances, _), _ = rtk.Attend(options(**fields)).apply(
        variables, student, teacher, train=True, mutable=["batch_stats"]
    )
    return attention, distances


TRACED = []


def loss(variables, student, teacher, **fields):
    found = attend(variables, student, teacher, **fields)
    return rtk.rtk_loss(*found), found


@jax.jit
def every(variables, student, teacher):
    """By selection: ((loss, (attention, distances)), gradients of all three)."""
    TRACED.append([t.shape for t in (*student, *teacher)])
    both = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)
    return {s: both(variables, student, teacher, selection=s) for s in SELECTIONS}


@jax.jit
def by_batch(variables, student, teacher):
    """By selection: attention and distances, where a batch selects as a whole."""
    call = functools.partial(attend, variables, student, teacher, scope="batch")
    return {selection: call(selection=selection) for selection in SELECTIONS}


@functools.cache
def answers(scope="sample"):
    """{selection: (attention, distances)} of `pair()`."""
    if scope == "batch":
        return jax.device_get(by_batch(weights(*pair()), *pair()))
    found = jax.device_get(every(weights(*pair()), *pair()))
    return {selection: answer for selection, ((_, answer), _) in found.items()}


def spread_logits(seed=0, shape=(6, 3, 4)):
    noise = 2 * np.random.default_rng(seed).standard_normal(shape)
    return noise.astype(np.float32)


select = jax.jit(rtk.select, static_argnums=(1, 2), static_argnames=("scope", "top_r"))
stage_mask = jax.jit(rtk.stage_mask, static_argnums=1)
top_mask = jax.jit(rtk.top_mask, static_argnums=1)


# Properties, by their number


@pytest.mark.parametrize("scope", ["sample", "batch"])
@pytest.mark.parametrize("selection", SELECTIONS)
def test_12_rows_sum_to_one_over_teacher_taps(selection, scope):
    attention, distances = answers(scope)[selection]
    keys = 3 if selection == "pooled" else 4
    assert attention.shape == distances.shape == (5, 3, keys)
    np.testing.assert_allclose(attention.sum(-1), 1, rtol=1e-5)
    assert np.min(attention) >= 0
    alive = (attention > 0).sum(-1)
    wanted = {"stage": 3, "topr": 3, "pooled": 3, "none": 4}
    if selection in wanted:
        np.testing.assert_array_equal(alive, wanted[selection])
    else:
        assert alive.min() >= 1 and alive.max() < 4
    if scope == "batch":
        same = (attention > 0) == (attention[:1] > 0)
        assert same.all()


def test_13_stage_keeps_the_largest_logit_of_each_stage():
    logits = spread_logits()
    mask = select(logits, GROUPS, "stage", scope="sample", top_r=3)
    for group in GROUPS:
        members = list(group)
        of_stage = np.asarray(mask)[..., members]
        np.testing.assert_array_equal(of_stage.sum(-1), 1)
        best = logits[..., members].argmax(-1)
        np.testing.assert_array_equal(of_stage.argmax(-1), best)
    tied = stage_mask(np.zeros(logits.shape, np.float32), GROUPS)
    np.testing.assert_array_equal(tied[0, 0], [True, False, True, True])
    # Stages need not be neighbours.
    apart = stage_mask(np.array([[[1.0, 3.0, 2.0]]]), ((0, 2), (1,)))
    np.testing.assert_array_equal(apart[0, 0], [False, True, True])


def test_14_filters_without_effect_equal_none_and_one_tap_gets_all():
    logits = spread_logits()
    for count in (4, 9):
        assert top_mask(logits, count).all()
    assert jax.jit(rtk.threshold_mask)(logits, 0.0).all()
    only = jax.jit(rtk.masked_softmax)(logits, top_mask(logits, 1))
    np.testing.assert_array_equal(np.max(only, -1), 1)
    np.testing.assert_array_equal(np.sum(np.asarray(only) > 0, -1), 1)
    student, teacher = pair()
    filtered = jax.jit(functools.partial(attend, selection="topr", top_r=4))
    found = filtered(weights(student, teacher), student, teacher)
    for ours, wanted in zip(found, answers()["none"], strict=True):
        np.testing.assert_allclose(ours, wanted, rtol=1e-5, atol=1e-6)


def test_14_threshold_keeps_weights_of_at_least_the_mean():
    logits = np.array([[[0.0, 0.0, 0.0, 0.0], [5.0, 0.0, 0.0, 0.0]]])
    mask = select(logits, GROUPS, "threshold", scope="sample", top_r=1)
    np.testing.assert_array_equal(mask[0, 0], [True] * 4)
    np.testing.assert_array_equal(mask[0, 1], [True, False, False, False])


@pytest.mark.parametrize("selection", ["stage", "topr", "threshold"])
def test_15_filtered_taps_have_no_influence(selection):
    student, teacher = pair()
    variables = weights(student, teacher)
    fields = {"selection": selection, "top_r": 2, "scope": "batch"}

    @jax.jit
    def run(values, row):
        """Of the student tap marked in `row`; descriptors stay the teacher's."""

        def loss(student):
            a, _ = attend(variables, student, teacher, **fields)
            e = attention_lib.distances(student, values, "sum")
            return rtk.rtk_loss(row[None, :, None] * a, e), (a, e)

        return jax.value_and_grad(loss, has_aux=True)(student)

    first = np.array([1.0, 0.0, 0.0], np.float32)
    (_, (attention, distances)), _ = run(teacher, first)
    weight = np.asarray(attention).max(0)
    rows, taps = np.nonzero(weight == 0)
    # A student tap, and a teacher tap it does not take.
    row, tap = np.roll(first, rows[0]), taps[0]

    def changed(tap):
        other = list(teacher)
        other[tap] = 7 * other[tap][:, ::-1] ** 2 + 1
        return run(tuple(other), row)

    ((before, _), slopes), ((after, (_, moved)), others) = (
        run(teacher, row),
        changed(tap),
    )
    assert np.max(np.abs(moved - distances)) > 0.01
    for a, b in zip((before, *slopes), (after, *others), strict=True):
        np.testing.assert_array_equal(a, b)
    # What is kept does have influence.
    kept = weight[rows[0]].argmax()
    assert abs(changed(kept)[0][0] - before) > 1e-3


def test_16_without_filter_it_is_afd_with_swapped_roles():
    first, second = pair()
    inner = {kind: tree["similarity"] for kind, tree in weights(first, second).items()}

    @jax.jit
    def roles_of_afd(inner, first, second):  # teacher = first asks
        logits, _ = attention_lib.Similarity(8).apply(
            inner,
            attention_lib.descriptors(first),
            attention_lib.descriptors(second),
            train=True,
            mutable=["batch_stats"],
        )
        return jax.nn.softmax(logits), attention_lib.distances(second, first, "sum")

    ours, summed = answers()["none"]  # student = first
    theirs, distances = roles_of_afd(inner, first, second)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)
    afd = np.swapaxes(distances, 1, 2)
    np.testing.assert_allclose(afd[:, 0, 0], summed[:, 0, 0], rtol=1e-5)  # one size
    assert np.max(np.abs(afd - summed)) > 0.01


def test_17_proportional_features_cost_nothing_and_the_loss_is_bounded():
    (tap,) = tap_toys.taps(((8, 5),), 1)
    variables = weights((tap,), (3 * tap,))
    call = functools.partial(loss, variables, (tap,), (3 * tap,))
    found = jax.jit(lambda: [call(selection=s)[0] for s in SELECTIONS])()
    np.testing.assert_allclose(found, 0, atol=1e-5)
    for seed in range(3):
        taps = pair(seed)
        for (value, _), _ in every(weights(*taps, seed), *taps).values():
            assert 0 < value <= 2 * 3


def test_18_a_larger_copy_of_a_tap_costs_the_same_summed_and_a_quarter_in_the_mean():
    small, student = tap_toys.taps(((4, 6), (4, 3)), 2)
    large = small.repeat(2, 1).repeat(2, 2)
    blocky = student.repeat(2, 1).repeat(2, 2)
    for reduction, factor in (("sum", 1), ("mean", 4)):

        @jax.jit
        def find(small, large, reduction=reduction):
            both = (student, blocky)
            at = functools.partial(attention_lib.distances, both, reduction=reduction)
            return at((small,)), at((large,))

        at_small, at_large = find(small, large)
        np.testing.assert_allclose(factor * at_large, at_small, rtol=1e-4, atol=1e-6)


def test_20_one_compilation_and_no_gather_by_data():
    student, teacher = pair()
    answers()
    other = tuple(t[::-1] * 2 for t in student), tuple(t + 1 for t in teacher)
    every(weights(student, teacher), *other)
    # Counted by hand: JAX drops old programs where a process has made very many.
    assert len(TRACED) == 1
    masks = [
        rtk.stage_mask,
        lambda logits, groups: rtk.top_mask(logits, 2),
        lambda logits, groups: rtk.threshold_mask(logits, 0.25),
    ]
    for mask in masks:
        text = str(jax.make_jaxpr(mask, static_argnums=1)(spread_logits(), GROUPS))
        assert "gather" not in text


# Selection and pooling


def test_selection_by_batch_uses_the_mean_logits():
    logits = spread_logits()
    mask = select(logits, GROUPS, "topr", scope="batch", top_r=1)
    wanted = logits.mean(0).argmax(-1)
    for row in np.asarray(mask):
        np.testing.assert_array_equal(row.argmax(-1), wanted)
        np.testing.assert_array_equal(row.sum(-1), 1)
    own = select(logits, GROUPS, "topr", scope="sample", top_r=1)
    np.testing.assert_array_equal(np.argmax(own, -1), np.argmax(logits, -1))


def test_pooled_starts_at_the_mean_of_each_stage_and_is_trained():
    student, teacher = pair()
    variables = weights(student, teacher)
    (_, (_, distances)), (slopes, _, _) = every(variables, student, teacher)["pooled"]
    merge_matrix = jax.jit(rtk.merge_matrix, static_argnums=1)
    merge = merge_matrix(variables["params"]["stage_scores"], GROUPS)
    np.testing.assert_allclose(
        merge, [[0.5, 0.5, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], rtol=1e-6
    )

    @jax.jit
    def maps(student, teacher):
        first = attention_lib.unit_maps(teacher[:2])
        ours = attention_lib.pooled_unit_maps(student, 8, 8)
        return numerics.unit(first.mean(1)), ours

    centre, ours = map(np.asarray, maps(student, teacher))
    wanted = ((ours - centre[:, None]) ** 2).sum(-1)
    np.testing.assert_allclose(distances[..., 0], wanted, rtol=1e-4)
    slope = np.asarray(slopes["params"]["stage_scores"])
    assert (np.abs(slope[:2]) > 1e-7).all()
    np.testing.assert_allclose(slope[2:], 0, atol=1e-8)  # alone in their stages


def test_masked_softmax_by_hand():
    logits = np.array([[[0.0, np.log(3.0), 50.0]]])
    mask = np.array([[[True, True, False]]])
    second = jax.jit(
        jax.value_and_grad(lambda x: jnp.sum(rtk.masked_softmax(x, mask)[..., 1]))
    )
    value, grad = second(logits)
    assert value == pytest.approx(0.75)
    np.testing.assert_allclose(grad[0, 0], [-3 / 16, 3 / 16, 0], rtol=1e-5)


def test_gradients_of_the_student_stay_finite_and_the_teacher_gets_none():
    student, teacher = pair()
    silent = (0 * student[0], *student[1:])
    found = every(weights(student, teacher), silent, teacher)
    for _, (of_weights, ours, theirs) in found.values():
        assert all(np.isfinite(x).all() for x in jax.tree.leaves((of_weights, ours)))
        assert tap_toys.largest(ours[1]) > 0
        assert tap_toys.largest(theirs) == 0
        params = of_weights["params"]["similarity"]
        assert tap_toys.largest(params["key1"]["kernel"]) > 0


def test_one_stage_still_learns_through_its_values():
    """A single stage leaves one tap: the attention is 1 and its logits get nothing."""
    student, teacher = tap_toys.taps(((8, 3),), 1), tap_toys.taps(((8, 4),) * 3, 2)
    both = functools.partial(loss, teacher=teacher, selection="stage")
    run = jax.jit(jax.value_and_grad(both, argnums=(0, 1), has_aux=True))
    (_, (attention, _)), (ours, theirs) = run(weights(student, teacher), student)
    np.testing.assert_array_equal(np.max(attention, -1), 1)
    assert tap_toys.largest(ours["params"]) == 0 and tap_toys.largest(theirs) > 0


# Settings


def problems(**fields):
    names = {name.replace("__", "."): value for name, value in fields.items()}
    return check.problems(config_lib.changed(config_lib.default(), names), 1)


def test_choices_are_those_of_the_library():
    for field, names in rtk.CHOICES.items():
        (line,) = problems(**{f"rtk__{field}": "?"})
        assert line.endswith(", ".join(names))
    with pytest.raises(ValueError, match="selection is 'stages'; did you mean 'stage'"):
        options(selection="stages")


@pytest.mark.parametrize("name", ["afd", "rtk"])
def test_relations_between_fields(name):
    (line,) = problems(method=name, batch_size=1)
    assert line.startswith("batch_size is 1, but method")
    weights = {f"{name}__{f}": 0.0 for f in ("ce_weight", "kd_weight", "beta")}
    (line,) = problems(method=name, **weights)
    assert line == (
        f"{name}.ce_weight, {name}.kd_weight, {name}.beta are all 0: nothing is learnt"
    )
    assert problems(method="kd", batch_size=1, **weights) == []
    assert problems(method=name, student__name="vgg8") == []
    (line,) = problems(method="none", baselines=(name,), batch_size=1)
    assert name in line


def test_options_come_from_the_fields():
    changes = {"rtk.beta": 200.0, "kd.temperature": 2.0, "rtk.top_r": 5}
    c = resolved.resolve(config_lib.changed(config_lib.default(), changes))
    made = c.method_options("rtk")
    assert (made["beta"], made["temperature"], made["top_r"]) == (200, 2, 5)
    assert set(made) == set(distill.option_names("rtk"))
    assert set(c.method_options("afd")) == set(distill.option_names("afd"))
