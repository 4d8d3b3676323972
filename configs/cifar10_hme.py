"""HME on CIFAR-10: ResNet50 -> a tree of experts, as released with KDExplainer.

    python main.py --config=configs/cifar10_hme.py
    python main.py --config=configs/cifar10_hme.py:cifar_resnet50,hme,none
    python main.py --config=configs/cifar10_hme.py --config.hme.layout=split \\
        --config.hme.loss=binary

One command trains the teacher (unless --config.teacher.init names one), then weights
and gates together (stage 1), then the tree selected by the gates (stage 2), for 300
epochs each with batch size 128. In shorter runs, the gates need a lower hme.temperature
to harden, and Adam needs a lower learning rate than the released 0.05:

    python main.py --config=configs/cifar10_hme.py:,,none \\
        --config.data.source=digits --config.data.image_size=16 \\
        --config.data.flip=False --config.data.pad=1 --config.batch_size=32 \\
        --config.epochs=6 --config.hme.temperature=0.2 --config.hme.stage1_lr=0.001

The paper's controls: method none, and none with --config.label_smoothing=0.1.
"""

from lakd_jax import config as config_lib
from lakd_jax.config import recipes


def get_config(arg: str = "") -> config_lib.ConfigDict:
    """Returns the config for `arg`, TEACHER,STUDENT,METHOD; parts may be empty."""
    c = recipes.images("cifar10")
    c.method = "kd"
    c.seed = 1029
    c.epochs = 300  # per stage
    c.batch_size = 128
    c.data.std = (0.2023, 0.1994, 0.2010)  # as released
    c.student.name = "hme"
    c.teacher.name = "cifar_resnet50"
    c.teacher.epochs = 240
    return config_lib.with_pair(c, arg)
