"""The blocks of the config that belong to no method: every field, declared once.

A class is a block, a field of it a field of the block. Options of methods are declared
by the methods, in `lakd_jax.distill`, and those of the optimiser in `optimiser.py`.
"""

import dataclasses
from typing import ClassVar

from lakd_jax import fields, paths, trackers
from lakd_jax.config import values
from lakd_jax.data import policy
from lakd_jax.local import cuts as cuts_lib
from lakd_jax.models import ensemble, vam

field = fields.field

SEEDS = 2**32  # of a larger one JAX would take the lower 32 bits
_SEED = fields.between(0, SEEDS - 1)
_AT_LEAST_0, _AT_LEAST_1 = fields.at_least(0), fields.at_least(1)
_POSITIVE = fields.above(0)


@dataclasses.dataclass(frozen=True)
class Run:
    """The fields outside of any block; the CIFAR protocol of the literature."""

    method: str = field(
        "lakd",
        "none (plain training), a name of docs/methods.md, or a sum such as dkd+at",
        values.method,
    )
    seed: int = field(0, "initialisation, order and augmentation follow from it", _SEED)
    seeds: tuple[int, ...] = field(
        (),
        "a run each, in WORKDIR/seed0, ...; empty: one run, of `seed`",
        fields.each(fields.whole(0, SEEDS - 1)),
    )
    epochs: int = field(240, check=_AT_LEAST_1)
    batch_size: int = field(64, "global, over all devices", _AT_LEAST_1)
    eval_batch_size: int = field(512, check=_AT_LEAST_1)
    dtype: str = field(
        "float32",
        "compute type: float32 | bfloat16; losses stay float32",
        fields.one_of(("float32", "bfloat16")),
    )
    label_smoothing: float = field(
        0.0,
        "share of each label that all classes divide, in every cross-entropy with "
        "labels",
        fields.below(1),
    )
    teachers: tuple[str, ...] = field(
        (),
        "several teachers in place of teacher.init, each as it takes them: INIT or "
        "NETWORK=INIT; the first is of the network teacher.name, whose features are "
        "compared",
        fields.each(values.teacher_entry),
    )
    baselines: tuple[str, ...] = field(
        (),
        "methods trained first, in WORKDIR/METHOD, for the table",
        fields.each(values.method),
    )
    log_every: int = field(50, "steps between two lines of metrics", _AT_LEAST_1)
    log_updates: bool = field(
        False,
        "log how far the weights of each stage move, for --mode=explain --points",
    )
    trackers: tuple[str, ...] = field(
        trackers.DEFAULT,
        "where metrics go beside metrics.jsonl: tensorboard | wandb | trackio, or your "
        "own; may change when a run resumes",
        fields.each(trackers.fault),
    )
    eval_every: int = field(1, "epochs between two evaluations on minival", _AT_LEAST_1)
    steps_per_dispatch: int = field(
        0, "steps in one program; 0: 1 on CPU, else 50", _AT_LEAST_0
    )
    compile_cache: str = field(
        "runs/compiled", "compiled programs, for the next start; or empty", values.cache
    )


@dataclasses.dataclass(frozen=True)
class Data:
    """The images, and how they are augmented."""

    source: str = field(
        "cifar100", "digits | folder:PATH | npz:PATH | a tfds name", values.data_source
    )
    data_dir: str = field(
        "", "where tfds keeps its sets; empty: its own default", paths.fault
    )
    image_size: int = field(
        0, "resize and centre crop to this; 0: as they are", _AT_LEAST_0
    )
    minival: float = field(
        0.1,
        "share of the training split kept to choose the best epoch",
        fields.between(0, 0.5),
    )
    per_class: int = field(
        0,
        "the student sees so many training images of each class, chosen by seed; a "
        "teacher that is trained here sees all; 0: all",
        _AT_LEAST_0,
    )
    test_share: float = field(
        0.0,
        "share of the images to test on, for a set without a test split; 0: there is "
        "one",
        fields.below(1),
    )
    orientation: bool = field(True, "photos are turned as their EXIF tag says")
    max_bad: int = field(
        0,
        "undecodable training images that may be left out; more: an error",
        _AT_LEAST_0,
    )
    mean: tuple[float, ...] = field(
        (0.5071, 0.4867, 0.4408),
        "of the pixels in 0..1, per channel",
        fields.channels(values.pixel_mean, empty=False),
    )
    std: tuple[float, ...] = field(
        (0.2675, 0.2565, 0.2761),
        "above 0, at most 1, per channel",
        fields.channels(values.pixel_deviation, empty=False),
    )
    pad: int = field(
        4, "zero pixels around the image before the random crop", _AT_LEAST_0
    )
    flip: bool = field(True, "random horizontal mirror image")
    jitter: float = field(
        0.0,
        "brightness, contrast and saturation change by at most this share",
        fields.between(0, 1),
    )
    policy: str = field(
        "",
        "random operations: trivial (TrivialAugmentWide) | rand-N-M (RandAugment: N "
        "operations at level M of 10) | fixmatch (strong view of MLKD and CRLD)",
        policy.fault,
    )
    erase: float = field(
        0.0, "probability that a box is replaced by noise", fields.between(0, 1)
    )
    mixup: float = field(
        0.0,
        "images and labels are mixed with those of a partner in the batch: a of "
        "Beta(a, a); 0: not",
        _AT_LEAST_0,
    )
    cutmix: float = field(
        0.0,
        "a box is replaced by that of a partner in the batch, labels by its area; with "
        "mixup, either in every second step",
        _AT_LEAST_0,
    )
    streaming: bool = field(
        False,
        "Read and decode images when they are needed, instead of keeping all in "
        "memory. A random part of each is cut out and resized to image_size; pad must "
        "be 0.",
    )
    crop_scale: tuple[float, ...] = field(
        (0.08, 1.0), "streaming: share of the area that is cut out", fields.shares
    )
    test_resize: int = field(
        256,
        "streaming, tests: the shorter side, before the centre is cut",
        _AT_LEAST_1,
    )
    workers: int = field(0, "streaming: processes that decode; 0: threads", _AT_LEAST_0)
    drop_last: bool = field(False, "leave out the short last batch of an epoch")


