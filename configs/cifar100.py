"""CIFAR-100 by the recipe that the field's tables are made with.

    python main.py --config=configs/cifar100.py:resnet56,resnet20,kd
    python main.py --config=configs/cifar100.py:resnet32x4,resnet8x4,dkd+at
    python main.py --config=configs/cifar100.py:vgg13,mobilenet_v2,lakd \\
        --config.data.source=folder:/path/to/images
    python -m benchmarks.table --data=cifar100 --pairs=resnet56:resnet20 \\
        --methods=none,kd,lakd --seeds=3 --budget=24 --out=runs/cifar100

All 50,000 training images and no validation split; 240 epochs of batch 64 with the
short last one, 782 steps each; SGD with momentum 0.9, without Nesterov's or a warm-up,
weight decay 5e-4 on everything; a rate of 0.05 (0.01 for MobileNetV2 and ShuffleNets),
a tenth of it from epochs 151, 181 and 211 on, counted from 1; crops of 32 from 4 zero
pixels around, mirror images. Give the pair in the argument: rate and weights that
depend on it (lakd_jax/config/recipes.py) do not follow --config.student.name.

tfds downloads CIFAR-100 (160 MB) and prepares it; a folder holds train/CLASS/x.png and
test/CLASS/x.png. The teacher is trained first, unless --config.teacher.init names one.

Top-1 of the test split as published, resnet56 -> resnet20 and resnet32x4 -> resnet8x4:
teacher 72.34 and 79.42, student alone 69.06 and 72.50, KD 70.66 and 73.33, AT 70.55 and
73.44 (RepDistiller's README), DKD 71.97 and 76.32 (logit-standardization-KD's README).
This family of tables mostly reports the best epoch on the test split, which is 0.1 to
0.5 above the last; ours is the last. All tables: benchmarks/published.json.
"""

from lakd_jax import config as config_lib
from lakd_jax.config import recipes


def get_config(arg: str = "") -> config_lib.ConfigDict:
    """`arg` is TEACHER,STUDENT,METHOD, resnet56,resnet20,lakd where left out."""
    return recipes.cifar(config_lib.default(), arg)
