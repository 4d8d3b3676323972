"""CIFAR-100 with the strong augmentation of recent logit methods.

    python main.py --config=configs/cifar100_strong.py:resnet32x4,resnet8x4,mlkd \\
        --config.teacher.init=resnet32x4.pth

The strong view of Multi-Level Logit Distillation (CVPR 2023) and CRLD (ACM MM 2024),
the same in their public code: after the usual crop and flip two random operations of 14
at random strengths (FixMatch's list), then a grey square of at most half the image's
side (`data.policy=fixmatch`). All else is configs/cifar100.py, which is CRLD's
schedule, too: 240 epochs of batch size 64, SGD at 0.05 (0.01 for MobileNetV2 and
ShuffleNets), divided by 10 after 150, 180 and 210. MLKD's differs: 0.025 for 240
epochs; 0.01 for 480 or 960 with MobileNetV2 and ShuffleNets (--config.optim.lr,
--config.epochs).

Both train on two views of each image in every step, the plain one and the strong one.
Here there is one view, the strong one, so results are not comparable with theirs to the
letter. DIST's public CIFAR recipe (dist_cifar.yaml) has crop and flip only, which is
configs/cifar100.py:TEACHER,STUDENT,dist.

Their teachers were trained without this: give teacher.init. A teacher that is trained
on the way is trained with the data of this file. We have not run this recipe to the
end.
"""

from lakd_jax import config as config_lib
from lakd_jax.config import recipes


def get_config(arg: str = "") -> config_lib.ConfigDict:
    """Returns the config for `arg`, TEACHER,STUDENT,METHOD.

    Empty parts default to resnet56,resnet20,lakd.
    """
    c = recipes.cifar(recipes.images("cifar100"), arg)
    c.data.policy = "fixmatch"
    return c
