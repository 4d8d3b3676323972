"""What the field's CIFAR-100 recipe sets by the pair of networks.

The rest of the recipe is the same for all pairs and stands in `lakd_jax.config`. The
facts are those of the CIFAR-100 configurations published with CRD (learning rates),
mdistiller and Scale Decoupled Distillation (the others).
"""

import math

from lakd_jax import config as config_lib
from lakd_jax.config import methods

EPOCHS = 240  # what the methods' warm-ups are counted in

_RATE = 0.05
_MOBILE_RATE = 0.01
_MOBILE = ("mobilenet_v2", "shuffle_v1", "shuffle_v2")

# dkd.beta is 8 where nothing else is said.
_VGG_BETA = 6.0
_PAIRS = {
    ("resnet56", "resnet20"): {"dkd.beta": 2.0},
    ("resnet110", "resnet32"): {"dkd.beta": 2.0},
    ("wrn_40_2", "wrn_16_2"): {"dkd.beta": 6.0},
    ("wrn_40_2", "wrn_40_1"): {"dkd.beta": 6.0},
    ("resnet32x4", "mobilenet_v2"): {"dkd.beta": 6.0},
    ("resnet32x4", "resnet8x4"): {"review.weight": 5.0},
}


def rate(network: str) -> float:
    """The learning rate that a network is trained with, as teacher or student."""
    return _MOBILE_RATE if network in _MOBILE else _RATE


def of_pair(teacher: str, student: str) -> dict[str, float]:
    """The methods' fields that the published configurations set for this pair."""
    vgg = any(name.startswith("vgg") for name in (teacher, student))
    fields = {"dkd.beta": _VGG_BETA} if vgg else {}
    return fields | _PAIRS.get((teacher, student), {})


def cifar(config: config_lib.ConfigDict, arg: str) -> config_lib.ConfigDict:
    """`config` under the recipe for the pair in `arg`, "TEACHER,STUDENT,METHOD".

    Nothing of the training split is kept apart: 50,000 images, 782 steps an epoch.

    Raises:
      ValueError: more than three parts.
    """
    c = config_lib.with_pair(config, arg)
    known = config_lib.flat(c)
    own = of_pair(c.teacher.name, c.student.name)
    fields = {
        "epochs": EPOCHS,
        "data.minival": 0.0,
        "optim.lr": rate(c.student.name),
        "teacher.lr": rate(c.teacher.name),
        # Methods come one by one; a fact about one that is not here yet waits for it.
        **{field: value for field, value in own.items() if field in known},
    }
    return config_lib.changed(c, fields)


def shortened(config: config_lib.ConfigDict, epochs: int) -> dict[str, object]:
    """The fields that make `config` one of `epochs` epochs, all else in proportion.

    Milestones and the learning rate's warm-up keep their share of the training; the
    methods' own durations keep their share of the recipe's 240, whatever the config.
    """
    share = epochs / config.epochs
    fields: dict[str, object] = {
        "epochs": epochs,
        "optim.milestones": tuple(m * share for m in config.optim.milestones),
        "optim.warmup_epochs": config.optim.warmup_epochs * share,
    }
    for method in methods.blocks():
        for name, value in config[method].items():
            if name.endswith("_epochs"):
                fields[f"{method}.{name}"] = _scaled(value, epochs / EPOCHS)
    now = config_lib.flat(config)
    return {
        name: value
        for name, value in fields.items()
        if not (isinstance(value, float) and math.isclose(value, now[name]))
        and value != now[name]
    }


def _scaled(value: float | tuple[float, ...], share: float) -> object:
    """A duration, or several, times `share`."""
    if isinstance(value, tuple):
        return tuple(each * share for each in value)
    return value * share
