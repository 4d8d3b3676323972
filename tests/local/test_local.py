"""Partitions of a student, and values and gradients at cuts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from lakd_jax import models
from lakd_jax.local import cuts


def net(name):
    return models.create(name, num_classes=10)


def test_none_is_one_module_at_the_end():
    got = cuts.modules(net("resnet20"), net("resnet56"), "none", ())
    assert got == cuts.Partition(("stage3.block3",), ("stage3.block9",), ("module1",))


def test_stages_pair_with_stages():
    got = cuts.modules(net("resnet20"), net("resnet56"), "stage", ())
    assert got.student_joints == ("stage1.block3", "stage2.block3", "stage3.block3")
    assert got.teacher_joints == ("stage1.block9", "stage2.block9", "stage3.block9")
    assert got.names == ("module1", "module2", "module3")


def test_stages_pair_with_any_ratio_of_blocks():
    got = cuts.modules(net("resnet32"), net("resnet56"), "stage", ())
    assert got.teacher_joints[0] == "stage1.block9"


def test_blocks_pair_in_proportion():
    got = cuts.modules(net("resnet20"), net("resnet56"), "block", ())
    assert len(got.student_joints) == 9
    assert got.teacher_joints[:4] == (
        "stage1.block3",
        "stage1.block6",
        "stage1.block9",
        "stage2.block3",
    )
    with pytest.raises(ValueError, match=r"local\.granularity.*stage1\.block1"):
        cuts.modules(net("resnet32"), net("resnet56"), "block", ())


def test_list_takes_stages_and_blocks():
    points = ("stem", "stage1", "stage2.block1")
    got = cuts.modules(net("resnet20"), net("resnet56"), "list", points)
    assert got.student_joints == (
        "stem",
        "stage1.block3",
        "stage2.block1",
        "stage3.block3",
    )
    assert got.teacher_joints == (
        "stem",
        "stage1.block9",
        "stage2.block3",
        "stage3.block9",
    )


def test_without_teacher_there_are_no_teacher_joints():
    assert cuts.modules(net("resnet20"), None, "stage", ()).teacher_joints == ()


@pytest.mark.parametrize(
    "points,words",
    [
        (("stage4",), "joint is 'stage4'"),
        (("stage2.block4",), "joint is"),
        (("stage2", "stage1"), "comes before"),
        (("stage1", "stage1.block3"), "given twice"),
        (("stage1", "stage3"), "end of the last stage"),
        ((), "goes with local.granularity=list"),
    ],
)
def test_wrong_cut_points_name_the_field_and_the_joints(points, words):
    with pytest.raises(ValueError, match="local.cuts") as e:
        cuts.modules(net("resnet20"), net("resnet56"), "list", points)
    assert words in str(e.value)
    assert not points or "stage1.block1" in str(e.value)


def test_cut_points_without_a_counterpart_are_refused():
    with pytest.raises(
        ValueError, match=r"local\.cuts.*stage1\.block2.*stage1\.block5"
    ):
        cuts.modules(net("resnet32"), net("resnet56"), "list", ("stage1.block2",))
    four = toys.Toy(stage_sizes=(1, 1, 1, 1))
    with pytest.raises(ValueError, match="3 stages and the teacher 4"):
        cuts.modules(toys.Toy(), four, "stage", ())
    assert cuts.modules(toys.Toy(), four, "none", ()).teacher_joints == (
        "stage4.block1",
    )


def test_granularity_and_cuts_must_agree():
    with pytest.raises(ValueError, match="did you mean 'stage'"):
        cuts.modules(toys.Toy(), None, "stages", ())
    with pytest.raises(ValueError, match="local.cuts goes with"):
        cuts.modules(toys.Toy(), None, "stage", ("stage1",))


@pytest.mark.parametrize("scale", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_cut_keeps_the_value_and_scales_the_gradient(scale, dtype):
    h = 100 * np.random.default_rng(0).normal(size=50)
    h = h.astype(dtype)

    @jax.jit
    def both(h):
        value, pull = jax.vjp(lambda h: cuts.cut(h, scale), h)
        return value, pull(jnp.ones_like(h))[0].astype(jnp.float32)

    value, grad = both(h)
    np.testing.assert_array_equal(value, h)
    np.testing.assert_allclose(grad, scale, rtol=4e-3)


def test_cut_scale_must_be_a_share():
    for scale in (-0.1, 1.5):
        with pytest.raises(ValueError, match="local.cut_scale must be from 0 to 1"):
            cuts.cut(jnp.ones(1), scale)


def test_joint_function_cuts_at_inner_joints_only():
    partition = cuts.modules(net("resnet20"), None, "stage", ())
    joint = cuts.joint_function(partition, 0.0)

    def slope(name):
        return jax.grad(lambda h: joint(name, h).sum())(jnp.ones(2))[0]

    slopes = {name: float(slope(name)) for name in net("resnet20").unit_names}
    stopped = [name for name, s in slopes.items() if s == 0]
    assert stopped == ["stage1.block3", "stage2.block3"]


def test_joint_function_passes_on_the_teachers_activation():
    partition = cuts.modules(toys.Toy(), toys.Toy(), "stage", ())
    theirs = {"stage1.block1": jnp.full((1, 2, 2, 4), 5.0)}
    joint = cuts.joint_function(partition, 1.0, theirs)
    h = jnp.ones((1, 2, 2, 4), jnp.bfloat16)
    got = joint("stage1.block1", h)
    assert got.dtype == h.dtype and (got == 5).all()
    assert not jax.grad(lambda h: joint("stage1.block1", h).sum())(h).any()
    with pytest.raises(ValueError, match=r"module_input.*\(1, 2, 2, 4\)"):
        joint("stage1.block1", jnp.ones((1, 2, 2, 3)))


def test_every_variable_belongs_to_a_module():
    lesson = toys.lesson(
        {"task": "aux_heads"},
        student=toys.Toy(stage_sizes=(2, 1, 1)),
        teacher=toys.Toy(stage_sizes=(2, 1, 1)),
        granularity="list",
        cut_points=("stage1.block1", "stage2"),
    )
    params, stats = jax.eval_shape(lesson.init, *toys.images())
    labels = lesson.labels(params)
    assert jax.tree.structure(labels) == jax.tree.structure(params)
    student = labels["student"]
    assert student["stem"]["conv"]["kernel"] == 0
    assert student["stage1"]["block1"]["bn"]["scale"] == 0
    assert student["stage1"]["block2"]["bn"]["scale"] == 1
    assert student["stage2"]["block1"]["bn"]["scale"] == 1
    assert student["stage3"]["block1"]["bn"]["scale"] == 2
    assert student["head"]["dense"]["bias"] == 2
    assert labels["method"]["module2"]["aux_head"]["bias"] == 1
    assert labels["method"]["module3"]["adapter"]["conv"]["kernel"] == 2
    assert lesson.labels(stats)["student"]["stage1"]["block2"]["bn"]["mean"] == 1


def test_variables_outside_all_modules_are_refused():
    partition = cuts.modules(toys.Toy(), None, "stage", ())
    for path in (("method", "bank"), ("student", "stage9", "block1"), ("x", "stem")):
        with pytest.raises(KeyError, match="belongs to no module"):
            cuts.module_of(path, partition, toys.Toy())
