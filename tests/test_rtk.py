"""RTK (our reading): the properties of the project's notes (12-21), the settings."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tap_toys

from lakd_jax import config as config_lib
from lakd_jax import distill, validate
from lakd_jax.distill import method, relation, rtk
from lakd_jax.distill import tap_attention as attention_lib
from lakd_jax.train import build

KEY = jax.random.key(0)
SELECTIONS = rtk.CHOICES["selection"]
GROUPS = attention_lib.by_size([jnp.zeros((1, s, s, 1)) for s, _ in tap_toys.TEACHER])


def options(**fields):
    config = config_lib.default()
    config.method = "rtk"
    made = build.method_options(config) | {"qk_dim": 8} | fields
    return rtk.Options(**made)


@functools.cache
def pair(seed=0):
    """Taps of a student and a teacher."""
    student = tap_toys.taps(tap_toys.STUDENT, seed)
    return student, tap_toys.taps(tap_toys.TEACHER, seed + 10)


def attend(student, teacher, seed=0, **fields):
    """Variables and a compiled function (variables, student, teacher) -> (a, E)."""
    module = rtk.Attend(options(**fields))
    variables = tap_toys.variables(module, student, teacher, seed=seed)

    @jax.jit
    def apply(variables, student, teacher):
        (a, e, _), _ = module.apply(
            variables, student, teacher, train=True, mutable=["batch_stats"]
        )
        return a, e

    return variables, apply


def spread_logits(seed=0, shape=(6, 3, 4)):
    return 2 * jax.random.normal(jax.random.key(seed), shape)


# Properties, by their number


@pytest.mark.parametrize("scope", ["sample", "batch"])
@pytest.mark.parametrize("selection", SELECTIONS)
def test_12_rows_sum_to_one_over_teacher_taps(selection, scope):
    student, teacher = pair()
    variables, apply = attend(student, teacher, selection=selection, scope=scope)
    attention, distances = apply(variables, student, teacher)
    keys = 3 if selection == "pooled" else 4
    assert attention.shape == distances.shape == (5, 3, keys)
    np.testing.assert_allclose(attention.sum(-1), 1, rtol=1e-5)
    assert jnp.min(attention) >= 0
    alive = np.asarray((attention > 0).sum(-1))
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
    mask = rtk.select(logits, GROUPS, "stage", scope="sample", top_r=3)
    for group in GROUPS:
        members = list(group)
        of_stage = np.asarray(mask)[..., members]
        np.testing.assert_array_equal(of_stage.sum(-1), 1)
        best = np.asarray(logits)[..., members].argmax(-1)
        np.testing.assert_array_equal(of_stage.argmax(-1), best)
    tied = rtk.stage_mask(jnp.zeros((1, 1, 4)), GROUPS)
    np.testing.assert_array_equal(tied[0, 0], [True, False, True, True])
    # Stages need not be neighbours.
    apart = rtk.stage_mask(jnp.array([[[1.0, 3.0, 2.0]]]), ((0, 2), (1,)))
    np.testing.assert_array_equal(apart[0, 0], [False, True, True])


def test_14_filters_without_effect_equal_none_and_one_tap_gets_all():
    logits = spread_logits()
    for mask in (rtk.top_mask(logits, 4), rtk.top_mask(logits, 9)):
        assert mask.all()
    assert rtk.threshold_mask(logits, 0.0).all()
    only = rtk.masked_softmax(logits, rtk.top_mask(logits, 1))
    np.testing.assert_array_equal(only.max(-1), 1)
    np.testing.assert_array_equal((only > 0).sum(-1), 1)
    student, teacher = pair()
    variables, every = attend(student, teacher, selection="topr", top_r=4)
    _, none = attend(student, teacher, selection="none")
    for ours, wanted in zip(
        every(variables, student, teacher),
        none(variables, student, teacher),
        strict=True,
    ):
        np.testing.assert_allclose(ours, wanted, rtol=1e-5)


def test_14_threshold_keeps_weights_of_at_least_the_mean():
    logits = jnp.array([[[0.0, 0.0, 0.0, 0.0], [5.0, 0.0, 0.0, 0.0]]])
    mask = rtk.select(logits, GROUPS, "threshold", scope="sample", top_r=1)
    np.testing.assert_array_equal(mask[0, 0], [True] * 4)
    np.testing.assert_array_equal(mask[0, 1], [True, False, False, False])


@pytest.mark.parametrize("selection", ["stage", "topr", "threshold"])
def test_15_filtered_taps_have_no_influence(selection):
    student, teacher = pair()
    module = rtk.Attend(options(selection=selection, top_r=2, scope="batch"))
    variables, apply = attend(
        student, teacher, selection=selection, top_r=2, scope="batch"
    )
    attention, _ = apply(variables, student, teacher)
    weight = np.asarray(attention).max(0)
    rows, taps = np.nonzero(weight == 0)
    row, tap = rows[0], taps[0]  # a student tap, and a teacher tap it does not take

    @jax.jit
    def run(student, values):
        """Loss of one student tap; descriptors are the unchanged teacher's."""

        def loss(student):
            (a, _, _), _ = module.apply(
                variables, student, teacher, train=True, mutable=["batch_stats"]
            )
            e = attention_lib.distances(student, values, "sum")
            return rtk.rtk_loss(a[:, row : row + 1], e[:, row : row + 1])

        return jax.value_and_grad(loss)(student)

    other = list(teacher)
    other[tap] = 7 * other[tap][:, ::-1] ** 2 + 1
    changed = attention_lib.distances(student, other, "sum")
    assert jnp.max(jnp.abs(changed - apply(variables, student, teacher)[1])) > 0.01
    before, after = run(student, teacher), run(student, tuple(other))
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(a, b)
    # What is kept does have influence.
    kept = weight[row].argmax()
    other = list(teacher)
    other[kept] = 7 * other[kept][:, ::-1] ** 2 + 1
    assert abs(run(student, tuple(other))[0] - before[0]) > 1e-3


