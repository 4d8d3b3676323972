"""LAKD: activation mapping distillation based on local learning.

Source: Yaoze Zhang et al., "LAKD, Activation Mapping Distillation Based on Local
Learning", arXiv 2408.11478. The student is cut into modules whose gradients are
independent (separation-decoupling mechanism) and the teacher's attention weights
their features (non-directional activation mapping, `lakd_jax.distill.ndam`):

    L_lf^l = (1/N_l) sum_i |F_T^l(i) - F_S^l(i)|^2                    (features)
    W      = a avgpool(F_sum(T)) + b maxpool(F_sum(T))                (mask)
    L_t    = alpha L_h + (1 - alpha) L_att + beta L_lf                (total)

What is certain: no official code exists, and no accuracy of LAKD is published as
far as we know. The three formulas come from summaries of the paper that agree;
what L_h and L_att are, how W is pooled and normalised, where adapters stand, and
every hyper-parameter are **unknown**. Each of these is an option, its
default is **our interpretation**, and `lakd_options` lists the others (Q1 .. Q14 as
in the project's notes). Our deviations from the bare formulas by default: adapters at
every joint, W normalised to mean 1, CE + KD in the head, weights (1, 1, 1); the
bare formulas are `preset=literal` with `adapter=shape`, `normalise=none` and
`head_loss=ce`, and need a lower learning rate.
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from lakd_jax import fields
from lakd_jax.distill import kd, ndam
from lakd_jax.distill import lakd_options as options_lib
from lakd_jax.distill.base import adapter as adapters
from lakd_jax.distill.base import method, numerics
from lakd_jax.distill.base import rules as rules_lib

CHOICES = options_lib.CHOICES
Options = options_lib.Options
needs_logits = options_lib.needs_logits
needs_suffix = options_lib.needs_suffix

_LOCAL = ("feature", "attention")  # terms of every module, weighed by `Options.share`

Weighted = tuple[dict[str, jax.Array], dict[str, jax.Array | float]]


def reduce_errors(
    errors: jax.Array, reduction: str, where: jax.Array | None = None
) -> jax.Array:
    """(B, H, W, C) -> scalar: 1/N_l sum over elements (Q11).

    `mean` divides by all elements, `per_sample_sum` by the batch size only. Examples
    that are not `where` (B,) are left out.
    """
    fields.check("reduction", reduction, CHOICES["reduction"])
    if reduction == "mean":
        return numerics.batch_mean(errors, where)
    return jnp.mean(jnp.sum(errors, axis=(1, 2, 3)), where=where)


def feature_loss(
    u: jax.Array, v: jax.Array, reduction: str, where: jax.Array | None = None
) -> jax.Array:
    """L_lf = (1/N) sum |v - u|^2, the paper's layer feature loss.

    Args:
      u: (B, H, W, C), the student's adapted features.
      v: (B, H, W, C), the teacher's; gets no gradient.
      reduction: what N is, see `reduce_errors`.
      where: (B,) bool, the examples that count; None for all.

    Returns:
      Scalar float32.
    """
    v = jax.lax.stop_gradient(v).astype(jnp.float32)
    return reduce_errors(jnp.square(u.astype(jnp.float32) - v), reduction, where)


def attention_loss(
    u: jax.Array,
    v: jax.Array,
    mask: jax.Array,
    power: str,
    reduction: str,
    where: jax.Array | None = None,
) -> jax.Array:
    """L_att = (1/N) sum (What (u - v))^2: the feature error seen through the mask.

    Our interpretation (Q2 a) of "W weights the feature maps of the modules"; summaries
    do not give L_att's formula.

    Args:
      u: (B, H, W, C), the student's adapted features.
      v: (B, H, W, C), the teacher's; gets no gradient.
      mask: (B, H, W, 1), What; gets no gradient.
      power: `2` as above; `1` What (u-v)^2; `softmax` HW softmax_HW(What) (u-v)^2.
      reduction: what N is, see `reduce_errors`.
      where: (B,) bool, the examples that count; None for all.

    Returns:
      Scalar float32; equal to `feature_loss` where What is 1 everywhere.
    """
    fields.check("power", power, CHOICES["power"])
    v = jax.lax.stop_gradient(v).astype(jnp.float32)
    w = jax.lax.stop_gradient(mask).astype(jnp.float32)
    errors = u.astype(jnp.float32) - v
    if power == "2":
        return reduce_errors(jnp.square(w * errors), reduction, where)
    if power == "softmax":
        w = w.shape[1] * w.shape[2] * jax.nn.softmax(w, axis=(1, 2))
    return reduce_errors(w * jnp.square(errors), reduction, where)


def map_loss(
    student_map: jax.Array, teacher_map: jax.Array, where: jax.Array | None = None
) -> jax.Array:
    """L_att as a distance of maps (Q2 b): mean_B ||W_S/||W_S|| - W_T/||W_T||||^2.

    A sum over the pixels of each image, so that it lies in 0..2 (0..4 for signed
    maps) at every size; Attention Transfer divides by the pixels as well.

    Args:
      student_map: (B, H, W, 1).
      teacher_map: (B, H, W, 1); gets no gradient.
      where: (B,) bool, the examples that count; None for all.

    Returns:
      Scalar float32.
    """
    student = ndam.normalise(student_map, "l2")
    teacher = jax.lax.stop_gradient(ndam.normalise(teacher_map, "l2"))
    return reduce_errors(jnp.square(student - teacher), "per_sample_sum", where)


class LAKD(method.Method):
    """LAKD's losses, one `ModuleLoss` per local module.

    Parameters and statistics: `{"module1": {"adapter": ..., "aux_head": ...}, ...}`
    with what the options call for; none of it is part of the trained student.
    Terms: `feature`, `attention` in every module, `head_ce`, `head_kd` in the last,
    `task_ce`, `task_kd` in earlier ones with `task=aux_heads|teacher_suffix`.
    Diagnostic: `feature_error`, mean (u-v)^2 / mean v^2, 1 where u predicts zero.
    """

    options: Options

    options_class: ClassVar[Any] = Options
    rules: ClassVar[tuple[rules_lib.Rule, ...]] = options_lib.RULES
    per_example: ClassVar[bool] = True
    local: ClassVar[bool] = True
    staged: ClassVar[bool] = True
    reads_labels: ClassVar[bool] = False
    cut_scale: ClassVar[float] = 0.0
    teacher_reads: ClassVar[tuple[str, ...]] = ("logits", "joints")

    @property
    def needs_uncut(self) -> bool:
        """Whether `Signals.student_uncut` is read."""
        return self.options.att_global

    @property
    def needs_suffix(self) -> bool:
        """Whether `Signals.teacher_suffix` is called."""
        return needs_suffix(self.options.task, self.options.attention)

    @property
    def needs_logits(self) -> bool:
        """Whether the teacher's logits are read in modules before the last."""
        return needs_logits(self.options.task, self.options.head_loss)

    @nn.compact
    def __call__(
        self, signals: method.Signals, *, train: bool
    ) -> tuple[method.ModuleLoss, ...]:
        """Returns one `ModuleLoss` per entry of `student_joints` that is not None.

        Raises:
          ValueError: `module_start_epochs` has another length, or a signal that
            the options need is missing.
        """
        count = len(signals.student_joints)
        _check_signals(self.options, signals)
        return tuple(
            _LocalLoss(self.options, k, k + 1 == count, name=f"module{k + 1}")(
                signals, train=train
            )
            for k, joint in enumerate(signals.student_joints)
            if joint is not None
        )


