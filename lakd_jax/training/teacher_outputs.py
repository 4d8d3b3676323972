"""What a step learns of its teacher: asked at once, or answered and stored before.

A step's source is the variables of a frozen teacher, which is then run on the batch, or
`Answers`, what was stored of its outputs (`lakd_jax.runs.teacher_cache`).
"""

import dataclasses
import functools
from typing import Any, Protocol

import flax
import jax
import jax.numpy as jnp

from lakd_jax.distill.base import method as method_lib
from lakd_jax.models import chain
from lakd_jax.training import spec
from lakd_jax.training import state as state_lib

PyTree = Any
Joints = tuple[jax.Array, ...]


class Teacher(Protocol):
    """What steps ask of a teacher. Nothing that it says has a gradient."""

    def whole(self, images: jax.Array) -> tuple[Any, Joints, Joints]:
        """Of a batch (B,H,W,3) uint8.

        Returns:
          What has `logits`, what is compared at each of the K teacher joints, and the
          activations there.
        """
        ...

    def beside(self, k: int, below: jax.Array) -> tuple[Any, jax.Array, jax.Array]:
        """Beside module `k` (from 0).

        Args:
          k: the module.
          below: the teacher's activation at the end of the module before.

        Returns:
          What has `logits` in the last module, what is compared at the end of the
          module, and the activation there (B, H, W, C each).
        """
        ...

    def suffix(self, k: int, activation: jax.Array) -> jax.Array:
        """Logits (B, classes) of the teacher run on from the end of its module `k`."""
        ...

    def head(self, activation: jax.Array) -> jax.Array:
        """Logits (N, classes) of the teacher run on from the end of its last stage."""
        ...

    def preacts(self, outputs: Any) -> Joints:
        """The joints before the next ReLU, from what `whole` gave first."""
        ...


@dataclasses.dataclass(frozen=True)
class Live:
    """A teacher that is run."""

    learner: spec.Learner
    variables: PyTree

    def whole(self, images: jax.Array) -> tuple[chain.Outputs, Joints, Joints]:
        """See `Teacher`."""
        learner = self.learner
        outputs = self._run(learner.teacher_pixels(images))
        names, model = learner.partition.teacher_joints, learner.teacher
        assert model is not None
        compared = spec.joints(learner, model, outputs, names)
        passed = tuple(chain.feature_at(outputs, model, name) for name in names)
        return outputs, compared, passed

    def beside(
        self, k: int, below: jax.Array
    ) -> tuple[chain.Outputs, jax.Array, jax.Array]:
        """See `Teacher`."""
        names = self.learner.partition.teacher_joints
        after, until = spec.span(names, k)
        outputs = self._run(below, after=after, until=until)
        compared = spec.end(self.learner, outputs, names[k])
        return outputs, compared, spec.passed(outputs, names[k])

    def suffix(self, k: int, activation: jax.Array) -> jax.Array:
        """See `Teacher`; the activation's gradient goes through."""
        model: Any = self.learner.teacher
        outputs = model.apply(
            self.variables,
            activation.astype(self.learner.teacher_pixels.dtype),
            train=False,
            after=self.learner.partition.teacher_joints[k],
        )
        return outputs.logits

    def head(self, activation: jax.Array) -> jax.Array:
        """See `Teacher`."""
        return self.suffix(-1, activation)

    def preacts(self, outputs: chain.Outputs) -> Joints:
        """See `Teacher`."""
        model: Any = self.learner.teacher
        names = self.learner.partition.teacher_joints
        return spec.preacts(model, outputs, names)

    def _run(self, inputs: jax.Array, **part: str) -> chain.Outputs:
        model: Any = self.learner.teacher
        outputs = model.apply(self.variables, inputs, train=False, **part)
        return jax.lax.stop_gradient(outputs)


@flax.struct.dataclass
class Answers:
    """What a method reads of a teacher's outputs; of a batch it is a `Teacher`.

    Attributes:
      logits: (V, N, classes) float32 of V views of N examples; (B, classes) of a batch.
      joints: (V, N, H, W, C) or (B, H, W, C) at each of the teacher's joints, in the
        type the teacher gives; () for methods that do not read them.
    """

    logits: jax.Array
    joints: Joints

    def whole(self, images: jax.Array) -> tuple["Answers", Joints, Joints]:
        """See `Teacher`; with `lakd.preact` the activations are what is compared."""
        return self, self.joints, self.joints

    def beside(
        self, k: int, below: jax.Array
    ) -> tuple["Answers", jax.Array, jax.Array]:
        """See `Teacher`; with `lakd.preact` the activation is the compared value."""
        return self, self.joints[k], self.joints[k]

    def suffix(self, k: int, activation: jax.Array) -> jax.Array:
        """Raises ValueError: outputs cannot be run on."""
        raise ValueError("a method that runs the teacher on needs teacher.views=0")

    def head(self, activation: jax.Array) -> jax.Array:
        """Raises ValueError: outputs cannot be run on."""
        return self.suffix(-1, activation)

    def preacts(self, outputs: Any) -> Joints:
        """Raises ValueError: pre-activations are not stored."""
        raise ValueError("a method on pre-activations needs teacher.views=0")


Source = PyTree | Answers | None


def teacher(learner: spec.Learner, source: Source) -> Teacher:
    """What answers for a batch; `source` is variables or the answers on that batch."""
    return source if isinstance(source, Answers) else Live(learner, source)


def of_batch(
    learner: spec.Learner, source: Source, step: jax.Array, indices: jax.Array
) -> Source:
    """The source for the batch at `indices` (B,) in the step with this number."""
    if not isinstance(source, Answers):
        return source
    view = learner.view(step)
    rows = jax.tree.map(lambda x: x[view, indices], source)
    return spec.shared(learner, rows)


def ask(
    learner: spec.Learner,
    variables: PyTree,
    data: state_lib.Resident,
    views: jax.Array,
    rows: jax.Array,
) -> Answers:
    """The answers (B, ...) on views (B,) of the examples at `rows` (B,).

    Raises:
      ValueError: the method reads more of the teacher than is stored.
    """
    reads = learner.facts.teacher_reads
    stored = method_lib.STORABLE
    if learner.method.needs_suffix or not set(reads) <= set(stored):
        raise ValueError(f"of {', '.join(reads)} only {', '.join(stored)} are stored")
    # One by one, as each may be of another view; the values are those of a batch.
    one = functools.partial(spec.augmented, learner, data)
    images = jax.vmap(lambda view, row: one(row[None], view)[0])(views, rows)
    images = spec.shared(learner, images)
    outputs, joints, _ = Live(learner, variables).whole(images)
    logits = outputs.logits.astype(jnp.float32)
    return Answers(logits, joints if "joints" in reads else ())
