"""Tests conflict and tree of hand-made gates."""

import math

import numpy as np
import pytest

from lakd_jax.hme import tree

# Two experts, then three, then four classes. Expert 2.2 serves no class, and the
# attention of 1.1 on 2.1 at temperature 1 is 2 / 3.
FIRST = np.array([[math.log(2), 0.0], [0.0, 5.0], [0.0, 1.0]])
SECOND = np.array([[0.0, 0.0, 9.0], [4.0, 0.0, 0.0], [0.0, 0.0, 9.0], [4.0, 0.0, 0.0]])
HAND = (FIRST, SECOND)


def test_property_14_uniform_and_one_hot():
    rng = np.random.default_rng(0)
    gates = [rng.random(shape) for shape in ((4, 2), (8, 4), (10, 8))]
    undecided = tree.conflict([np.full(g.shape, 0.3) for g in gates], 0.5)
    np.testing.assert_allclose(undecided, [1, 1, 1])
    sharp = [1e6 * np.eye(g.shape[1])[g.argmax(-1)] for g in gates]
    assert tree.conflict(sharp, 0.5) == [0, 0, 0]


def test_entropy_by_hand():
    entropy = -(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3))
    (level,) = tree.conflict([FIRST[:1]], 1.0)  # 2/3 and 1/3
    assert level == pytest.approx(entropy / math.log(2))
    # Half the temperature squares the odds: 4/5 and 1/5. The second row is undecided.
    entropy = -(4 / 5 * math.log(4 / 5) + 1 / 5 * math.log(1 / 5))
    (level,) = tree.conflict([np.stack([FIRST[0], [3.0, 3.0]])], 0.5)
    assert level == pytest.approx((entropy / math.log(2) + 1) / 2)
    # A single parent is no conflict.
    levels = tree.conflict([np.zeros((3, 1)), np.zeros((2, 3))], 1.0)
    assert levels == [0, pytest.approx(1)]


def test_tree_of_hand_made_gates():
    made = tree.tree(HAND)
    assert made.parents == ((0, 1, 1), (2, 0, 2, 0))
    assert made.experts == (2, 3)
    assert made.paths == ((1, 2), (0, 0), (1, 2), (0, 0))
    assert made.alive == ((0, 1), (0, 2))
    assert made.dead == ((), (1,))
    assert made.distinct_paths == 2
    assert made.order == (1, 3, 0, 2)


def test_ties_go_to_the_first_parent_and_ancestors_of_the_dead_die():
    made = tree.tree([np.array([[1.0, 1.0], [0.0, 1.0]]), np.array([[2.0, 2.0]])])
    assert made.paths == ((0, 0),)
    assert made.dead == ((1,), (1,))


def test_property_14_dot():
    names = ["cat", "car", 'a "dog"', "bus"]
    assert tree.dot(HAND, names, 1.0).split("\n") == [
        "digraph tree {",
        "  node [shape=box];",
        '  image [label="image"];',
        '  e1_1 [label="1.1"];',
        '  e1_2 [label="1.2"];',
        '  e2_1 [label="2.1"];',
        '  e2_3 [label="2.3"];',
        '  c1 [label="car", shape=ellipse];',
        '  c3 [label="bus", shape=ellipse];',
        '  c0 [label="cat", shape=ellipse];',
        '  c2 [label="a \\"dog\\"", shape=ellipse];',
        "  image -> e1_1;",
        "  image -> e1_2;",
        '  e1_1 -> e2_1 [label="0.67", penwidth=3.67];',
        '  e1_2 -> e2_3 [label="0.73", penwidth=3.92];',
        '  e2_1 -> c1 [label="0.96", penwidth=4.86];',
        '  e2_1 -> c3 [label="0.96", penwidth=4.86];',
        '  e2_3 -> c0 [label="1.00", penwidth=5.00];',
        '  e2_3 -> c2 [label="1.00", penwidth=5.00];',
        "}",
        "",
    ]


def test_shares_by_hand():
    made = tree.tree(HAND)
    # Neither (0, 1) nor (2, 3) has a common ancestor; two of all six pairs have one.
    separated = tree.shares(made, (0, 0, 1, 1))
    assert separated == (tree.Share(0, 1 / 3),) * 2
    together = tree.shares(made, (0, 1, 0, 1))
    assert together == (tree.Share(1, 1 / 3),) * 2


def test_superclasses():
    assert tree.SUPERCLASSES["cifar10"].count(0) == 4  # plane, car, ship, truck
    coarse = tree.SUPERCLASSES["cifar100"]
    assert [coarse.count(group) for group in range(20)] == [5] * 20
    trees = [coarse[label] for label in (47, 52, 56, 59, 96)]  # maple to willow
    assert trees == [17] * 5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tree.tree([FIRST, FIRST]), "gate 1 has 3 children, gate 2 2 parents"),
        (lambda: tree.tree([]), "no gates"),
        (lambda: tree.conflict(HAND, 0.0), "temperature must be above 0"),
        (lambda: tree.dot(HAND, ["a"], 1.0), "1 names given for 4 classes"),
        (lambda: tree.shares(tree.tree(HAND), (0, 1)), "2 groups given for 4"),
        (lambda: tree.shares(tree.tree(HAND), (0, 1, 2, 3)), "no two classes"),
    ],
)
def test_faults(call, message):
    with pytest.raises(ValueError, match=message):
        call()
