"""Cuts that balance memory or operations."""

import itertools

import pytest
import toys
from flax import linen as nn

from lakd_jax import models
from lakd_jax.local import balance, cuts, pairing


def net(name):
    return models.create(name, num_classes=10)


def shares(model, partition, kind):
    """Returns the share of each module in the total cost."""
    costs = balance.unit_costs(model, kind)
    ends = [model.unit_names.index(j) + 1 for j in partition.student_joints]
    parts = [sum(costs[a:b]) for a, b in itertools.pairwise([0, *ends])]
    return [part / sum(parts) for part in parts]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_split_is_the_best_of_all(count):
    costs = [5.0, 1, 1, 4, 2, 2, 7, 1]
    ends = [0, 2, 3, 5, 7]

    def largest(chosen):
        marks = [0, *(e + 1 for e in chosen)]
        return max(sum(costs[a:b]) for a, b in itertools.pairwise(marks))

    every = [
        (*inner, ends[-1]) for inner in itertools.combinations(ends[:-1], count - 1)
    ]
    found = balance.split(costs, ends, count)
    assert tuple(found) in every
    assert largest(found) == min(map(largest, every))


@pytest.mark.parametrize(
    ("granularity", "count", "message"),
    [
        ("bytes", 4, r"local\.modules: only 3 modules are possible, but 4"),
        ("stage", 3, r"local\.modules goes with"),
        ("flops", 0, r"local\.modules goes with"),
    ],
)
def test_impossible_numbers_of_modules_are_refused(granularity, count, message):
    with pytest.raises(ValueError, match=message):
        cuts.modules(net("resnet8"), net("resnet20"), granularity, (), count)


def test_activations_shrink_and_operations_do_not():
    costs = {kind: balance.unit_costs(net("resnet20"), kind) for kind in balance.KINDS}
    # Blocks 3, 6 and 9 are the last of stages: 32x32x16, 16x16x32, 8x8x64.
    memory = [costs["bytes"][i] for i in (3, 6, 9)]
    assert memory[0] == pytest.approx(2 * memory[1], rel=0.05)
    assert memory[1] == pytest.approx(2 * memory[2], rel=0.05)
    work = [costs["flops"][i] for i in (3, 6, 9)]
    assert max(work) < 1.2 * min(work)


def test_balanced_cuts_are_where_theory_puts_them():
    student = net("resnet56")
    memory = cuts.modules(student, student, "bytes", (), 4)
    assert max(shares(student, memory, "bytes")) < 0.29
    # Stage 1 alone has 4/7 of the activations, so two of four modules are in it.
    assert sum(j.startswith("stage1") for j in memory.student_joints) == 2
    work = cuts.modules(student, student, "flops", (), 3)
    assert max(shares(student, work, "flops")) < 0.37
    assert len(work.names) == len(work.teacher_joints) == 3


class Posted(toys.Toy, kw_only=True):
    """A toy whose images must have eight pixels on a side."""

    fixed_side: int = 8

    @nn.nowrap
    def make_stem(self, name):
        return Posts(self.width, 1, name=name)


class Posts(toys.Unit):
    @nn.compact
    def __call__(self, x, *, train):
        assert x.shape[1:] == (8, 8, 3)
        return toys.Unit.__call__(self, x, train=train)


@pytest.mark.parametrize("kind", balance.KINDS)
def test_costs_are_of_images_of_the_networks_size(kind):
    fixed = balance.unit_costs(Posted(), kind)
    larger = balance.unit_costs(toys.Toy(), kind)  # IMAGE_SIZE, 32
    assert len(fixed) == len(larger) == 4
    for small, large in zip(fixed, larger, strict=True):
        assert 8 < large / small < 25  # 16 times the pixels, and borders


@pytest.mark.parametrize("kind", balance.KINDS)
def test_unlike_networks_are_cut_where_the_largest_module_is_smallest(kind):
    """With `flops`, a teacher's run with the module that is compared with them."""
    student, teacher = toys.Toy(stage_sizes=(2, 2, 2)), toys.Flat(stage_sizes=(4, 4))
    ours = balance.unit_costs(student, kind)
    theirs = balance.unit_costs(teacher, kind) if kind == "flops" else [0.0] * 9
    pairs = [
        (student.unit_names.index(a) + 1, teacher.unit_names.index(b) + 1)
        for a, b in pairing.of_joints(student, teacher).items()
    ]

    def largest(ends):
        between = itertools.pairwise([(0, 0), *ends])
        parts = [3 * sum(ours[a:c]) + sum(theirs[b:d]) for (a, b), (c, d) in between]
        return max(parts)

    every = [(*inner, pairs[-1]) for inner in itertools.combinations(pairs[1:-1], 2)]
    parts = cuts.modules(student, teacher, kind, (), 3)
    joints = zip(parts.student_joints, parts.teacher_joints, strict=True)
    chosen = tuple(
        (student.unit_names.index(a) + 1, teacher.unit_names.index(b) + 1)
        for a, b in joints
    )
    assert chosen in every and largest(chosen) == min(map(largest, every))
