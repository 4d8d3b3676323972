"""Methods that add one loss to cross-entropy, and sums of methods."""

from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from lakd_jax import fields
from lakd_jax.distill import kd
from lakd_jax.distill.base import method
from lakd_jax.distill.base import rules as rules_lib


def ramp(epoch: jax.Array, epochs: float) -> jax.Array | float:
    """The share of a weight that has warmed up: min(e / epochs, 1), e from 1.

    It is constant within an epoch, as in the reference recipes.

    Args:
      epoch: epochs begun since the start, with fractions, from 0.
      epochs: of the warm-up; 0 for none.
    """
    return jnp.minimum((jnp.floor(epoch) + 1) / epochs, 1.0) if epochs else 1.0


class Term(method.Method, kw_only=True):
    """ce_weight CE + weight * (the losses that `losses` gives).

    A subclass gives `losses`, a default of `weight`, and its own options as fields. One
    whose losses read `Signals.labels` declares `reads_labels = True`.

    Attributes:
      ce_weight: of the cross-entropy with the labels.
      weight: of the method's losses.
      warmup_epochs: see `ramp`, of `weight`.
    """

    ce_weight: float = fields.field(1.0, check=fields.at_least(0))
    weight: float = fields.field(check=fields.at_least(0))
    warmup_epochs: float = fields.field(0.0, check=fields.at_least(0))

    rules: ClassVar[tuple[rules_lib.Rule, ...]] = (
        rules_lib.some_weight("ce_weight", "weight"),
    )
    reads_labels: ClassVar[bool] = False

    def losses(self, signals: method.Signals, *, train: bool) -> Sequence[Any]:
        """Returns `{name: raw loss, scalar float32}` per module, for the last modules.

        One entry for methods that train the student from its end; for those with
        `staged` one per module. Submodules are named `module1`, ... after the module
        they belong to, or `head` for the last.
        """
        raise NotImplementedError

    def hard_loss(self, signals: method.Signals) -> jax.Array:
        """Returns the cross-entropy with the labels, scalar float32."""
        return signals.cross_entropy(signals.student.logits)

    def weigh(self, signals: method.Signals) -> tuple[Any, Any]:
        """Returns the weights of cross-entropy and of the losses in this step."""
        return self.ce_weight, self.weight * ramp(signals.epoch, self.warmup_epochs)

    @nn.compact
    def __call__(
        self, signals: method.Signals, *, train: bool
    ) -> tuple[method.ModuleLoss, ...]:
        """Returns one `ModuleLoss`, or one per module; the last has `head_ce`, too."""
        own = [dict(terms) for terms in self.losses(signals, train=train)]
        hard, weight = self.weigh(signals)
        weights = [dict.fromkeys(terms, weight) for terms in own]
        own[-1]["head_ce"] = self.hard_loss(signals)
        weights[-1]["head_ce"] = hard
        return tuple(
            method.ModuleLoss(terms=t, weights=w, diagnostics={})
            for t, w in zip(own, weights, strict=True)
        )


class LogitTerm(Term, kw_only=True):
    """A `Term` on logits, which may be standardised first.

    Attributes:
      standardise: see `kd.standardised`.
    """

    standardise: bool = fields.field(False, "z-scores of the logits")

    def logits(self, signals: method.Signals) -> tuple[jax.Array, jax.Array]:
        """Returns the student's and the teacher's logits, (B, classes) each."""
        student, teacher = signals.student.logits, signals.teacher.logits
        if self.standardise:
            return kd.standardised(student), kd.standardised(teacher)
        return student, teacher


class Sum(method.Method):
    """Several methods at once: all their losses, each with its weight.

    A term that two of them have (`head_ce`, `head_kd`) counts once, with the weight
    that the first of them gives it.

    Attributes:
      parts: the methods, in the order in which they were named.
    """

    parts: tuple[method.Method, ...]

    @nn.compact
    def __call__(
        self, signals: method.Signals, *, train: bool
    ) -> tuple[method.ModuleLoss, ...]:
        """Returns the losses of all parts, aligned at the last module."""
        of_parts = [part(signals, train=train) for part in self.parts]
        count = max(map(len, of_parts))
        merged = [method.ModuleLoss({}, {}, {}) for _ in range(count)]
        for losses in of_parts:
            first = count - len(losses)
            for k, loss in enumerate(losses, first):
                merged[k] = _merged(merged[k], loss)
        return tuple(merged)

    @property
    def needs_uncut(self) -> bool:
        """Whether `Signals.student_uncut` is read."""
        return any(part.needs_uncut for part in self.parts)

    @property
    def needs_suffix(self) -> bool:
        """Whether `Signals.teacher_suffix` is called."""
        return any(part.needs_suffix for part in self.parts)


def _merged(first: method.ModuleLoss, second: method.ModuleLoss) -> method.ModuleLoss:
    """Merges two losses; a term of both is the first one's."""
    return method.ModuleLoss(
        terms=second.terms | first.terms,
        weights={**second.weights, **first.weights},
        diagnostics=second.diagnostics | first.diagnostics,
    )
