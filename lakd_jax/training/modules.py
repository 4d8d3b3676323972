"""One module of an isolated student at a time: its state, its step.

Where no gradient crosses a cut, a step of the whole student is the steps of its
modules one after another: each needs its own state, the student's activation at the
cut below it and the teacher's at the joint below. `isolated_step` runs them in one
program, `lakd_jax.training.engine` in a program each.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax

from lakd_jax.distill.base import method as method_lib
from lakd_jax.local import cuts
from lakd_jax.models import chain
from lakd_jax.runtime import backend
from lakd_jax.training import spec, teacher_outputs
from lakd_jax.training import state as state_lib

PyTree = Any


@flax.struct.dataclass
class Boundary:
    """What a module hands to the next one: (B, H, W, C) each, and never a gradient.

    In front of the first module both are images as each network takes them.
    """

    student: jax.Array
    teacher: jax.Array


def module_state(
    learner: spec.Learner, state: state_lib.TrainState, k: int
) -> state_lib.TrainState:
    """The part of a whole student's state that belongs to module `k` (from 0)."""
    own = functools.partial(_owned, learner.partition, learner.student, (k,))
    params = own(state.params)
    owner = jax.tree.map(lambda _: k, params)
    like = state_lib.TrainState(
        step=state.step,
        params=params,
        batch_stats=own(state.batch_stats),
        opt_state=jax.eval_shape(learner.optimizer_of(owner).init, params),
    )
    return rearranged(like, state)


def rearranged(
    like: PyTree, *sources: PyTree, rename: Callable[[str], str] = str
) -> PyTree:
    """The tree `like` with leaves of the same paths from `sources`.

    So the states of all modules become the whole student's, and the other way round.

    Args:
      like: its structure is kept.
      sources: trees with leaves.
      rename: what a path of `like` is called in the sources.

    Raises:
      KeyError: no source has a path.
    """
    leaves: dict[str, Any] = {}
    for source in sources:
        for path, leaf in jax.tree_util.tree_leaves_with_path(source):
            leaves[jax.tree_util.keystr(path)] = leaf
    return jax.tree_util.tree_map_with_path(
        lambda path, _: leaves[rename(jax.tree_util.keystr(path))], like
    )


def _owned(
    partition: cuts.Partition, model: Any, wanted: Collection[int], tree: PyTree
) -> PyTree:
    """What of `{"student": ..., "method": ...}` belongs to the modules `wanted`."""
    flat: dict[tuple[str, ...], Any] = flax.traverse_util.flatten_dict(tree)
    kept = {
        path: leaf
        for path, leaf in flat.items()
        if cuts.module_of(path, partition, model) in wanted
    }
    return {part: {} for part in tree} | flax.traverse_util.unflatten_dict(kept)


def teacher_part(learner: spec.Learner, variables: PyTree, k: int) -> dict[str, PyTree]:
    """The teacher's variables that module `k` needs.

    Those of its own units, and of all behind them where the method runs the teacher on
    from a joint.
    """
    names = learner.partition.teacher_joints
    as_student = cuts.Partition(names, (), learner.partition.names)
    wanted = range(k, len(names)) if learner.method.needs_suffix else (k,)
    return {
        kind: _owned(as_student, learner.teacher, wanted, {"student": tree})["student"]
        for kind, tree in variables.items()
    }


def isolated_step(
    learner: spec.Learner,
    state: state_lib.TrainState,
    source: teacher_outputs.Source,
    data: state_lib.Resident,
    indices: jax.Array,
) -> tuple[state_lib.TrainState, spec.Metrics]:
    """`step.train_step` of a student whose modules are isolated, one after another.

    `source` is the teacher's variables, or what is stored of its outputs on the batch.
    A module is updated as soon as its loss is known, and all that comes after waits
    for that: its activations are then free before the next module makes its own.
    """
    below, labels, noise = start(learner, state.step, data, indices)
    states, told = [], []
    for k in range(len(learner.partition.names)):
        own, below, metrics = module_step(
            learner,
            k,
            module_state(learner, state, k),
            source,
            below,
            labels,
            noise,
        )
        own, below = _in_order(own, below)
        states.append(own)
        told.append(metrics)
    return rearranged(state, *states), together(told)


def start(
    learner: spec.Learner,
    step: jax.Array,
    data: state_lib.Resident,
    indices: jax.Array,
) -> tuple[Boundary, jax.Array, jax.Array]:
    """What the first module is fed, the labels (B,), and the key of dropout."""
    images, labels = spec.batch(learner, step, data, indices)
    below = Boundary(learner.student_pixels(images), learner.teacher_pixels(images))
    return below, labels, jax.random.fold_in(data.noise, step)


