"""Segments: consecutive modules that one gradient trains, and their part of the state.

Where a gradient crosses cuts the whole student is one segment; where none does, every
module is one, and its step needs nothing but its own variables, the activation at the
cut below and the teacher's at the joint below.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax
import jax

from lakd_jax.data import device
from lakd_jax.local import cuts
from lakd_jax.models import chain
from lakd_jax.training import spec as spec_lib
from lakd_jax.training import state as state_lib

PyTree = Any
# A segment's own metrics, and those of its modules.
Metrics = tuple[spec_lib.Metrics, tuple[spec_lib.Metrics, ...]]


@dataclasses.dataclass(frozen=True)
class Segment:
    """Modules `first` to `last`, both included, counted from 0."""

    first: int
    last: int

    @property
    def modules(self) -> range:
        """The indices of the modules."""
        return range(self.first, self.last + 1)

    def span(self, joints: tuple[str, ...]) -> tuple[str, str]:
        """Returns (after, until), as `chain.Chain` takes them, of a network.

        `joints` are the ends of all modules; the last module runs the head as well.
        """
        after = joints[self.first - 1] if self.first else ""
        return after, joints[self.last] if self.last + 1 < len(joints) else ""


@flax.struct.dataclass
class Boundary:
    """What a segment hands to the next one: (B, H, W, C) each, and never a gradient.

    In front of the first segment both are images as each network takes them.
    """

    student: jax.Array
    teacher: jax.Array


@flax.struct.dataclass
class Batch:
    """What all segments see of a batch.

    Attributes:
      labels: (B,) int32.
      examples: (B,) int32, rows of the training split.
      noise: the key of what is drawn in this step: dropout, and by the method.
    """

    labels: jax.Array
    examples: jax.Array
    noise: jax.Array


def of_student(spec: spec_lib.StepSpec) -> tuple[Segment, ...]:
    """Returns the segments of a student, from the image to the head."""
    count = len(spec.partition.names)
    if spec.isolated:
        return tuple(Segment(k, k) for k in range(count))
    return (whole(spec),)


def whole(spec: spec_lib.StepSpec) -> Segment:
    """Returns the segment of all modules."""
    return Segment(0, len(spec.partition.names) - 1)


def start(
    spec: spec_lib.StepSpec,
    step: jax.Array,
    data: device.DeviceData,
    indices: jax.Array,
) -> tuple[Boundary, Batch]:
    """Returns what the first segment is fed in the step with this number."""
    images, labels = spec_lib.batch(spec, step, data, indices)
    noise = jax.random.fold_in(data.noise, step)
    return of_images(spec, images), Batch(labels, indices, noise)


def of_images(spec: spec_lib.StepSpec, images: jax.Array) -> Boundary:
    """Returns images (B, H, W, 3) uint8 as each network takes them."""
    ours = spec.student_pixels(images)
    return Boundary(ours, spec.teacher_pixels(images) if spec.teacher else ours)


def flat_metrics(
    parts: Sequence[Segment], metrics: Sequence[Metrics]
) -> spec_lib.Metrics:
    """Returns the metrics of a step from those of its segments; losses are summed."""
    flat: spec_lib.Metrics = {}
    for segment, (shared, modules) in zip(parts, metrics, strict=True):
        flat |= shared
        for k, values in zip(segment.modules, modules, strict=True):
            flat |= {f"module{k + 1}/{name}": value for name, value in values.items()}
    losses = [shared["loss"] for shared, _ in metrics]
    flat["loss"] = functools.reduce(lambda a, b: a + b, losses)
    return flat


def compared(
    spec: spec_lib.StepSpec,
    model: chain.Chain,
    outputs: chain.Outputs,
    joints: tuple[str, ...],
    segment: Segment,
) -> tuple[jax.Array, ...]:
    """Returns what is compared at the end of each module, (B, H, W, C) each.

    Args:
      model: student or teacher.
      outputs: of the pass over the segment.
      joints: the ends of all modules in `model`.
    """
    if len(segment.modules) == len(joints):
        return tuple(
            chain.feature_at(outputs, model, n, preact=spec.preact) for n in joints
        )
    joint = joints[segment.last]
    return (outputs.preacts[-1] if spec.preact else passed(outputs, joint),)


def passed(outputs: chain.Outputs, joint: str) -> jax.Array:
    """Returns the activation (B, H, W, C) at `joint`, with which the pass ended."""
    if joint == "stem":
        assert outputs.stem is not None
        return outputs.stem
    return next(stage[-1] for stage in reversed(outputs.blocks) if stage)


# ------------------------------------------------------------ a segment's part of it


def state_of(
    spec: spec_lib.StepSpec, state: state_lib.TrainState, segment: Segment
) -> state_lib.TrainState:
    """Returns the part of a whole student's state that belongs to a segment."""
    if segment == whole(spec):
        return state
    take = functools.partial(_owned, spec.partition, spec.student, segment)
    params = take(state.params)
    optimizer = spec.optimizer_of(labels_of(spec, params))
    like = state_lib.TrainState(
        step=state.step,
        params=params,
        collections={name: take(tree) for name, tree in state.collections.items()},
        opt_state=jax.eval_shape(optimizer.init, params),
    )
    return joined(like, state)


def labels_of(spec: spec_lib.StepSpec, params: PyTree) -> PyTree:
    """Returns the index of the module that owns each parameter."""
    return cuts.label_tree(params, spec.partition, spec.student)


