"""SRRL: the author's values, and those of the other public code."""

import functools

import golden_weights
import jax
import newer
import numpy as np
import pytest
import tiny
import toys

from lakd_jax import config as config_lib
from lakd_jax import distill, errors
from lakd_jax.config import check
from lakd_jax.distill import srrl
from lakd_jax.models import heads

GOLDEN, LABELS = newer.GOLDEN, newer.LABELS
WIDTH = 96
PARTS = {"stat": {"beta": 0.0}, "logits": {"alpha": 0.0}}
CASES = {  # (student's map, prefix of the convolution's name and of the norm's)
    "map": ("feat_student_2", "srrl.map.Connectors"),
    "map_larger": ("feat_student_1", "srrl.map_larger.Connectors"),
    "pooled_first_of_maps": ("feat_student_2", "srrl.pooled_first.transfer"),
}


def made(case, part):
    """The method with one of its parts alone."""
    block = config_lib.default()["srrl"].to_dict() | PARTS[part] | {"ce_weight": 0.0}
    block["pool_first"] = case.startswith("pooled_first")
    return distill.create("srrl", block)


def variables(case, channels):
    """The public connector's."""
    prefix = CASES[case][1]
    params = {
        "conv": golden_weights.conv(f"{prefix}.0", WIDTH, channels, 1, 1),
        "bn": golden_weights.norm(f"{prefix}.1", WIDTH),
    }
    return params, {"bn": newer.norm_state(f"{prefix}.1", WIDTH)}


def signals(joint, classifier=newer.teacher_head):
    """What the method sees of a student's map and of the golden teacher."""
    teacher = newer.feature("feat_teacher_wide_2")
    pooled = np.mean(teacher, (1, 2))
    logits = GOLDEN["srrl/map/teacher_logits"]
    return toys.signals(
        toys.outputs(newer.INPUTS["logits_student"]),
        toys.outputs(logits, pooled),
        LABELS,
        student_joints=(joint,),
        teacher_joints=(teacher,),
        teacher_classifier=classifier,
    )


@functools.cache
def found(case, part):
    """The loss, and its gradients to the connector and to the student's map."""
    joint = newer.feature(CASES[case][0])
    params, stats = variables(case, joint.shape[-1])
    method = made(case, part)

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1))
    def run(params, joint):
        given = {"params": {"head": params}, "batch_stats": {"head": stats}}
        seen = signals(joint)
        (loss,), _ = method.apply(given, seen, train=True, mutable=["batch_stats"])
        return loss.total()

    return jax.device_get(run(params, joint))


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_the_public_ones(case, part):
    value, (of_params, grad) = found(case, part)
    key = f"srrl/{case}/{part}"
    newer.assert_public(key, value, grad)
    if case == "map":
        for leaf, name in {"scale": "weight", "bias": "bias"}.items():
            wanted = f"{key}/grad_Connectors.1.{name}"
            newer.assert_public_grad(wanted, of_params["bn"][leaf])
    if case == "map_larger":
        kernel = newer.as_torch(of_params["conv"]["kernel"])
        newer.assert_public_grad(f"{key}/grad_Connectors.0.weight", kernel)


def test_the_two_public_codes_differ():
    for part in PARTS:
        assert found("pooled_first_of_maps", part)[0] > 5 * found("map", part)[0]


def test_statistics_are_means_over_positions():
    """Of maps of any size, or of vectors that are such means."""
    u, v = toys.noise(0, 4, 6, 6, 3), toys.noise(1, 4, 3, 3, 3)
    wanted = np.mean((np.mean(u, (1, 2)) - np.mean(v, (1, 2))) ** 2)
    for theirs in (v, np.mean(v, (1, 2))):
        run = jax.value_and_grad(srrl.statistics_loss, argnums=(0, 1))
        value, (ours, grad) = jax.jit(run)(u, theirs)
        np.testing.assert_allclose(value, wanted, rtol=1e-5)
        assert np.any(ours) and not np.any(grad)


def test_nothing_reaches_the_teachers_classifier():
    joint = newer.feature("feat_student_2")
    params, stats = variables("map", 64)
    given = {"params": {"head": params}, "batch_stats": {"head": stats}}

    @jax.jit
    @jax.grad
    def run(classifier):
        seen = signals(joint, lambda: classifier)
        apply = made("map", "logits").apply
        return apply(given, seen, train=True, mutable=["batch_stats"])[0][0].total()

    assert not any(np.any(x) for x in run(newer.teacher_head()))


def test_the_classifier_is_the_layer_behind_the_pooled_features():
    model = toys.Toy(width=6)
    own = toys.network(model, 7)
    x, _ = toys.images()
    out = jax.jit(functools.partial(model.apply, train=False))(own, x)
    matrix, bias = heads.classifier(model, own)
    np.testing.assert_allclose(
        np.asarray(out.pooled) @ matrix + bias[None], out.logits, rtol=1e-4, atol=1e-6
    )
    layer = own["params"]["head"]["dense"]
    for head in ({}, {"a": layer, "b": layer}):
        broken = {"params": own["params"] | {"head": head}}
        with pytest.raises(errors.TeacherError, match=f"has {len(head)} linear layers"):
            heads.classifier(model, broken)


@pytest.mark.parametrize(
    ("method", "teacher", "words"),
    [
        ("srrl", "deit_tiny_distilled", "teacher.name is deit_tiny_distilled, but the"),
        ("wkd_l", "deit_tiny_distilled", "ViT has 2 linear layers"),
        ("wkd_l+at", "hme", "HME has 0 linear layers"),
        ("srrl", "wrn_16_1", ""),
        ("wkd_l", "vgg8", ""),
    ],
)
def test_teachers_without_one_linear_layer_are_refused(
    method, teacher, words, tmp_path
):
    fields = {"method": method, "teacher__name": teacher, "teacher__init": "runs/it"}
    lines = [
        line
        for line in check.problems(tiny.config(tmp_path, **fields), 1)
        if "linear layers" in line
    ]
    assert len(lines) == bool(words) and all(words in line for line in lines)
