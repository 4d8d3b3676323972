"""Joints of two networks paired by their share of depth."""

import functools
import itertools
import pathlib
import re

import pytest
import toys

from lakd_jax import models
from lakd_jax.local import cuts, pairing


def net(*sizes):
    """Returns a network with stages of these sizes, or the one of that name."""
    if isinstance(sizes[0], str):
        return models.create(sizes[0], num_classes=3)
    return toys.Toy(stage_sizes=sizes)


def numbered(model, joints):
    """Returns the places of these joints in the network; the stem's is 0."""
    return [model.unit_names.index(joint) for joint in joints]


@functools.cache
def all_sizes():
    """Returns every combination of stage sizes that a registered network has."""
    known = {models.create(n, num_classes=2).stage_sizes for n in models.names()}
    # Stages of networks of other families, and depths that divide none of the others.
    return sorted(known | {(3,) * 4, (2, 2, 6, 2), (1, 2, 2, 3, 3, 4, 1), (5,), (7, 1)})


@pytest.mark.parametrize(
    ("count", "others", "expected"),
    [
        (3, 3, {1: 1, 2: 2, 3: 3}),
        (3, 9, {1: 3, 2: 6, 3: 9}),
        (9, 3, {3: 1, 6: 2, 9: 3}),  # exact ones win over their neighbours
        (5, 9, {1: 2, 2: 4, 3: 5, 4: 7, 5: 9}),
        (2, 3, {1: 2, 2: 3}),  # 1.5 is rounded up
        (3, 2, {2: 1, 3: 2}),  # blocks 1 and 2 are as far from the middle: the later
        (8, 3, {3: 1, 5: 2, 8: 3}),
        (9, 1, {9: 1}),
        (1, 9, {1: 9}),
    ],
)
def test_blocks_pair_with_the_nearest(count, others, expected):
    assert pairing.of_blocks(count, others) == expected


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        # To a shallower one: two blocks of the student are nearest to each.
        (
            *((2, 2, 2, 2), (3, 2)),
            {"stage1.block2": "stage1.block1", "stage2.block1": "stage1.block2"}
            | {"stage3.block1": "stage1.block3", "stage3.block2": "stage2.block1"}
            | {"stage4.block2": "stage2.block2"},
        ),
        # As many stages pair stage by stage, whatever the share of the whole.
        (
            *((1, 3), (4, 2)),
            {"stage1.block1": "stage1.block4", "stage2.block2": "stage2.block1"}
            | {"stage2.block3": "stage2.block2"},
        ),
    ],
)
def test_joints_pair_by_their_share_of_depth(student, teacher, expected):
    paired = pairing.of_joints(net(*student), net(*teacher))
    assert paired == {"stem": "stem"} | expected


def test_the_example_of_the_documentation():
    page = pathlib.Path(__file__).parents[2] / "docs" / "methods.md"
    _, _, section = page.read_text().partition("## Unlike networks")
    row = re.compile(r"\| (stem|stage\S+) \|[^|]*\| (\S+) \| ?([^|]*)\|")
    rows = [match.groups() for match in row.finditer(section)]
    student, teacher = net("resnet20"), net(3, 3, 3, 3)
    paired = pairing.of_joints(student, teacher)
    assert [(ours, theirs) for ours, theirs, _ in rows] == list(paired.items())
    ends = {ours: theirs for ours, theirs, end in rows if "end of module" in end}
    assert ends == pairing.of_stages(student, teacher) and len(ends) == 3


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        ((3, 3, 3), (3, 3, 3, 3), [4, 8, 12]),
        ((3, 3, 3, 3), (3, 3, 3), [2, 5, 7, 9]),
        ((1, 3), (4, 2), [4, 6]),  # ends of stages with ends of stages
        # The ends of the last two are nearest to the last block.
        ((1, 2, 2, 3, 3, 4, 1), (2, 2, 2, 2), [1, 2, 3, 4, 6, 7, 8]),
        ((1, 1, 1, 9), (2, 2), [1, 2, 3, 4]),
        ((9, 1, 1), (2, 1), [1, 2, 3]),
    ],
)
def test_ends_of_stages_all_have_a_counterpart(student, teacher, expected):
    teacher = net(*teacher)
    paired = pairing.of_stages(net(*student), teacher)
    ends = [f"stage{s}.block{size}" for s, size in enumerate(student, 1)]
    assert list(paired) == ends
    assert numbered(teacher, paired.values()) == expected


