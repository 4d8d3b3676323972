"""Which modules the pictures and the report compare."""

import pytest
import tiny
import toys

from lakd_jax.config import resolved
from lakd_jax.runs import pictures

THREE, TWO = toys.Toy(stage_sizes=(2, 2, 2)), toys.Toy(stage_sizes=(3, 4))
SHALLOW = toys.Toy(stage_sizes=(1, 1, 1))


@pytest.mark.parametrize(
    ("method", "granularity", "teacher", "expected"),
    [
        ("lakd", "stage", TWO, ["stage1.block2", "stage2.block2", "stage2.block4"]),
        ("kd", "stage", SHALLOW, ["stage1.block1", "stage2.block1", "stage3.block1"]),
        ("kd", "stage", TWO, ["stage2.block4"]),
        # KD has no modules: that its cuts do not pair is no fault of its config.
        ("kd", "block", SHALLOW, ["stage3.block1"]),
    ],
)
def test_modules_are_those_of_the_method(
    method, granularity, teacher, expected, tmp_path
):
    fields = {"method": method, "local__granularity": granularity}
    config = resolved.resolve(tiny.config(tmp_path, **fields))
    parts = pictures.partition(config, THREE, teacher)
    assert list(parts.teacher_joints) == expected
    assert len(parts.names) == len(parts.student_joints) == len(expected)
