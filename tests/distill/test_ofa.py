"""One for all: the public heads and losses, cut students, widths and exponents."""

import functools

import golden_weights
import jax
import jax.numpy as jnp
import newer
import numpy as np
import precision
import pytest
import tiny
import toys

from lakd_jax import config as config_lib
from lakd_jax import distill
from lakd_jax.config import check
from lakd_jax.distill import kd, ofa

GOLDEN, LABELS = newer.GOLDEN, newer.LABELS
STUDENT, TEACHER = newer.INPUTS["logits_student"], newer.INPUTS["logits_teacher"]
MAPS = [newer.INPUTS[f"feat_student_{k}"] for k in range(3)]
WIDTH = 96  # of the teacher's last map, wider than the student's 64
EXPONENTS = (1, 1.25, 1.5)  # of stages 2, 3 and 4 of the public code


@functools.cache
def loss():
    run = jax.value_and_grad(ofa.ofa_loss, argnums=(0, 1))
    return jax.jit(run, static_argnums=(3, 4))


@pytest.mark.parametrize(
    ("key", "eps", "temperature"),
    [
        *((f"eps{eps:g}", eps, 1.0) for eps in EXPONENTS),
        ("eps1.5_t2", 1.5, 2.0),
    ],
)
def test_losses_are_the_public_ones(key, eps, temperature):
    value, (ours, theirs) = loss()(STUDENT, TEACHER, LABELS, eps, temperature)
    newer.assert_public(f"ofa/logits/{key}", value, ours)
    assert not np.any(theirs)


def test_an_exponent_of_one_reads_no_label():
    value, (grad, _) = loss()(STUDENT, TEACHER, LABELS, 1.0, 1.0)
    again, (same, _) = loss()(STUDENT, TEACHER, (LABELS + 1) % 10, 1.0, 1.0)
    np.testing.assert_allclose(value, again, rtol=1e-6)
    np.testing.assert_allclose(grad, same, atol=1e-7)
    plain = jax.grad(kd.kd_loss)(STUDENT, TEACHER, 1.0)
    np.testing.assert_allclose(grad, plain, atol=1e-6)


def test_a_larger_exponent_by_hand():
    teacher = np.log([[0.5, 0.3, 0.2]]).astype(np.float32)
    student = np.log([[0.2, 0.2, 0.6]]).astype(np.float32)
    value, _ = loss()(student, teacher, np.array([1]), 2.0, 1.0)
    weights = [0.25, 1.3**2 - 1, 0.04]
    np.testing.assert_allclose(value, -np.dot(weights, student[0]), rtol=1e-5)


def test_sure_networks_give_finite_gradients():
    """Where the public code's logarithm of a softmax is infinite."""
    sure = 1000 * np.eye(10, dtype=np.float32)[LABELS]
    for both in ((sure, -sure), (-sure, sure)):
        value, (grad, _) = loss()(*both, LABELS, 1.5, 1.0)
        assert np.isfinite(value) and np.all(np.isfinite(grad))


def test_bfloat16_is_computed_in_float32():
    run = functools.partial(ofa.ofa_loss, labels=LABELS, eps=1.5)
    assert precision.arithmetic(run, *precision.halves((STUDENT, TEACHER))) == {
        "float32"
    }


# ----------------------------------------------------------------------------- heads


