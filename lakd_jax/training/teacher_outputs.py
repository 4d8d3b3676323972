"""What a step learns of its teacher: asked at once, or answered and stored before.

A step's source is the variables of a frozen teacher, which is then run on the batch, or
`TeacherOutputs`, what was stored of its outputs (`lakd_jax.runs.teacher_cache`).
"""

import dataclasses
import functools
from typing import Any, Protocol

import flax
import jax
import jax.numpy as jnp

from lakd_jax.data import device
from lakd_jax.distill.base import method as method_lib
from lakd_jax.models import chain
from lakd_jax.training import segments
from lakd_jax.training import spec as spec_lib

PyTree = Any
Joints = tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True)
class Seen:
    """What a teacher gives beside a segment. Nothing of it has a gradient.

    Attributes:
      outputs: what has `logits`, those of the last segment only.
      compared: what is compared at the end of each module, (B, H, W, C).
      passed: the activations there.
    """

    outputs: Any
    compared: Joints
    passed: Joints


class Teacher(Protocol):
    """What steps ask of a teacher. Nothing that it says has a gradient."""

    def segment(self, segment: segments.Segment, below: jax.Array) -> "Seen":
        """Returns what its part beside a segment of the student gives.

        `below` is its activation (B, H, W, C) at the end of the segment before, or
        images as it takes them.
        """
        ...

    def suffix(self, k: int, activation: jax.Array) -> jax.Array:
        """Logits (B, classes) of the teacher run on from the end of its module `k`."""
        ...

    def head(self, activation: jax.Array) -> jax.Array:
        """Logits (N, classes) of the teacher run on from the end of its last stage."""
        ...

    def preacts(self, outputs: Any) -> Joints:
        """The joints before the next ReLU, from the outputs of a whole pass."""
        ...


@dataclasses.dataclass(frozen=True)
class Live:
    """A teacher that is run."""

    spec: spec_lib.StepSpec
    variables: PyTree

    def segment(self, segment: segments.Segment, below: jax.Array) -> "Seen":
        """See `Teacher`."""
        spec, model = self.spec, self.spec.teacher
        assert model is not None
        names = spec.partition.teacher_joints
        after, until = segment.span(names)
        outputs = self._run(below, after=after, until=until)
        compared = segments.compared(spec, model, outputs, names, segment)
        if len(segment.modules) == len(names):
            passed = tuple(chain.feature_at(outputs, model, name) for name in names)
        else:
            passed = (segments.passed(outputs, names[segment.last]),)
        return Seen(outputs, compared, passed)

    def suffix(self, k: int, activation: jax.Array) -> jax.Array:
        """See `Teacher`; the activation's gradient goes through."""
        model: Any = self.spec.teacher
        outputs = model.apply(
            self.variables,
            activation.astype(self.spec.teacher_pixels.dtype),
            train=False,
            after=self.spec.partition.teacher_joints[k],
        )
        return outputs.logits

    def head(self, activation: jax.Array) -> jax.Array:
        """See `Teacher`."""
        return self.suffix(-1, activation)

    def preacts(self, outputs: chain.Outputs) -> Joints:
        """See `Teacher`."""
        model: Any = self.spec.teacher
        names = self.spec.partition.teacher_joints
        return spec_lib.preacts(model, outputs, names)

    def _run(self, inputs: jax.Array, **part: str) -> chain.Outputs:
        model: Any = self.spec.teacher
        outputs = model.apply(self.variables, inputs, train=False, **part)
        return jax.lax.stop_gradient(outputs)


@flax.struct.dataclass
class TeacherOutputs:
    """What a method reads of a teacher's outputs; of a batch it is a `Teacher`.

    Attributes:
      logits: (V, N, classes) float32 of V views of N examples; (B, classes) of a batch.
      joints: (V, N, H, W, C) or (B, H, W, C) at each of the teacher's joints, in the
        type the teacher gives; () for methods that do not read them.
    """

    logits: jax.Array
    joints: Joints

    def segment(self, segment: segments.Segment, below: jax.Array) -> "Seen":
        """See `Teacher`; with `lakd.preact` the activations are what is compared."""
        joints = self.joints[segment.first : segment.last + 1]
        return Seen(self, joints, joints)

    def suffix(self, k: int, activation: jax.Array) -> jax.Array:
        """Raises ValueError: outputs cannot be run on."""
        raise ValueError("a method that runs the teacher on needs teacher.views=0")

    def head(self, activation: jax.Array) -> jax.Array:
        """Raises ValueError: outputs cannot be run on."""
        return self.suffix(-1, activation)

    def preacts(self, outputs: Any) -> Joints:
        """Raises ValueError: pre-activations are not stored."""
        raise ValueError("a method on pre-activations needs teacher.views=0")


Source = PyTree | TeacherOutputs | None


def teacher(spec: spec_lib.StepSpec, source: Source) -> Teacher:
    """What answers for a batch; `source` is variables or the answers on that batch."""
    return source if isinstance(source, TeacherOutputs) else Live(spec, source)


def of_batch(
    spec: spec_lib.StepSpec, source: Source, step: jax.Array, indices: jax.Array
) -> Source:
    """The source for the batch at `indices` (B,) in the step with this number."""
    if not isinstance(source, TeacherOutputs):
        return source
    view = spec.view(step)
    rows = jax.tree.map(lambda x: x[view, indices], source)
    return spec_lib.shared(spec, rows)


def compute_outputs(
    spec: spec_lib.StepSpec,
    variables: PyTree,
    data: device.DeviceData,
    views: jax.Array,
    rows: jax.Array,
) -> TeacherOutputs:
    """The answers (B, ...) on views (B,) of the examples at `rows` (B,).

    Raises:
      ValueError: the method reads more of the teacher than is stored.
    """
    reads = spec.facts.teacher_reads
    stored = method_lib.STORABLE
    if spec.method.needs_suffix or not set(reads) <= set(stored):
        raise ValueError(f"of {', '.join(reads)} only {', '.join(stored)} are stored")
    # One by one, as each may be of another view; the values are those of a batch.
    one = functools.partial(spec_lib.augmented, spec, data)
    images = jax.vmap(lambda view, row: one(row[None], view)[0])(views, rows)
    images = spec_lib.shared(spec, images)
    below = spec.teacher_pixels(images)
    seen = Live(spec, variables).segment(segments.whole(spec), below)
    logits = seen.outputs.logits.astype(jnp.float32)
    return TeacherOutputs(logits, seen.compared if "joints" in reads else ())
