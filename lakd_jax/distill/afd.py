"""AFD: attention-based feature matching, exact.

Source: Ji, Heo, Park, "Show, Attend and Distill: Knowledge Distillation via
Attention-based Feature Matching", AAAI 2021, arXiv 2102.02973, with every detail as
the authors' published code has it:

    a[b, i, :] = softmax over student taps j of similarity(teacher i, student j)
    D[b, i, j] = mean over positions of (f_{j->i} - g_i)^2
    L_AFD      = sum_i mean_b sum_j a[b, i, j] D[b, i, j]
    L          = CE + 0.9 KD + 200 L_AFD

g and f are L2-normalised maps of mean squared activation, the student's pooled to the
teacher's size. Each *teacher* tap attends to the *student* taps that are to imitate
it. No gradient is stopped on the student's side: it learns through the maps and through
the attention. One deviation: where the authors call a pre-activation network's norm
a second time for the tap, which moves its running statistics twice per step, here
they move once.
"""

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from lakd_jax import fields
from lakd_jax.distill import kd
from lakd_jax.distill import tap_attention as attention_lib
from lakd_jax.distill.base import method
from lakd_jax.distill.base import rules as rules_lib


def afd_loss(attention: jax.Array, distances: jax.Array) -> jax.Array:
    """sum_i mean_b sum_j a[b, i, j] D[b, i, j], section 3 of the paper.

    Args:
      attention: (B, teacher taps, student taps), rows that sum to 1.
      distances: (B, student taps, teacher taps), means over positions.

    Returns:
      Scalar float32, never negative.
    """
    return jnp.sum(jnp.mean(attention * distances.swapaxes(1, 2), 0))


class AFD(method.Method):
    """ce_weight CE + kd_weight KD + beta L_AFD, for networks of any two families.

    Terms: `head_ce`, `head_kd`, `afd`. Diagnostics: entropy of the attention and the
    share of each student stage. Parameters: one `tap_attention.Similarity`, trained
    with the student and dropped after.
    """

    qk_dim: int = fields.field(128, "width of queries and keys", fields.at_least(1))
    ce_weight: float = fields.field(
        1.0, "of the cross-entropy with the labels", fields.at_least(0)
    )
    kd_weight: float = fields.field(
        0.9, "of the softened divergence to the teacher", fields.at_least(0)
    )
    beta: float = fields.field(
        200.0, "of the attention-weighted feature distance", fields.at_least(0)
    )
    temperature: float = fields.field(kd.KD.temperature, source="kd.temperature")

    about: ClassVar[str] = "the temperature is kd.temperature"
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
        ours = attention_lib.taps_of(signals.student, "student")
        theirs = attention_lib.taps_of(signals.teacher, "teacher")
        theirs = jax.lax.stop_gradient(theirs)
        similarity = attention_lib.Similarity(self.qk_dim, name="module1")
        logits = similarity(
            attention_lib.descriptors(theirs),
            attention_lib.descriptors(ours),
            train=train,
        )
        attention = jax.nn.softmax(logits)
        self.sow("intermediates", "attention", attention)  # for explain
        distances = attention_lib.distances(ours, theirs, "mean")
        terms, weights = kd.head_terms(
            signals, self.ce_weight, self.kd_weight, self.temperature
        )
        terms["afd"] = afd_loss(attention, distances)
        groups = attention_lib.by_size(ours)
        diagnostics = attention_lib.attention_diagnostics(attention, groups)
        weights = {**weights, "afd": self.beta}
        return (method.ModuleLoss(terms, weights, diagnostics),)


METHODS = {"afd": AFD}
ORDER = 30  # in lists of methods
