"""LAKD on ImageNet: ResNet-34 -> ResNet-18 with the usual 100-epoch protocol.

    python main.py --config=configs/imagenet_lakd.py --workdir=runs/imagenet \
        --config.data.data_dir=TFDS
    python main.py --config=configs/imagenet_lakd.py:resnet50,mobilenet_v1,lakd ...

SGD at 0.2 for batches of 512 (scaled linearly for others), momentum 0.9, weight decay
1e-4, learning rate divided by 10 after 30, 60 and 90 epochs; random resized crops of
224 and horizontal flips; evaluation on the central 224 of 256; bfloat16. kd and the
head of lakd: 0.5 CE + 0.5 KD at T = 1; dkd, rld: T = 1, beta 0.5 (2 for mobilenet_v1),
one epoch of warm-up; wkd_l, wkd_f, deepkd: as published for these two pairs.

Teacher: torchvision's first weights of the network, if it has any (--mode=teachers).
They are fetched once into `teacher.cache`, checked, and evaluated first: 73.3 % for
ResNet-34, 76.1 % for ResNet-50. --config.teacher.init=FILE takes others (.pth or
.safetensors); empty, the teacher is trained here.

Data: tfds's imagenet2012. Put ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar into
TFDS/downloads/manual and run, with the `tf` extra (150 GB, several hours, once):

    tfds build imagenet2012 --file_format=array_record --data_dir=TFDS

Data prepared as TFRecord can be read as well; reading neither needs TensorFlow.
Alternatively, --config.data.source=folder:DIR with DIR/train/CLASS/x.JPEG and
DIR/test/CLASS/x.JPEG.

Set --config.data.workers to the number of the host's cores: docs/scaling.md estimates
how many images per second a device consumes. We have not run this recipe to the end.
The student should reach the published 69.8 % alone and 70.7 to 71.0 % with kd (tables
of Scale Decoupled Distillation and mdistiller); no result of LAKD is known. One run
takes about 2.3e18 floating-point operations for this pair, six hours on a device that
performs 1.1e14 per second (computed, not measured).
"""

from lakd_jax import config as config_lib
from lakd_jax.config import recipes
from lakd_jax.interop import published


def get_config(arg: str = "") -> config_lib.ConfigDict:
    """Returns the config for `arg`, TEACHER,STUDENT,METHOD; parts may be empty."""
    c = recipes.imagenet()
    c.update(epochs=100, batch_size=512, eval_batch_size=512)
    c.optim.update(
        lr=0.2, lr_batch=512, weight_decay=1e-4, milestones=(30.0, 60.0, 90.0)
    )
    c.kd.update(ce_weight=0.5, kd_weight=0.5, temperature=1.0)
    c.student.name, c.teacher.name = "resnet18", "resnet34"
    c = config_lib.with_pair(c, arg)
    c.teacher.init = published.first_of("torchvision", c.teacher.name)
    mobile = c.student.name.startswith("mobilenet")
    beta = 2.0 if mobile else 0.5
    c.dkd.update(temperature=1.0, beta=beta, warmup_epochs=1.0)
    c.rld.update(temperature=1.0, alpha_temperature=1.0, beta=beta, warmup_epochs=1.0)
    c.deepkd.update(temperature=1.0, beta=1.0, warmup_epochs=1.0, others_delta=0.05)
    c.deepkd.share_epochs = (0.0, 100.0)
    c.wkd_l.update(weight=30.0, temperature=2.0, decay_after_epochs=0.0)
    c.wkd_f.update(weight=0.02, mean_weight=2.0, grid=4, decay_after_epochs=0.0)
    c.wkd_f.projector = "bottleneck"
    if mobile:
        c.deepkd.update(beta=2.0, others_delta=0.075)
        c.wkd_l.update(weight=25.0, sharpness=2.0)
        c.wkd_f.update(weight=0.005, decay_after_epochs=30.0)
    return c
