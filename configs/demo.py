"""What distillation gives where images are few: `make demo`.

    python main.py --config=configs/demo.py --workdir=runs/demo

The teacher, resnet20, learns 1,797 real scanned digits, enlarged to 16x16. The student,
resnet8, sees five of each: alone, with KD and with LAKD, three seeds each.
"""

from lakd_jax import config as config_lib
from lakd_jax.config import recipes


def get_config() -> config_lib.ConfigDict:
    """Returns the config of the demo."""
    c = recipes.images("digits")
    c.method, c.baselines, c.seeds = "lakd", ("none", "kd"), (0, 1, 2)
    c.epochs, c.teacher.epochs = 40, 10
    # Batches without a short one: a second program would be compiled for it.
    c.batch_size, c.data.drop_last = 25, True
    c.data.per_class = 5
    c.eval_batch_size, c.eval_every = 180, 4
    c.log_every = c.checkpoint.every_steps = 40
    c.student.name, c.teacher.name = "resnet8", "resnet20"
    c.optim.update(lr=0.05, schedule="cosine", warmup_epochs=1.0)
    return c
