"""Partitions a student into local modules, and cuts gradients between them.

A module is a contiguous group of units of a `models.chain.Chain`; module 1 includes the
stem and module K the head. Modules are counted from 0 in indices and from 1 in names.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from lakd_jax import fields
from lakd_jax.local import balance, pairing
from lakd_jax.models import chain

PyTree = Any

GRANULARITIES = ("stage", "block", "none", "list", "bytes", "flops")
ENGINES = ("fused", "dispatch", "pipeline")  # see `lakd_jax.training.engine`


@dataclasses.dataclass(frozen=True)
class Partition:
    """The K local modules of a student, and the teacher's joints paired with theirs.

    Attributes:
      student_joints: the joint at the end of each module; the last is the end of
        the last stage.
      teacher_joints: the teacher's joint that each is compared with; () without a
        teacher.
      names: "module1", ..., "moduleK".
    """

    student_joints: tuple[str, ...]
    teacher_joints: tuple[str, ...]
    names: tuple[str, ...]


def modules(
    student: chain.Chain,
    teacher: chain.Chain | None,
    granularity: str,
    cuts: Sequence[str],
    count: int = 0,
) -> Partition:
    """Partitions a student, and pairs a joint of the teacher with every cut.

    The teacher's joint is the one nearest to the same share of depth: of the stage if
    both networks have as many stages, else of all blocks (see `local.pairing`). The
    last joints are always paired, and the stem with the stem.

    Args:
      student: the network to be cut.
      teacher: None for a method without one.
      granularity: `none` for one module; `stage` for one per stage, the first with the
        stem; `block` for one per block; `list` to cut at the joints in `cuts`; `bytes`
        and `flops` for `count` modules with balanced activations or operations
        (including those of the teacher that run with them), see `local.balance`.
      cuts: only with `list`: the student's joints to cut at, in order, such as
        ("stage1", "stage2.block1"); the end of the network is added.
      count: only with `bytes` and `flops`: the number of modules.

    Raises:
      ValueError: names `local.granularity`, `local.cuts` or `local.modules`, the fault
        and the valid values.
    """
    fields.check("local.granularity", granularity, GRANULARITIES)
    if bool(cuts) != (granularity == "list"):
        raise ValueError(
            "local.cuts goes with local.granularity=list, and only with it; it is "
            f"{tuple(cuts)!r} with {granularity!r}"
        )
    balanced = granularity in balance.KINDS
    if balanced != (count > 0):
        raise ValueError(
            "local.modules goes with local.granularity=bytes or flops, and only with "
            f"them; it is {count} with {granularity!r}"
        )
    ends = [f"stage{s}" for s in range(1, len(student.stage_sizes) + 1)]
    joints = {
        "none": ends[-1:],
        "stage": ends,
        "block": student.unit_names[1:],
        "list": [*_checked_cuts(student, cuts), ends[-1]],
        **dict.fromkeys(balance.KINDS, ()),
    }[granularity]
    if balanced:
        joints = _balanced(student, teacher, granularity, count)
    joints = tuple(chain.resolve_joint(student, j) for j in joints)
    theirs: tuple[str, ...] = ()
    if teacher is not None and len(joints) == 1:
        theirs = teacher.unit_names[-1:]
    elif teacher is not None:
        theirs = _counterparts(student, teacher, joints, granularity)
    names = tuple(f"module{k}" for k in range(1, len(joints) + 1))
    return Partition(joints, theirs, names)


def _checked_cuts(student: chain.Chain, cuts: Sequence[str]) -> list[str]:
    """Resolves the cuts to units; raises ValueError for a cut that is not valid."""
    valid = f"; cuts can be made at {', '.join(student.unit_names[:-1])}"
    resolved: list[str] = []
    for cut_point in cuts:
        try:
            unit = chain.resolve_joint(student, cut_point)
        except ValueError as e:
            raise ValueError(f"local.cuts: {e}") from None
        if unit == student.unit_names[-1]:
            raise ValueError(
                f"local.cuts: {cut_point!r} is the end of the last stage, where the "
                f"last module ends anyway{valid}"
            )
        if unit in resolved:
            raise ValueError(f"local.cuts: {cut_point!r} is given twice{valid}")
        order = student.unit_names.index
        if resolved and order(unit) < order(resolved[-1]):
            raise ValueError(
                f"local.cuts: {cut_point!r} comes before {resolved[-1]!r} in the "
                f"network; give the cuts in order{valid}"
            )
        resolved.append(unit)
    return resolved


def _counterparts(
    student: chain.Chain,
    teacher: chain.Chain,
    joints: tuple[str, ...],
    granularity: str,
) -> tuple[str, ...]:
    """Returns the teacher's joint for each of the student's."""
    field = "local.cuts" if granularity == "list" else "local.granularity"
    if not teacher.stage_sizes:
        raise ValueError(
            "teacher.name: the function gives no feature maps to compare at the cuts; "
            "use local.granularity=none, or return maps (teacher_from)"
        )
    paired = pairing.of_joints(student, teacher)
    valid = f"cuts can be made at {', '.join(list(paired)[:-1])}"
    if granularity == "stage":
        stages, blocks = len(student.stage_sizes), len(teacher.unit_names) - 1
        if stages > blocks:
            raise ValueError(
                f"{field}: the student has {stages} stages and the teacher {blocks} "
                "blocks, too few to pair with; use local.granularity=none, or list: "
                f"{valid}"
            )
        paired = pairing.of_stages(student, teacher)
    for joint in joints:
        if joint not in paired:
            raise ValueError(
                f"{field}: no joint of the teacher is left for {joint!r}: the one "
                "nearest to its share of depth belongs to a nearer joint, since the "
                f"teacher's stages have {teacher.stage_sizes} blocks and the student's "
                f"{student.stage_sizes}; {valid}"
            )
    return tuple(paired[j] for j in joints)


def _balanced(
    student: chain.Chain, teacher: chain.Chain | None, kind: str, count: int
) -> list[str]:
    """Returns the joints that cut a student into `count` modules of similar cost."""
    names = student.unit_names
    paired = dict(zip(names, names, strict=True))
    if teacher is not None:
        paired = pairing.of_exact_joints(student, teacher)
        if count >= len(paired):  # the stem ends no module
            paired = pairing.of_joints(student, teacher)
    costs = list(balance.unit_costs(student, kind))
    if kind == "flops":
        if teacher is not None and teacher.WHOLE:
            raise ValueError(
                "local.granularity=flops counts the work of parts of the teacher, but "
                "this one runs as a whole: use local.granularity=bytes"
            )
        # A backward pass costs two forward passes; a frozen teacher runs forward only.
        costs = [3 * cost for cost in costs]
        if teacher is not None:
            theirs, begin = balance.unit_costs(teacher, "flops"), 0
            for joint, other in paired.items():
                end = teacher.unit_names.index(other) + 1
                costs[names.index(joint)] += sum(theirs[begin:end])
                begin = end
    ends = [names.index(joint) for joint in paired if joint != "stem"]
    try:
        return [names[end] for end in balance.split(costs, ends, count)]
    except ValueError as error:
        raise ValueError(f"local.modules: {error}") from None


def cut(h: jax.Array, scale: float | jax.Array) -> jax.Array:
    """Returns `h` unchanged, with its gradient multiplied by `scale`.

    0 isolates the module below (the separation of LAKD), 1 is end-to-end training.

    Args:
      h: any array.
      scale: g in [0, 1]; an array is not checked.

    Raises:
      ValueError: g is out of range.
    """
    stopped = jax.lax.stop_gradient(h)
    if isinstance(scale, jax.Array):
        scale = scale.astype(h.dtype)
    elif not 0 <= scale <= 1:
        raise ValueError(f"local.cut_scale must be from 0 to 1, is {scale:g}")
    elif scale in (0, 1):
        return h if scale else stopped
    # Not g h + (1 - g) sg(h), which may round to a value other than h.
    return stopped + scale * (h - stopped)


def joint_function(
    partition: Partition,
    scale: float | jax.Array,
    replace: Mapping[str, jax.Array] | None = None,
) -> Callable[[str, jax.Array], jax.Array] | None:
    """Returns the `joint` argument of a student's `apply` that isolates its modules.

    Returns None for a single module, which is not cut at all.

    Args:
      partition: of the student; there is no cut at its last joint.
      scale: see `cut`.
      replace: student joint -> the teacher's activation there, which the module above
        receives instead (no gradient crosses); None passes on the student's.

    Raises:
      ValueError: `scale` is out of range, or, when called, an activation of the
        teacher has another shape than the student's.
    """
    inner = partition.student_joints[:-1]
    if not inner:
        return None

    def joint(name: str, h: jax.Array) -> jax.Array:
        if name not in inner:
            return h
        if replace is None:
            return cut(h, scale)
        z = replace[name]
        if z.shape != h.shape:
            raise ValueError(
                f"local.module_input=teacher: at {name!r} the teacher's activation is "
                f"{z.shape} and the student's {h.shape}; use local.module_input=student"
            )
        return jax.lax.stop_gradient(z).astype(h.dtype)

    return joint


def module_of(path: Sequence[str], partition: Partition, student: chain.Chain) -> int:
    """Returns the index, from 0, of the module that a variable belongs to.

    Args:
      path: its keys in `{"student": chain variables, "method": method variables}`,
        such as ("student", "stage2", "block1", "conv1", "kernel") or
        ("method", "module2", "adapter", "conv", "kernel"), or, for the first method
        of a sum, ("method", "parts_0", "module2", ...). A method's variables in
        "head" belong to the last module.
      partition: of the student.
      student: the network that was cut.

    Raises:
      KeyError: the path belongs to no module.
    """
    part, unit = path[0], path[1]
    if part == "method":
        unit = path[2] if unit.startswith("parts_") else unit
        modules = {name: k for k, name in enumerate(partition.names)}
    else:
        unit = unit if unit in ("stem", "head") else f"{unit}.{path[2]}"
        order = student.unit_names
        ends = [order.index(joint) for joint in partition.student_joints]
        modules = {name: sum(end < k for end in ends) for k, name in enumerate(order)}
    modules["head"] = len(partition.names) - 1
    if part not in ("student", "method") or unit not in modules:
        raise KeyError(f"{'/'.join(path)} belongs to no module")
    return modules[unit]


def label_tree(tree: PyTree, partition: Partition, student: chain.Chain) -> PyTree:
    """Replaces every leaf of `{"student": ..., "method": ...}` by its `module_of`.

    Works for parameters and batch statistics; per-module norms, clipping and
    optimisers use the labels.
    """

    def label(path: tuple[Any, ...], _: Any) -> int:
        return module_of([str(key.key) for key in path], partition, student)

    return jax.tree_util.tree_map_with_path(label, tree)
