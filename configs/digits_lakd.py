"""LAKD on 1,797 real scanned digits, a few minutes on two CPU cores.

    python main.py --config=configs/digits_lakd.py

Teacher resnet20, student resnet8, images enlarged to 16x16. Trains the teacher, then
the student alone, with KD and with LAKD, and prints a comparison. RESULTS.md has the
results of five seeds.
"""

from lakd_jax import config as config_lib
from lakd_jax.config import recipes


def get_config(arg: str = "") -> config_lib.ConfigDict:
    """Returns the config for the method `arg`, lakd by default."""
    c = recipes.images("digits")
    c.method = arg or "lakd"
    c.baselines = tuple(m for m in ("none", "kd") if m != c.method)
    c.epochs = 10
    c.batch_size = 64
    c.log_every = 10
    c.student.name = "resnet8"
    c.teacher.name = "resnet20"
    c.optim.lr = 0.05
    c.optim.schedule = "cosine"
    c.optim.warmup_epochs = 1.0
    return c
