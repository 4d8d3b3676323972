"""The images of known data sets, and the CIFAR-100 recipe by the pair of networks.

The rest of the CIFAR recipe is the same for all pairs and is the default of the config.
The values are those of the CIFAR-100 configurations published with CRD (learning
rates), mdistiller and Scale Decoupled Distillation (the others).
"""

import fnmatch
import math
from typing import Any

from lakd_jax import config as config_lib
from lakd_jax.config import listing
from lakd_jax.distill.base import registry

# Fields of `data`: where the images are, their mean and deviation, and how they are
# augmented where not as CIFAR. Mean and deviation are those that public code uses, with
# four digits; SVHN's are of the train split without "extra", CINIC-10's its authors'.
IMAGES: dict[str, dict[str, Any]] = {
    "cifar10": {
        "source": "cifar10",
        "mean": (0.4914, 0.4822, 0.4465),
        "std": (0.2470, 0.2435, 0.2616),
    },
    "cifar100": {},  # the default
    "svhn": {
        "source": "svhn_cropped",
        "mean": (0.4377, 0.4438, 0.4728),
        "std": (0.1980, 0.2010, 0.1970),
        "flip": False,  # a mirrored digit is a different symbol
    },
    "cinic10": {
        "source": "folder:CINIC-10",
        "mean": (0.4789, 0.4723, 0.4305),
        "std": (0.2421, 0.2383, 0.2587),
    },
    "digits": {
        "source": "digits",
        "image_size": 16,
        "mean": (0.3, 0.3, 0.3),
        "std": (0.35, 0.35, 0.35),
        "pad": 1,
        "flip": False,
    },
    "imagenet": {
        "source": "imagenet2012",
        "image_size": 224,
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "pad": 0,
    },
}
EPOCHS = 240  # what the methods' warm-ups are counted in

_RATE = 0.05
_MOBILE_RATE = 0.01
_MOBILE = ("mobilenet_v2", "shuffle_v1", "shuffle_v2")


def rate(network: str) -> float:
    """Returns the learning rate of a network, as teacher or student."""
    return _MOBILE_RATE if network in _MOBILE else _RATE


def of_pair(teacher: str, student: str) -> dict[str, float]:
    """Returns the methods' fields that the published configurations set for a pair.

    Each method declares its own, see `lakd_jax.distill.base.method.Pairs`.
    """
    return {
        f"{method}.{option}": value
        for method, entry in registry.TABLE.items()
        for patterns, values in entry.fact("pairs", {}).items()
        if all(map(fnmatch.fnmatchcase, (teacher, student), patterns))
        for option, value in values.items()
    }


def cifar(config: config_lib.ConfigDict, arg: str) -> config_lib.ConfigDict:
    """Returns `config` with the recipe for the pair in "TEACHER,STUDENT,METHOD".

    Nothing of the training split is held out: 50,000 images, 782 steps per epoch.

    Raises:
      ValueError: more than three parts.
    """
    c = config_lib.with_pair(config, arg)
    fields = {
        "epochs": EPOCHS,
        "data.minival": 0.0,
        "optim.lr": rate(c.student.name),
        "teacher.lr": rate(c.teacher.name),
        **of_pair(c.teacher.name, c.student.name),
    }
    return config_lib.changed(c, fields)


def images(name: str) -> config_lib.ConfigDict:
    """Returns the default config with a data set of `IMAGES`."""
    fields = {f"data.{field}": value for field, value in IMAGES[name].items()}
    return config_lib.changed(config_lib.default(), fields)


def imagenet() -> config_lib.ConfigDict:
    """Returns what recipes for ImageNet share: streamed images of 224, in bfloat16."""
    config = images("imagenet")
    config.dtype = "bfloat16"
    config.data.update(streaming=True, test_resize=256, minival=0.0, workers=16)
    return config


def shortened(config: config_lib.ConfigDict, epochs: int) -> dict[str, object]:
    """Returns the fields that shorten `config` to `epochs` epochs, in proportion.

    Milestones and the learning rate's warm-up keep their share of the training; the
    methods' own durations keep their share of the recipe's 240, whatever the config.
    """
    share = epochs / config.epochs
    fields: dict[str, object] = {
        "epochs": epochs,
        "optim.milestones": tuple(m * share for m in config.optim.milestones),
        "optim.warmup_epochs": config.optim.warmup_epochs * share,
    }
    for block in listing.of_methods():
        for name, value in config[block.name].items():
            if name.endswith("_epochs"):
                fields[f"{block.name}.{name}"] = _scaled(value, epochs / EPOCHS)
    now = config_lib.flat(config)
    return {
        name: value
        for name, value in fields.items()
        if not (isinstance(value, float) and math.isclose(value, now[name]))
        and value != now[name]
    }


def _scaled(value: float | tuple[float, ...], share: float) -> object:
    """Scales a duration, or several."""
    if isinstance(value, tuple):
        return tuple(each * share for each in value)
    return value * share
