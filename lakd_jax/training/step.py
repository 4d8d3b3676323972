"""Computes a training step, segment by segment: forward pass, losses and update."""

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
from lakd_jax.models import chain, masking, wide
from lakd_jax.runtime import backend
from lakd_jax.training import accumulate, dot, optim, segments, teacher_outputs, updates
from lakd_jax.training import spec as spec_lib
from lakd_jax.training import state as state_lib

PyTree = Any
Losses = tuple[method_lib.ModuleLoss, ...]
# The losses of a segment's modules, the student's outputs, and the mutable collections
# of student and method after the pass.
ForwardPass = tuple[Losses, chain.Outputs, PyTree]
_SOWN = "intermediates"  # the collection that `StepSpec.regularise` reads


def run_steps(
    spec: spec_lib.StepSpec,
    state: state_lib.TrainState,
    source: teacher_outputs.Source,
    data: device.DeviceData,
    indices: jax.Array,
    count: jax.Array | None = None,
) -> tuple[state_lib.TrainState, spec_lib.Metrics]:
    """Runs one step per row of `indices` (n, B), and returns metrics of shape (n,).

    On CPU the loop is unrolled, since XLA runs convolutions inside loops more than ten
    times slower there.

    Args:
      source: the teacher's variables, its stored outputs, or None.
      count: the number of rows that are used, so that one program, with a loop, serves
        for all up to n; metrics of the others are 0. None uses all.
    """
    one = functools.partial(train_step, spec)
    if count is not None:
        return _counted(
            lambda s, i: one(s, source, data, indices[i]), state, indices, count
        )
    if indices.shape[0] == 1:
        state, metrics = one(state, source, data, indices[0])
        return state, jax.tree.map(lambda m: m[None], metrics)
    return jax.lax.scan(
        lambda s, rows: one(s, source, data, rows),
        state,
        indices,
        unroll=indices.shape[0] if backend.on_cpu(spec.mesh) else 1,
    )


def _counted(
    one: Callable[[state_lib.TrainState, jax.Array], Any],
    state: state_lib.TrainState,
    indices: jax.Array,
    count: jax.Array,
) -> tuple[state_lib.TrainState, spec_lib.Metrics]:
    """Runs `one(state, i)` for the i below `count`; see `run_steps`."""
    _, shapes = jax.eval_shape(one, state, jnp.int32(0))
    metrics = jax.tree.map(lambda m: jnp.zeros(len(indices), m.dtype), shapes)

    def body(i: jax.Array, carry: Any) -> Any:
        state, metrics = one(carry[0], i)
        return state, jax.tree.map(lambda m, x: m.at[i].set(x), carry[1], metrics)

    return jax.lax.fori_loop(0, count, body, (state, metrics))