@pytest.mark.parametrize("student", all_sizes(), ids=str)
def test_pairs_increase_strictly_and_end_together(student):
    """So that every segment of either network has at least one block."""
    ours = net(*student)
    for sizes in all_sizes():
        theirs = net(*sizes)
        found = [pairing.of_joints(ours, theirs), pairing.of_exact_joints(ours, theirs)]
        if sum(sizes) >= len(student):
            found.append({"stem": "stem"} | pairing.of_stages(ours, theirs))
        for pairs in found:
            assert next(iter(pairs.items())) == ("stem", "stem")
            assert list(pairs.items())[-1] == (
                ours.unit_names[-1],
                theirs.unit_names[-1],
            )
            for model, joints in ((ours, pairs), (theirs, pairs.values())):
                places = numbered(model, joints)
                assert all(a < b for a, b in itertools.pairwise(places))
        assert found[1].items() <= found[0].items()
        fewer = map(min, zip(student, sizes, strict=False))
        blocks = (
            sum(fewer) if len(student) == len(sizes) else min(sum(student), sum(sizes))
        )
        assert len(found[0]) == 1 + blocks


def test_every_joint_pairs_with_itself():
    for sizes in all_sizes():
        model = net(*sizes)
        assert all(a == b for a, b in pairing.of_joints(model, model).items())
        assert tuple(pairing.of_exact_joints(model, model)) == model.unit_names


@pytest.mark.parametrize(
    ("granularity", "points", "count", "ours", "theirs"),
    [
        ("none", (), 0, [9], [12]),
        ("stage", (), 0, [3, 6, 9], [4, 8, 12]),
        ("block", (), 0, [*range(1, 10)], [1, 3, 4, 5, 7, 8, 9, 11, 12]),
        ("list", ("stem", "stage1.block2", "stage3.block2"), 0, [0, 2, 8, 9], None),
        ("bytes", (), 2, None, None),
        ("flops", (), 4, None, None),
    ],
)
def test_every_granularity_cuts_unlike_networks(
    granularity, points, count, ours, theirs
):
    student, teacher = net("resnet20"), net(3, 3, 3, 3)
    got = cuts.modules(student, teacher, granularity, points, count)
    assert ours in (None, numbered(student, got.student_joints))
    assert theirs in (None, numbered(teacher, got.teacher_joints))
    assert len(got.student_joints) == len(got.teacher_joints) == (count or len(ours))
    if granularity != "stage":  # whose ends may be moved
        paired = pairing.of_joints(student, teacher)
        assert got.teacher_joints == tuple(paired[j] for j in got.student_joints)


@pytest.mark.parametrize(
    ("student", "teacher", "granularity", "points", "message"),
    [
        (
            *((1, 1, 1, 1), (1, 1, 1), "stage", ()),
            r"local\.granularity: the student has 4 stages and the teacher 3 blocks.*"
            r"granularity=none.*cuts can be made at stem, stage1\.block1, stage3\.b",
        ),
        (
            *((3, 3, 3), (2, 2, 2, 2), "block", ()),
            r"local\.granularity: no joint of the teacher is left for "
            r"'stage2\.block1'.*\(2, 2, 2, 2\).*\(3, 3, 3\); cuts can be made at",
        ),
        (
            *((3, 3, 3), (2, 1), "list", ("stage1.block1", "stage2")),
            r"local\.cuts: .*left for 'stage1\.block1'.*at stem, stage1\.block3, "
            r"stage2\.block3$",
        ),
        ((3, 3), (1,), "bytes", (), r"local\.modules: only 1 modules"),
    ],
)
def test_cuts_without_a_counterpart_are_refused(
    student, teacher, granularity, points, message
):
    count = 2 if granularity == "bytes" else 0
    with pytest.raises(ValueError, match=message):
        cuts.modules(net(*student), net(*teacher), granularity, points, count)


def test_balanced_cuts_are_at_equal_shares_if_there_are_enough():
    """So that adding nearest joints has not moved cuts that were possible before."""
    student, teacher = net("resnet32"), net("resnet56")
    exact = set(pairing.of_exact_joints(student, teacher).values())
    few, many = (cuts.modules(student, teacher, "bytes", (), n) for n in (3, 4))
    assert set(few.teacher_joints) <= exact and len(few.names) == 3
    assert not set(many.teacher_joints) <= exact and len(many.names) == 4
