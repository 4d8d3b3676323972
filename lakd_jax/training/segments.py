"""Segments: runs of modules trained by one gradient, and their part of the state.

If gradients cross the cuts, the whole student is one segment. If none does, every
module is a segment, and its step needs only its own variables, the student's activation
at the cut below, and the teacher's activation at the joint below.
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
_MIXING = 2**31 - 1  # folded into a step's key; smaller numbers count its parts
# The metrics of the segment as a whole, and those of each of its modules.
Metrics = tuple[spec_lib.Metrics, tuple[spec_lib.Metrics, ...]]


@dataclasses.dataclass(frozen=True)
class Segment:
    """The modules `first` to `last`, inclusive, counted from 0."""

    first: int
    last: int

    @property
    def modules(self) -> range:
        """Returns the indices of the modules."""
        return range(self.first, self.last + 1)

    def span(self, joints: tuple[str, ...]) -> tuple[str, str]:
        """Returns the segment as `(after, until)`, the arguments of `chain.Chain`.

        `joints` are the ends of all modules; the last module also runs the head.
        """
        after = joints[self.first - 1] if self.first else ""
        return after, joints[self.last] if self.last + 1 < len(joints) else ""


@flax.struct.dataclass
class Boundary:
    """The activations passed to the next segment, without gradients.

    These are (B, H, W, C), or tokens (B, N, C). For the first segment both are the
    networks' input images.
    """

    student: jax.Array
    teacher: jax.Array


@flax.struct.dataclass
class Batch:
    """The parts of a batch that every segment receives.

    Attributes:
      labels: (B,) int32.
      examples: (B,) int32, rows of the training split.
      noise: the random key of this step, for dropout and for the method.
      soft_labels: (B, classes) float32 of mixed images; None if they are not mixed.
      valid: (B,) bool, the rows that are examples; None if all are.
    """

    labels: jax.Array
    examples: jax.Array
    noise: jax.Array
    soft_labels: jax.Array | None = None
    valid: jax.Array | None = None


def of_student(spec: spec_lib.StepSpec) -> tuple[Segment, ...]:
    """Returns the student's segments, ordered from the input to the head."""
    count = len(spec.partition.names)
    if spec.isolated:
        return tuple(Segment(k, k) for k in range(count))
    return (whole_student(spec),)


def whole_student(spec: spec_lib.StepSpec) -> Segment:
    """Returns the segment that spans all modules."""
    return Segment(0, len(spec.partition.names) - 1)


def start(
    spec: spec_lib.StepSpec,
    step: jax.Array,
    data: device.DeviceData,
    indices: jax.Array,
) -> tuple[Boundary, Batch]:
    """Returns the first segment's inputs in step number `step`, and the batch.

    If short batches are filled up, `indices` of -1 stand for rows that do not count.
    """
    valid = indices >= 0 if spec.fills else None
    indices = spec_lib.filled(spec, indices)
    images, labels = spec_lib.batch(spec, step, data, indices)
    noise = jax.random.fold_in(data.noise, step)
    soft = None
    if spec.mixing:
        key = jax.random.fold_in(noise, _MIXING)
        images, soft = spec_lib.shared(spec, spec.mixing(key, images, labels))
    return of_images(spec, images), Batch(labels, indices, noise, soft, valid)


def of_images(spec: spec_lib.StepSpec, images: jax.Array) -> Boundary:
    """Returns the input of each network for images (B, H, W, 3) in 0..255."""
    student = spec.student_pixels(images)
    teacher = spec.teacher_pixels(images) if spec.teacher else student
    return Boundary(student, teacher)


def flat_metrics(
    parts: Sequence[Segment], metrics: Sequence[Metrics]
) -> spec_lib.Metrics:
    """Merges the metrics of all segments into those of a step, and sums the losses."""
    flat: spec_lib.Metrics = {}
    for segment, (shared, modules) in zip(parts, metrics, strict=True):
        flat |= shared
        for k, values in zip(segment.modules, modules, strict=True):
            flat |= {f"module{k + 1}/{name}": value for name, value in values.items()}
    losses = [shared["loss"] for shared, _ in metrics]
    flat["loss"] = functools.reduce(lambda a, b: a + b, losses)
    return flat