def train_step(
    spec: spec_lib.StepSpec,
    state: state_lib.TrainState,
    source: teacher_outputs.Source,
    data: device.DeviceData,
    indices: jax.Array,
) -> tuple[state_lib.TrainState, spec_lib.Metrics]:
    """Makes one update from the examples at `indices` (B,) of the training split.

    See `segments.start` for short batches.

    Each segment is updated as soon as its losses are computed, and the next one waits
    for the update. This frees the segment's activations before the next one allocates
    its own.

    Returns:
      The new state and scalar metrics: the loss, the batch's accuracy, every loss term,
      and per module the norms of the gradient and of the weight-decay term.
    """
    source = teacher_outputs.of_batch(spec, source, state.step, indices)
    below, batch = segments.start(spec, state.step, data, indices)
    metrics, states = [], []
    parts = segments.of_student(spec)
    if len(parts) > 1:
        source = teacher_outputs.for_segments(spec, source, below)
    for segment in parts:
        part = segments.state_of(spec, state, segment)
        part, below, values = segment_step(spec, segment, part, source, below, batch)
        if len(parts) > 1:
            part, below = _force_order(part, below, spec.mesh)
        states.append(part)
        metrics.append(values)
    new_state = segments.joined(state, *states) if len(parts) > 1 else states[0]
    return new_state, segments.flat_metrics(parts, metrics)


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
      state: the state of this segment only, see `segments.state_of`.
      source: the teacher's variables, at least those that `segments.teacher_of`
        returns, or its stored outputs for the batch.
      below: the boundary at the end of the previous segment.

    Returns:
      The new state, the boundary above, and the metrics. Those of the last segment
      include the batch's accuracy and the learning rate.
    """
    learn = functools.partial(_learn, spec, segment, state)
    if spec.accumulate > 1:
        learn = accumulate.in_parts(spec, learn, state.params)
    grads, collections, above, metrics = learn(state.collections, source, below, batch)
    is_whole = segment == segments.whole_student(spec)
    labels = spec.labels if is_whole else segments.labels_of(spec, state.params)
    optimizer = spec.optimizer if is_whole else spec.optimizer_of(labels)
    changes, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, changes)
    if spec.momenta:
        grads = dot.summed(grads)
    _add_norms(spec, segment, metrics, grads, params, labels)
    if spec.log_updates:
        moved: Any = changes
        metrics[0].update(updates.norms(spec.student, moved["student"]))
    if segment.last + 1 == len(spec.partition.names):
        rate = spec.learning_rate(state.step)
        metrics[0]["learning_rate"] = jnp.float32(rate)
    average = state.average
    if spec.average:
        variables = {"params": params} | collections
        average = spec.average.updated(average, state.step, variables)
    state = state_lib.TrainState(
        state.step + 1, params, collections, opt_state, average
    )
    return state, above, metrics


def _learn(
    spec: spec_lib.StepSpec,
    segment: segments.Segment,
    state: state_lib.TrainState,
    collections: PyTree,
    source: teacher_outputs.Source,
    below: segments.Boundary,
    batch: segments.Batch,
) -> accumulate.Learned:
    """Returns the gradient, the new collections, the boundary above, and metrics."""
    state = dataclasses.replace(state, collections=collections)
    teacher_pass = teacher_outputs.run(spec, segment, source, below)
    forward = functools.partial(
        _forward, spec, segment, state, teacher_pass, below, batch
    )
    grads, (losses, student, collections) = _gradient(spec, forward, state.params)
    modules = tuple(loss.terms | loss.diagnostics for loss in losses)
    shared = {"loss": method_lib.total(losses)}
    above = below  # not read after the last segment
    if segment.last + 1 == len(spec.partition.names):
        correct = jnp.argmax(student.logits, -1) == batch.labels
        shared["accuracy"] = jnp.mean(correct, dtype=jnp.float32, where=batch.valid)
    elif teacher_pass is not None:
        joint = spec.partition.student_joints[segment.last]
        end = segments.end_activation(student, joint)
        above = segments.Boundary(end, teacher_pass.activations[-1])
    return grads, collections, above, (shared, modules)


def _gradient(
    spec: spec_lib.StepSpec,
    forward: Callable[[PyTree], ForwardPass],
    params: PyTree,
) -> tuple[PyTree, ForwardPass]:
    """Returns the gradient of the summed losses; by `dot.split` if there are groups.

    For a module's parameters, the gradient of the sum is the gradient of the module's
    own loss, since the cuts block all other gradients (or scale them by `cut_scale`).
    """
    groups = spec.momenta
    total = functools.partial(dot.losses, groups) if groups else method_lib.total

    def objective(params: PyTree) -> tuple[Any, ForwardPass]:
        result = forward(params)
        return total(result[0]), result

    if not groups:
        return jax.grad(objective, has_aux=True)(params)
    _, backward, result = jax.vjp(objective, params, has_aux=True)
    grads = []
    for group in groups:
        (grad,) = backward(tuple(jnp.float32(group is other) for other in groups))
        grads.append(grad)
    return dot.split(groups, grads), result


def _forward(
    spec: spec_lib.StepSpec,
    segment: segments.Segment,
    state: state_lib.TrainState,
    teacher_pass: teacher_outputs.TeacherPass | None,
    below: segments.Boundary,
    batch: segments.Batch,
    params: PyTree,
) -> ForwardPass:
    """Runs a segment of the student, and the method on it."""
    state = dataclasses.replace(state, params=params)
    names = list(state.collections)
    with wide.sums(spec.wide_sums), masking.norms_over(batch.valid):
        signals, student = observe(spec, segment, state, teacher_pass, below, batch)
        losses, method = spec.method.apply(
            state.variables("method"), signals, train=True, mutable=names
        )
    if spec.regularise:
        losses = spec.regularise(losses, student.get(_SOWN, {}), epoch=signals.epoch)
    collections = {
        name: {"student": student.get(name, {}), "method": method.get(name, {})}
        for name in names
    }
    return losses, signals.student, collections


def observe(
    spec: spec_lib.StepSpec,
    segment: segments.Segment,
    state: state_lib.TrainState,
    teacher_pass: teacher_outputs.TeacherPass | None,
    below: segments.Boundary,
    batch: segments.Batch,
) -> tuple[method_lib.Signals, PyTree]:
    """Runs the student's part of a segment on a batch.

    Args:
      teacher_pass: the teacher's results for the segment; None without a teacher.

    Returns:
      The method's inputs, and the student's mutable collections after the pass.
    """
    joints = spec.partition.student_joints
    after, until = segment.span(joints)
    inputs = below.student
    if segment.first:
        from_teacher = spec.module_input == "teacher"
        inputs = jax.lax.stop_gradient(below.teacher if from_teacher else inputs)
    model = spec.student_at(state.step) if spec.student_at else spec.student
    variables = state.variables("student")
    replace = None
    if spec.module_input == "teacher" and teacher_pass is not None:
        ends = joints[segment.first : segment.last + 1]
        replace = dict(zip(ends, teacher_pass.activations, strict=True))

    def run(scale: float | jax.Array) -> tuple[chain.Outputs, PyTree]:
        cut = None
        if segment.first != segment.last:
            cut = cuts.joint_function(spec.partition, scale, replace)
        outputs: Any = model.apply(
            variables,
            inputs,
            train=True,
            joint=cut,
            after=after,
            until=until,
            mutable=[*state.collections, _SOWN],
            rngs={"dropout": batch.noise},
        )
        return outputs

    opening = spec.opening
    student, collections = run(opening(state.step) if opening else spec.cut_scale)

    def features(outputs: chain.Outputs) -> tuple[jax.Array, ...]:
        where = (outputs, joints, segment)
        return segments.features(spec.student, *where, preact=spec.preact)

    signals = method_lib.Signals(
        student=student,
        teacher=teacher_pass and teacher_pass.outputs,
        labels=batch.labels,
        epoch=state.step.astype(jnp.float32) / spec.steps_per_epoch,
        student_joints=_pad(joints, segment, features(student)),
        teacher_joints=_pad(joints, segment, teacher_pass.features)
        if teacher_pass
        else (),
        label_weights=jnp.asarray(spec.class_weights, jnp.float32)[batch.labels]
        if spec.class_weights
        else None,
        label_smoothing=spec.label_smoothing,
        soft_labels=batch.soft_labels,
        examples=batch.examples,
        count=spec.examples,
        key=batch.noise,
        valid=batch.valid,
    )
    if spec.uncut:
        # The values are identical; the compiler merges the two forward passes.
        uncut = features(run(1.0)[0])
        signals = dataclasses.replace(signals, student_uncut=uncut)
    return _with_optional(spec, signals, state, teacher_pass), collections


def _with_optional(
    spec: spec_lib.StepSpec,
    signals: method_lib.Signals,
    state: state_lib.TrainState,
    teacher_pass: teacher_outputs.TeacherPass | None,
) -> method_lib.Signals:
    """Adds heads, pre-activations and the teacher's suffix if the method reads them."""
    optional: dict[str, Any] = {}
    if spec.facts.needs_heads:
        noise: Any = signals.key  # of a step, which always has one
        mutable = [*state.collections, _SOWN]
        optional["student_head"] = functools.partial(
            _head, spec, state.variables("student"), mutable, noise
        )
    if spec.facts.needs_preacts:
        joints = spec.partition.student_joints
        preacts = spec_lib.preacts(spec.student, signals.student, joints)
        optional["student_preacts"] = preacts
    if teacher_pass is not None:
        teacher = teacher_pass.teacher
        optional["teacher_suffix"] = teacher.suffix
        optional["teacher_classifier"] = teacher.classifier
        if spec.facts.needs_heads:
            optional["teacher_head"] = teacher.head
        if spec.facts.needs_preacts:
            optional["teacher_preacts"] = teacher.preacts(teacher_pass.outputs)
    return dataclasses.replace(signals, **optional)