def joined(like: PyTree, *sources: PyTree) -> PyTree:
    """Returns the tree `like` with the leaves that `sources` have at the same paths.

    So the states of all segments become the whole student's, and the other way round.

    Raises:
      KeyError: no source has a path.
    """
    leaves: dict[str, Any] = {}
    for source in sources:
        for path, leaf in jax.tree_util.tree_leaves_with_path(source):
            leaves[jax.tree_util.keystr(path)] = leaf
    return jax.tree_util.tree_map_with_path(
        lambda path, _: leaves[jax.tree_util.keystr(path)], like
    )


def teacher_of(
    spec: spec_lib.StepSpec, variables: PyTree, segment: Segment
) -> dict[str, PyTree]:
    """Returns the teacher's variables that a segment needs.

    Those of its own units, and of all behind them where the method runs the teacher on
    from a joint.
    """
    names = spec.partition.teacher_joints
    as_student = cuts.Partition(names, (), spec.partition.names)
    if spec.method.needs_suffix:
        segment = Segment(segment.first, len(names) - 1)
    take = functools.partial(_owned, as_student, spec.teacher, segment)
    return {
        kind: take({"student": tree})["student"] for kind, tree in variables.items()
    }


def _owned(
    partition: cuts.Partition, model: Any, segment: Segment, tree: PyTree
) -> PyTree:
    """Returns what of `{"student": ..., "method": ...}` belongs to a segment."""
    flat: dict[tuple[str, ...], Any] = flax.traverse_util.flatten_dict(tree)
    kept = {
        path: leaf
        for path, leaf in flat.items()
        if cuts.module_of(path, partition, model) in segment.modules
    }
    return {part: {} for part in tree} | flax.traverse_util.unflatten_dict(kept)


# ------------------------------------------------------- the same without any names


@dataclasses.dataclass(frozen=True)
class Names:
    """How a module's variables are called, so that they can be handed over by position.

    Modules that are alike then have trees of one structure, and share a program. The
    head is apart, since one module alone has it.

    Attributes:
      units: of the network, in its order, as `chain.Chain.unit_names` has them.
      method: the module's name in the method's variables; "" for a teacher's.
    """

    units: tuple[str, ...]
    method: str = ""

    def remove(self, tree: PyTree) -> PyTree:
        """Returns `{"student": ..., "method": ...}` with units in a tuple.

        Raises:
          KeyError: the tree has something that is of no unit and no method.
        """
        student, method = dict(tree["student"]), dict(tree.get("method", {}))
        placed = {
            "head": student.pop("head", {}),
            "units": tuple(_take(student, unit) for unit in self.units),
            "losses": method.pop(self.method, {}),
            "last": method.pop("head", {}),
        }
        if left := jax.tree_util.tree_leaves_with_path((student, method)):
            raise KeyError(jax.tree_util.keystr(left[0][0]))
        return placed

    def restore(self, placed: PyTree) -> PyTree:
        """Returns what `remove` was given; what is empty is left out."""
        flat: dict[tuple[str, ...], Any] = {("student", "head"): placed["head"]}
        flat["method", self.method] = placed["losses"]
        flat["method", "head"] = placed["last"]
        for unit, tree in zip(self.units, placed["units"], strict=True):
            flat[("student", *unit.split("."))] = tree
        named = flax.traverse_util.unflatten_dict({p: t for p, t in flat.items() if t})
        return {"student": {}, "method": {}} | named


def _take(tree: dict[str, Any], unit: str) -> PyTree:
    """Takes a unit's variables, {} for none, out of a network's."""
    first, *rest = unit.split(".")
    if not rest:
        return tree.pop(first, {})
    inner = dict(tree.get(first, {}))
    taken = inner.pop(rest[0], {})
    tree[first] = inner
    return taken


def student_names(spec: spec_lib.StepSpec, segment: Segment) -> Names:
    """Returns the names in a segment of one module."""
    partition = spec.partition
    units = _units(spec.student, partition.student_joints, segment)
    return Names(units, partition.names[segment.first])


def teacher_names(spec: spec_lib.StepSpec, segment: Segment) -> Names:
    """Returns the names in what `teacher_of` gives for a segment of one module."""
    joints = spec.partition.teacher_joints
    assert spec.teacher is not None  # of isolated modules
    if spec.method.needs_suffix:
        segment = Segment(segment.first, len(joints) - 1)
    return Names(_units(spec.teacher, joints, segment))


def _units(
    model: chain.Chain, joints: tuple[str, ...], segment: Segment
) -> tuple[str, ...]:
    order = model.unit_names
    first = order.index(joints[segment.first - 1]) + 1 if segment.first else 0
    return order[first : order.index(joints[segment.last]) + 1]


def renamed_state(
    change: Callable[[PyTree], PyTree], state: state_lib.TrainState
) -> state_lib.TrainState:
    """Applies `Names.remove` or `Names.restore` to all that is like the parameters."""
    structure = jax.tree.structure(state.params)

    def alike(tree: PyTree) -> bool:
        return jax.tree.structure(tree) == structure

    return state_lib.TrainState(
        step=state.step,
        params=change(state.params),
        collections={name: change(tree) for name, tree in state.collections.items()},
        opt_state=jax.tree.map(
            lambda x: change(x) if alike(x) else x, state.opt_state, is_leaf=alike
        ),
    )


def renamed_teacher(
    change: Callable[[PyTree], PyTree], variables: Mapping[str, PyTree]
) -> dict[str, PyTree]:
    """Applies `Names.remove` to a teacher's variables, of each kind."""
    return {kind: change({"student": tree}) for kind, tree in variables.items()}
