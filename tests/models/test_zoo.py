"""Methods of RepDistiller's zoo: golden values, values by hand, and their schedules.

Golden values were computed with RepDistiller's and mdistiller's files in PyTorch.
"""

import dataclasses
import functools
import pathlib
import re

import apart
import golden_weights
import jax
import jax.numpy as jnp
import numpy as np
import precision
import pytest
import tap_toys

from lakd_jax import config as config_lib
from lakd_jax import distill
from lakd_jax.config import check
from lakd_jax.distill import ab, cc, fitnet, ft, kdsvd, vid
from lakd_jax.distill.base import method
from lakd_jax.models import chain

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
INPUTS = dict(np.load(GOLDEN / "losses_inputs.npz"))
LOSSES = dict(np.load(GOLDEN / "losses.npz"))
EPOCHS = 2.0


def inputs(name):
    return np.moveaxis(INPUTS[name], 1, -1)


def weight(name, *shape):
    """A golden tensor in our layout."""
    x = golden_weights.tensor(name, shape)
    return np.transpose(x, (2, 3, 1, 0)) if len(shape) == 4 else x


def fitnet_loss(student, teacher):
    conv = {"kernel": weight("fitnet.conv.weight", 48, 32, 1, 1)}
    conv["bias"] = weight("fitnet.conv.bias", 48)
    norm = {
        "scale": weight("fitnet.bn.weight", 48),
        "bias": weight("fitnet.bn.bias", 48),
    }
    zeros = {"mean": np.zeros(48), "var": np.ones(48)}
    variables = {"params": {"conv": conv, "bn": norm}, "batch_stats": {"bn": zeros}}
    module = fitnet.Regressor(48, relu=True)
    out, _ = module.apply(variables, student, train=True, mutable=["batch_stats"])
    return fitnet.hint_loss(out, teacher)


def vid_loss(student, teacher):
    params = {
        "conv1": {"kernel": weight("vid.0.weight", 48, 32, 1, 1)},
        "conv2": {"kernel": weight("vid.2.weight", 48, 48, 1, 1)},
        "conv3": {"kernel": weight("vid.4.weight", 48, 48, 1, 1)},
        "scale": 4 + weight("vid.log_scale", 48),
    }
    mean, scale = vid.Regressor(48, 5.0).apply({"params": params}, student)
    return vid.vid_loss(mean, teacher, scale)


def boundary_loss(student, teacher):
    """The golden value is the sum over the batch of eight."""
    return 8 * ab.boundary_loss(student, teacher, 1.0)


CASES = {
    "vid/feat_teacher_wide_1": (vid_loss, "feat_student_1", "feat_teacher_wide_1"),
    "fitnet/feat_teacher_wide_1": (
        fitnet_loss,
        "feat_student_1",
        "feat_teacher_wide_1",
    ),
    "ab_criterion": (boundary_loss, "ofd_student_connected", "ofd_teacher_preact"),
}


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_the_public_ones_in_float32(name):
    loss, *both = CASES[name]
    both = list(map(inputs, both))
    value, (ours, theirs) = jax.jit(jax.value_and_grad(loss, (0, 1)))(*both)
    assert golden_weights.distance(value, LOSSES[name]) < 1e-4
    golden = np.moveaxis(LOSSES[f"{name}/grad_s"], 1, -1)
    assert golden_weights.distance(ours, golden) < 1e-4
    assert not np.any(theirs)
    assert precision.arithmetic(loss, *precision.halves(both)) == {"float32"}


def test_boundary_loss_is_nothing_beyond_the_margin():
    loss = jax.jit(ab.boundary_loss)
    teacher = np.array([[0.1, -3.0, 0.0, 2.0]])
    assert loss(2 * np.sign(teacher - 1e-9), teacher, 1.0) == 0
    student = np.array([[0.5, 0.5, -0.5, -1.0]])  # short by 0.5, 1.5, 0.5 and 2
    got = loss(student, teacher, 1.0)
    np.testing.assert_allclose(got, 0.25 + 2.25 + 0.25 + 4)


