"""CIFAR-100 with the recipe behind the published tables of distillation.

    python main.py --config=configs/cifar100.py:resnet56,resnet20,kd
    python main.py --config=configs/cifar100.py:resnet32x4,resnet8x4,dkd+at
    python main.py --config=configs/cifar100.py:vgg13,mobilenet_v2,lakd \\
        --config.data.source=folder:/path/to/images
    python -m benchmarks.table --data=cifar100 --pairs=resnet56:resnet20 \\
        --methods=none,kd,lakd --seeds=3 --budget=24 --out=runs/cifar100

All 50,000 training images and no validation split; 240 epochs of batch size 64, 782
steps each, including the short last batch; SGD with momentum 0.9, without Nesterov
momentum or warm-up; weight decay 5e-4 on all parameters; learning rate 0.05 (0.01 for
MobileNetV2 and ShuffleNets), divided by 10 at the start of epochs 151, 181 and 211
(counted from 1); crops of 32 after padding with 4 zeros, horizontal flips. Give the
pair in the argument: learning rate and weights that depend on it
(lakd_jax/config/recipes.py) do not follow --config.student.name.

tfds downloads CIFAR-100 (160 MB) and prepares it; a folder holds train/CLASS/x.png and
test/CLASS/x.png. The teacher is trained first, unless --config.teacher.init names one.

Published top-1 test accuracy, resnet56 -> resnet20 and resnet32x4 -> resnet8x4:
teacher 72.34 and 79.42, student alone 69.06 and 72.50, KD 70.66 and 73.33, AT 70.55 and
73.44 (RepDistiller's README), DKD 71.97 and 76.32 (logit-standardization-KD's README).
Most of these tables report the best epoch on the test split, which is 0.1 to 0.5 above
the last epoch; we report the last. All tables: benchmarks/published.json.
"""

from lakd_jax import config as config_lib
from lakd_jax.config import recipes


def get_config(arg: str = "") -> config_lib.ConfigDict:
    """Returns the config for `arg`, TEACHER,STUDENT,METHOD.

    Empty parts default to resnet56,resnet20,lakd.
    """
    return recipes.cifar(recipes.images("cifar100"), arg)