def together(told: Sequence[spec.Metrics]) -> spec.Metrics:
    """The metrics of all modules as those of a step; their losses are summed."""
    whole = {name: value for own in told for name, value in own.items()}
    whole["loss"] = functools.reduce(lambda a, b: a + b, [own["loss"] for own in told])
    return whole


def _in_order(
    state: state_lib.TrainState, above: Boundary
) -> tuple[state_lib.TrainState, Boundary]:
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


def module_step(
    learner: spec.Learner,
    k: int,
    state: state_lib.TrainState,
    source: teacher_outputs.Source,
    below: Boundary,
    labels: jax.Array,
    noise: jax.Array,
) -> tuple[state_lib.TrainState, Boundary, spec.Metrics]:
    """One update of module `k` (from 0).

    Args:
      state: of the module alone, see `module_state`.
      source: the teacher's variables, those that `teacher_part` gives at least, or
        what is stored of its outputs on the batch.
      below: at the end of the module before.
      labels: (B,).
      noise: key of the student's dropout in this step.

    Returns:
      The new state, the boundary above, and the module's metrics, with its loss and,
      of the last module, the batch's accuracy.
    """
    asked = teacher_outputs.teacher(learner, source)
    teacher, z, teacher_above = asked.beside(k, below.teacher)
    inputs = below.teacher if k and learner.module_input == "teacher" else below.student
    joint = learner.partition.student_joints[k]
    if k:
        inputs = jax.lax.stop_gradient(inputs)

    def loss(params: PyTree) -> tuple[jax.Array, tuple]:
        student, left = _run_student(learner, k, params, state, inputs, noise)
        h = spec.end(learner, student, joint)
        signals = _signals(
            learner, k, asked, student, teacher, h, z, labels, state.step
        )
        variables = {"params": params["method"]}
        variables["batch_stats"] = state.batch_stats["method"]
        (own,), new = learner.method.apply(
            variables, signals, train=True, mutable=["batch_stats"]
        )
        stats = {
            "student": left.get("batch_stats", {}),
            "method": new.get("batch_stats", {}),
        }
        return own.total(), (own, stats, student)

    value = jax.value_and_grad(loss, has_aux=True)
    (total, (own, stats, student)), grads = value(state.params)
    done, moved = _updated(learner, k, state, grads, stats)
    metrics = {"loss": total} | method_lib.flatten_metrics([own], k + 1) | moved
    if k + 1 == len(learner.partition.names):
        correct = jnp.argmax(student.logits, -1) == labels
        metrics["accuracy"] = jnp.mean(correct, dtype=jnp.float32)
        metrics["learning_rate"] = jnp.float32(learner.learning_rate(state.step))
    above = Boundary(spec.passed(student, joint), teacher_above)
    return done, above, metrics


def _updated(
    learner: spec.Learner,
    k: int,
    state: state_lib.TrainState,
    grads: PyTree,
    stats: PyTree,
) -> tuple[state_lib.TrainState, spec.Metrics]:
    """Module `k` after its update, and the norms that led to it."""
    owned = jax.tree.map(lambda _: k, state.params)
    optimizer = learner.optimizer_of(owned)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    done = state_lib.TrainState(
        step=state.step + 1, params=params, batch_stats=stats, opt_state=opt_state
    )
    return done, spec.norms(learner, grads, params, owned)


def _run_student(
    learner: spec.Learner,
    k: int,
    params: PyTree,
    state: state_lib.TrainState,
    inputs: jax.Array,
    noise: jax.Array,
) -> tuple[chain.Outputs, PyTree]:
    """The module's units in training mode, and the statistics they leave."""
    variables = {"params": params["student"]}
    variables["batch_stats"] = state.batch_stats["student"]
    after, until = spec.span(learner.partition.student_joints, k)
    left: Any = learner.student.apply(
        variables,
        inputs,
        train=True,
        after=after,
        until=until,
        mutable=["batch_stats"],
        rngs={"dropout": noise},
    )
    return left


def _signals(
    learner: spec.Learner,
    k: int,
    asked: teacher_outputs.Teacher,
    student: chain.Outputs,
    teacher: Any,
    h: jax.Array,
    z: jax.Array,
    labels: jax.Array,
    step: jax.Array,
) -> method_lib.Signals:
    """What the method sees when module `k` alone has run."""
    others = [None] * len(learner.partition.names)
    return method_lib.Signals(
        student=student,
        teacher=teacher,
        labels=labels,
        epoch=step.astype(jnp.float32) / learner.steps_per_epoch,
        student_joints=(*others[:k], h, *others[k + 1 :]),
        teacher_joints=(*others[:k], z, *others[k + 1 :]),
        teacher_suffix=asked.suffix,
    )
