"""Pairs the joints of a student with those of a teacher by their share of depth.

Blocks are counted from 1. Block i of n pairs with the teacher's block nearest to
i m / n of its m blocks. Networks with the same number of stages pair stage by stage,
all others over all of their blocks. The stem pairs with the stem, and the last block
with the last.
"""

import itertools
from collections.abc import Sequence

from lakd_jax.models import chain


def of_joints(student: chain.Chain, teacher: chain.Chain) -> dict[str, str]:
    """Returns student joint -> teacher joint, strictly increasing on both sides.

    Of several joints of the student with the same counterpart, the one with the
    smallest rounding error is kept; the others have none.
    """
    paired = {"stem": "stem"}
    for ours, theirs in _parts(student, teacher):
        numbers = of_blocks(len(ours), len(theirs))
        paired |= {ours[i - 1]: theirs[k - 1] for i, k in numbers.items()}
    return paired


def of_exact_joints(student: chain.Chain, teacher: chain.Chain) -> dict[str, str]:
    """Returns those of `of_joints` that are as far through their stage as the other.

    If the numbers of stages differ, these are all.
    """
    paired = of_joints(student, teacher)
    if len(student.stage_sizes) != len(teacher.stage_sizes):
        return paired
    exact = {"stem"}
    for ours, theirs in _parts(student, teacher):
        exact |= {
            ours[i - 1]
            for i, k in of_blocks(len(ours), len(theirs)).items()
            if i * len(theirs) == k * len(ours)
        }
    return {joint: other for joint, other in paired.items() if joint in exact}


def of_stages(student: chain.Chain, teacher: chain.Chain) -> dict[str, str]:
    """Returns the end of each of the student's stages -> teacher joint.

    Where the ends of two stages are nearest to the same block of the teacher, the
    earlier one takes the block before it.

    Args:
      student: the network whose stages are paired.
      teacher: has at least as many blocks as the student has stages.
    """
    sizes, theirs = student.stage_sizes, teacher.unit_names
    if len(sizes) == len(teacher.stage_sizes):
        ends = list(itertools.accumulate(teacher.stage_sizes))
    else:
        ends = _spread(list(itertools.accumulate(sizes)), len(theirs) - 1)
    return {f"stage{s}.block{sizes[s - 1]}": theirs[k] for s, k in enumerate(ends, 1)}


def of_blocks(count: int, others: int) -> dict[int, int]:
    """Returns block -> block of the other network, strictly increasing.

    Args:
      count: number of blocks of the one network.
      others: number of blocks of the other.
    """
    chosen: dict[int, int] = {}  # block of the other network -> block of the one
    for block in range(1, count + 1):
        other = _nearest(block, count, others)
        rivals = (block, chosen.get(other, block))
        errors = [abs(rival * others - other * count) for rival in rivals]
        # Of equal errors the later is kept: halves are rounded up in both networks.
        if errors[0] <= errors[1]:
            chosen[other] = block
    return {block: other for other, block in chosen.items()}


def _parts(
    student: chain.Chain, teacher: chain.Chain
) -> list[tuple[Sequence[str], Sequence[str]]]:
    """Returns the blocks of both networks that pair with each other, by name."""
    if len(student.stage_sizes) != len(teacher.stage_sizes):
        return [(student.unit_names[1:], teacher.unit_names[1:])]
    return list(zip(_by_stage(student), _by_stage(teacher), strict=True))


def _by_stage(model: chain.Chain) -> list[Sequence[str]]:
    names, sizes = model.unit_names[1:], model.stage_sizes
    ends = itertools.accumulate(sizes)
    return [names[end - n : end] for n, end in zip(sizes, ends, strict=True)]


def _nearest(block: int, count: int, others: int) -> int:
    """Rounds block * others / count, halves up, to one of 1..others."""
    return max(1, (2 * block * others + count) // (2 * count))


def _spread(blocks: Sequence[int], others: int) -> list[int]:
    """Returns the nearest of 1..others to each block, moved down where two are equal.

    Args:
      blocks: ascending; the last is the network's last.
      others: number of blocks of the other network, at least one per entry.
    """
    found, above = [], others + 1
    for place in range(len(blocks), 0, -1):
        near = max(_nearest(blocks[place - 1], blocks[-1], others), place)
        above = min(near, above - 1)
        found.insert(0, above)
    return found