def test_16_without_filter_it_is_afd_with_swapped_roles():
    first, second = (tap_toys.taps(s, 4) for s in (tap_toys.STUDENT, tap_toys.TEACHER))
    variables, apply = attend(first, second, selection="none")
    ours, summed = apply(variables, first, second)  # student = first
    inner = {name: tree["similarity"] for name, tree in variables.items()}
    logits, _ = attention_lib.Similarity(8).apply(  # AFD's: teacher = first asks
        inner,
        attention_lib.descriptors(first),
        attention_lib.descriptors(second),
        train=True,
        mutable=["batch_stats"],
    )
    np.testing.assert_allclose(ours, jax.nn.softmax(logits), rtol=1e-4)
    afd = attention_lib.distances(second, first, "sum").swapaxes(1, 2)
    np.testing.assert_allclose(afd[:, 0, 0], summed[:, 0, 0], rtol=1e-5)  # one size
    assert jnp.max(jnp.abs(afd - summed)) > 0.01


def test_17_proportional_features_cost_nothing_and_the_loss_is_bounded():
    (tap,) = tap_toys.taps(((8, 5),), 1)
    for selection in SELECTIONS:
        variables, apply = attend((tap,), (3 * tap,), selection=selection)
        loss = rtk.rtk_loss(*apply(variables, (tap,), (3 * tap,)))
        assert loss == pytest.approx(0, abs=1e-5)
    for seed in range(3):
        student, teacher = pair(seed)
        variables, apply = attend(student, teacher, seed)
        assert 0 < rtk.rtk_loss(*apply(variables, student, teacher)) <= 2 * 3


def test_18_a_larger_copy_of_a_tap_costs_the_same_summed_and_a_quarter_in_the_mean():
    small, student = tap_toys.taps(((4, 6), (4, 3)), 2)
    large = small.repeat(2, 1).repeat(2, 2)
    blocky = student.repeat(2, 1).repeat(2, 2)
    for reduction, factor in (("sum", 1), ("mean", 4)):
        find = functools.partial(attention_lib.distances, reduction=reduction)
        at_small = find((student, blocky), (small,))
        at_large = find((student, blocky), (large,))
        np.testing.assert_allclose(factor * at_large, at_small, rtol=1e-4, atol=1e-6)


def test_20_one_compilation_and_no_gather_by_data():
    student, teacher = pair()
    for selection in SELECTIONS:
        variables, apply = attend(student, teacher, selection=selection)
        traced = []
        # Counted by hand: JAX drops old programs where a process has made very many.
        counted = jax.jit(lambda *x, run=apply, to=traced: to.append(1) or run(*x))
        counted(variables, student, teacher)
        other = tuple(t[::-1] * 2 for t in student), tuple(t + 1 for t in teacher)
        counted(variables, *other)
        assert len(traced) == 1
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
    mask = rtk.select(logits, GROUPS, "topr", scope="batch", top_r=1)
    wanted = np.asarray(logits).mean(0).argmax(-1)
    for row in np.asarray(mask):
        np.testing.assert_array_equal(row.argmax(-1), wanted)
        np.testing.assert_array_equal(row.sum(-1), 1)
    own = rtk.select(logits, GROUPS, "topr", scope="sample", top_r=1)
    np.testing.assert_array_equal(np.argmax(own, -1), np.argmax(logits, -1))


