"""The interface of distillation methods: `Signals` in, one `ModuleLoss` per module.

A method is a Linen module called once per step with `Signals`; it returns one
`ModuleLoss` for each local module of the student, in order from the image to
the head. The last module owns the head. Which parameters a loss may reach is
decided by where the forward pass is cut (`lakd_jax.local.cuts`), never here.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import flax
import jax
import jax.numpy as jnp
from flax import linen as nn

from lakd_jax.distill.base import labels as labels_lib
from lakd_jax.distill.base import rules as rules_lib

STORABLE = ("logits", "joints")  # of what methods read of a teacher, see `Method`
TASK = ("head_ce", "task_ce")  # loss terms computed from the labels


# {(pattern of the teacher's name, of the student's): {option: value}}. Patterns are
# those of `fnmatch`; of several that match, later ones win.
Pairs = Mapping[tuple[str, str], Mapping[str, float]]


class Momentum(NamedTuple):
    """A momentum that some of the loss terms have for themselves.

    Attributes:
      name: of the group of terms.
      shift: the option of the method that is added to `optim.momentum` for them.
      terms: their names; () for all terms that no other group has.
      decays: whether weight decay is part of this group's gradient.
    """

    name: str
    shift: str
    terms: tuple[str, ...] = ()
    decays: bool = False


def _no_suffix(k: int, activation: jax.Array) -> jax.Array:
    raise ValueError(
        "task='teacher_suffix' and attention='logits' need Signals.teacher_suffix"
    )


def _no_head(activation: jax.Array) -> jax.Array:
    raise ValueError("the method needs Signals.student_head and teacher_head")


def _no_classifier() -> tuple[jax.Array, jax.Array]:
    raise ValueError("the method needs Signals.teacher_classifier")


@flax.struct.dataclass
class Signals:
    """One step as a method sees it; K is the number of local modules.

    Attributes:
      student: the student's `Outputs`, in training mode.
      teacher: the teacher's `Outputs` in evaluation mode, or what has the parts of
        them that `Method.teacher_reads` names; None without a teacher.
      labels: (B,) int32; of mixed images, those of the first of the two. Their
        cross-entropy is `cross_entropy`, which knows how they are smoothed and mixed.
      epoch: scalar float32, epochs begun since the start, with fractions.
      student_joints: K activations (B, H, W, C), at the end of each module and
        before the cut there, so that a loss on them trains the module below. None
        for modules that are run elsewhere: they get no loss here.
      teacher_joints: the K activations they are compared with; () without teacher.
      student_uncut: K activations of a forward pass without cuts, for methods
        with `needs_uncut`; else ().
      teacher_suffix: `(k, activation) -> logits (B, classes)`, the teacher from
        the end of its module k (counted from 0) to the logits, for methods with
        `needs_suffix`; else it raises ValueError.
      student_head, teacher_head: `activation -> logits (N, classes)`, each network
        from the end of its last stage on, for activations (N, H, W, C) of any size:
        cells of 1x1 give logits position by position. The student's has a gradient
        and moves no statistics. For methods with `needs_heads`; else ValueError.
      teacher_classifier: `() -> (matrix (D, classes), bias (classes,))`, the linear
        layer from the teacher's `Outputs.pooled` to its logits; TeacherError if it has
        none, ValueError if there is no network but stored outputs.
      student_preacts, teacher_preacts: the K joints before the next ReLU, for methods
        with `needs_preacts`; else ().
      label_weights: (B,) float32, of the labels' cross-entropy; None weighs them alike.
      label_smoothing: the share of each label that all classes divide.
      soft_labels: (B, classes) float32 of mixed images, smoothed; None if images are
        not mixed.
      examples: (B,) int32, the rows of the training split that the batch is made of.
      count: how many rows that has.
      key: of what the method draws in this step.
      valid: (B,) bool, the rows that are examples; the others fill up the short last
        batch of an epoch, and no loss may depend on them. None if all are examples, as
        they always are for methods without `per_example`.
    """

    student: Any
    teacher: Any
    labels: jax.Array
    epoch: jax.Array
    student_joints: tuple[Any, ...]  # of jax.Array | None
    teacher_joints: tuple[Any, ...]
    student_uncut: tuple[jax.Array, ...] = ()
    teacher_suffix: Callable[[int, jax.Array], jax.Array] = flax.struct.field(
        pytree_node=False, default=_no_suffix
    )
    student_head: Callable[[jax.Array], jax.Array] = flax.struct.field(
        pytree_node=False, default=_no_head
    )
    teacher_head: Callable[[jax.Array], jax.Array] = flax.struct.field(
        pytree_node=False, default=_no_head
    )
    teacher_classifier: Callable[[], tuple[jax.Array, jax.Array]] = flax.struct.field(
        pytree_node=False, default=_no_classifier
    )
    student_preacts: tuple[jax.Array, ...] = ()
    teacher_preacts: tuple[jax.Array, ...] = ()
    label_weights: jax.Array | None = None
    label_smoothing: float = flax.struct.field(pytree_node=False, default=0.0)
    soft_labels: jax.Array | None = None
    examples: jax.Array | None = None
    count: int = flax.struct.field(pytree_node=False, default=0)
    key: jax.Array | None = None
    valid: jax.Array | None = None

    def cross_entropy(self, logits: jax.Array) -> jax.Array:
        """Returns the cross-entropy of logits (B, classes) with the labels.

        Labels are smoothed, mixed and weighted as the run demands. Scalar float32.
        """
        if self.soft_labels is not None:
            return labels_lib.soft_cross_entropy(logits, self.soft_labels, self.valid)
        how = (self.label_smoothing, self.label_weights, self.valid)
        return labels_lib.smoothed_cross_entropy(logits, self.labels, *how)


class Method(nn.Module):
    """The base of all methods; a subclass turns `Signals` into losses.

    Class facts (instance properties where they depend on options): `local`, whether
    its modules can be run one by one; `staged`, whether it has a loss in each module
    of the student, so that this may be cut; `cut_scale`, how it is cut where the
    config leaves it open; `needs_teacher`; `needs_heads` and `needs_preacts`, whether
    it reads those of `Signals`; `reads_labels`, whether it uses `Signals.labels` other
    than by `Signals.cross_entropy`, so that images cannot be mixed; `least_batch`,
    examples a batch must have (2 where the method normalises vectors by the batch);
    `needs_uncut` and `needs_suffix`, whether it reads `Signals.student_uncut` and
    `Signals.teacher_suffix`; `teacher_reads`, what it reads of the teacher's outputs
    (`joints` stands for `Signals.teacher_joints`); `needs_logits`, whether modules
    before the last read the teacher's logits, and so cannot be run before its last
    stage; `borrows_head`, whether the student is given the teacher's classifier behind
    a projector, whose inner channels are the teacher's divided by its option `factor`.

    What the class declares for itself and not for its subclasses: `title`, its name in
    tables (by default the method's in capital letters); `per_example`, whether all its
    losses are means over the examples `Signals.valid`, so that short batches may be
    filled up; `about`, a note on its options for docs/configuration.md; `pairs`, the
    options that the published recipes change by the pair of networks. `options_class`
    is the dataclass of the field `options`, where the options are one object. `rules`
    are checked before a run. `momenta` groups the terms of the whole loss where SGD is
    to have a momentum for each group; one group has all other terms, and one the weight
    decay.
    """

    # The option that weighs the only part of the losses that can teach with two
    # classes, "" if nothing weighs it; None if all parts can.
    two_classes: ClassVar[str | None] = None

    title: ClassVar[str] = ""
    per_example: ClassVar[bool] = False
    about: ClassVar[str] = ""
    pairs: ClassVar[Pairs] = {}
    options_class: ClassVar[Any] = None
    rules: ClassVar[tuple[rules_lib.Rule, ...]] = ()
    momenta: ClassVar[tuple[Momentum, ...]] = ()

    local: ClassVar[bool] = False
    staged: ClassVar[bool] = False
    cut_scale: ClassVar[float] = 1.0
    needs_teacher: ClassVar[bool] = True
    reads_labels: ClassVar[bool] = True
    least_batch: ClassVar[int] = 1
    needs_heads: ClassVar[bool] = False
    needs_preacts: ClassVar[bool] = False
    borrows_head: ClassVar[bool] = False
    teacher_reads: ClassVar[tuple[str, ...]] = ("logits",)

    @property
    def needs_uncut(self) -> bool:
        """Whether `Signals.student_uncut` is read."""
        return False

    @property
    def needs_suffix(self) -> bool:
        """Whether `Signals.teacher_suffix` is called."""
        return False

    @property
    def needs_logits(self) -> bool:
        """Whether the teacher's logits are read in modules before the last."""
        return False


@flax.struct.dataclass
class ModuleLoss:
    """The loss of one local module, J_k = sum_i weights[i] * terms[i].

    Attributes:
      terms: name -> raw loss, scalar float32.
      weights: the same names -> factor.
      diagnostics: name -> scalar float32 that is reported and never minimised.
    """

    terms: dict[str, jax.Array]
    weights: Mapping[str, jax.Array | float]
    diagnostics: dict[str, jax.Array]

    def total(self) -> jax.Array:
        """J_k, scalar float32."""
        zero = jnp.zeros((), jnp.float32)
        return sum((self.weights[n] * t for n, t in self.terms.items()), zero)

    def plus(
        self, name: str, term: jax.Array, weight: jax.Array | float
    ) -> "ModuleLoss":
        """Returns a copy with one more term."""
        return ModuleLoss(
            terms=self.terms | {name: term},
            weights={**self.weights, name: weight},
            diagnostics=self.diagnostics,
        )


def total(losses: Sequence[ModuleLoss]) -> jax.Array:
    """L_t = sum_k J_k, scalar float32: what a step differentiates and reports."""
    return sum((loss.total() for loss in losses), jnp.zeros((), jnp.float32))


def flatten_metrics(
    losses: Sequence[ModuleLoss], first: int = 1
) -> dict[str, jax.Array]:
    """`{"module1/feature": ..., "module3/head_ce": ...}`, unweighted terms.

    Diagnostics are included, under the same `moduleN/` prefix. `first` is the number
    of the first module.
    """
    return {
        f"module{k}/{name}": value
        for k, loss in enumerate(losses, first)
        for name, value in (loss.terms | loss.diagnostics).items()
    }
