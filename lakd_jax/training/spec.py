"""The constants of a training step, and the operations common to all steps."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from lakd_jax import distill
from lakd_jax.data import augment, device
from lakd_jax.data import distortion as distortion_lib
from lakd_jax.data import mixing as mixing_lib
from lakd_jax.distill.base import method as method_lib
from lakd_jax.local import cuts
from lakd_jax.models import chain
from lakd_jax.runtime import mesh as mesh_lib
from lakd_jax.training import dot, ema

PyTree = Any
Metrics = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Pixels:
    """Converts images in 0..255 to the input of a network.

    Attributes:
      mean, std: per channel, for pixels in 0..1.
      dtype: of the result.
      size: the image side that the network expects; 0 keeps the size of the images.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    dtype: Any
    size: int = 0

    def __call__(self, images: jax.Array) -> jax.Array:
        """Converts (B, H, W, 3) in 0..255 to normalised (B, size, size, 3) `dtype`."""
        images = augment.resize(images, self.size)
        return augment.normalise(images, self.mean, self.std, self.dtype)


@dataclasses.dataclass(frozen=True)
class StepSpec:
    """Everything about a step that stays constant during training.

    Attributes:
      student, teacher: the networks; the teacher may be None.
      method: the Linen module that turns `Signals` into one loss per module.
      facts: the static properties of the method.
      partition: the student's modules and the teacher's matching joints.
      cut_scale: the share of the gradient kept at each cut, from 0 (isolated) to 1
        (end to end).
      opening: this share by step, in place of `cut_scale`; None if it stays.
      module_input: "student" or "teacher", whose activation at the joint below each
        module is its input.
      uncut: whether the method also receives joints whose gradients cross the cuts.
      starts: the epoch from which each module's losses count; () starts all at once.
      views: the number of augmented views of each example, cycled through with one
        view per epoch; 0 draws new ones in every epoch.
      preact: whether joints are taken before the last ReLU.
      examples: the size of the training split.
      labels: the index of the module that owns each parameter.
      optimizer_of: makes the optimiser for a part of the parameters, given the labels
        of that part; `optimizer` is the one for all parameters.
      momenta: the groups of loss terms whose gradients the optimiser takes separately,
        see `dot`; () for one gradient of all.
      decay_mask: whether weight decay leaves out some parameters, see `optim.decays`.
      class_weights: of the labels' cross-entropy, per class; () weighs them alike.
      label_smoothing: the share of each label that all classes divide.
      distortion: what else changes training images.
      mixing: how the images of a batch are mixed; None if they are not.
      average: how the moving average of the student is updated; None for no average.
      fills: whether short batches are filled up to `batch_size`, with rows that no
        statistic and no loss depends on, so that all steps share one program.
      accumulate: the number of parts in which a batch is processed, see `accumulate`.
      student_at: returns the student in effect in a step, counted from 0; None if it
        never changes.
      wide_sums: whether gradients of kernels are summed in float32, see `models.wide`.
      log_updates: whether the updates of each stage are measured, see `updates`.
      regularise: adds the losses that the student's units sowed, given their
        "intermediates" and the epoch; None if they sow none.
    """

    student: chain.Chain
    teacher: chain.Chain | None
    method: method_lib.Method
    facts: distill.Facts
    partition: cuts.Partition
    cut_scale: float
    module_input: str
    uncut: bool
    starts: tuple[float, ...]
    preact: bool
    student_pixels: Pixels
    teacher_pixels: Pixels
    pad: int
    flip: bool
    views: int
    steps_per_epoch: int
    examples: int
    optimizer: optax.GradientTransformation
    learning_rate: optax.Schedule
    weight_decay: float
    labels: PyTree
    mesh: Mesh
    optimizer_of: Callable[[PyTree], optax.GradientTransformation]
    momenta: dot.Groups = ()
    opening: Callable[[jax.Array], jax.Array] | None = None
    decay_mask: bool = False
    class_weights: tuple[float, ...] = ()
    label_smoothing: float = 0.0
    distortion: distortion_lib.Distortion = distortion_lib.Distortion()
    mixing: mixing_lib.Mixing | None = None
    average: ema.Average | None = None
    fills: bool = False
    accumulate: int = 1
    wide_sums: bool = False
    log_updates: bool = False
    student_at: Callable[[Any], chain.Chain] | None = None
    regularise: Callable[..., tuple[method_lib.ModuleLoss, ...]] | None = None

    @property
    def isolated(self) -> bool:
        """Returns whether modules can be trained one by one: no gradient crosses a cut.

        A module's loss must not depend on later modules either. It does with sown
        values, which may be averaged over all modules, and with pre-activations of
        networks that compute them in the norm at the entry of the next unit.
        """
        if self.teacher is None or self.regularise or self.student_at or self.opening:
            return False
        if not self.facts.local or self.uncut or self.method.needs_logits:
            return False
        entry = self.student.PREACTIVATION or self.teacher.PREACTIVATION
        return self.cut_scale == 0 and not (self.preact and entry)

    def view(self, step: jax.Array) -> jax.Array:
        """Returns the index of the augmented view used in step number `step`."""
        epoch = step // self.steps_per_epoch
        return epoch % self.views if self.views else epoch


