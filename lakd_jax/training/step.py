"""One training step as a pure function, segment by segment: forward, losses, update."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lakd_jax.data import device
from lakd_jax.distill.base import method as method_lib
from lakd_jax.local import cuts
from lakd_jax.models import chain
from lakd_jax.runtime import backend
from lakd_jax.training import dot, optim, segments, teacher_outputs
from lakd_jax.training import spec as spec_lib
from lakd_jax.training import state as state_lib

PyTree = Any
Losses = tuple[method_lib.ModuleLoss, ...]
_SOWN = "intermediates"  # what units leave for `Learner.regularise`


@dataclasses.dataclass(frozen=True)
class Pass:
    """What a forward pass of a segment leaves beside its losses.

    Attributes:
      student: the student's outputs.
      collections: its mutable collections and the method's, after the pass.
    """

    student: chain.Outputs
    collections: PyTree


jax.tree_util.register_dataclass(Pass)


def run_steps(
    spec: spec_lib.StepSpec,
    state: state_lib.TrainState,
    source: teacher_outputs.Source,
    data: device.DeviceData,
    indices: jax.Array,
) -> tuple[state_lib.TrainState, spec_lib.Metrics]:
    """Runs as many steps as `indices` (n, B) has rows; metrics are (n,) each.

    `source` is the teacher's variables, what is stored of its outputs, or None.
    On CPU the loop is unrolled: XLA runs convolutions inside loops there more
    than ten times slower.
    """
    if indices.shape[0] == 1:
        state, metrics = train_step(spec, state, source, data, indices[0])
        return state, jax.tree.map(lambda m: m[None], metrics)
    return jax.lax.scan(
        lambda s, rows: train_step(spec, s, source, data, rows),
        state,
        indices,
        unroll=indices.shape[0] if backend.on_cpu() else 1,
    )


def train_step(
    spec: spec_lib.StepSpec,
    state: state_lib.TrainState,
    source: teacher_outputs.Source,
    data: device.DeviceData,
    indices: jax.Array,
) -> tuple[state_lib.TrainState, spec_lib.Metrics]:
    """Makes one update from the examples at `indices` (B,) of the training split.

    A segment is updated as soon as its losses are known, and all that comes after waits
    for that: its activations are then free before the next one makes its own.

    Returns the new state and scalars: the loss, the batch's accuracy, every
    loss term, and per module the norms of gradient and weight-decay term.
    """
    source = teacher_outputs.of_batch(spec, source, state.step, indices)
    below, batch = segments.start(spec, state.step, data, indices)
    found, states = [], []
    parts = segments.of_student(spec)
    for segment in parts:
        own = segments.state_of(spec, state, segment)
        own, below, metrics = segment_step(spec, segment, own, source, below, batch)
        if len(parts) > 1:
            own, below = _in_order(own, below)
        states.append(own)
        found.append(metrics)
    done = segments.joined(state, *states) if len(parts) > 1 else states[0]
    return done, segments.flat_metrics(parts, found)


def segment_step(
    spec: spec_lib.StepSpec,
    segment: segments.Segment,
    state: state_lib.TrainState,
    source: teacher_outputs.Source,
    below: segments.Boundary,
    batch: segments.Batch,
) -> tuple[state_lib.TrainState, segments.Boundary, segments.Metrics]:
    """Makes one update of a segment.

    Args:
      state: of the segment alone, see `segments.state_of`.
      source: the teacher's variables, those that `segments.teacher_of` gives at least,
        or what is stored of its outputs on the batch.
      below: at the end of the segment before.

    Returns:
      The new state, the boundary above, and the metrics; the batch's accuracy and the
      learning rate come with the last segment.
    """
    seen = None
    if spec.teacher is not None:
        teacher = teacher_outputs.teacher(spec, source)
        seen = teacher.segment(segment, below.teacher)
    forward = functools.partial(
        _forward, spec, segment, state, source, seen, below, batch
    )
    grads, losses, left = _gradient(spec, forward, state.params)
    total = segment == segments.whole(spec)
    labels = spec.labels if total else segments.labels_of(spec, state.params)
    optimizer = spec.optimizer if total else spec.optimizer_of(labels)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    if spec.apart:
        grads = jax.tree.map(jnp.add, *grads)
    metrics = _metrics(spec, segment, losses, grads, params, labels)
    above = below  # which nothing reads behind the last segment
    if segment.last + 1 == len(spec.partition.names):
        correct = jnp.argmax(left.student.logits, -1) == batch.labels
        metrics[0]["accuracy"] = jnp.mean(correct, dtype=jnp.float32)
        rate = spec.learning_rate(state.step)
        metrics[0]["learning_rate"] = jnp.float32(rate)
    elif seen is not None:
        joint = spec.partition.student_joints[segment.last]
        above = segments.Boundary(segments.passed(left.student, joint), seen.passed[-1])
    new = state_lib.TrainState(state.step + 1, params, left.collections, opt_state)
    return new, above, metrics


def _gradient(
    spec: spec_lib.StepSpec,
    forward: Callable[[PyTree], tuple[Losses, Pass]],
    params: PyTree,
) -> tuple[PyTree, Losses, Pass]:
    """Returns the gradient of all losses; with `StepSpec.apart` two, see `dot`.

    The gradient of their sum for a module's parameters is that of its own loss, since
    the cuts let nothing (or `cut_scale` of it) through.
    """

    def total(params: PyTree) -> tuple[jax.Array, tuple[Losses, Pass]]:
        losses, left = forward(params)
        return method_lib.total(losses), (losses, left)

    def both(params: PyTree) -> tuple[tuple[jax.Array, jax.Array], Any]:
        losses, left = forward(params)
        return dot.losses(losses), (losses, left)

    if not spec.apart:
        grads, (losses, left) = jax.grad(total, has_aux=True)(params)
        return grads, losses, left
    _, backward, (losses, left) = jax.vjp(both, params, has_aux=True)
    one, zero = jnp.float32(1), jnp.float32(0)
    (task,), (others,) = backward((one, zero)), backward((zero, one))
    return dot.Apart(task, others), losses, left


def _forward(
    spec: spec_lib.StepSpec,
    segment: segments.Segment,
    state: state_lib.TrainState,
    source: teacher_outputs.Source,
    seen: teacher_outputs.Seen | None,
    below: segments.Boundary,
    batch: segments.Batch,
    params: PyTree,
) -> tuple[Losses, Pass]:
    """Runs a segment and the method on it: the losses of its modules."""
    state = dataclasses.replace(state, params=params)
    signals, left = observe(spec, segment, state, source, seen, below, batch)
    names = list(state.collections)
    losses, after = spec.method.apply(
        state.variables("method"), signals, train=True, mutable=names
    )
    if spec.regularise:
        losses = spec.regularise(losses, left.get(_SOWN, {}), epoch=signals.epoch)
    collections = {
        name: {"student": left.get(name, {}), "method": after.get(name, {})}
        for name in names
    }
    return losses, Pass(signals.student, collections)


def observe(
    spec: spec_lib.StepSpec,
    segment: segments.Segment,
    state: state_lib.TrainState,
    source: teacher_outputs.Source,
    seen: teacher_outputs.Seen | None,
    below: segments.Boundary,
    batch: segments.Batch,
) -> tuple[method_lib.Signals, PyTree]:
    """Runs the student's part: what the method sees, and what the pass leaves.

    `seen` is what the teacher's part gave.
    """
    joints = spec.partition.student_joints
    after, until = segment.span(joints)
    inputs = below.student
    if segment.first:
        fed = below.teacher if spec.module_input == "teacher" else inputs
        inputs = jax.lax.stop_gradient(fed)
    model = spec.student_at(state.step) if spec.student_at else spec.student
    variables = state.variables("student")
    replace = None
    if spec.module_input == "teacher" and seen is not None:
        ends = joints[segment.first : segment.last + 1]
        replace = dict(zip(ends, seen.passed, strict=True))

    def run(scale: float) -> tuple[chain.Outputs, PyTree]:
        cut = None
        if segment.first != segment.last:
            cut = cuts.joint_function(spec.partition, scale, replace)
        left: Any = model.apply(
            variables,
            inputs,
            train=True,
            joint=cut,
            after=after,
            until=until,
            mutable=[*state.collections, _SOWN],
            rngs={"dropout": batch.noise},
        )
        return left

    student, left = run(spec.cut_scale)
    compared = functools.partial(segments.compared, spec, spec.student)
    signals = method_lib.Signals(
        student=student,
        teacher=seen and seen.outputs,
        labels=batch.labels,
        epoch=state.step.astype(jnp.float32) / spec.steps_per_epoch,
        student_joints=_among(joints, segment, compared(student, joints, segment)),
        teacher_joints=_among(joints, segment, seen.compared) if seen else (),
        examples=batch.examples,
        count=spec.examples,
        key=batch.noise,
    )
    more: dict[str, Any] = {}
    if spec.uncut:
        # The same values again; the compiler merges the two forward passes.
        more["student_uncut"] = compared(run(1.0)[0], joints, segment)
    if spec.facts.needs_heads:
        more["student_head"] = functools.partial(
            _head, spec, variables, [*state.collections, _SOWN]
        )
    if spec.facts.needs_preacts:
        more["student_preacts"] = spec_lib.preacts(spec.student, student, joints)
    if seen is not None:
        teacher = teacher_outputs.teacher(spec, source)
        more["teacher_suffix"] = teacher.suffix
        if spec.facts.needs_heads:
            more["teacher_head"] = teacher.head
        if spec.facts.needs_preacts:
            more["teacher_preacts"] = teacher.preacts(seen.outputs)
    return dataclasses.replace(signals, **more), left


def first_signals(
    spec: spec_lib.StepSpec,
    state: state_lib.TrainState,
    source: teacher_outputs.Source,
    images: jax.Array,
    labels: jax.Array,
    noise: jax.Array,
) -> method_lib.Signals:
    """Returns what the method sees of the whole student on images (B, H, W, 3) uint8.

    `state` needs no variables of the method: what it sees decides their shapes.
    """
    everything = segments.whole(spec)
    below = segments.of_images(spec, images)
    batch = segments.Batch(labels, labels, noise)
    seen = None
    if spec.teacher is not None:
        teacher = teacher_outputs.teacher(spec, source)
        seen = teacher.segment(everything, below.teacher)
    return observe(spec, everything, state, source, seen, below, batch)[0]


def _among(
    joints: tuple[str, ...], segment: segments.Segment, values: tuple[jax.Array, ...]
) -> tuple[jax.Array | None, ...]:
    """Returns the values of a segment's modules among None for all others."""
    behind = len(joints) - 1 - segment.last
    return (*[None] * segment.first, *values, *[None] * behind)


