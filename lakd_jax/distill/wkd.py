"""Wasserstein distance distillation, of logits (WKD-L) and of features (WKD-F).

Source: Lv, Yang and Li, "Wasserstein Distance Rivals Kullback-Leibler Divergence for
Knowledge Distillation" (arXiv 2412.08139) and the authors' public code. Deviations
from the latter:

* Transport leaves the label out by probabilities of 0 instead of a matrix of its own
  for each example: equal plans, less to hold.
* Costs from the classifier (`fc` there) work with every network that ends in a linear
  layer, and the teacher gets no gradient; there the second step fails.
* A student's map that is smaller than the teacher's, but not half as large, is
  projected at its own size; the public code has no projector for it.
"""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from lakd_jax import errors, fields
from lakd_jax.distill import dkd, wkd_costs, wkd_projector
from lakd_jax.distill.base import method, numerics, term
from lakd_jax.distill.base import rules as rules_lib

_REGULARISATION = 0.05  # of the transport
_ROUNDS = 10  # of Sinkhorn's iteration
_EPS = 1e-8  # of costs and quotients
_VARIANCE_EPS = 1e-5

# --------------------------------------------------------------------------- of logits


def logit_distance(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    labels: jax.Array,
    cost: jax.Array,
    temperature: float,
) -> jax.Array:
    """Mean cost of carrying the student's probabilities to the teacher's.

    Of the classes other than the label, whose probabilities at T sum to 1. The plan
    has entropic regularisation, 10 rounds of Sinkhorn's iteration; the gradient passes
    through all of them. The teacher gets none, nor do the costs.

    Args:
      student_logits, teacher_logits: (B, classes), any floating type.
      labels: (B,) integers.
      cost: (classes, classes), from the student's classes (rows) to the teacher's.
      temperature: T > 0.

    Returns:
      Scalar float32, never negative; without T^2.
    """
    classes = student_logits.shape[-1]
    label = jax.nn.one_hot(labels, classes, dtype=bool)
    ours, theirs = (
        jnp.where(label, 0.0, jnp.exp(dkd.others(logits / temperature, label)))
        for logits in numerics.frozen(student_logits, teacher_logits)
    )
    cost = nn.relu(jax.lax.stop_gradient(cost).astype(jnp.float32)) + _EPS
    kernel = jnp.exp(-cost / _REGULARISATION)
    u, v = jnp.where(label, 0.0, 1 / max(classes - 1, 1)), theirs
    for _ in range(_ROUNDS):
        v = theirs / (_product(u, kernel) + _EPS)
        u = ours / (_product(v, kernel.T) + _EPS)
    return jnp.mean(jnp.sum(u * _product(v, (kernel * cost).T), -1))


def _product(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)


def target_loss(
    student_logits: jax.Array, teacher_logits: jax.Array, labels: jax.Array
) -> jax.Array:
    """Mean of -p_t log p_s of the label, at T = 1 among all classes.

    Args:
      student_logits, teacher_logits: (B, classes); the teacher gets no gradient.
      labels: (B,) integers.

    Returns:
      Scalar float32, never negative.
    """
    log_s, log_t = (
        jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], -1)
        for logits in numerics.frozen(student_logits, teacher_logits)
    )
    return -jnp.mean(jnp.exp(log_t) * log_s)


class _Decaying(term.Term, kw_only=True):
    """A `Term` whose weight falls along a cosine after some epochs."""

    decay_after_epochs: float = fields.field(
        150.0,
        "then the weight falls to 0 along a cosine; 0 on ImageNet",
        fields.at_least(0),
    )
    epochs: int = fields.field(240, source="epochs")

    def weigh(self, signals: method.Signals) -> tuple[Any, Any]:
        """Returns the weights of cross-entropy and of the losses in this step."""
        hard, weight = super().weigh(signals)
        number = jnp.floor(signals.epoch) + 1  # as the public code counts
        left = max(self.epochs - self.decay_after_epochs, 1)
        share = jnp.clip((number - self.decay_after_epochs) / left, 0.0, 1.0)
        return hard, weight * (1 + jnp.cos(math.pi * share)) / 2


