"""The options of LAKD: what its paper leaves open, and what must hold between them.

Q1 to Q14 are the open questions as in docs/design.md; see `lakd_jax.distill.lakd`.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lakd_jax import fields
from lakd_jax.distill import kd, ndam
from lakd_jax.distill.base import rules as rules_lib

CHOICES = {
    "preset": ("default", "literal"),
    "head_loss": ("ce", "ce+kd"),
    "attention": ("weight", "map", "logits", "inside"),
    "power": ("2", "1", "softmax"),
    "f_sum": ndam.F_SUMS,
    "normalise": ndam.NORMALISATIONS,
    "task": ("last", "aux_heads", "teacher_suffix"),
    "reduction": ("mean", "per_sample_sum"),
    "adapter": ("always", "shape"),
    "maps": ("float32", "dtype"),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Every choice LAKD leaves open; ValueError names a field that is wrong.

    What the values of a choice mean:

      preset: `default` weighs (L_h, L_att, L_lf) by `head_weight`,
        `attention_weight`, `feature_weight`; `literal` by alpha,
        (1 - alpha) att_scale, beta. The other set is not read.
      head_loss: Q1, L_h: `ce` (literal) | `ce+kd` ce_weight CE + kd_weight KD.
      attention: Q2, L_att: `weight` both maps weighted by the teacher's mask |
        `map` distance of L2-normalised attention maps of student and teacher |
        `logits` KL of the logits that the teacher's later stages make of the
        weighted maps | `inside` the mask stands in L_lf, no separate term.
      power: Q3, of the mask: `2` (What (u-v))^2, literal | `1` What (u-v)^2 |
        `softmax` HW softmax_HW(What) (u-v)^2.
      window, f_sum, normalise: see `ndam.pooled_map`, `ndam.attention_map`,
        `ndam.normalise`; the mask of `map` is always L2-normalised.
      a, b: of the average and the maximum in W, not alpha and beta of the total (Q13).
      task: Q7, where L_h also goes: `last` module only | `aux_heads` a linear
        classifier on each earlier module's pooled features | `teacher_suffix`
        each earlier module's adapted features through the frozen teacher's own
        later stages. (Through an uncut student: cut_scale=1 in `local`.)
      att_global: Q8, L_att is computed on a forward pass without cuts.
      module_start_epochs: Q9, per module the epoch before which its weights are
        0; () starts all at once.
      reduction: Q11, N_l: `mean` over all elements | `per_sample_sum` over a
        sample's elements, mean over the batch.
      preact: Q12, joints are taken before the last ReLU; done by the step.
      adapter: `always` at every joint | `shape` only where channels differ.
      maps: the type of features, adapters and their maps: `float32` | `dtype` that of
        the networks, such as bfloat16; sums over them are float32 in any case.
      temperature: of KD, in the head and wherever logits are compared.
      standardise: the logits of KD in heads, see `kd.standardised`.
    """

    preset: str = fields.field(
        "default",
        "default | literal (the bare formula; see docs/design.md)",
        fields.one_of(CHOICES["preset"]),
    )
    head_weight: float = fields.field(
        1.0, "of L_h, the loss of the classifier", fields.at_least(0)
    )
    attention_weight: float = fields.field(1.0, "of L_att", fields.at_least(0))
    feature_weight: float = fields.field(1.0, "of L_lf", fields.at_least(0))
    feature_floor: float = fields.field(
        1.0,
        "share of the weights of L_att and L_lf that is left at the end, to which they "
        "fall by a cosine; 1: constant",
        fields.between(0, 1),
    )
    epochs: int = fields.field(240, source="epochs")
    alpha: float = fields.field(
        0.5,
        "preset=literal: L = alpha L_h + (1-alpha) s L_att + beta L_lf",
        fields.between(0, 1),
    )
    beta: float = fields.field(100.0, check=fields.at_least(0))
    att_scale: float = fields.field(1.0, "s above", fields.at_least(0))
    head_loss: str = fields.field(
        "ce+kd",
        "Q1: ce | ce+kd (weights and temperature in kd)",
        fields.one_of(CHOICES["head_loss"]),
    )
    ce_weight: float = fields.field(kd.KD.ce_weight, source="kd.ce_weight")
    kd_weight: float = fields.field(kd.KD.kd_weight, source="kd.kd_weight")
    temperature: float = fields.field(kd.KD.temperature, source="kd.temperature")
    standardise: bool = fields.field(kd.KD.standardise, source="kd.standardise")
    attention: str = fields.field(
        "weight",
        "Q2: weight | map | logits | inside",
        fields.one_of(CHOICES["attention"]),
    )
    power: str = fields.field(
        "2",
        "Q3: of the mask on the squared error: 2 | 1 | softmax",
        fields.one_of(CHOICES["power"]),
    )
    window: int = fields.field(
        3, "Q4: side of the pooling window; 0: the whole map", fields.at_least(0)
    )
    stride: int = fields.field(
        1, "Q4: above 1, pooled coarsely and enlarged again", fields.at_least(1)
    )
    f_sum: str = fields.field(
        "abs",
        "Q5: sum over channels of: abs | signed | square",
        fields.one_of(CHOICES["f_sum"]),
    )
    normalise: str = fields.field(
        "mean",
        "Q6: mean | l2 | max | sigmoid | none",
        fields.one_of(CHOICES["normalise"]),
    )
    a: float = fields.field(
        0.5, "weight of average pooling in the mask", fields.at_least(0)
    )
    b: float = fields.field(
        0.5, "weight of max pooling in the mask", fields.at_least(0)
    )
    task: str = fields.field(
        "last",
        "Q7: last | aux_heads | teacher_suffix",
        fields.one_of(CHOICES["task"]),
    )
    aux_weight: float = fields.field(
        1.0, "of the earlier modules' task loss, when they have one", fields.at_least(0)
    )
    att_global: bool = fields.field(False, "Q8: L_att crosses the cuts")
    module_start_epochs: tuple[float, ...] = fields.field(
        (), source="local.module_start_epochs"
    )
    reduction: str = fields.field(
        "mean", "Q11: mean | per_sample_sum", fields.one_of(CHOICES["reduction"])
    )
    preact: bool = fields.field(
        False, "Q12: compare before the last ReLU (stage ends only)"
    )
    adapter: str = fields.field(
        "always",
        "always | shape: 1x1 convolution only where widths differ",
        fields.one_of(CHOICES["adapter"]),
    )
    maps: str = fields.field(
        "float32",
        "adapted features and their maps: float32 | dtype (of the networks), which "
        "takes less memory and time on accelerators",
        fields.one_of(CHOICES["maps"]),
    )

    def __post_init__(self):
        object.__setattr__(self, "power", str(self.power))
        object.__setattr__(self, "module_start_epochs", tuple(self.module_start_epochs))
        fields.require(self)
        if self.att_global and self.attention == "inside":
            raise ValueError(
                "att_global needs a separate L_att; attention='inside' has none"
            )

    @property
    def weights(self) -> tuple[float, float, float]:
        """Factors of (L_h, L_att, L_lf)."""
        if self.preset == "literal":
            return self.alpha, (1 - self.alpha) * self.att_scale, self.beta
        return self.head_weight, self.attention_weight, self.feature_weight

    def share(self, epoch: jax.Array) -> jax.Array:
        """Returns the share of the weights of L_att and L_lf in effect at `epoch`."""
        fall = optax.cosine_decay_schedule(1.0, self.epochs, self.feature_floor)
        return jnp.asarray(fall(epoch))

    def mask(self, features: jax.Array) -> jax.Array:
        """Returns What of features (B, H, W, C): (B, H, W, 1), no gradient."""
        return jax.lax.stop_gradient(self.map(features, self.normalise))

    def map(self, features: jax.Array, kind: str) -> jax.Array:
        """Returns W of features (B, H, W, C), normalised: (B, H, W, 1) float32."""
        summed = ndam.attention_map(features, self.f_sum)
        pooled = ndam.pooled_map(summed, self.a, self.b, self.window, self.stride)
        return ndam.normalise(pooled, kind)


