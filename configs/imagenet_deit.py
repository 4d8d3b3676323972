"""DeiT on ImageNet: a transformer learns a CNN's answers with its distillation token.

    python main.py --config=configs/imagenet_deit.py --workdir=runs/deit \\
        --config.data.data_dir=TFDS
    python main.py --config=configs/imagenet_deit.py:resnet50,deit_small,none ...

The defaults of the public code's main.py, in batches of 1024 as its README trains
DeiT-tiny and DeiT-small: 300 epochs without the short last batch, AdamW at 5e-4 x 1024
/ 512, weight decay 0.05 but for vectors and tokens, five epochs of warm-up from 1e-6, a
cosine to 1e-5 counted from the first epoch, stochastic depth 0.1; random resized crops
of 224, flips, RandAugment (rand-m9-mstd0.5-inc1, two operations), random erasing 0.25,
mixup 0.8 or CutMix 1.0 in each step, label smoothing 0.1; half cross-entropy, half the
teacher's answer. Of the average of the weights (0.99996) the public code keeps a copy,
and reports the trained weights; so does this. Evaluation is on the central 224 of 256.

What differs: an epoch of the public code shows a third of the images, each in three
augmented copies (repeated augmentation); it resizes crops by bicubic interpolation
where we average pixels, changes the rate by the epoch where we change it by the step,
computes in float16, and has a RegNetY-16GF as teacher, which is not among our networks.
It reports 74.5, 81.2 and 83.4 % for the distilled deit_tiny, deit_small and deit_base,
72.2, 79.9 and 81.8 % for those without a teacher. We have not run this recipe to the
end.

The teacher, torchvision's resnet50 with 80.9 %, is fetched by its name; give others as
teacher.init (--mode=teachers lists names). configs/imagenet_lakd.py says how to prepare
the data.
"""

from lakd_jax import config as config_lib
from lakd_jax.config import recipes


def get_config(arg: str = "") -> config_lib.ConfigDict:
    """Returns the config for `arg`, TEACHER,STUDENT,METHOD.

    Empty parts default to resnet50,deit_small_distilled,deit.
    """
    c = recipes.imagenet()
    c.update(method="deit", epochs=300, batch_size=1024, eval_batch_size=1024)
    c.label_smoothing = 0.1
    c.data.update(drop_last=True, policy="rand-2-9", erase=0.25, mixup=0.8, cutmix=1.0)
    c.optim.update(
        name="adamw",
        lr=1e-3,
        weight_decay=0.05,
        decay_mask=True,
        schedule="cosine",
        cosine_from="start",
        lr_floor=1e-5,
        warmup_epochs=5.0,
        lr_start=1e-6,
        ema=0.99996,
        ema_used=False,
    )
    c.student.name, c.teacher.name = "deit_small_distilled", "resnet50"
    c.student.drop_path = 0.1
    c = config_lib.with_pair(c, arg)
    if c.teacher.name == "resnet50":
        c.teacher.init = "torchvision:resnet50.IMAGENET1K_V2"
    return c