def published(stage):
    """The public head's parameters and running statistics of stage 2, 3 or 4."""
    conv, bias, norm = golden_weights.conv, golden_weights.bias, golden_weights.norm
    count, channels = 4 - stage, MAPS[stage - 2].shape[-1]
    params, stats = {}, {}
    for i in range(count):
        out = WIDTH if i + 1 == count else channels * 2
        name, own, state = f"ofa.{stage}.{i}.op", {}, {}
        for number, (first, features) in enumerate([(0, channels), (4, out)], 1):
            own[f"depthwise{number}"] = conv(f"{name}.{first}", channels, 1, 3, 3)
            one = conv(f"{name}.{first + 1}", features, channels, 1, 1)
            own[f"pointwise{number}"] = one
            own[f"bn{number}"] = norm(f"{name}.{first + 2}", features)
            state[f"bn{number}"] = newer.norm_state(f"{name}.{first + 2}", features)
        params[f"sep{i + 1}"], stats[f"sep{i + 1}"] = own, state
        channels = out
    if not count:
        name = f"ofa.{stage}.0"
        params["conv"] = conv(name, WIDTH, channels, 1, 1) | bias(name, WIDTH)
    name = f"ofa.{stage}.{max(count, 1) + 2}"  # behind a pooling and a flattening
    dense = golden_weights.tensor(f"{name}.weight", (10, WIDTH)).T
    params["dense"] = {"kernel": dense} | bias(name, 10)
    return params, stats


@functools.cache
def head(stage):
    """(value, logits), gradients to parameters and map; and logits when evaluated."""
    params, stats = published(stage)
    made = ofa.StageHead(4 - stage, WIDTH, 10)

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def run(params, x):
        given = {"params": params, "batch_stats": stats}
        logits, _ = made.apply(given, x, train=True, mutable=["batch_stats"])
        evaluated = made.apply(given, x, train=False)
        value = ofa.ofa_loss(logits, TEACHER, LABELS, EXPONENTS[stage - 2])
        return value, (logits, evaluated)

    return jax.device_get(run(params, MAPS[stage - 2]))


@pytest.mark.parametrize("stage", [2, 3, 4])
def test_heads_of_stages_are_the_public_ones(stage):
    (value, logits), (of_params, grad) = head(stage)
    for mode, found in zip(("train", "eval"), logits, strict=True):
        wanted = GOLDEN[f"ofa/stage{stage}/{mode}_logits"]
        assert golden_weights.distance(found, wanted) < newer.CLOSE
    key = f"ofa/stage{stage}/train_eps{EXPONENTS[stage - 2]}"
    newer.assert_public(key, value, grad)
    if stage != 3:
        return
    own = of_params["sep1"]
    for leaf, name in {
        "depthwise1": "op.0",
        "pointwise1": "op.1",
        "depthwise2": "op.4",
        "pointwise2": "op.5",
    }.items():
        found = newer.as_torch(own[leaf]["kernel"])
        newer.assert_public_grad(f"{key}/grad_0.{name}.weight", found)
    for leaf, name in {"bn1": "op.2", "bn2": "op.6"}.items():
        newer.assert_public_grad(f"{key}/grad_0.{name}.weight", own[leaf]["scale"])
        newer.assert_public_grad(f"{key}/grad_0.{name}.bias", own[leaf]["bias"])
    newer.assert_public_grad(f"{key}/grad_3.weight", of_params["dense"]["kernel"].T)


def test_the_whole_is_the_public_distiller():
    """Of three stages, at the public exponents and at the default's weights."""
    block = config_lib.default()["ofa"].to_dict() | {"eps": (*EXPONENTS, 1.5)}
    made = distill.create("ofa", block)
    found = [published(stage) for stage in (2, 3, 4)]
    params, stats = (
        {f"module{k}": one[i] for k, one in enumerate(found, 1)} for i in (0, 1)
    )
    student = toys.outputs(STUDENT, np.zeros((8, 64), np.float32))
    teacher = toys.outputs(TEACHER, np.zeros((8, WIDTH), np.float32))
    signals = toys.signals(student, teacher, LABELS, student_joints=tuple(MAPS))
    given = {"params": params, "batch_stats": stats}
    run = jax.jit(lambda v, s: made.apply(v, s, train=True, mutable=["batch_stats"]))
    losses, _ = run(given, signals)
    last = losses[-1].terms
    ours = {
        "loss_gt": last["head_ce"],
        "loss_kd": last["ofa_logits"],
        "loss_ofa": sum(one.terms["ofa"] for one in losses),
    }
    for name, value in ours.items():
        wanted = GOLDEN[f"ofa/distiller/{name}"]
        np.testing.assert_allclose(value, wanted, rtol=newer.CLOSE)
    total = sum(one.total() for one in losses)
    np.testing.assert_allclose(total, sum(ours.values()), rtol=1e-6)