def batch(
    spec: StepSpec, step: jax.Array, data: device.DeviceData, indices: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns augmented images (B,H,W,3) and labels (B,), split over devices.

    An example's augmentation depends only on (seed, view, example id), not on the batch
    that contains it.
    """
    if spec.distortion.active:  # so much work that no device should do that of another
        indices = shared(spec, indices)
    images = augmented(spec, data, indices, spec.view(step))
    return shared(spec, (images, data.at(indices)[1]))


def filled(spec: StepSpec, indices: jax.Array) -> jax.Array:
    """Returns indices of which all can be read: what fills a batch is example 0."""
    return jnp.maximum(indices, 0) if spec.fills else indices


def augmented(
    spec: StepSpec, data: device.DeviceData, indices: jax.Array, view: jax.Array
) -> jax.Array:
    """Returns one view (B,H,W,3) in 0..255 of the examples at `indices` (B,)."""
    images, _, ids = data.at(indices)
    where = (ids, view)
    images = augment.augment(data.key, images, *where, pad=spec.pad, flip=spec.flip)
    return spec.distortion(data.key, images, *where)


def shared(spec: StepSpec, batch: PyTree, *, axis: int = 0) -> PyTree:
    """Splits a batch, arrays (B, ...), over the devices if it divides equally.

    `axis` is that of the examples, if it is not the first.
    """
    if jax.tree.leaves(batch)[0].shape[axis] % spec.mesh.size:
        return batch  # a short last batch stays replicated
    sharding = mesh_lib.over_batch(spec.mesh, axis)
    return jax.lax.with_sharding_constraint(batch, sharding)


def preacts(
    model: chain.Chain, outputs: chain.Outputs, names: tuple[str, ...]
) -> tuple[jax.Array, ...]:
    """Returns the joints `names` (B, H, W, C) of a full pass, before the next ReLU."""
    return tuple(chain.feature_at(outputs, model, n, preact=True) for n in names)


def mismatched_joints(spec: StepSpec, side: int) -> list[str]:
    """Describes each joint whose features differ in shape from the teacher's.

    `side` is the size of the data's images, which a network may receive resized.
    """
    if spec.teacher is None or "joints" not in spec.facts.teacher_reads:
        return []
    partition, lines = spec.partition, []
    student_shapes = chain.joint_shapes(
        spec.student, partition.student_joints, spec.student_pixels.size or side
    )
    teacher_shapes = chain.joint_shapes(
        spec.teacher, partition.teacher_joints, spec.teacher_pixels.size or side
    )
    pairs = zip(partition.student_joints, student_shapes, teacher_shapes, strict=True)
    for name, *pair in pairs:
        if pair[0] != pair[1]:
            shapes = ("x".join(map(str, shape[1:])) for shape in pair)
            lines.append(f"{name} {' from '.join(shapes)}")
    return lines