@dataclasses.dataclass(frozen=True)
class Network:
    """What student and teacher have in common."""

    name: str = field("resnet20", "see lakd_jax.models.names()", values.network)
    init: str = field(
        "",
        "empty: random; a finished run, .safetensors or PyTorch file, or a name of "
        "published weights: torchvision:resnet34.IMAGENET1K_V1 (--mode=teachers lists "
        "them), hf:ORG/REPO",
        values.weights,
    )
    init_key: str = field(
        "",
        "the entry of a PyTorch file that is read, such as state_dict_ema, or a prefix "
        "of its names; empty: the trained network",
    )
    shortcut: str = field(
        "projection",
        "projection | identity (option A of He et al.)",
        fields.one_of(("projection", "identity")),
    )
    patch: int = field(
        0,
        "side of the patches of ViTs (16) and of ConvNeXt's stem (4), in pixels; 0: "
        "these. On CIFAR 4 and 2. A file has its own.",
        _AT_LEAST_0,
    )
    dropout: float = field(
        0.0, "before the classifier of the networks since 2019", fields.below(1)
    )
    drop_path: float = field(
        0.0,
        "stochastic depth of these: the rate in the last block, smaller before",
        fields.below(1),
    )
    layer_scale: float = field(
        -1.0,
        "first value of the factors on the branches of ViTs and ConvNeXts; 0: none, "
        "-1: as published (none, 1e-6)",
        values.scale_or_published,
    )
    image_size: int = field(
        0,
        "images are resized to this for it; 0: as the data has them. Transformers are "
        "made for it: position embeddings of a file for another are interpolated.",
        _AT_LEAST_0,
    )


@dataclasses.dataclass(frozen=True)
class _Switch:
    enabled: bool = field(False)


@dataclasses.dataclass(frozen=True)
class Vam(vam.Options, _Switch):
    """Virtual attention in the student's convolutions."""

    about: ClassVar[str] = (
        "attention over blocks of channels, our interpretation of KDExplainer's"
    )

    gamma: float = field(
        0.01, "weight of the mean entropy of the attention", _AT_LEAST_0
    )


@dataclasses.dataclass(frozen=True)
class Student(Network):
    """The student."""

    new_head: bool = field(
        False,
        "load student.init without its classifier, which is drawn from the seed: for "
        "weights of other classes",
    )
    one_pass: bool = field(
        False,
        "batch norms take mean and variance of a batch in one pass: one exchange "
        "between chips, not two; see docs/launch.md",
    )