def features(
    model: chain.Chain,
    outputs: chain.Outputs,
    joints: tuple[str, ...],
    segment: Segment,
    *,
    preact: bool,
) -> tuple[jax.Array, ...]:
    """Returns the features (B, H, W, C) at the end of each module of a segment.

    Args:
      model: the student or the teacher.
      outputs: the outputs of `model` run over the segment.
      joints: the ends of all modules in `model`.
      preact: whether to take them before the last ReLU.
    """
    if len(segment.modules) == len(joints):
        return tuple(chain.feature_at(outputs, model, n, preact=preact) for n in joints)
    if preact:
        return (outputs.preacts[-1],)
    return (model.as_map(end_activation(outputs, joints[segment.last])),)


def activations(
    outputs: chain.Outputs, joints: tuple[str, ...], segment: Segment
) -> tuple[jax.Array, ...]:
    """Returns what the last unit of each module of a segment passes on."""
    if len(segment.modules) == len(joints):
        return tuple(chain.passed_on(outputs, name) for name in joints)
    return (end_activation(outputs, joints[segment.last]),)


def end_activation(outputs: chain.Outputs, joint: str) -> jax.Array:
    """Returns what the unit at `joint`, where the pass ended, passes on."""
    if joint == "stem":
        assert outputs.stem is not None
        return outputs.stem
    return next(stage[-1] for stage in reversed(outputs.blocks) if stage)


# ------------------------------------------------------------ a segment's variables


def state_of(
    spec: spec_lib.StepSpec, state: state_lib.TrainState, segment: Segment
) -> state_lib.TrainState:
    """Returns the part of the student's state that belongs to a segment."""
    if segment == whole_student(spec):
        return state
    select = functools.partial(_select, spec.partition, spec.student, segment)
    params = select(state.params)
    optimizer = spec.optimizer_of(labels_of(spec, params))
    like = state_lib.TrainState(
        step=state.step,
        params=params,
        collections={name: select(tree) for name, tree in state.collections.items()},
        opt_state=jax.eval_shape(optimizer.init, params),
        average={name: select(tree) for name, tree in state.average.items()},
    )
    return joined(like, state)


def labels_of(spec: spec_lib.StepSpec, params: PyTree) -> PyTree:
    """Returns the index of the module that owns each parameter."""
    return cuts.label_tree(params, spec.partition, spec.student)


def joined(like: PyTree, *sources: PyTree) -> PyTree:
    """Returns a tree shaped as `like`, with the leaves of `sources` at the same paths.

    This merges the states of all segments into the student's, and extracts a segment's
    state from the student's.

    Raises:
      KeyError: a path of `like` is in no source.
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

    These are the variables of its units and, if the method resumes the teacher from a
    joint, of all later units.
    """
    names = spec.partition.teacher_joints
    as_student = cuts.Partition(names, (), spec.partition.names)
    if spec.method.needs_suffix:
        segment = Segment(segment.first, len(names) - 1)
    select = functools.partial(_select, as_student, spec.teacher, segment)
    return {
        kind: select({"student": tree})["student"] for kind, tree in variables.items()
    }


def _select(
    partition: cuts.Partition, model: Any, segment: Segment, tree: PyTree
) -> PyTree:
    """Filters `{"student": ..., "method": ...}` for the variables of a segment."""
    flat: dict[tuple[str, ...], Any] = flax.traverse_util.flatten_dict(tree)
    kept = {
        path: leaf
        for path, leaf in flat.items()
        if cuts.module_of(path, partition, model) in segment.modules
    }
    return {part: {} for part in tree} | flax.traverse_util.unflatten_dict(kept)


# -------------------------------------------------------- variables by position


