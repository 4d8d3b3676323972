"""The block `optim` of the config, see `blocks`."""

import dataclasses
import math
from typing import ClassVar

from lakd_jax import fields

field = fields.field

NAMES = ("sgd", "adamw", "adam", "lamb", "lion")


def class_weights(value: str) -> str:
    """Empty, "balanced", or a positive number per class, separated by commas."""
    if value in ("", "balanced"):
        return ""
    try:
        if all(0 < float(weight) < math.inf for weight in value.split(",")):
            return ""
    except ValueError:
        pass
    return f"must be balanced, or positive numbers such as 1,2.5, is {value!r}"


@dataclasses.dataclass(frozen=True)
class Optim:
    """The optimiser."""

    about: ClassVar[str] = (
        "[optimisers.md](optimisers.md) has recipes, and what accumulation and "
        "averaging do"
    )

    name: str = field("sgd", "sgd | adamw | adam | lamb | lion", fields.one_of(NAMES))
    lr: float = field(0.05, check=fields.above(0))
    lr_batch: int = field(
        0,
        "the batch_size that lr, lr_start and lr_floor are for, others in proportion; "
        "0: any",
        fields.at_least(0),
    )
    momentum: float = field(0.9, "sgd", fields.between(0, 1))
    nesterov: bool = field(False, "sgd")
    dot_delta: float = field(
        0.0,
        "DOT: momentum - this for the labels' losses, momentum + this for all others, "
        "such as 0.075 on CIFAR and 0.09 on ImageNet; 0: one momentum for all.",
        fields.below(1),
    )
    beta1: float = field(0.9, "all but sgd: of the mean gradient", fields.below(1))
    beta2: float = field(
        0.999,
        "adamw, adam, lamb: of the mean square; lion: of its momentum, 0.99 in the "
        "paper",
        fields.below(1),
    )
    eps: float = field(
        1e-8,
        "adamw, adam, lamb (1e-6 in the paper): of the denominator",
        fields.above(0),
    )
    weight_decay: float = field(
        5e-4,
        "on every parameter, as the literature does, see decay_mask; part of the "
        "gradient (sgd, adam) or of the update (adamw, lamb, lion)",
        fields.at_least(0),
    )
    decay_mask: bool = field(
        False,
        "no decay of vectors (biases, scales of norms, layer scales), position "
        "embeddings and class tokens, as is usual with adamw",
    )
    wide_sums: bool = field(
        False,
        "with dtype=bfloat16: sum gradients of kernels over the chips in float32",
    )
    schedule: str = field(
        "step",
        "step | cosine | constant",
        fields.one_of(("step", "cosine", "constant")),
    )
    milestones: tuple[float, ...] = field(
        (150.0, 180.0, 210.0),
        "epochs after which lr falls (step)",
        fields.each(fields.above(0)),
    )
    decay: float = field(0.1, "factor at each milestone", fields.between(0, 1))
    lr_floor: float = field(0.0, "what cosine ends at", fields.at_least(0))
    cosine_from: str = field(
        "warmup",
        "where cosine is counted from: warmup (its end) | start (of the training, as "
        "DeiT does)",
        fields.one_of(("warmup", "start")),
    )
    warmup_epochs: float = field(0.0, "linear, from lr_start", fields.at_least(0))
    lr_start: float = field(
        0.0,
        "of the first step of a warm-up; 0: lr by the number of its steps",
        fields.at_least(0),
    )
    class_weights: str = field(
        "",
        "of the labels' cross-entropy: balanced (by the inverse of a class's number of "
        "images), or a number per class, such as 1,2.5; empty: all alike",
        class_weights,
    )
    clip_norm: float = field(
        0.0, "largest gradient norm of a module; 0: no clipping", fields.at_least(0)
    )
    accumulate: int = field(
        1,
        "parts in which a batch of batch_size is processed, to save memory; the "
        "gradient is their mean, and batch statistics are those of a part",
        fields.at_least(1),
    )
    ema: float = field(
        0.0,
        "share that a moving average of the student's weights keeps in each step, such "
        "as 0.9999; 0: no average",
        fields.below(1),
    )
    ema_warmup: bool = field(
        False, "it grows from 0 to that: 1 - (1 + step)^(-2/3) where this is lower"
    )
    ema_used: bool = field(
        True,
        "the average is what is evaluated and exported; False: the trained weights "
        "are, and the average is tested at the end and kept in "
        "student_average.safetensors",
    )
