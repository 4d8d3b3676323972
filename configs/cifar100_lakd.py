"""LAKD on CIFAR-100: resnet56 -> resnet20 with the usual protocol.

    python main.py --config=configs/cifar100_lakd.py
    python main.py --config=configs/cifar100_lakd.py:resnet32x4,resnet8x4,lakd

240 epochs of batch size 64 (the short last batch is used), SGD at 0.05 with momentum
0.9 and weight decay 5e-4, learning rate divided by 10 after 150, 180 and 210 epochs,
crops of 32 after padding with 4 pixels, horizontal flips. tfds downloads CIFAR-100
(160 MB). Unlike in the published tables, a tenth of the training split is held out for
choosing the best epoch; --config.data.minival=0 trains on all of it and reports the
last epoch only.
"""

from lakd_jax import config as config_lib
from lakd_jax.config import recipes


def get_config(arg: str = "") -> config_lib.ConfigDict:
    """Returns the config for `arg`, TEACHER,STUDENT,METHOD; parts may be empty."""
    return config_lib.with_pair(recipes.images("cifar100"), arg)