def _head(
    spec: spec_lib.StepSpec,
    variables: PyTree,
    mutable: list[str],
    activation: jax.Array,
) -> jax.Array:
    """Returns the student's logits (N, classes) from (N, H, W, C) of its end."""
    outputs, _ = spec.student.apply(
        variables,
        activation.astype(spec.student_pixels.dtype),
        train=True,
        after=spec.student.unit_names[-1],
        mutable=mutable,
    )
    return outputs.logits


def _metrics(
    spec: spec_lib.StepSpec,
    segment: segments.Segment,
    losses: Losses,
    grads: PyTree,
    params: PyTree,
    labels: PyTree,
) -> segments.Metrics:
    """Returns the loss, every term, and the norms of gradient and weight decay.

    `params` are those after the update, so that numbers that overflowed are seen before
    they are saved. A gradient far below the decay means that the module shrinks instead
    of learning (a danger where its only loss is a mean over many features).
    """
    found = [loss.terms | loss.diagnostics for loss in losses]
    for k, norm in optim.module_norms(grads, labels).items():
        found[k - segment.first]["grad_norm"] = norm
    for k, norm in optim.module_norms(optim.decayed(params), labels).items():
        found[k - segment.first]["decay_norm"] = spec.weight_decay * norm
    return {"loss": method_lib.total(losses)}, tuple(found)


def _in_order(
    state: state_lib.TrainState, above: segments.Boundary
) -> tuple[state_lib.TrainState, segments.Boundary]:
    """Both unchanged, and nothing that uses `above` runs before `state` is made."""
    params, above = jax.lax.optimization_barrier((state.params, above))
    state = dataclasses.replace(state, params=params)
    if not backend.on_cpu():
        return state, above
    # XLA drops barriers on CPU before it schedules, so there has to be a real
    # dependence, on every weight: each that is left for later keeps activations alive.
    # Weights are finite, or the run stops; activations may not be.
    weights = jnp.stack([leaf.ravel()[0] for leaf in jax.tree.leaves(params)]).sum()
    return state, jax.tree.map(lambda x: x + (0 * weights).astype(x.dtype), above)