def test_vid_begins_with_the_variance_it_was_given():
    @jax.jit
    def scale(x):
        variables = vid.Regressor(4, 5.0).init(jax.random.key(0), x)
        return variables["params"]["scale"]

    variance = np.log1p(np.exp(scale(np.ones((1, 2, 2, 3))))) + 1e-5
    np.testing.assert_allclose(variance, 5.0, rtol=1e-6)


def kdsvd_by_loops(students, teachers, k):
    """From NumPy's decomposition, image by image and channel by channel."""
    total, batch, stages = 0.0, len(students[0]), []
    for s, t in zip(students, teachers, strict=True):
        stage = []
        for image in range(batch):
            flat = [np.float64(x[image]).reshape(-1, x.shape[-1]) for x in (s, t)]
            (_, _, mine), (_, values, other) = [
                np.linalg.svd(x, full_matrices=False) for x in flat
            ]
            chosen = []
            shares = values[:k] / np.linalg.norm(values[:k])
            for row, share in zip(other[:k], shares, strict=True):
                row = row if row.sum() > 0 else -row
                best = max(mine[: k + 3], key=lambda v, r=row: abs(v @ r))
                best = best if best @ row > 0 else -best
                chosen.append((share * best, share * row))
            stage.append(chosen)
        stages.append(stage)
    for before, after in zip(stages[:-1], stages[1:], strict=True):
        for lower, upper in zip(before, after, strict=True):
            for (s0, t0), (s1, t1) in zip(lower, upper, strict=True):
                for i in range(len(s0)):
                    ours = np.exp(-((s1 - s0[i]) ** 2) / 8)
                    theirs = np.exp(-((t1 - t0[i]) ** 2) / 8)
                    total += np.sum((ours - theirs) ** 2) / batch
    return total


def features(seed, batch=2):
    rng = np.random.default_rng(seed)
    shapes = [(batch, 4, 4, 5), (batch, 3, 3, 6), (batch, 2, 2, 7)]
    return [rng.uniform(0, 1, s).astype(np.float32) for s in shapes]


@functools.cache
def of_kdsvd(k):
    """(students, teachers) -> value and both gradients."""
    loss = functools.partial(kdsvd.kdsvd_loss, k=k)
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))


@pytest.mark.parametrize("k", [1, 2])
def test_kdsvd_by_loops(k):
    students, teachers = features(0), features(1)
    got, _ = of_kdsvd(k)(students, teachers)
    np.testing.assert_allclose(got, kdsvd_by_loops(students, teachers, k), rtol=1e-3)


def test_kdsvd_is_least_at_the_teacher_and_trains_the_student_alone():
    students, teachers = features(0), features(1)
    value, (ours, theirs) = of_kdsvd(1)(students, teachers)
    assert of_kdsvd(1)(teachers, teachers)[0] < 1e-9 < value
    assert all(np.any(g) for g in ours) and not any(np.any(g) for g in theirs)
    loss = functools.partial(kdsvd.kdsvd_loss, k=1)
    halves = precision.halves((students, teachers))
    assert precision.arithmetic(loss, *halves) == {"float32"}
    with pytest.raises(ValueError, match="7 with 6"):
        loss(students[2:], teachers[1:2])


@pytest.mark.parametrize("shape", [(9, 5), (5, 9), (6, 6)])
def test_gradient_of_singular_vectors_is_that_of_differences(shape):
    rng = np.random.default_rng(3)
    x = rng.standard_normal((1, *shape))
    towards = rng.standard_normal((shape[1], 2))

    def of_rows(rows):  # free of signs
        first = (towards[:, 0] @ rows[0]) * (rows[0] @ towards[:, 1])
        return first + (towards[:, 1] @ rows[1]) ** 2

    def loss(x):  # in double precision
        return of_rows(np.linalg.svd(x[0], full_matrices=False)[2])

    expected = np.zeros_like(x)
    for place in np.ndindex(*x.shape):
        step = np.zeros_like(x)
        step[place] = 1e-6
        expected[place] = (loss(x + step) - loss(x - step)) / 2e-6
    ours = jax.grad(lambda x: of_rows(kdsvd.right_vectors(x, 2)[0].T))
    got = jax.jit(ours)(x.astype(np.float32))
    np.testing.assert_allclose(got, expected, rtol=2e-3, atol=2e-4)