def _check_signals(options: Options, signals: method.Signals) -> None:
    count, starts = len(signals.student_joints), options.module_start_epochs
    if starts and len(starts) != count:
        raise ValueError(
            f"module_start_epochs has {len(starts)} entries, the student has {count} "
            "modules"
        )
    if options.att_global and len(signals.student_uncut) != count:
        raise ValueError("att_global needs Signals.student_uncut, one per module")


class _LocalLoss(nn.Module):
    """J_k of one module and the parameters that belong to it."""

    options: Options
    index: int
    last: bool

    @nn.compact
    def __call__(self, signals: method.Signals, *, train: bool) -> method.ModuleLoss:
        options, k = self.options, self.index
        h = self._typed(signals.student_joints[k])
        z = self._typed(jax.lax.stop_gradient(signals.teacher_joints[k]))
        uncut = self._typed(signals.student_uncut[k]) if options.att_global else h
        adapted, adapted_uncut = self._adapt(h, uncut, z.shape[-1], train)
        u, v = adapters.match_size(adapted, z)

        terms, weights = self._task(signals, h, adapted, z)
        _, attention_weight, feature_weight = options.weights
        weights["feature"] = feature_weight
        mask = options.mask(v)
        reduction = (options.reduction, signals.valid)
        if options.attention == "inside":
            terms["feature"] = attention_loss(u, v, mask, options.power, *reduction)
        else:
            terms["feature"] = feature_loss(u, v, *reduction)
            terms["attention"] = self._attention(signals, uncut, adapted_uncut, z)
            weights["attention"] = attention_weight
        if options.feature_floor < 1:
            share = options.share(signals.epoch)
            weights |= {name: share * weights[name] for name in terms if name in _LOCAL}
        if options.module_start_epochs:
            started = jnp.float32(signals.epoch >= options.module_start_epochs[k])
            weights = {name: started * w for name, w in weights.items()}
        scale = numerics.batch_mean(jnp.square(v.astype(jnp.float32)), signals.valid)
        error = jax.lax.stop_gradient(feature_loss(u, v, "mean", signals.valid))
        error /= jnp.maximum(scale, 1e-12)
        return method.ModuleLoss(
            terms=terms, weights=weights, diagnostics={"feature_error": error}
        )

    def _typed(self, x: jax.Array) -> jax.Array:
        """Returns `x` as float32, or as the networks compute (`maps`)."""
        return x if self.options.maps == "dtype" else x.astype(jnp.float32)

    def _adapt(
        self, h: jax.Array, uncut: jax.Array, channels: int, train: bool
    ) -> tuple[jax.Array, jax.Array]:
        """A(h) and A(uncut); one update of A's running statistics."""
        if self.options.adapter == "shape" and h.shape[-1] == channels:
            return h, uncut
        adapter = adapters.Adapter(channels, h.dtype, name="adapter")
        adapted = adapter(h, train=train)
        if not self.options.att_global:
            return adapted, adapted
        return adapted, adapters.again(adapter, uncut, train=train)

    def _attention(
        self, signals: method.Signals, h: jax.Array, adapted: jax.Array, z: jax.Array
    ) -> jax.Array:
        """L_att of the student's map `h` and its adapted form."""
        options = self.options
        u, v = adapters.match_size(adapted, z)
        if options.attention == "weight":
            mask = options.mask(v)
            reduction = (options.reduction, signals.valid)
            return attention_loss(u, v, mask, options.power, *reduction)
        if options.attention == "map":
            # The student's own map: an adapter could match W for it.
            h, v = adapters.match_size(h, z)
            maps = (options.map(h, "none"), options.map(v, "none"))
            return map_loss(*maps, signals.valid)
        mask = options.mask(z)
        ours = signals.teacher_suffix(
            self.index, mask * adapters.resize_like(adapted, z)
        )
        theirs = signals.teacher_suffix(self.index, mask * z)
        return kd.kd_loss(ours, theirs, options.temperature, signals.valid)

    def _task(
        self, signals: method.Signals, h: jax.Array, adapted: jax.Array, z: jax.Array
    ) -> Weighted:
        """L_h in the last module, and in earlier ones as `task` says."""
        options = self.options
        if self.last:
            logits = signals.student.logits
            return _head_loss(options, signals, logits, "head", options.weights[0])
        if options.task == "last":
            return {}, {}
        if options.task == "aux_heads":
            classes = signals.student.logits.shape[-1]
            pooled = jnp.mean(h, axis=(1, 2))
            logits = nn.Dense(classes, name="aux_head")(pooled)
        else:
            logits = signals.teacher_suffix(
                self.index, adapters.resize_like(adapted, z)
            )
        return _head_loss(options, signals, logits, "task", options.aux_weight)


def _head_loss(
    options: Options,
    signals: method.Signals,
    logits: jax.Array,
    prefix: str,
    weight: float,
) -> Weighted:
    """L_h of `logits` (B, classes) as terms and weights named after `prefix`."""
    ce = f"{prefix}_ce"
    terms = {ce: signals.cross_entropy(logits)}
    if options.head_loss == "ce":
        return terms, {ce: weight}
    divergence = f"{prefix}_kd"
    target = signals.teacher.logits
    if options.standardise:
        logits, target = kd.standardised(logits), kd.standardised(target)
    terms[divergence] = kd.kd_loss(logits, target, options.temperature, signals.valid)
    return terms, {
        ce: weight * options.ce_weight,
        divergence: weight * options.kd_weight,
    }


METHODS = {"lakd": LAKD}
ORDER = 20  # in lists of methods