def _costs_at_hand(options: Any, run: rules_lib.Run) -> str:
    if options.cost:
        return ""
    if not run["teacher.views"]:
        return rules_lib.linear_teacher(options, run)
    return (
        f"{run.method}.cost is empty, so costs come from the teacher's classifier, "
        "which teacher.views does not store: set teacher.views to 0, or "
        f"{run.method}.cost to a file"
    )


class WKDL(_Decaying):
    """ce_weight CE + target_weight * `target_loss` + weight * `logit_distance`.

    The public code reads the classes' distances from files made with the teacher's
    features (1 - CKA), which depend on the order of the examples. `cost` may name such
    a file; by default they are those of the teacher's classifier.
    """

    weight: float = 600.0
    target_weight: float = fields.field(
        1.0, "of the label's part, which does not decay", fields.at_least(0)
    )
    temperature: float = fields.field(8.0, check=fields.above(0))
    cost: str = fields.field(
        "",
        ".npy or .npz file of the classes' distances, (classes, classes); empty: 1 - "
        "cosine of their weights in the teacher's classifier",
        wkd_costs.path_fault,
    )
    sharpness: float = fields.field(
        1.0, "costs are 1 - exp(-sharpness d); 0: d itself", fields.at_least(0)
    )

    title: ClassVar[str] = "WKD-L"
    about: ClassVar[str] = "with WKD-F, weight=200 (32x4-8x4)"
    two_classes: ClassVar[str | None] = "target_weight"
    reads_labels: ClassVar[bool] = True
    rules: ClassVar[tuple[rules_lib.Rule, ...]] = (*term.Term.rules, _costs_at_hand)
    pairs: ClassVar[method.Pairs] = {
        ("wrn_40_2", "shuffle_v1"): {"weight": 200.0, "temperature": 6.0}
    }

    def losses(self, signals: method.Signals, *, train: bool) -> Sequence[Any]:
        """Returns the term `wkd_l`.

        Raises:
          errors.ConfigError: the file cannot be used, or is for other classes.
        """
        both, labels = (signals.student.logits, signals.teacher.logits), signals.labels
        cost = self._cost(signals)
        return [{"wkd_l": logit_distance(*both, labels, cost, self.temperature)}]

    def _cost(self, signals: method.Signals) -> jax.Array:
        classes = signals.student.logits.shape[-1]
        if not self.cost:
            matrix, _ = signals.teacher_classifier()
            distances = wkd_costs.classifier_distances(matrix)
        elif fault := wkd_costs.path_fault(self.cost):
            raise errors.ConfigError([f"wkd_l.cost {fault}"])
        else:
            distances = jnp.asarray(wkd_costs.read_distances(self.cost))
        if len(distances) != classes:
            raise errors.ConfigError(
                [
                    f"wkd_l.cost: {self.cost} has distances of {len(distances)} "
                    f"classes, but the data has {classes}: make it for these"
                ]
            )
        return wkd_costs.sharpened(distances, self.sharpness)

    def __call__(
        self, signals: method.Signals, *, train: bool
    ) -> tuple[method.ModuleLoss, ...]:
        """Returns one `ModuleLoss` with `wkd_l`, `wkd_target` and `head_ce`."""
        (loss,) = super().__call__(signals, train=train)
        logits = signals.student.logits, signals.teacher.logits
        weight = self.target_weight * term.ramp(signals.epoch, self.warmup_epochs)
        return (loss.plus("wkd_target", target_loss(*logits, signals.labels), weight),)


# ------------------------------------------------------------------------- of features