def first_signals(
    spec: spec_lib.StepSpec,
    state: state_lib.TrainState,
    source: teacher_outputs.Source,
    images: jax.Array,
    labels: jax.Array,
    noise: jax.Array,
) -> method_lib.Signals:
    """Returns the method's inputs for the whole student and images (B, H, W, 3) uint8.

    `state` needs no variables of the method, whose shapes follow from these inputs.
    """
    everything = segments.whole_student(spec)
    below = segments.of_images(spec, images)
    batch = segments.Batch(labels, labels, noise)
    teacher_pass = teacher_outputs.run(spec, everything, source, below)
    return observe(spec, everything, state, teacher_pass, below, batch)[0]


def _pad(
    joints: tuple[str, ...], segment: segments.Segment, values: tuple[jax.Array, ...]
) -> tuple[jax.Array | None, ...]:
    """Returns one entry per module: the segment's `values`, and None for the others."""
    after = len(joints) - 1 - segment.last
    return (*[None] * segment.first, *values, *[None] * after)


def _head(
    spec: spec_lib.StepSpec,
    variables: PyTree,
    mutable: list[str],
    noise: jax.Array,
    activation: jax.Array,
) -> jax.Array:
    """Returns the student's logits (N, classes) for a last activation (N, H, W, C)."""
    outputs, _ = spec.student.apply(
        variables,
        activation.astype(spec.student_pixels.dtype),
        train=True,
        after=spec.student.unit_names[-1],
        mutable=mutable,
        rngs={"dropout": noise},
    )
    return outputs.logits


