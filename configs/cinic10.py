"""RTK on CINIC-10, with the CIFAR-100 recipe: ten classes, CIFAR-10 and ImageNet.

    python main.py --config=configs/cinic10.py \\
        --config.data.source=folder:/path/to/CINIC-10
    python main.py --config=configs/cinic10.py:resnet56,resnet20,kd \\
        --config.data.source=folder:/path/to/CINIC-10

The folder is as published (datashare.ed.ac.uk, "CINIC-10 is not ImageNet or CIFAR-10",
650 MB): train, valid and test with a folder for each class, 90,000 images each. `valid`
chooses the best epoch, which is reported beside the last; 1,407 steps of 64 per epoch.
In memory the images take 830 MB.

RTK's paper names CINIC-10 among its data sets, ResNet and WideResNet as networks, and
no more that we know: pairs and training are those of configs/cifar100.py, and no number
of it can be compared. We have not run this recipe.
"""

from lakd_jax import config as config_lib
from lakd_jax.config import recipes


def get_config(arg: str = "") -> config_lib.ConfigDict:
    """Returns the config for `arg`, TEACHER,STUDENT,METHOD.

    Empty parts default to wrn_40_2,wrn_16_2,rtk.
    """
    c = config_lib.with_pair(recipes.images("cinic10"), "wrn_40_2,wrn_16_2,rtk")
    return recipes.cifar(c, arg)
