"""Provides the teacher's outputs to a step: computed on the batch, or cached earlier.

A step's source is either the variables of a frozen teacher, which then runs on the
batch, or `TeacherOutputs` computed in advance (`lakd_jax.runs.teacher_cache`).
"""

import dataclasses
import functools
from typing import Any

import flax
import jax
import jax.numpy as jnp

from lakd_jax.data import device
from lakd_jax.distill.base import method as method_lib
from lakd_jax.models import chain, ensemble, heads
from lakd_jax.training import segments
from lakd_jax.training import spec as spec_lib

PyTree = Any
Joints = tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True)
class TeacherPass:
    """The teacher's results for one segment of the student, without gradients.

    Attributes:
      teacher: what the results come from: a network, or a batch of stored outputs.
      outputs: an object with `logits`, which are valid for the last segment only.
      features: the features (B, H, W, C) that the method compares at each module's end.
      activations: what the teacher's units there pass on.
    """

    teacher: "Live | TeacherOutputs"
    outputs: Any
    features: Joints
    activations: Joints


@dataclasses.dataclass(frozen=True)
class Live:
    """Runs the teacher network on each batch."""

    spec: spec_lib.StepSpec
    variables: PyTree

    def segment(self, segment: segments.Segment, below: jax.Array) -> TeacherPass:
        """Returns the results of the part that corresponds to a segment of the student.

        `below` is the teacher's activation (B, H, W, C) at the end of the previous
        segment, or, for the first one, its input images.
        """
        spec, model = self.spec, self.spec.teacher
        assert model is not None
        names = spec.partition.teacher_joints
        after, until = segment.span(names)
        outputs: Any = model.apply(
            self.variables, below, train=False, after=after, until=until
        )
        outputs = jax.lax.stop_gradient(outputs)
        features = segments.features(model, outputs, names, segment, preact=spec.preact)
        passed_on = segments.activations(outputs, names, segment)
        return TeacherPass(self, outputs, features, passed_on)

    def suffix(self, k: int, activation: jax.Array) -> jax.Array:
        """Returns logits (B, classes), resuming from an activation after module `k`.

        Gradients flow through to the activation.
        """
        model: Any = self.spec.teacher
        outputs = model.apply(
            self.variables,
            activation.astype(self.spec.teacher_pixels.dtype),
            train=False,
            after=self.spec.partition.teacher_joints[k],
        )
        return outputs.logits

    def head(self, activation: jax.Array) -> jax.Array:
        """Returns logits (N, classes), resuming from a last-stage activation."""
        return self.suffix(-1, activation)

    def classifier(self) -> tuple[jax.Array, jax.Array]:
        """Returns the matrix (D, classes) and the bias (classes,) of the last layer.

        Of several teachers they are the first one's, like the features.
        """
        model: Any = self.spec.teacher
        return heads.classifier(*ensemble.first(model, self.variables))

    def preacts(self, outputs: chain.Outputs) -> Joints:
        """Returns the joints before the next ReLU, from the outputs of a full pass."""
        model: Any = self.spec.teacher
        names = self.spec.partition.teacher_joints
        return spec_lib.preacts(model, outputs, names)


@flax.struct.dataclass
class TeacherOutputs:
    """Stored teacher outputs; those of a single batch take the place of `Live`.

    Attributes:
      logits: (V, N, classes) float32 for V views of N examples, or (B, classes) for a
        batch.
      joints: (V, N, H, W, C) or (B, H, W, C) at each of the teacher's joints, in the
        teacher's output dtype; () for methods that do not read them.
    """

    logits: jax.Array
    joints: Joints

    def segment(self, segment: segments.Segment, below: jax.Array) -> TeacherPass:
        """Returns the stored joints, as features and as activations."""
        joints = self.joints[segment.first : segment.last + 1]
        return TeacherPass(self, self, joints, joints)

    def suffix(self, k: int, activation: jax.Array) -> jax.Array:
        """Raises ValueError: there is no network to resume."""
        raise ValueError("resuming the teacher from a joint needs teacher.views=0")

    def head(self, activation: jax.Array) -> jax.Array:
        """Raises ValueError: there is no network to resume."""
        return self.suffix(-1, activation)

    def classifier(self) -> tuple[jax.Array, jax.Array]:
        """Raises ValueError: there is no network to read."""
        raise ValueError("reading the teacher's classifier needs teacher.views=0")

    def preacts(self, outputs: Any) -> Joints:
        """Raises ValueError: pre-activations are not stored."""
        raise ValueError("a method on pre-activations needs teacher.views=0")


Source = PyTree | TeacherOutputs | None


def run(
    spec: spec_lib.StepSpec,
    segment: segments.Segment,
    source: Source,
    below: segments.Boundary,
) -> TeacherPass | None:
    """Returns the teacher's results for a segment; None without a teacher."""
    if spec.teacher is None:
        return None
    stored = isinstance(source, TeacherOutputs)
    teacher = source if stored else Live(spec, source)
    return teacher.segment(segment, below.teacher)


def of_batch(
    spec: spec_lib.StepSpec, source: Source, step: jax.Array, indices: jax.Array
) -> Source:
    """Returns the source for the batch at `indices` (B,) in step number `step`."""
    if not isinstance(source, TeacherOutputs):
        return source
    view, indices = spec.view(step), spec_lib.filled(spec, indices)
    rows = jax.tree.map(lambda x: x[view, indices], source)
    return spec_lib.shared(spec, rows)


def for_segments(
    spec: spec_lib.StepSpec, source: Source, below: segments.Boundary
) -> Source:
    """Returns the source for several segments: a teacher that runs as a whole runs now.

    `below` has the input images of the batch.
    """
    network = spec.teacher
    if network is None or not network.WHOLE or isinstance(source, TeacherOutputs):
        return source
    everything = segments.whole_student(spec)
    result = Live(spec, source).segment(everything, below.teacher)
    return TeacherOutputs(result.outputs.logits, result.features)


def compute_outputs(
    spec: spec_lib.StepSpec,
    variables: PyTree,
    data: device.DeviceData,
    views: jax.Array,
    rows: jax.Array,
) -> TeacherOutputs:
    """Computes the outputs (B, ...) on `views` (B,) of the examples at `rows` (B,).

    Raises:
      ValueError: the method reads teacher outputs that cannot be stored.
    """
    reads = spec.facts.teacher_reads
    stored = method_lib.STORABLE
    if spec.method.needs_suffix or not set(reads) <= set(stored):
        raise ValueError(f"of {', '.join(reads)}, only {', '.join(stored)} are stored")
    # Augments one example at a time because each may have a different view; the values
    # equal those of a batch.
    augment_one = functools.partial(spec_lib.augmented, spec, data)
    images = jax.vmap(lambda view, row: augment_one(row[None], view)[0])(views, rows)
    images = spec_lib.shared(spec, images)
    below = spec.teacher_pixels(images)
    teacher_pass = Live(spec, variables).segment(segments.whole_student(spec), below)
    logits = teacher_pass.outputs.logits.astype(jnp.float32)
    return TeacherOutputs(logits, teacher_pass.features if "joints" in reads else ())
