"""What does not change while a student is trained, and what every step does alike."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from lakd_jax import distill
from lakd_jax.data import augment, device
from lakd_jax.distill.base import method as method_lib
from lakd_jax.local import cuts
from lakd_jax.models import chain
from lakd_jax.runtime import mesh as mesh_lib

PyTree = Any
Metrics = dict[str, jax.Array]


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
class StepSpec:
    """Everything about a step that does not change while training.

    Attributes:
      student, teacher: the networks; the teacher may be None.
      method: Linen module that turns `Signals` into one loss a module.
      facts: of the method.
      partition: the student's modules and the teacher's matching joints.
      cut_scale: gradient kept at each cut, 0 (isolated) to 1 (end to end).
      module_input: "student", or "teacher": each module is fed the teacher's
        activation at the joint below it.
      uncut: also hand the method joints whose gradients cross the cuts.
      starts: the epoch from which each module's losses count; () for all at once.
      views: augmented views of an example that come again and again, one an epoch; 0:
        every epoch has new ones.
      preact: joints before the last ReLU.
      examples: of the training split.
      optimizer_of: makes the optimiser of any part of the parameters from the labels
        of that part; `optimizer` is that of all of them.
      apart: the optimiser takes the gradient of the labels' losses apart from that of
        all others, see `dot`.
      student_at: the student as it is in the step with a number, from 0; None where
        it is always the same.
      regularise: adds to the losses what the student's units sowed, given those
        "intermediates" and the epoch; None where they sow nothing.
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
    labels: PyTree  # module index of every parameter
    mesh: Mesh
    optimizer_of: Callable[[PyTree], optax.GradientTransformation]
    apart: bool = False
    student_at: Callable[[Any], chain.Chain] | None = None
    regularise: Callable[..., tuple[method_lib.ModuleLoss, ...]] | None = None

    @property
    def isolated(self) -> bool:
        """Whether modules can be run one by one, as no gradient crosses a cut.

        Neither may a module's loss need anything of a later one: what is sown may be
        one mean over all modules, and norms at the entry of a unit make the
        pre-activation below it.
        """
        if self.teacher is None or self.regularise or self.student_at:
            return False
        if not self.facts.local or self.uncut or self.method.needs_logits:
            return False
        entry = self.student.PREACTIVATION or self.teacher.PREACTIVATION
        return self.cut_scale == 0 and not (self.preact and entry)

    def view(self, step: jax.Array) -> jax.Array:
        """Which augmented view of the examples the step with this number sees."""
        epoch = step // self.steps_per_epoch
        return epoch % self.views if self.views else epoch


def batch(
    spec: StepSpec, step: jax.Array, data: device.DeviceData, indices: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Augmented images (B,H,W,3) uint8 and labels (B,), split over devices.

    An example's augmentation depends on (seed, view, example id) alone, not on
    the batch it comes in.
    """
    images = augmented(spec, data, indices, spec.view(step))
    return shared(spec, (images, data.at(indices)[1]))


def augmented(
    spec: StepSpec, data: device.DeviceData, indices: jax.Array, view: jax.Array
) -> jax.Array:
    """One augmented view of the examples at `indices` (B,), (B,H,W,3) uint8."""
    images, _, ids = data.at(indices)
    return augment.augment(
        data.key,
        images,
        ids,
        view,
        pad=spec.pad,
        flip=spec.flip,
    )


def shared(spec: StepSpec, batch: PyTree) -> PyTree:
    """A batch (arrays of (B, ...)) split over the devices, if they can share it."""
    if jax.tree.leaves(batch)[0].shape[0] % spec.mesh.size:
        return batch  # a short one, whole everywhere
    return jax.lax.with_sharding_constraint(batch, mesh_lib.over_batch(spec.mesh))


def preacts(
    model: chain.Chain, outputs: chain.Outputs, names: tuple[str, ...]
) -> tuple[jax.Array, ...]:
    """The joints `names` of a whole pass before the next ReLU, (B, H, W, C) each."""
    return tuple(chain.feature_at(outputs, model, n, preact=True) for n in names)


def unlike(spec: StepSpec, side: int) -> list[str]:
    """The joints whose features differ in shape from the teacher's, one a line.

    `side` is that of the data's images, which a network may be fed at another size.
    """
    if spec.teacher is None or "joints" not in spec.facts.teacher_reads:
        return []
    partition, lines = spec.partition, []
    ours = chain.joint_shapes(
        spec.student, partition.student_joints, spec.student_pixels.size or side
    )
    theirs = chain.joint_shapes(
        spec.teacher, partition.teacher_joints, spec.teacher_pixels.size or side
    )
    for name, own, other in zip(partition.student_joints, ours, theirs, strict=True):
        if own != other:
            shapes = ("x".join(map(str, shape[1:])) for shape in (own, other))
            lines.append(f"{name} {' from '.join(shapes)}")
    return lines