def needs_logits(task: str, head_loss: str) -> bool:
    """Whether modules before the last are compared with the teacher's logits."""
    return task != "last" and head_loss == "ce+kd"


def needs_suffix(task: str, attention: str) -> bool:
    """Whether the teacher is run on from features of the student."""
    return task == "teacher_suffix" or attention == "logits"


def _weights(options: Any, run: rules_lib.Run) -> str:
    if options.preset != "default":
        return ""
    rule = rules_lib.some_weight("head_weight", "attention_weight", "feature_weight")
    return rule(options, run)


def _mask(options: Any, run: rules_lib.Run) -> str:
    if options.a or options.b:
        return ""
    return "lakd.a and lakd.b are both 0: the mask would be empty"


def _att_global(options: Any, run: rules_lib.Run) -> str:
    if not options.att_global or options.attention != "inside":
        return ""
    return "lakd.att_global needs a separate L_att; lakd.attention=inside has none"


def _att_global_input(options: Any, run: rules_lib.Run) -> str:
    if not options.att_global or run["local.module_input"] == "student":
        return ""
    return "lakd.att_global needs local.module_input=student: no gradient crosses"


def _preact(options: Any, run: rules_lib.Run) -> str:
    if not options.preact or run["local.granularity"] in ("stage", "none"):
        return ""
    return "lakd.preact needs local.granularity=stage or none"


def _preact_suffix(options: Any, run: rules_lib.Run) -> str:
    if not (options.preact and needs_suffix(options.task, options.attention)):
        return ""
    return (
        "lakd.preact cannot go with lakd.task=teacher_suffix or lakd.attention=logits: "
        "the teacher goes on from what its blocks put out"
    )


def _module_starts(options: Any, run: rules_lib.Run) -> str:
    starts = options.module_start_epochs
    if not starts or len(starts) == len(run.modules):
        return ""
    return (
        f"local.module_start_epochs has {len(starts)} entries, the student "
        f"{len(run.modules)} modules"
    )


def _module_input(options: Any, run: rules_lib.Run) -> str:
    if run["local.module_input"] == "student":
        return ""
    for joint in run.joints[:-1]:  # the last one feeds no module
        if joint.student == joint.teacher:
            continue
        ours, theirs = joint.student[-1], joint.teacher[-1]
        has = f"{ours} channels and the teacher {theirs}"
        if ours == theirs:
            sizes = ["x".join(map(str, s[1:3])) for s in (joint.student, joint.teacher)]
            has = f"maps of {sizes[0]} and the teacher of {sizes[1]}"
        return (
            f"local.module_input=teacher: at {joint.name!r} the student has {has}; use "
            "local.module_input=student"
        )
    return ""


RULES: tuple[rules_lib.Rule, ...] = (
    _weights,
    _mask,
    _att_global,
    _preact,
    _preact_suffix,
    _att_global_input,
    _module_starts,
    _module_input,
)