def test_dead_and_equal_directions_have_finite_gradients():
    teachers = features(1)
    for value in (0, 1):
        students = [np.full_like(x, value) for x in teachers]
        _, (grads, _) = of_kdsvd(1)(students, teachers)
        assert all(np.all(np.isfinite(g)) for g in grads)
    same = np.eye(4, dtype=np.float32)[None]
    grad = jax.jit(jax.grad(lambda x: jnp.sum(kdsvd.right_vectors(x, 2))))(same)
    assert np.all(np.isfinite(grad))


def outputs(seed, width):
    shapes = [(4, 3), (4, 8, 8, width), (4, 4, 4, width + 2), (4, width)]
    rng = np.random.default_rng(seed)
    drawn = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    logits, *joints, pooled = drawn
    joints = tuple(joints)
    return chain.Outputs(logits, None, joints, joints, (), pooled), joints


def signals(epoch=0.0, widths=(4, 4)):
    (student, ours), (teacher, theirs) = map(outputs, (0, 1), widths)
    return method.Signals(
        student=student,
        teacher=teacher,
        labels=np.array([0, 1, 2, 0]),
        epoch=np.float32(epoch),
        student_joints=ours,
        teacher_joints=theirs,
        student_preacts=ours,
        teacher_preacts=theirs,
    )


def made(name, **options):
    block = config_lib.default()[name].to_dict()
    return distill.create(name, block | options)


@functools.cache
def program(name, **options):
    """Signals -> the method's answer."""
    taught = made(name, **options)

    @jax.jit
    def run(given):
        return taught.init_with_output(jax.random.key(0), given, train=True)[0]

    return run


@pytest.mark.parametrize("name", ["ab", "fsp"])
def test_the_methods_loss_comes_first_and_the_labels_after(name):
    taught = made(name, init_epochs=EPOCHS)
    for epoch, first in ((0.0, True), (1.9, True), (2.0, False), (9.0, False)):
        loss = program(name, init_epochs=EPOCHS)(signals(epoch))[-1]
        assert float(loss.weights["head_ce"]) == (0 if first else taught.ce_weight)
        assert float(loss.weights[name]) == (
            pytest.approx(taught.weight) if first else 0
        )


def test_ab_halves_stage_by_stage_and_connects_other_widths():
    given = signals()
    below, above = program("ab", init_epochs=EPOCHS)(given)
    boundary = jax.jit(ab.boundary_loss)
    for k, (share, loss) in enumerate(((0.5, below), (1.0, above))):
        pair = given.student_preacts[k], given.teacher_preacts[k]
        expected = share * boundary(*pair, 1.0)
        np.testing.assert_allclose(loss.terms["ab"], expected, rtol=1e-6)
    alone, wide = (
        jax.eval_shape(lambda g: made("ab").init(jax.random.key(0), g, train=True), g)
        for g in (given, signals(widths=(4, 6)))
    )
    assert "params" not in alone and set(wide["params"]) == {"module1", "module2"}


def test_cc_trains_both_embeddings():
    taught, given = made("cc"), signals(widths=(4, 6))
    variables = tap_toys.variables(taught, given)

    @jax.jit
    @jax.value_and_grad
    def loss(variables):
        return taught.apply(variables, given, train=True)[0].terms["cc"]

    got, grads = loss(variables)
    grads = grads["params"]["head"]
    assert np.any(grads["student"]["kernel"]) and np.any(grads["teacher"]["kernel"])
    params = variables["params"]["head"]
    ours, theirs = (
        x.pooled @ params[n]["kernel"]
        for x, n in ((given.student, "student"), (given.teacher, "teacher"))
    )
    np.testing.assert_allclose(got, jax.jit(cc.cc_loss)(ours, theirs), rtol=1e-5)


