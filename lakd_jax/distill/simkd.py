"""SimKD: the student learns the teacher's last map, and keeps the teacher's classifier.

Source: Chen et al., "Knowledge Distillation with the Reused Teacher Classifier" (CVPR
2022, arXiv 2203.14001) and the authors' public code. The student's head is a projector
to the teacher's channels (`models.projector`) and the teacher's classifier, which is
not trained. This is the network that is tested, saved and exported; its parameters are
counted with those of both. Deviations from the public code:

* The maps are what the classifiers read the mean of: the teacher's behind everything
  that is before its pool, as a wide ResNet's norm and ReLU or a MobileNet's 1x1
  convolution, where the public code takes the map of the last stage. The student's
  projector gets the map of its last stage, of a wide ResNet behind its norm and ReLU.
* The student has no classifier of its own, which the public code keeps and only decays.
* The student knows to which size it pools its map; the public code runs the teacher for
  that in tests, too.
* The cross-entropy with the labels is reported, but is no part of the loss; the public
  code has it with a weight of 0.
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from lakd_jax import fields, models
from lakd_jax.distill.base import adapter, method, numerics
from lakd_jax.distill.base import rules as rules_lib
from lakd_jax.models import heads


def simkd_loss(projected: jax.Array, teacher: jax.Array) -> jax.Array:
    """Mean squared difference of maps, the teacher's pooled to the student's size.

    Args:
      projected: (B, H, W, D), at most as large as the teacher's.
      teacher: (B, H', W', D); it gets no gradient.

    Returns:
      Scalar float32, never negative.

    Raises:
      ValueError: the maps differ in channels, or the student's is larger.
    """
    ours, theirs = adapter.match_size(*numerics.frozen(projected, teacher))
    if ours.shape != projected.shape or ours.shape != theirs.shape:
        raise ValueError(
            f"method simkd compares maps of the same channels, the student's not the "
            f"larger one, but has {projected.shape} and {teacher.shape}: the student "
            "needs a `projector`"
        )
    return jnp.mean((ours - theirs) ** 2)


def _student_with_map(options: Any, run: rules_lib.Run) -> str:
    name = run["student.name"]
    if models.create(name, num_classes=2).takes_projector:
        return ""
    return (
        f"student.name is {name}, but method simkd puts a projector and the teacher's "
        "classifier behind the last map, which this network's head does not allow: "
        "choose another student, or another method"
    )


def _teacher_with_map(options: Any, run: rules_lib.Run) -> str:
    name = run["teacher.name"]
    if heads.map_shape(models.create(name, num_classes=2)):
        return ""
    return (
        f"teacher.name is {name}, but method simkd compares the map that the teacher's "
        "classifier reads the mean of, and this one reads no such mean: choose another "
        "teacher, or another method"
    )


def _divisible(options: Any, run: rules_lib.Run) -> str:
    shape = heads.map_shape(models.create(run["teacher.name"], num_classes=2))
    if not shape or shape[-1] >= options.factor:
        return ""
    return (
        f"simkd.factor is {options.factor}, more than the {shape[-1]} channels of the "
        "teacher, which it divides"
    )


class SimKD(method.Method):
    """weight * `simkd_loss`, and nothing else; in sums, beside what the others have.

    Attributes:
      weight: of the loss.
      factor: the projector's inner channels are the teacher's divided by it.
    """

    weight: float = fields.field(1.0, check=fields.above(0))
    factor: int = fields.field(
        2,
        "the projector's inner channels are the teacher's divided by it; 2, 4 or 8 in "
        "the paper",
        fields.at_least(1),
    )

    title: ClassVar[str] = "SimKD"
    about: ClassVar[str] = (
        "The student keeps the teacher's classifier, behind a projector; both are part "
        "of it in tests, files and parameter counts"
    )
    borrows_head: ClassVar[bool] = True
    reads_labels: ClassVar[bool] = False
    least_batch: ClassVar[int] = 2
    teacher_reads: ClassVar[tuple[str, ...]] = ("map", "head")
    rules: ClassVar[tuple[rules_lib.Rule, ...]] = (
        rules_lib.linear_teacher,
        _teacher_with_map,
        _student_with_map,
        _divisible,
    )

    @nn.compact
    def __call__(
        self, signals: method.Signals, *, train: bool
    ) -> tuple[method.ModuleLoss, ...]:
        """Returns the loss of the last module, with the term `simkd`."""
        ours, theirs = signals.student.last_map, signals.teacher.last_map
        if ours is None or theirs is None:
            raise ValueError("method simkd needs networks with `Outputs.last_map`")
        hard = jax.lax.stop_gradient(signals.cross_entropy(signals.student.logits))
        return (
            method.ModuleLoss(
                terms={"simkd": simkd_loss(ours, theirs)},
                weights={"simkd": self.weight},
                diagnostics={"head_ce": hard},
            ),
        )


METHODS = {"simkd": SimKD}
ORDER = 350  # in lists of methods
