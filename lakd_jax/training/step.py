"""One training step as a pure function: forward, loss, update."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lakd_jax.distill.base import method as method_lib
from lakd_jax.hme import network
from lakd_jax.local import cuts
from lakd_jax.models import chain
from lakd_jax.runtime import backend
from lakd_jax.training import dot, modules, spec, teacher_outputs, vam
from lakd_jax.training import state as state_lib

PyTree = Any
# Collections that the student's pass leaves; the second holds entropies of gates.
_LEFT = ["batch_stats", "intermediates"]


def run_steps(
    learner: spec.Learner,
    state: state_lib.TrainState,
    source: teacher_outputs.Source,
    data: state_lib.Resident,
    indices: jax.Array,
) -> tuple[state_lib.TrainState, spec.Metrics]:
    """As many steps as `indices` (n, B) has rows; metrics are (n,) each.

    `source` is the teacher's variables, what is stored of its outputs, or None.
    On CPU the loop is unrolled: XLA runs convolutions inside loops there more
    than ten times slower.
    """
    if indices.shape[0] == 1:
        state, metrics = train_step(learner, state, source, data, indices[0])
        return state, jax.tree.map(lambda m: m[None], metrics)
    return jax.lax.scan(
        lambda s, rows: train_step(learner, s, source, data, rows),
        state,
        indices,
        unroll=indices.shape[0] if backend.on_cpu() else 1,
    )


def train_step(
    learner: spec.Learner,
    state: state_lib.TrainState,
    source: teacher_outputs.Source,
    data: state_lib.Resident,
    indices: jax.Array,
) -> tuple[state_lib.TrainState, spec.Metrics]:
    """One update from the examples at `indices` (B,) of the training split.

    Returns the new state and scalars: the loss, the batch's accuracy, every
    loss term, and per module the norms of gradient and weight-decay term.
    """
    source = teacher_outputs.of_batch(learner, source, state.step, indices)
    one_by_one = learner.isolated and len(learner.partition.names) > 1
    program = modules.isolated_step if one_by_one else whole_step
    return program(learner, state, source, data, indices)


def whole_step(
    learner: spec.Learner,
    state: state_lib.TrainState,
    source: teacher_outputs.Source,
    data: state_lib.Resident,
    indices: jax.Array,
) -> tuple[state_lib.TrainState, spec.Metrics]:
    """`train_step` by one gradient of the sum of all modules' losses.

    Or by two, of the labels' losses and of all others, see `dot`.
    """
    images, labels = spec.batch(learner, state.step, data, indices)
    whole = jax.grad(loss, argnums=1, has_aux=True)
    grads, (stats, metrics) = (_gradients_apart if learner.apart else whole)(
        learner,
        state.params,
        state.batch_stats,
        source,
        images,
        labels,
        state.step,
        jax.random.fold_in(data.noise, state.step),
        indices,
    )
    updates, opt_state = learner.optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    if learner.apart:
        grads = jax.tree.map(jnp.add, *grads)
    metrics |= spec.norms(learner, grads, params, learner.labels)
    metrics["learning_rate"] = jnp.float32(learner.learning_rate(state.step))
    new = state_lib.TrainState(
        step=state.step + 1,
        params=params,
        batch_stats=stats,
        opt_state=opt_state,
    )
    return new, metrics


def _gradients_apart(
    learner: spec.Learner, params: PyTree, *arguments: Any
) -> tuple[dot.Apart, tuple[PyTree, spec.Metrics]]:
    """Two gradients from one forward pass, and what `losses` has beside the losses."""

    def both(params: PyTree) -> tuple[tuple[jax.Array, jax.Array], Any]:
        found, beside = losses(learner, params, *arguments)
        return dot.losses(found), beside

    _, backward, beside = jax.vjp(both, params, has_aux=True)
    one, zero = jnp.float32(1), jnp.float32(0)
    (task,), (others,) = backward((one, zero)), backward((zero, one))
    return dot.Apart(task, others), beside


def loss(
    learner: spec.Learner, params: PyTree, *arguments: Any
) -> tuple[jax.Array, tuple[PyTree, spec.Metrics]]:
    """The sum of `losses`, and what these have beside them.

    The gradient of the sum for a module's parameters is that of its own loss, since
    the cuts let nothing (or `cut_scale` of it) through.
    """
    _, beside = losses(learner, params, *arguments)
    return beside[1]["loss"], beside


def losses(
    learner: spec.Learner,
    params: PyTree,
    batch_stats: PyTree,
    source: teacher_outputs.Source,
    images: jax.Array,
    labels: jax.Array,
    step: jax.Array,
    noise: jax.Array,
    examples: jax.Array,
) -> tuple[tuple[method_lib.ModuleLoss, ...], tuple[PyTree, spec.Metrics]]:
    """The losses of all modules; (new batch statistics, metrics) beside them.

    Images are (B,H,W,3) uint8, already augmented.
    """
    signals, new = observe(
        learner, params, batch_stats, source, images, labels, step, noise, examples
    )
    found, method_state = learner.method.apply(
        _variables(params, batch_stats, "method"),
        signals,
        train=True,
        mutable=["batch_stats"],
    )
    found = vam.with_entropy(
        found,
        new.get("intermediates", {}),
        gamma=learner.vam_gamma,
        owner=lambda path: cuts.module_of(path, learner.partition, learner.student),
        epoch=signals.epoch,
        starts=learner.starts,
    )
    total = method_lib.total(found)
    correct = jnp.argmax(signals.student.logits, -1) == labels
    metrics = {"loss": total, "accuracy": jnp.mean(correct, dtype=jnp.float32)}
    metrics |= method_lib.flatten_metrics(found)
    own = method_state.get("batch_stats", {})
    new_stats = {"student": new["batch_stats"], "method": own}
    return found, (new_stats, metrics)


def observe(
    learner: spec.Learner,
    params: PyTree,
    batch_stats: PyTree,
    source: teacher_outputs.Source,
    images: jax.Array,
    labels: jax.Array,
    step: jax.Array,
    noise: jax.Array,
    examples: jax.Array,
) -> tuple[method_lib.Signals, PyTree]:
    """What the method sees of both networks, and what the student's pass leaves.

    `noise` is the key of what is drawn in this step: the student's dropout, if it has
    any, and by the method. `examples` (B,) are the rows of the batch.
    """
    teacher, teacher_joints, passed, extra = None, (), (), {}
    if learner.teacher is not None:
        asked = teacher_outputs.teacher(learner, source)
        teacher, teacher_joints, passed = asked.whole(images)
        extra["teacher_suffix"] = asked.suffix
        if learner.facts.needs_heads:
            extra["teacher_head"] = asked.head
        if learner.facts.needs_preacts:
            extra["teacher_preacts"] = asked.preacts(teacher)
    replace = None
    if learner.module_input == "teacher":
        replace = dict(zip(learner.partition.student_joints, passed, strict=True))
    variables = _variables(params, batch_stats, "student")
    inputs = learner.student_pixels(images)
    apply = functools.partial(_student(learner, step).apply, rngs={"dropout": noise})

    def run(scale: float) -> tuple[chain.Outputs, PyTree]:
        joint = cuts.joint_function(learner.partition, scale, replace)
        return apply(variables, inputs, train=True, joint=joint, mutable=_LEFT)

    student, new = run(learner.cut_scale)
    uncut = ()
    if learner.uncut:
        # The same values again; the compiler merges the two forward passes.
        uncut = spec.joints(
            learner, learner.student, run(1.0)[0], learner.partition.student_joints
        )
    joints = learner.partition.student_joints
    if learner.facts.needs_heads:
        extra["student_head"] = functools.partial(_head, learner, variables)
    if learner.facts.needs_preacts:
        extra["student_preacts"] = spec.preacts(learner.student, student, joints)
    signals = method_lib.Signals(
        student=student,
        teacher=teacher,
        labels=labels,
        epoch=step.astype(jnp.float32) / learner.steps_per_epoch,
        student_joints=spec.joints(learner, learner.student, student, joints),
        teacher_joints=teacher_joints,
        student_uncut=uncut,
        examples=examples,
        count=learner.examples,
        key=noise,
        **extra,
    )
    return signals, new


def _head(learner: spec.Learner, variables: PyTree, activation: jax.Array) -> jax.Array:
    """The student's logits (N, classes) from activations (N, H, W, C) of its end."""
    outputs, _ = learner.student.apply(
        variables,
        activation.astype(learner.student_pixels.dtype),
        train=True,
        after=learner.student.unit_names[-1],
        mutable=_LEFT,
    )
    return outputs.logits


def _student(learner: spec.Learner, step: jax.Array) -> chain.Chain:
    """The student as it is in this step: its gates may be soft."""
    temperature = learner.temperature(step)
    if temperature is None:
        return learner.student
    return network.soften(learner.student, temperature)


def _variables(params: PyTree, batch_stats: PyTree, part: str) -> PyTree:
    return {"params": params[part], "batch_stats": batch_stats[part]}
