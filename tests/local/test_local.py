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


def blocks(numbers):
    """Returns the names of these blocks of each of three stages."""
    return tuple(f"stage{s}.block{b}" for s in (1, 2, 3) for b in numbers)


STEM_TO_END = ("stem", "stage1.block3", "stage2.block1", "stage3.block3")


@pytest.mark.parametrize(
    ("student", "granularity", "points", "ours", "theirs"),
    [
        ("resnet20", "none", (), ("stage3.block3",), ("stage3.block9",)),
        ("resnet20", "stage", (), blocks("3"), blocks("9")),
        ("resnet32", "stage", (), blocks("5"), blocks("9")),
        ("resnet20", "block", (), blocks("123"), blocks("369")),
        (
            *("resnet20", "list", ("stem", "stage1", "stage2.block1"), STEM_TO_END),
            ("stem", "stage1.block9", "stage2.block3", "stage3.block9"),
        ),
    ],
)
def test_joints_pair_with_those_as_far_through_their_stage(
    student, granularity, points, ours, theirs
):
    names = tuple(f"module{k}" for k in range(1, len(ours) + 1))
    got = cuts.modules(net(student), net("resnet56"), granularity, points)
    assert got == cuts.Partition(ours, theirs, names)
    alone = cuts.modules(net(student), None, granularity, points)
    assert alone == cuts.Partition(ours, (), names)


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


FOUR = toys.Toy(stage_sizes=(1, 1, 1, 1))


@pytest.mark.parametrize(
    ("student", "teacher", "granularity", "points", "message"),
    [
        ("resnet56", "resnet32", "block", (), r"local\.granularity.*stage1\.block1"),
        (
            *("resnet56", "resnet32", "list", ("stage1.block3",)),
            r"local\.cuts.*stage1\.block3.*stage1\.block9",
        ),
        (FOUR, toys.Toy(), "stage", (), "4 stages and the teacher 3"),
        (toys.Toy(), None, "stages", (), "did you mean 'stage'"),
        (toys.Toy(), None, "stage", ("stage1",), "local.cuts goes with"),
    ],
)
def test_what_does_not_pair_is_refused(student, teacher, granularity, points, message):
    networks = (net(n) if isinstance(n, str) else n for n in (student, teacher))
    with pytest.raises(ValueError, match=message):
        cuts.modules(*networks, granularity, points)


def test_one_module_pairs_with_any_number_of_stages():
    one = cuts.modules(toys.Toy(), FOUR, "none", ())
    assert one.teacher_joints == ("stage4.block1",)


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
