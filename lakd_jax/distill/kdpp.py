"""KD++: features as long as the teacher's, in the direction of their class.

Source: Wang et al., "Improving Knowledge Distillation via Regularizing Feature Norm
and Direction" (arXiv 2305.17007), the ND loss on top of KD; reduction and embedding of
the public code.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from lakd_jax import fields
from lakd_jax.distill import kd
from lakd_jax.distill.base import adapter, method, numerics, term
from lakd_jax.models import layers

_EPS = 1e-12  # the shortest vector that has a direction


def nd_loss(
    student_embeddings: jax.Array, teacher_embeddings: jax.Array, centres: jax.Array
) -> jax.Array:
    """Mean over the batch of 1 - s.e / max(|s|, |t|), e the direction of the centre.

    It is 0 where s is as long as t or longer and points to its class; longer ones,
    which turn no better, gain nothing. Centres of zeros have no direction: their
    examples cost 1 and get no gradient.

    Args:
      student_embeddings: (B, C).
      teacher_embeddings: (B, C); they get no gradient.
      centres: (B, C), of each example's class; they get no gradient, either.

    Returns:
      Scalar float32, from 0 to 2.
    """
    student, teacher = numerics.frozen(student_embeddings, teacher_embeddings)
    towards = numerics.unit(jax.lax.stop_gradient(centres).astype(jnp.float32))
    ours, theirs = (jnp.sum(jnp.square(x), -1) for x in (student, teacher))
    longest = jnp.where(ours >= theirs, ours, theirs)
    # The gradient of the root must be finite where both vectors are zero.
    scale = jax.lax.rsqrt(jnp.maximum(longest, _EPS**2))
    return jnp.mean(1 - jnp.sum(student * towards, -1) * scale)


class Centres(nn.Module):
    """The mean of all of the teacher's features of each class that were seen so far.

    Kept in "batch_stats": `means` (classes, C) and `counts` (classes,).

    Attributes:
      classes: how many there are.
    """

    classes: int

    @nn.compact
    def __call__(
        self, features: jax.Array, labels: jax.Array, *, train: bool
    ) -> jax.Array:
        """Centres (B, C) of the labels; those of classes never seen are zeros.

        Args:
          features: (B, C) float32, of the teacher; in training they count first.
          labels: (B,) integers.
          train: whether they count at all.
        """
        shape = (self.classes, features.shape[-1])
        means = self.variable("batch_stats", "means", jnp.zeros, shape)
        counts = self.variable("batch_stats", "counts", jnp.zeros, shape[:1])
        if train and not self.is_initializing():
            member = jax.nn.one_hot(labels, self.classes)
            added = jnp.sum(member, 0)
            sums = jnp.matmul(member.T, features, precision=jax.lax.Precision.HIGHEST)
            total = counts.value + added
            shift = sums - added[:, None] * means.value
            means.value += shift / jnp.maximum(total, 1)[:, None]
            counts.value = total
        return means.value[labels]


class Embedding(nn.Module):
    """Batch norm, dropout and a linear layer, from the student's width.

    Attributes:
      features: the teacher's width.
      dropout: share of inputs that are dropped.
    """

    features: int
    dropout: float

    @nn.compact
    def __call__(
        self, x: jax.Array, key: jax.Array | None, *, train: bool
    ) -> jax.Array:
        """(B, C) -> (B, features) float32; `key` draws what is dropped."""
        x = x.astype(jnp.float32)
        x = adapter.batch_norm(train=train, name="bn")(x)
        if train:
            x = nn.Dropout(self.dropout, deterministic=False)(x, rng=key)
        start = layers.uniform_fan_in
        return nn.Dense(self.features, kernel_init=start, name="dense")(x)


class _Head(nn.Module):
    """All that KD++ keeps: the classes' centres, and the embedding where it is needed.

    Attributes:
      dropout: of the embedding.
    """

    dropout: float

    @nn.compact
    def __call__(self, signals: method.Signals, *, train: bool) -> jax.Array:
        ours, theirs = numerics.frozen(signals.student.pooled, signals.teacher.pooled)
        width, classes = theirs.shape[-1], signals.teacher.logits.shape[-1]
        centres = Centres(classes, name="centres")(theirs, signals.labels, train=train)
        if ours.shape[-1] != width:
            embed = Embedding(width, self.dropout, name="embedding")
            ours = embed(ours, signals.key, train=train)
        return nd_loss(ours, theirs, centres)


class KDPP(term.Term):
    """ce_weight CE + kd_weight KD + weight * `nd_loss` of the features in the end.

    The public code reads the classes' centres from a file, made by a pass of the
    teacher over the training split. Here they are what `Centres` has seen, this batch
    included, so that every class in a batch has one, a rough one in the first epoch.
    The public code's warm-up of KD starts from 0, ours (`term.ramp`) an epoch later.
    A student of another width than the teacher's is embedded, as there; the embedding
    is dropped after training.
    """

    weight: float = 2.0
    kd_weight: float = fields.field(
        1.0, "of KD; 3.5 for 32x4-8x4, 2.5 to 4 to other families", fields.at_least(0)
    )
    temperature: float = fields.field(4.0, check=fields.above(0))
    kd_warmup_epochs: float = fields.field(20.0, "of kd_weight", fields.at_least(0))
    dropout: float = fields.field(
        0.5, "in front of the layer to a teacher of another width", fields.below(1)
    )

    title: ClassVar[str] = "KD++"
    about: ClassVar[str] = "of norm and direction; 1.5 or 0.5 for some pairs"
    least_batch: ClassVar[int] = 2
    reads_labels: ClassVar[bool] = True
    teacher_reads: ClassVar[tuple[str, ...]] = ("logits", "pooled")

    def losses(self, signals: method.Signals, *, train: bool) -> Sequence[Any]:
        """Returns the term `nd`."""
        return [{"nd": _Head(self.dropout, name="head")(signals, train=train)}]

    def __call__(
        self, signals: method.Signals, *, train: bool
    ) -> tuple[method.ModuleLoss, ...]:
        """Returns one `ModuleLoss` with `nd`, `head_ce` and `head_kd`."""
        (loss,) = super().__call__(signals, train=train)
        logits = signals.student.logits, signals.teacher.logits
        soft = kd.kd_loss(*logits, self.temperature)
        weight = self.kd_weight * term.ramp(signals.epoch, self.kd_warmup_epochs)
        weight *= term.ramp(signals.epoch, self.warmup_epochs)
        return (loss.plus("head_kd", soft, weight),)


METHODS = {"kdpp": KDPP}
ORDER = 280  # in lists of methods