def _edges(size: int, grid: int) -> list[slice]:
    """Returns the cells of an axis, as adaptive pooling has them; they may overlap."""
    return [slice(i * size // grid, -((i + 1) * -size // grid)) for i in range(grid)]


def smallest_cell(height: int, width: int, grid: int) -> int:
    """Returns the elements of the smallest of grid x grid cells of a map."""
    sides = [min(s.stop - s.start for s in _edges(n, grid)) for n in (height, width)]
    return sides[0] * sides[1]


def feature_terms(u: jax.Array, v: jax.Array, grid: int) -> tuple[jax.Array, jax.Array]:
    """Squared differences of the means, and of the deviations, of cells of two maps.

    Summed over channels, means over the batch and over grid x grid cells. With the
    first weighed as the second this is the squared Wasserstein distance of normal
    distributions with diagonal covariances.

    Args:
      u: (B, H, W, C).
      v: (B, H', W', C); it gets no gradient.
      grid: cells along each axis.

    Returns:
      Two scalars float32, never negative.

    Raises:
      ValueError: a cell has one element, which has no (unbiased) deviation.
    """
    for x in (u, v):
        if smallest_cell(x.shape[1], x.shape[2], grid) < 2:
            raise ValueError(
                f"grid={grid} makes cells of one element in a map of {x.shape[1]}x"
                f"{x.shape[2]}, which have no deviation: choose a smaller grid"
            )
    (mean_u, std_u), (mean_v, std_v) = (
        _statistics(x, grid) for x in numerics.frozen(u, v)
    )
    count = len(u) * grid**2
    return (
        jnp.sum(jnp.square(mean_u - mean_v)) / count,
        jnp.sum(jnp.square(std_u - std_v)) / count,
    )


def _statistics(x: jax.Array, grid: int) -> tuple[jax.Array, jax.Array]:
    """Means and deviations (cells, B, C) of a map."""
    rows, columns = (_edges(size, grid) for size in x.shape[1:3])
    cells = [x[:, row, column] for row in rows for column in columns]
    means = jnp.stack([jnp.mean(cell, (1, 2)) for cell in cells])
    variances = jnp.stack([jnp.var(cell, (1, 2), ddof=1) for cell in cells])
    return means, jnp.sqrt(variances + _VARIANCE_EPS)


def _cells_fault(options: Any, sizes: Sequence[Sequence[int]]) -> str:
    """Returns what is wrong with cells of maps; "" if each has several elements."""
    for height, width in sizes:
        if smallest_cell(height, width, options.grid) < 2:
            return (
                f"wkd_f.grid is {options.grid}, which makes cells of one element in a "
                f"last map of {height}x{width}, and these have no deviation: lower it"
            )
    return ""


def _cells(options: Any, run: rules_lib.Run) -> str:
    """Checks the cells where the config has the size of the images."""
    if not run["data.image_size"]:
        return ""
    _, ours, theirs = run.joints[-1]
    ours, theirs = ours[1:3], theirs[1:3]
    ours = wkd_projector.projected_size(ours, theirs, options.projector)
    return _cells_fault(options, [ours, theirs])


class WKDF(_Decaying):
    """ce_weight CE + weight * (mean_weight * means + deviations) of the last map.

    See `feature_terms`; the student's map first passes a `wkd_projector.Projector`. A
    teacher's signed map (of a wide ResNet) is used as it is, as in the public code,
    although the projector ends in a ReLU.
    """

    weight: float = 0.08
    mean_weight: float = fields.field(
        4.0, "of the means against the deviations", fields.at_least(0)
    )
    grid: int = fields.field(1, "cells along each side of the map", fields.at_least(1))
    projector: str = fields.field(
        "conv1x1",
        "of the student's map: conv1x1 | bottleneck (ImageNet)",
        fields.one_of(wkd_projector.KINDS),
    )

    title: ClassVar[str] = "WKD-F"
    about: ClassVar[str] = "with WKD-L, mean_weight=8 (32x4-8x4)"
    rules: ClassVar[tuple[rules_lib.Rule, ...]] = (*term.Term.rules, _cells)
    pairs: ClassVar[method.Pairs] = {
        ("wrn_40_2", "shuffle_v1"): {"weight": 0.3, "mean_weight": 3.0, "grid": 4}
    }
    teacher_reads: ClassVar[tuple[str, ...]] = ("joints",)

    def losses(self, signals: method.Signals, *, train: bool) -> Sequence[Any]:
        """Returns the term `wkd_f`.

        Raises:
          errors.ConfigError: the grid makes cells of one element.
        """
        ours, theirs = signals.student_joints[-1], signals.teacher_joints[-1]
        size = theirs.shape[1:3]
        project = wkd_projector.Projector(
            theirs.shape[-1], size, self.projector, name="head"
        )
        ours = project(ours, train=train)
        if fault := _cells_fault(self, [ours.shape[1:3], size]):
            raise errors.ConfigError([fault])
        means, deviations = feature_terms(ours, theirs, self.grid)
        return [{"wkd_f": self.mean_weight * means + deviations}]


METHODS = {"wkd_l": WKDL, "wkd_f": WKDF}
ORDER = 320  # in lists of methods
