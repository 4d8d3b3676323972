"""RTK (our interpretation): representative teacher keys.

Source: Yang, Kao, Huang, "Knowledge Distillation with Representative Teacher Keys
Based on Attention Mechanism for Image Classification Model Compression", arXiv
2206.12788. **Only its abstract is known to us**, and no code is published. It claims:
the keys come from the teacher, useless information of the teacher is filtered out,
and the accuracy of an attention-based method is improved on. All else here is our
interpretation, on top of AFD (`lakd_jax.distill.afd`), with the roles swapped:

    l[b, j, i] = similarity(query of student tap j, key of teacher tap i)
    M          = which teacher taps are representative, a hard choice (`MASKS`)
    a[b, j, :] = softmax over the teacher taps i with M[b, j, i]
    E[b, j, i] = ||f_{j->i} - g_i||^2, summed over positions
    L_RTK      = sum_j mean_b sum_i a[b, j, i] E[b, j, i]
    L          = CE + 0.9 KD + 4 L_RTK

Why the sum: one softmax ranges over teacher taps of several sizes, and a mean would
make those of large maps cheap whatever they show. Figures of this are not figures of
the paper's method. See docs/rtk.md.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from lakd_jax import fields
from lakd_jax.distill import kd
from lakd_jax.distill import tap_attention as attention_lib
from lakd_jax.distill.base import method
from lakd_jax.distill.base import rules as rules_lib

Mask = Callable[[jax.Array, attention_lib.Groups, int], jax.Array]

CHOICES = {
    "selection": ("stage", "topr", "threshold", "pooled", "none"),
    "scope": ("sample", "batch"),
    "distance_reduce": attention_lib.REDUCTIONS,
}

_TOLERANCE = 1e-6  # equal weights, of which all are kept, may round below their mean


def stage_mask(logits: jax.Array, groups: attention_lib.Groups) -> jax.Array:
    """The largest logit of each stage; of equal ones the first.

    Args:
      logits: (B, S, T).
      groups: the teacher taps of each stage, a partition of 0..T-1.

    Returns:
      (B, S, T) bool, one True per row and stage.
    """
    taps = logits.shape[-1]
    mask = jnp.zeros(logits.shape, bool)
    for group in groups:
        member = jnp.array([[[i in group for i in range(taps)]]])
        best = jnp.argmax(jnp.where(member, logits, -jnp.inf), -1)
        mask |= jax.nn.one_hot(best, taps, dtype=bool)
    return mask


def top_mask(logits: jax.Array, count: int) -> jax.Array:
    """The `count` largest logits of each row (all, if it has fewer), any stage.

    (B, S, T) -> (B, S, T) bool; of equal ones the first.
    """
    taps = logits.shape[-1]
    _, best = jax.lax.top_k(logits, min(count, taps))
    return jnp.any(jax.nn.one_hot(best, taps, dtype=bool), -2)


def threshold_mask(logits: jax.Array, level: float) -> jax.Array:
    """Where softmax(logits) >= level; at level 1/T or less never an empty row.

    (B, S, T) -> (B, S, T) bool.
    """
    return jax.nn.softmax(logits) >= level - _TOLERANCE


# Each as (logits, groups, top_r) -> mask. "pooled" makes one key of a stage before
# there are logits, and keeps all of those.
MASKS: dict[str, Mask] = {
    "stage": lambda logits, groups, _: stage_mask(logits, groups),
    "topr": lambda logits, _, top_r: top_mask(logits, top_r),
    "threshold": lambda logits, *_: threshold_mask(logits, 1 / logits.shape[-1]),
    "pooled": lambda logits, *_: jnp.ones(logits.shape, bool),
    "none": lambda logits, *_: jnp.ones(logits.shape, bool),
}


def select(
    logits: jax.Array,
    groups: attention_lib.Groups,
    selection: str,
    *,
    scope: str,
    top_r: int,
) -> jax.Array:
    """Which teacher taps are representative, for each image and student tap.

    Args:
      logits: (B, S, T).
      groups: the teacher taps of each stage.
      selection: a name in `MASKS`.
      scope: "sample" chooses for each image, "batch" once, by the mean logits.
      top_r: how many "topr" keeps.

    Returns:
      (B, S, T) bool without gradient, at least one True per row.

    Raises:
      ValueError: unknown selection or scope.
    """
    fields.check("selection", selection, CHOICES["selection"])
    fields.check("scope", scope, CHOICES["scope"])
    shape = logits.shape
    logits = jax.lax.stop_gradient(logits)
    if scope == "batch":
        logits = jnp.mean(logits, 0, keepdims=True)
    return jnp.broadcast_to(MASKS[selection](logits, groups, top_r), shape)


def masked_softmax(logits: jax.Array, mask: jax.Array) -> jax.Array:
    """Attention over the last axis, exactly 0 where the mask is False.

    Both (B, S, T); every row of the mask has a True.
    """
    return jax.nn.softmax(jnp.where(mask, logits, -jnp.inf))


def rtk_loss(attention: jax.Array, distances: jax.Array) -> jax.Array:
    """sum_j mean_b sum_i a[b, j, i] E[b, j, i], in [0, 2 S] for summed distances.

    Args:
      attention: (B, student taps, teacher taps), rows that sum to 1.
      distances: (B, student taps, teacher taps).

    Returns:
      Scalar float32.
    """
    return jnp.sum(jnp.mean(attention * distances, 0))


def merge_matrix(scores: jax.Array, groups: attention_lib.Groups) -> jax.Array:
    """Weights that make one key of a stage, softmax of `scores` in each stage.

    Args:
      scores: (T,) trainable.
      groups: the teacher taps of each stage.

    Returns:
      (G, T), rows that sum to 1 and are 0 outside their stage.
    """
    taps = len(scores)
    member = jnp.array([[i in group for i in range(taps)] for group in groups])
    rows = jnp.broadcast_to(scores, member.shape)
    return jax.nn.softmax(jnp.where(member, rows, -jnp.inf))


@dataclasses.dataclass(frozen=True)
class Options:
    """Every choice of our interpretation; ValueError names a field that is wrong.

    `selection`: `stage` the best tap of each teacher stage | `topr` the `top_r` best |
    `threshold` those of at least mean weight | `pooled` a learnt mean of each stage |
    `none` all of them, the control.
    """

    qk_dim: int = fields.field(128, "width of queries and keys", fields.at_least(1))
    ce_weight: float = fields.field(
        1.0, "of the cross-entropy with the labels", fields.at_least(0)
    )
    kd_weight: float = fields.field(
        0.9, "of the softened divergence to the teacher", fields.at_least(0)
    )
    beta: float = fields.field(
        4.0,
        "of the attention-weighted feature distance; with mean, 200",
        fields.at_least(0),
    )
    temperature: float = fields.field(kd.KD.temperature, source="kd.temperature")
    selection: str = fields.field(
        "stage",
        "of teacher taps: stage | topr | threshold | pooled | none",
        fields.one_of(CHOICES["selection"]),
    )
    top_r: int = fields.field(3, "how many selection=topr keeps", fields.at_least(1))
    scope: str = fields.field(
        "sample",
        "select for each image (sample) or once for all (batch)",
        fields.one_of(CHOICES["scope"]),
    )
    distance_reduce: str = fields.field(
        "sum",
        "over the positions of a map: sum | mean",
        fields.one_of(CHOICES["distance_reduce"]),
    )

    def __post_init__(self):
        fields.require(self)


class RTK(method.Method):
    """RTK (our interpretation): ce_weight CE + kd_weight KD + beta L_RTK.

    Terms: `head_ce`, `head_kd`, `rtk`. Diagnostics: entropy of the attention and the
    share of each teacher stage. All parameters are trained with the student and
    dropped after.
    """

    options: Options

    title: ClassVar[str] = "RTK (our interpretation)"
    about: ClassVar[str] = (
        "our interpretation, docs/rtk.md; the temperature is kd.temperature"
    )
    options_class: ClassVar[Any] = Options
    rules: ClassVar[tuple[rules_lib.Rule, ...]] = (
        rules_lib.some_weight("ce_weight", "kd_weight", "beta"),
    )
    least_batch: ClassVar[int] = 2
    reads_labels: ClassVar[bool] = False
    teacher_reads: ClassVar[tuple[str, ...]] = ("logits", "taps")

    @nn.compact
    def __call__(
        self, signals: method.Signals, *, train: bool
    ) -> tuple[method.ModuleLoss, ...]:
        """Returns one `ModuleLoss`.

        Raises:
          ValueError: a network without taps.
        """
        options = self.options
        ours = attention_lib.taps_of(signals.student, "student")
        theirs = attention_lib.taps_of(signals.teacher, "teacher")
        attend = Attend(options, name="module1")
        attention, distances, groups = attend(ours, theirs, train=train)
        self.sow("intermediates", "attention", attention)  # for explain
        terms, weights = kd.head_terms(
            signals, options.ce_weight, options.kd_weight, options.temperature
        )
        terms["rtk"] = rtk_loss(attention, distances)
        diagnostics = attention_lib.attention_diagnostics(attention, groups)
        weights = {**weights, "rtk": options.beta}
        return (method.ModuleLoss(terms, weights, diagnostics),)


class Attend(nn.Module):
    """From taps to attention and distances; owns all of RTK's parameters."""

    options: Options

    @nn.compact
    def __call__(
        self, student: attention_lib.Taps, teacher: attention_lib.Taps, *, train: bool
    ) -> tuple[jax.Array, jax.Array, attention_lib.Groups]:
        """What each student tap imitates, and how far it is from it.

        Args:
          student: S taps (B, h, w, c).
          teacher: T taps (B, H, W, C); get no gradient.
          train: normalise descriptors by this batch.

        Returns:
          Attention and distances, (B, S, T) float32 both, and the teacher taps of
          each stage. With `selection=pooled` stages stand for taps.
        """
        options, teacher = self.options, jax.lax.stop_gradient(tuple(teacher))
        groups, merge = attention_lib.by_size(teacher), None
        if options.selection == "pooled":
            zeros = nn.initializers.zeros  # at first, the plain mean
            scores = self.param("stage_scores", zeros, (len(teacher),), jnp.float32)
            merge = merge_matrix(scores, groups)
        logits = attention_lib.Similarity(options.qk_dim, name="similarity")(
            attention_lib.descriptors(student),
            attention_lib.descriptors(teacher),
            train=train,
            merge=merge,
        )
        reduction = options.distance_reduce
        distances = attention_lib.distances(student, teacher, reduction, merge)
        if merge is not None:
            groups = tuple((index,) for index in range(len(groups)))
        how = {"scope": options.scope, "top_r": options.top_r}
        mask = select(logits, groups, options.selection, **how)
        return masked_softmax(logits, mask), distances, groups


METHODS = {"rtk": RTK}
ORDER = 40  # in lists of methods
