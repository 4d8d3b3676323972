"""One training step as a pure function: forward, loss, update."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from lakd_jax import backend
from lakd_jax.data import augment
from lakd_jax.distill import method as method_lib
from lakd_jax.local import cuts
from lakd_jax.models import chain, hme
from lakd_jax.train import gates, optim
from lakd_jax.train import state as state_lib

PyTree = Any
Metrics = dict[str, jax.Array]
# Collections that the student's pass leaves; the second holds entropies of gates.
_LEFT = ["batch_stats", "intermediates"]


@dataclasses.dataclass(frozen=True)
class Pixels:
    """How uint8 images become a network's input.

    Attributes:
      mean, std: per channel, of pixels in 0..1.
      dtype: of the result.
      size: side that the network expects; 0 for that of the images.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    dtype: Any
    size: int = 0

    def __call__(self, images: jax.Array) -> jax.Array:
        """(B, H, W, 3) uint8 -> normalised (B, size, size, 3) of `dtype`."""
        images = augment.resize(images, self.size)
        return augment.normalise(images, self.mean, self.std, self.dtype)


@dataclasses.dataclass(frozen=True)
class Learner:
    """Everything about a step that does not change while training.

    Attributes:
      student, teacher: the networks; the teacher may be None.
      method: Linen module that turns `Signals` into one loss a module.
      partition: the student's modules and the teacher's matching joints.
      cut_scale: gradient kept at each cut, 0 (isolated) to 1 (end to end).
      module_input: "student", or "teacher": each module is fed the teacher's
        activation at the joint below it.
      uncut: also hand the method joints whose gradients cross the cuts.
      vam_gamma: weight of the entropy of the student's gates, if it has any.
      starts: the epoch from which each module's gates count; () for all at once.
      preact: joints before the last ReLU.
      anneal: temperature of the student's soft gates times the epoch, see
        `temperature`; None where it has none, or where they are hard.
    """

    student: chain.Chain
    teacher: chain.Chain | None
    method: method_lib.Method
    partition: cuts.Partition
    cut_scale: float
    module_input: str
    uncut: bool
    vam_gamma: float
    starts: tuple[float, ...]
    preact: bool
    student_pixels: Pixels
    teacher_pixels: Pixels
    pad: int
    flip: bool
    steps_per_epoch: int
    optimizer: optax.GradientTransformation
    learning_rate: optax.Schedule
    weight_decay: float
    labels: PyTree  # module index of every parameter
    mesh: Mesh
    anneal: float | None = None

    def temperature(self, step: Any) -> jax.Array | None:
        """Of the student's gates in the step with this number, from 0; None: hard."""
        if self.anneal is None:
            return None
        epoch = jnp.asarray(step // self.steps_per_epoch + 1, jnp.float32)
        return self.anneal / epoch


def run_steps(
    learner: Learner,
    state: state_lib.TrainState,
    teacher_variables: PyTree,
    data: state_lib.Resident,
    indices: jax.Array,
) -> tuple[state_lib.TrainState, Metrics]:
    """As many steps as `indices` (n, B) has rows; metrics are (n,) each.

    On CPU the loop is unrolled: XLA runs convolutions inside loops there more
    than ten times slower.
    """
    if indices.shape[0] == 1:
        state, metrics = train_step(learner, state, teacher_variables, data, indices[0])
        return state, jax.tree.map(lambda m: m[None], metrics)
    return jax.lax.scan(
        lambda s, rows: train_step(learner, s, teacher_variables, data, rows),
        state,
        indices,
        unroll=indices.shape[0] if backend.on_cpu() else 1,
    )


def train_step(
    learner: Learner,
    state: state_lib.TrainState,
    teacher_variables: PyTree,
    data: state_lib.Resident,
    indices: jax.Array,
) -> tuple[state_lib.TrainState, Metrics]:
    """One update from the examples at `indices` (B,) of the training split.

    Returns the new state and scalars: the loss, the batch's accuracy, every
    loss term, and per module the norms of gradient and weight-decay term.
    """
    images, labels = batch(learner, state.step, data, indices)
    grads, (stats, metrics) = jax.grad(loss, argnums=1, has_aux=True)(
        learner,
        state.params,
        state.batch_stats,
        teacher_variables,
        images,
        labels,
        state.step,
        jax.random.fold_in(data.noise, state.step),
    )
    updates, opt_state = learner.optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics |= _norms(learner, grads, params)
    metrics["learning_rate"] = jnp.float32(learner.learning_rate(state.step))
    new = state_lib.TrainState(
        step=state.step + 1,
        params=params,
        batch_stats=stats,
        opt_state=opt_state,
    )
    return new, metrics


def batch(
    learner: Learner, step: jax.Array, data: state_lib.Resident, indices: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Augmented images (B,H,W,3) uint8 and labels (B,), split over devices.

    An example's augmentation depends on (seed, epoch, example id) alone, not on
    the batch it comes in.
    """
    images = augment.augment(
        data.key,
        data.images[indices],
        data.ids[indices],
        step // learner.steps_per_epoch,
        pad=learner.pad,
        flip=learner.flip,
    )
    sharding = state_lib.over_batch(learner.mesh)
    if indices.shape[0] % learner.mesh.size:
        return images, data.labels[indices]  # a short batch, whole everywhere
    constrain = jax.lax.with_sharding_constraint
    return constrain(images, sharding), constrain(data.labels[indices], sharding)


def loss(
    learner: Learner,
    params: PyTree,
    batch_stats: PyTree,
    teacher_variables: PyTree,
    images: jax.Array,
    labels: jax.Array,
    step: jax.Array,
    noise: jax.Array,
) -> tuple[jax.Array, tuple[PyTree, Metrics]]:
    """The summed loss of all modules; (new batch statistics, metrics) beside it.

    Images are (B,H,W,3) uint8, already augmented. The gradient of the sum for a
    module's parameters is that of its own loss, since the cuts let nothing (or
    `cut_scale` of it) through.
    """
    signals, new = observe(
        learner, params, batch_stats, teacher_variables, images, labels, step, noise
    )
    losses, method_state = learner.method.apply(
        _variables(params, batch_stats, "method"),
        signals,
        train=True,
        mutable=["batch_stats"],
    )
    losses = gates.with_entropy(
        losses,
        new.get("intermediates", {}),
        gamma=learner.vam_gamma,
        owner=lambda path: cuts.module_of(path, learner.partition, learner.student),
        epoch=signals.epoch,
        starts=learner.starts,
    )
    total = method_lib.total(losses)
    correct = jnp.argmax(signals.student.logits, -1) == labels
    metrics = {"loss": total, "accuracy": jnp.mean(correct, dtype=jnp.float32)}
    metrics |= method_lib.flatten_metrics(losses)
    own = method_state.get("batch_stats", {})
    new_stats = {"student": new["batch_stats"], "method": own}
    return total, (new_stats, metrics)


def observe(
    learner: Learner,
    params: PyTree,
    batch_stats: PyTree,
    teacher_variables: PyTree,
    images: jax.Array,
    labels: jax.Array,
    step: jax.Array,
    noise: jax.Array,
) -> tuple[method_lib.Signals, PyTree]:
    """What the method sees of both networks, and what the student's pass leaves.

    `noise` is the key of the student's dropout in this step, if it has any.
    """
    teacher, teacher_joints, extra = None, (), {}
    if learner.teacher is not None:
        pixels = learner.teacher_pixels(images)
        outputs: Any = learner.teacher.apply(teacher_variables, pixels, train=False)
        teacher = jax.lax.stop_gradient(outputs)
        extra["teacher_suffix"] = functools.partial(_suffix, learner, teacher_variables)
        teacher_joints = _joints(
            learner, learner.teacher, teacher, learner.partition.teacher_joints
        )
    replace = None
    if learner.module_input == "teacher":
        replace = dict(
            zip(learner.partition.student_joints, teacher_joints, strict=True)
        )
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
        uncut = _joints(
            learner, learner.student, run(1.0)[0], learner.partition.student_joints
        )
    signals = method_lib.Signals(
        student=student,
        teacher=teacher,
        labels=labels,
        epoch=step.astype(jnp.float32) / learner.steps_per_epoch,
        student_joints=_joints(
            learner, learner.student, student, learner.partition.student_joints
        ),
        teacher_joints=teacher_joints,
        student_uncut=uncut,
        **extra,
    )
    return signals, new


def _student(learner: Learner, step: jax.Array) -> chain.Chain:
    """The student as it is in this step: its gates may be soft."""
    temperature = learner.temperature(step)
    if temperature is None:
        return learner.student
    return hme.soften(learner.student, temperature)


def _suffix(
    learner: Learner, variables: PyTree, module: int, activation: jax.Array
) -> jax.Array:
    """Logits of the teacher run on from the end of its module `module`."""
    assert learner.teacher is not None
    outputs: Any = learner.teacher.apply(
        variables,
        activation.astype(learner.teacher_pixels.dtype),
        train=False,
        after=learner.partition.teacher_joints[module],
    )
    return outputs.logits


def _joints(
    learner: Learner, model: chain.Chain, outputs: chain.Outputs, names: tuple[str, ...]
) -> tuple[jax.Array, ...]:
    return tuple(
        chain.feature_at(outputs, model, n, preact=learner.preact) for n in names
    )


def _variables(params: PyTree, batch_stats: PyTree, part: str) -> PyTree:
    return {"params": params[part], "batch_stats": batch_stats[part]}


def _norms(learner: Learner, grads: PyTree, params: PyTree) -> Metrics:
    """Per module the norm of its gradient and of its next weight-decay term.

    `params` are those after the update, so that numbers that overflowed are seen
    before they are saved.
    A gradient far below the decay means that the module shrinks instead of
    learning (a danger where its only loss is a mean over many features).
    """
    out = {}
    for k, norm in optim.module_norms(grads, learner.labels).items():
        out[f"module{k + 1}/grad_norm"] = norm
    for k, norm in optim.module_norms(optim.decayed(params), learner.labels).items():
        out[f"module{k + 1}/decay_norm"] = learner.weight_decay * norm
    return out