@pytest.mark.parametrize(
    ("sides", "wanted"),
    [
        ((56, 28, 14, 7), (3, 2, 1, 0)),  # the public code's
        ((32, 16, 8), (2, 1, 0)),
        ((16, 8, 4, 4), (2, 1, 0, 0)),  # VGG
        ((32, 32, 16, 8, 8), (2, 2, 1, 0, 0)),  # cuts between stages
        ((3, 3), (0, 0)),
        ((4, 8), (0, 0)),
    ],
)
def test_heads_halve_maps_as_the_student_does(sides, wanted):
    assert tuple(ofa.halvings(side, sides[-1]) for side in sides) == wanted


# --------------------------------------------------------------------------- options


def widths(**fields):
    """Of the vectors that the heads of a toy pool; the teacher is wider."""
    block = config_lib.default()["ofa"].to_dict() | fields
    lesson = toys.lesson(block, name="ofa")
    shapes = jax.eval_shape(lambda: lesson.init(*toys.images()))
    found = shapes[0]["method"]
    return [found[f"module{k}"]["dense"]["kernel"].shape[0] for k in (1, 2, 3)]


def test_heads_are_as_wide_as_the_wider_network_or_as_told():
    assert widths() == [8] * 3  # 6 channels and one more with each stage
    assert widths(width=5) == [5] * 3


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"eps": (1.0, 1.1)}, "ofa.eps has 2 entries, but the student has 3 modules"),
        ({"eps": (1.0,) * 3}, "one for each module and one for the logits"),
        ({"eps": (1.0, 0.0)}, "ofa.eps must be above 0"),
    ],
)
def test_exponents_of_another_number_are_refused(fields, words, tmp_path):
    changed = {f"ofa__{name}": value for name, value in fields.items()}
    config = tiny.config(tmp_path, method="ofa", **changed)
    (line,) = check.problems(config, 1)
    assert words in line


def test_stored_logits_need_a_width(tmp_path):
    fields = {"method": "ofa", "teacher__views": 2, "teacher__name": "resnet8x4"}
    (line,) = check.problems(tiny.config(tmp_path, **fields), 1)
    assert "ofa.width is 0" in line and "have 64 and 256 channels" in line
    fields["ofa__width"] = 256
    assert check.problems(tiny.config(tmp_path, **fields), 1) == []
    one_each = tiny.config(tmp_path, ofa__eps=(1.0, 1.1, 1.2, 1.3), **fields)
    assert check.problems(one_each, 1) == []


def test_a_given_width_reads_no_teacher_but_its_logits():
    """As stored outputs are, which have no pooled features."""
    block = config_lib.default()["ofa"].to_dict() | {"width": 5}
    made = distill.create("ofa", block)

    class Stored:
        logits = jnp.asarray(TEACHER)

    student = toys.outputs(STUDENT, np.zeros((8, 64), np.float32))
    signals = toys.signals(student, None, LABELS, student_joints=tuple(MAPS))
    signals = signals.replace(teacher=Stored())
    start = functools.partial(made.init, train=True)
    variables = jax.eval_shape(lambda: start(jax.random.key(0), signals))
    assert variables["params"]["module1"]["dense"]["kernel"].shape == (5, 10)


def test_cut_students_run_in_the_fused_engine_alone(tmp_path):
    """Modules before the last read the teacher's logits."""
    cut = {"method": "ofa", "local__cut_scale": 0.0}
    assert check.problems(tiny.config(tmp_path, **cut), 1) == []
    (line,) = check.problems(tiny.config(tmp_path, local__engine="dispatch", **cut), 1)
    assert "use local.engine=fused" in line
