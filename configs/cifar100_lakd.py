"""LAKD on CIFAR-100: resnet56 -> resnet20 with the field's protocol.

    python main.py --config=configs/cifar100_lakd.py
    python main.py --config=configs/cifar100_lakd.py:resnet32x4,resnet8x4,lakd

240 epochs of batch 64 (the short last one kept), SGD at 0.05 with momentum 0.9 and
weight decay 5e-4, a tenth of the rate after 150, 180 and 210 epochs, crops of 32
from 4 pixels of padding, mirror images. tfds downloads CIFAR-100 (160 MB). Unlike
the published tables, a tenth of the training split is kept for choosing the best
epoch; --config.data.minival=0 trains on all of it and reports the last epoch only.
"""

from lakd_jax import config as config_lib


def get_config(arg: str = "") -> config_lib.ConfigDict:
    """`arg` is TEACHER,STUDENT,METHOD; what is left out stays as above."""
    return config_lib.with_pair(config_lib.default(), arg)
