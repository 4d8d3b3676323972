"""CIFAR-10 with the standard CIFAR-100 recipe and CIFAR-10's mean and deviation.

    python main.py --config=configs/cifar10.py:resnet56,resnet20,kd
    python main.py --config=configs/cifar10.py:wrn_40_2,wrn_16_1,lakd \\
        --config.data.source=folder:/path/to/images
    python -m benchmarks.table --data=cifar10 --pairs=resnet56:resnet20 \\
        --methods=none,kd,lakd --seeds=3 --budget=24 --out=runs/cifar10

Training is as described in configs/cifar100.py: 50,000 images, 240 epochs of 782 steps,
no validation split. Give the pair in the argument.

tfds downloads CIFAR-10 (170 MB) and prepares it; a folder holds train/CLASS/x.png and
test/CLASS/x.png. The teacher is trained first, unless --config.teacher.init names one.

The literature has no standard table of distillation on CIFAR-10. Test accuracy of plain
networks, by He et al. and (in parentheses) by akamaster's pytorch_resnet_cifar10:
resnet20 91.25 (91.73), resnet32 92.49 (92.63), resnet44 92.83 (93.10), resnet56 93.03
(93.39), resnet110 93.57 (93.68), with recipes that differ from this one. Gains by
distillation are 0.1 to 0.5: run several seeds.
"""

from lakd_jax import config as config_lib
from lakd_jax.config import recipes


def get_config(arg: str = "") -> config_lib.ConfigDict:
    """Returns the config for `arg`, TEACHER,STUDENT,METHOD.

    Empty parts default to resnet56,resnet20,lakd.
    """
    return recipes.cifar(recipes.images("cifar10"), arg)