def test_pooled_starts_at_the_mean_of_each_stage_and_is_trained():
    student, teacher = pair()
    variables, apply = attend(student, teacher, selection="pooled")
    scores = variables["params"]["stage_scores"]
    merge = rtk.merge_matrix(scores, GROUPS)
    np.testing.assert_allclose(
        merge, [[0.5, 0.5, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], rtol=1e-6
    )
    first = attention_lib.unit_maps(teacher[:2])
    centre = np.asarray(relation.unit(first.mean(1)))
    ours = attention_lib.pooled_unit_maps(student, 8, 8)
    wanted = ((np.asarray(ours) - centre[:, None]) ** 2).sum(-1)
    _, distances = apply(variables, student, teacher)
    np.testing.assert_allclose(distances[..., 0], wanted, rtol=1e-4)

    def loss(params):
        return rtk.rtk_loss(*apply({**variables, "params": params}, student, teacher))

    slope = jax.grad(loss)(variables["params"])["stage_scores"]
    assert (np.abs(slope[:2]) > 1e-7).all()
    np.testing.assert_allclose(slope[2:], 0, atol=1e-8)  # alone in their stages


def test_masked_softmax_by_hand():
    logits = jnp.array([[[0.0, np.log(3.0), 50.0]]])
    mask = jnp.array([[[True, True, False]]])
    value, grad = jax.value_and_grad(
        lambda x: jnp.sum(rtk.masked_softmax(x, mask)[..., 1])
    )(logits)
    assert value == pytest.approx(0.75)
    np.testing.assert_allclose(grad[0, 0], [-3 / 16, 3 / 16, 0], rtol=1e-5)


def test_gradients_of_the_student_stay_finite_and_the_teacher_gets_none():
    student, teacher = pair()
    student = (jnp.zeros_like(student[0]), *student[1:])
    for selection in SELECTIONS:
        variables, apply = attend(student, teacher, selection=selection)

        def loss(variables, student, teacher, apply=apply):
            return rtk.rtk_loss(*apply(variables, student, teacher))

        grads = jax.grad(loss, (0, 1, 2))(variables, student, teacher)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(grads))
        assert tap_toys.largest(grads[1][1]) > 0
        assert tap_toys.largest(grads[2]) == 0
        params = grads[0]["params"]["similarity"]
        assert tap_toys.largest(params["key1"]["kernel"]) > 0


def test_one_stage_still_learns_through_its_values():
    """A single stage leaves one tap: the attention is 1 and its logits get nothing."""
    student, teacher = tap_toys.taps(((8, 3),), 1), tap_toys.taps(((8, 4),) * 3, 2)
    variables, apply = attend(student, teacher)
    attention, _ = apply(variables, student, teacher)
    np.testing.assert_array_equal(attention.max(-1), 1)

    def loss(variables, student):
        return rtk.rtk_loss(*apply(variables, student, teacher))

    ours, theirs = jax.grad(loss, (0, 1))(variables, student)
    assert tap_toys.largest(ours["params"]) == 0 and tap_toys.largest(theirs) > 0


COUNTS = {
    "wrn": (((32, 32), (16, 64), (8, 128)), 6, 2, 342_272),
    "resnet": (((32, 16), (16, 32), (8, 64)), 9, 3, 341_376),
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts(name):
    stages, theirs, ours, wanted = COUNTS[name]

    def shapes(count):
        return tuple(
            jax.ShapeDtypeStruct((2, side, side, channels), jnp.float32)
            for side, channels in stages
            for _ in range(count)
        )

    init = functools.partial(rtk.Attend(options(qk_dim=128)).init, train=True)
    made = jax.eval_shape(init, KEY, shapes(ours), shapes(theirs))
    assert sum(x.size for x in jax.tree.leaves(made["params"])) == wanted


def test_terms_and_diagnostics():
    made = tap_toys.signals(*pair())
    module = distill.create("rtk", vars(options()))
    variables = module.init(KEY, made, train=True)
    (found,), _ = module.apply(variables, made, train=True, mutable=["batch_stats"])
    assert set(found.terms) == {"head_ce", "head_kd", "rtk"}
    terms = found.terms
    wanted = terms["head_ce"] + 0.9 * terms["head_kd"] + 4 * terms["rtk"]
    assert found.total() == pytest.approx(float(wanted), rel=1e-6)
    shares = [found.diagnostics[f"attention_stage{k}"] for k in (1, 2, 3)]
    assert sum(map(float, shares)) == pytest.approx(1, rel=1e-5)
    assert 0 < found.diagnostics["attention_entropy"] <= np.log(3) + 1e-6
    assert all(x.shape == () for x in jax.tree.leaves(found.diagnostics))
    assert isinstance(found, method.ModuleLoss)


# Settings


def problems(**fields):
    names = {name.replace("__", "."): value for name, value in fields.items()}
    return validate.problems(config_lib.changed(config_lib.default(), names), 1)


def test_choices_are_those_of_the_library():
    for field, names in rtk.CHOICES.items():
        for name in names:
            assert problems(method="rtk", **{f"rtk__{field}": name}) == []
        (line,) = problems(**{f"rtk__{field}": "?"})
        assert line.endswith(", ".join(names))
    with pytest.raises(ValueError, match="selection is 'stages'; did you mean 'stage'"):
        options(selection="stages")
    with pytest.raises(ValueError, match="top_r must be at least 1, is 0"):
        options(top_r=0)
    with pytest.raises(ValueError, match="did you mean 'scope'"):
        distill.create("rtk", {"scopes": "batch"})


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
    c = config_lib.changed(
        config_lib.default(),
        {"method": "rtk", "rtk.beta": 200.0, "kd.temperature": 2.0, "rtk.top_r": 5},
    )
    made = build.method_options(c)
    assert (made["beta"], made["temperature"], made["top_r"]) == (200, 2, 5)
    assert set(made) == set(distill.option_names("rtk"))
    c.method = "afd"
    assert set(build.method_options(c)) == set(distill.option_names("afd"))