@dataclasses.dataclass(frozen=True)
class Names:
    """The names of a module's variables, removed to pass the variables by position.

    Without names, the trees of identical modules have the same structure, so that the
    modules can share a compiled program. The head is a separate entry, since only one
    module has it.

    Attributes:
      units: names of the units in network order, from `chain.Chain.unit_names`.
      method: the module's name in the method's variables; "" for a teacher.
    """

    units: tuple[str, ...]
    method: str = ""

    def remove(self, tree: PyTree) -> PyTree:
        """Returns `{"student": ..., "method": ...}` without names, units in a tuple.

        Raises:
          KeyError: a variable belongs neither to these units nor to the method.
        """
        student, method = dict(tree["student"]), dict(tree.get("method", {}))
        placed = {
            "head": student.pop("head", {}),
            "units": tuple(_pop(student, unit) for unit in self.units),
            "losses": method.pop(self.method, {}),
            "last": method.pop("head", {}),
        }
        if unplaced := jax.tree_util.tree_leaves_with_path((student, method)):
            raise KeyError(jax.tree_util.keystr(unplaced[0][0]))
        return placed

    def restore(self, placed: PyTree) -> PyTree:
        """Inverts `remove`, dropping empty subtrees."""
        flat: dict[tuple[str, ...], Any] = {("student", "head"): placed["head"]}
        flat["method", self.method] = placed["losses"]
        flat["method", "head"] = placed["last"]
        for unit, tree in zip(self.units, placed["units"], strict=True):
            flat[("student", *unit.split("."))] = tree
        named = flax.traverse_util.unflatten_dict({p: t for p, t in flat.items() if t})
        return {"student": {}, "method": {}} | named


def _pop(tree: dict[str, Any], unit: str) -> PyTree:
    """Pops the variables of a unit from those of a network; {} if it has none."""
    first, *rest = unit.split(".")
    if not rest:
        return tree.pop(first, {})
    inner = dict(tree.get(first, {}))
    taken = inner.pop(rest[0], {})
    tree[first] = inner
    return taken


def student_names(spec: spec_lib.StepSpec, segment: Segment) -> Names:
    """Returns the names of the variables in a segment of one module."""
    partition = spec.partition
    units = _unit_names(spec.student, partition.student_joints, segment)
    return Names(units, partition.names[segment.first])


def teacher_names(spec: spec_lib.StepSpec, segment: Segment) -> Names:
    """Returns the names in the result of `teacher_of` for a segment of one module."""
    joints = spec.partition.teacher_joints
    assert spec.teacher is not None  # isolated modules always have one
    if spec.method.needs_suffix:
        segment = Segment(segment.first, len(joints) - 1)
    return Names(_unit_names(spec.teacher, joints, segment))


def _unit_names(
    model: chain.Chain, joints: tuple[str, ...], segment: Segment
) -> tuple[str, ...]:
    order = model.unit_names
    first = order.index(joints[segment.first - 1]) + 1 if segment.first else 0
    return order[first : order.index(joints[segment.last]) + 1]


def renamed_state(
    change: Callable[[PyTree], PyTree], state: state_lib.TrainState
) -> state_lib.TrainState:
    """Applies `Names.remove` or `Names.restore` to all parameter-shaped trees."""
    structure = jax.tree.structure(state.params)

    def is_like_params(tree: PyTree) -> bool:
        return jax.tree.structure(tree) == structure

    return state_lib.TrainState(
        step=state.step,
        params=change(state.params),
        collections={name: change(tree) for name, tree in state.collections.items()},
        opt_state=jax.tree.map(
            lambda x: change(x) if is_like_params(x) else x,
            state.opt_state,
            is_leaf=is_like_params,
        ),
        average={name: change(tree) for name, tree in state.average.items()},
    )


def renamed_teacher(
    change: Callable[[PyTree], PyTree], variables: Mapping[str, PyTree]
) -> dict[str, PyTree]:
    """Applies `Names.remove` to each collection of a teacher's variables."""
    return {kind: change({"student": tree}) for kind, tree in variables.items()}