def _add_norms(
    spec: spec_lib.StepSpec,
    segment: segments.Segment,
    metrics: segments.Metrics,
    grads: PyTree,
    params: PyTree,
    labels: PyTree,
) -> None:
    """Adds the norms of gradient and weight decay to each module's metrics.

    `params` are the updated parameters, so that an overflow is detected before it is
    saved. A gradient much smaller than the decay means that the module shrinks instead
    of learning (a risk where its only loss is a mean over many features).
    """
    modules = metrics[1]
    for k, norm in optim.module_norms(grads, labels).items():
        modules[k - segment.first]["grad_norm"] = norm
    decayed = optim.decayed(params, masked=spec.decay_mask)
    for k, norm in optim.module_norms(decayed, labels).items():
        modules[k - segment.first]["decay_norm"] = spec.weight_decay * norm


def _force_order(
    state: state_lib.TrainState, above: segments.Boundary, mesh: jax.sharding.Mesh
) -> tuple[state_lib.TrainState, segments.Boundary]:
    """Returns both unchanged, but makes uses of `above` wait for `state`."""
    params, above = jax.lax.optimization_barrier((state.params, above))
    state = dataclasses.replace(state, params=params)
    if not backend.on_cpu(mesh):
        return state, above
    # On CPU, XLA drops barriers before scheduling, so the order needs a real data
    # dependency on every weight: any weight whose update is delayed keeps activations
    # alive. It goes through the weights since these are finite (otherwise the run
    # stops), which activations need not be.
    weights = jnp.stack([leaf.ravel()[0] for leaf in jax.tree.leaves(params)]).sum()
    return state, jax.tree.map(lambda x: x + (0 * weights).astype(x.dtype), above)
