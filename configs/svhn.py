"""RTK on SVHN, with the CIFAR-100 recipe: digits of house numbers, 32x32.

    python main.py --config=configs/svhn.py
    python main.py --config=configs/svhn.py:resnet110,resnet20,lakd
    python -m benchmarks.table --data=svhn --pairs=resnet56:resnet20 \\
        --methods=none,kd,rtk --seeds=3 --budget=24 --out=runs/svhn

73,257 training images (1,145 steps of 64 per epoch, the last one short) and 26,032 to
test on; the "extra" split is not used. Images are not mirrored. tfds downloads both
splits (250 MB) and prepares them without TensorFlow.

RTK's paper names SVHN among its data sets, ResNet and WideResNet as networks, and no
more that we know: pairs and training are those of configs/cifar100.py, and no number of
it can be compared. We have not run this recipe; its images come from the path that the
tests prove on a made archive.
"""

from lakd_jax import config as config_lib
from lakd_jax.config import recipes


def get_config(arg: str = "") -> config_lib.ConfigDict:
    """Returns the config for `arg`, TEACHER,STUDENT,METHOD.

    Empty parts default to wrn_40_2,wrn_16_2,rtk.
    """
    c = config_lib.with_pair(recipes.images("svhn"), "wrn_40_2,wrn_16_2,rtk")
    return recipes.cifar(c, arg)