@dataclasses.dataclass(frozen=True)
class Teacher(Network):
    """The teacher, and how it is trained where it has no weights yet."""

    about: ClassVar[str] = "empty init: train it first with method=none"

    name: str = "resnet56"
    mean: tuple[float, ...] = field(
        (),
        "its own; empty (size: 0): as its finished run says, or the data's",
        fields.channels(values.pixel_mean, empty=True),
    )
    std: tuple[float, ...] = field(
        (), check=fields.channels(values.pixel_deviation, empty=True)
    )
    epochs: int = field(
        0, "when it is trained here; 0: as many as the student", _AT_LEAST_0
    )
    lr: float = field(0.0, "when it is trained here; 0: optim.lr", _AT_LEAST_0)
    seed: int = field(
        0, "when it is trained here; students of all seeds share it", _SEED
    )
    cache: str = field(
        "runs/teachers",
        "where teachers trained here are kept, by hash, and downloaded weights",
        paths.place_fault,
    )
    combine: str = field(
        "mean",
        "teachers: mean of their logits | confidence (weighted per example: less the "
        "larger the entropy)",
        fields.one_of(ensemble.COMBINE),
    )
    fold: bool = field(True, "batch norms into the convolutions: the same to rounding")
    views: int = field(
        0,
        "0: the teacher runs in every step. V: methods with a teacher see each image "
        "in V augmented views that come again every V epochs, and what the teacher "
        "says of them is stored in `cache`, once for each seed; steps then run "
        "without the teacher.",
        _AT_LEAST_0,
    )
    views_mib: int = field(
        2048, "most that this may take, on disk and on each device", _AT_LEAST_1
    )
    floor: float = field(
        0.0,
        "lowest accuracy on the test split that is accepted, in 0..1; 0: twice chance "
        "(at most 0.75), and more than the share of the most frequent class, which "
        "always answering that class would get. Not of a teacher of other classes.",
        fields.between(0, 1),
    )


@dataclasses.dataclass(frozen=True)
class Hme:
    """The hierarchy of experts, a student that is trained in two stages."""

    about: ClassVar[str] = (
        "Of student.name=hme. optim's momentum, weight_decay and clip_norm hold for "
        "it, too; optim.lr and its schedule are then those of a teacher that is "
        "trained first."
    )

    layout: str = field(
        "ltb",
        "ltb (as released) | split (of a wide ResNet; our interpretation)",
        values.hme_option("layout"),
    )
    base: str = field(
        "wrn_40_1",
        "layout=split: the network that is split into experts",
        values.hme_option("base"),
    )
    output: str = field(
        "nce",
        "of a class's head: nce (the larger of two units) | ce (one)",
        fields.one_of(("nce", "ce")),
    )
    loss: str = field(
        "kway",
        "kway | binary (a yes-or-no task per class; our interpretation)",
        fields.one_of(("kway", "binary")),
    )
    positive_weight: float = field(
        1.0, "loss=binary: of the one class that is right", _POSITIVE
    )
    stage1_epochs: int = field(
        0,
        "weights and gates; 0: as many as stage 2, which has `epochs`",
        _AT_LEAST_0,
    )
    stage1_lr: float = field(0.05, "Adam", _POSITIVE)
    gate_lr: float = field(0.01, "stage 1: of the gates", _POSITIVE)
    temperature: float = field(
        10.0, "stage 1: of the gates, divided by the epoch from 1", _POSITIVE
    )
    stage2_lr: float = field(
        0.05, "SGD, halved at every tenth of the epochs", _POSITIVE
    )


@dataclasses.dataclass(frozen=True)
class Local:
    """Where and how a student is cut."""

    granularity: str = field(
        "stage",
        "Q14: stage | block | none (one) | list | bytes | flops",
        fields.one_of(cuts_lib.GRANULARITIES),
    )
    modules: int = field(
        0,
        "granularity=bytes, flops: how many, balanced by activations or work",
        _AT_LEAST_0,
    )
    cuts: tuple[str, ...] = field(  # checked against the networks
        (), 'granularity=list: student joints, e.g. ("stage1", "stage2.block1")'
    )
    engine: str = field(
        "fused",
        "fused | dispatch (a program per module) | pipeline (on devices)",
        fields.one_of(cuts_lib.ENGINES),
    )
    cut_scale: float = field(
        -1.0,
        "Q8: gradient kept at a cut: 0 isolates, 1 is end to end. -1: as the method "
        "does, 0 for lakd, 1 for the others with a loss in each module (at, fitnet, "
        "...).",
        values.share_or_method,
    )
    cut_end: float = field(
        -1.0,
        "cut_scale at the end, to which it changes by a cosine, such as 1: features "
        "first, answers last. -1: it stays",
        values.share_or_method,
    )
    module_input: str = field(
        "student", "Q10: student | teacher", fields.one_of(("student", "teacher"))
    )
    module_start_epochs: tuple[float, ...] = field(
        (), "Q9: epoch at which each module starts; empty: 0", fields.each(_AT_LEAST_0)
    )


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """How often the state is saved, and how much of it is kept."""

    every_steps: int = field(0, "0: at the end of every epoch", _AT_LEAST_0)
    keep: int = field(2, check=_AT_LEAST_1)
