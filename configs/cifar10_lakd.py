"""LAKD on CIFAR-10: resnet56 -> resnet20 with the usual 240 epochs.

    python main.py --config=configs/cifar10_lakd.py
    python main.py --config=configs/cifar10_lakd.py \\
        --config.data.source=folder:/path/to/images
    python main.py --config=configs/cifar10_lakd.py:resnet110,resnet32,kd

With the first command, tfds downloads CIFAR-10 (170 MB); a folder holds
train/CLASS/x.png and test/CLASS/x.png. The teacher is trained first unless
--config.teacher.init names a finished run or a PyTorch file. Both trainings are
meant for an accelerator; RESULTS.md has shorter ones on two CPU cores.
"""

from lakd_jax import config as config_lib
from lakd_jax.config import recipes


def get_config(arg: str = "") -> config_lib.ConfigDict:
    """Returns the config for `arg`, TEACHER,STUDENT,METHOD; parts may be empty."""
    return config_lib.with_pair(recipes.images("cifar10"), arg)