def test_paraphraser_is_trained_first_and_then_stays():
    taught = made("ft", init_epochs=EPOCHS, rate=0.5)
    start = jax.jit(lambda g: taught.init(jax.random.key(0), g, train=True))
    variables = start(signals())

    @jax.jit
    def step(variables, epoch):
        given = dataclasses.replace(signals(), epoch=epoch)

        def loss(params):
            v = {**variables, "params": params}
            answer, new = taught.apply(v, given, train=True, mutable=["batch_stats"])
            return method.total(answer), (answer[0], new["batch_stats"])

        grads, (answer, stats) = jax.grad(loss, has_aux=True)(variables["params"])
        return grads["head"], answer, {**variables, "batch_stats": stats}

    grads, answer, _ = step(variables, 0.0)
    assert all(np.any(g) for g in jax.tree.leaves(grads["paraphraser"]))
    assert not apart.nonzero(grads["translator"])
    assert float(answer.weights["ft"]) == 0 != float(answer.weights["ft_rebuilt"])

    head = variables["params"]["head"]
    given = jax.tree.map(lambda x: 2 * x + 1, head["paraphraser"])
    head = {**head, "paraphraser": given}  # as weight decay would move it
    moved = {**variables, "params": {"head": head}}
    grads, later, after = step(moved, 2.0)
    assert not apart.nonzero(grads["paraphraser"])
    assert apart.nonzero(grads["translator"])
    np.testing.assert_array_equal(later.terms["ft"], answer.terms["ft"])
    assert float(later.weights["ft"]) == 200 and later.weights["ft_rebuilt"] == 0
    _, _, earlier = step(moved, 1.0)
    first = variables["batch_stats"]["head"]["kept"]
    for stats, kept in ((after, first), (earlier, given)):
        found = stats["batch_stats"]["head"]["kept"]
        jax.tree.map(np.testing.assert_array_equal, found, kept)


def test_paraphraser_has_the_widths_it_should():
    x = np.ones((1, 4, 4, 6), np.float32)
    (factor, rebuilt), variables = jax.eval_shape(
        ft.Paraphraser(0.5).init_with_output, jax.random.key(0), x
    )
    assert factor.shape == (1, 4, 4, 3) and rebuilt.shape == x.shape
    assert len(jax.tree.leaves(variables)) == 12


def problems(**fields):
    names = {"student.name": "resnet8", "teacher.name": "resnet20"}
    fields = {name.replace("__", "."): value for name, value in fields.items()}
    return check.problems(config_lib.changed(config_lib.default(), names | fields), 1)


@pytest.mark.parametrize("name", ["ab", "fsp", "ft"])
def test_first_epochs_leave_some_for_the_rest(name):
    assert problems(method=name, epochs=31) == []
    assert problems(method="kd", epochs=30) == []
    (line,) = problems(method=f"kd+{name}", epochs=30)
    assert line.startswith(f"{name}.init_epochs is 30, but epochs is 30")


WIDTHS = "same widths.*16 channels and the teacher 64"


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        *((name, {"teacher__name": "resnet32x4"}, WIDTHS) for name in ("fsp", "kdsvd")),
        *(
            (name, {"local__granularity": "none"}, "local.granularity")
            for name in ("fsp", "kdsvd")
        ),
        ("fitnet", {"fitnet__hint_layer": 4}, "^fitnet.hint_layer is 4, .* has 3"),
        ("ab", {"local__granularity": "block"}, "method ab"),
    ],
)
def test_what_cannot_be_compared_is_refused(name, fields, message):
    assert problems(method=name) == []
    (line,) = problems(method=name, **fields)
    assert re.search(message, line)
