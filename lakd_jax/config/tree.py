"""The configuration: every field, its default and its meaning.

Files in `configs/` start from `default()` and change what they need. Only the
builders in `lakd_jax.runs` and
`lakd_jax.training.setup` read a config; library functions take plain values.
A tuple that is empty means "not given" where its comment says so.
"""

import copy
import hashlib
import json
import re
from typing import Any

import ml_collections

from lakd_jax.config import methods

ConfigDict = ml_collections.ConfigDict

_ADDED: dict[str, dict[str, Any]] = {}  # blocks of registered methods, by name


def default() -> ConfigDict:
    """Every field with its default; the CIFAR protocol of the field, LAKD on."""
    c = ConfigDict()
    # none (plain training), a name of docs/methods.md, or a sum such as dkd+at
    c.method = "lakd"
    c.seed = 0  # initialisation, order and augmentation follow from it
    c.seeds = ()  # a run each, in WORKDIR/seed0, ...; empty: one run, of `seed`
    c.epochs = 240
    c.batch_size = 64  # global, over all devices
    c.eval_batch_size = 512
    c.dtype = "float32"  # compute type: float32 | bfloat16; losses stay float32
    c.label_smoothing = 0.0  # of the labels' part of the loss; methods none and kd
    c.baselines = ()  # methods trained first, in WORKDIR/METHOD, for the table
    c.log_every = 50  # steps between two lines of metrics
    c.eval_every = 1  # epochs between two evaluations on minival
    c.steps_per_dispatch = 0  # steps in one program; 0: 1 on CPU, else 50
    c.compile_cache = "runs/compiled"  # compiled programs, for the next start; or empty

    c.data = _data()
    c.student = _network("resnet20")
    c.student.vam = _vam()
    c.teacher = _teacher()
    c.optim = _optim()
    c.kd = _kd()
    c.lakd = _lakd()
    c.afd = _afd()
    c.rtk = _rtk()
    for name, block in method_blocks().items():
        c[name] = block
    c.hme = _hme()
    c.local = _local()
    c.checkpoint = _checkpoint()
    return c


def method_blocks() -> dict[str, ConfigDict]:
    """Those of `config.methods` and of the methods that were registered."""
    return methods.blocks() | added_blocks()


def added_blocks() -> dict[str, ConfigDict]:
    """Those of the methods that were registered."""
    return {name: ConfigDict(block) for name, block in _ADDED.items()}


def add_block(name: str, block: dict[str, Any]) -> None:
    """Gives every config from now on a block; see `lakd_jax.register.method`.

    Raises:
      ValueError: a built-in field or block has the name, or it is no word.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ValueError(f"method {name!r}: the name must be a word in small letters")
    if name == "none" or (name in default() and name not in _ADDED):
        raise ValueError(f"method {name!r}: the config has this name already")
    _ADDED[name] = block


def _data() -> ConfigDict:
    d = ConfigDict()
    d.source = "cifar100"  # digits | folder:PATH | npz:PATH | a tfds name
    d.data_dir = ""  # where tfds keeps its sets; empty: its own default
    d.image_size = 0  # resize and centre crop to this; 0: as they are
    d.minival = 0.1  # share of the training split kept to choose the best epoch
    d.max_bad = 0  # undecodable training images that may be left out; more: an error
    d.mean = (0.5071, 0.4867, 0.4408)  # of the pixels in 0..1, per channel
    d.std = (0.2675, 0.2565, 0.2761)
    d.pad = 4  # zero pixels around the image before the random crop
    d.flip = True  # random horizontal mirror image
    # Read and decode images when they are needed, instead of keeping all in memory. A
    # random part of each is cut out and resized to image_size; pad must be 0.
    d.streaming = False
    d.crop_scale = (0.08, 1.0)  # streaming: share of the area that is cut out
    d.test_resize = 256  # streaming, tests: the shorter side, before the centre is cut
    d.workers = 0  # streaming: processes that decode; 0: threads
    d.drop_last = False  # leave out the short last batch of an epoch
    return d


def _network(name: str) -> ConfigDict:
    n = ConfigDict()
    n.name = name  # see lakd_jax.models.names()
    n.init = ""  # empty: random; a finished run, .safetensors or PyTorch file
    n.shortcut = "projection"  # projection | identity (option A of He et al.)
    n.image_size = 0  # images are resized to this for it; 0: as the data has them
    return n


def _vam() -> ConfigDict:
    v = ConfigDict()  # attention over blocks of channels, our reading of KDExplainer's
    v.enabled = False
    v.gate = "static"  # static (folded away at the end) | dynamic (by image, stays)
    v.blocks = 4  # of inputs and of outputs; fewer where channels do not divide
    v.temperature = 1.0  # of the attention
    v.rescale = True  # times the number of blocks: uniform attention changes nothing
    v.init_std = 0.0  # of the gates; 0: training starts from the plain network
    v.gamma = 0.01  # weight of the mean entropy of the attention
    return v


def _teacher() -> ConfigDict:
    t = _network("resnet56")  # empty init: train it first with method=none
    t.mean = ()  # its own; empty (size: 0): as its finished run says, or the data's
    t.std = ()
    t.epochs = 0  # when it is trained here; 0: as many as the student
    t.lr = 0.0  # when it is trained here; 0: optim.lr
    t.seed = 0  # when it is trained here; students of all seeds share it
    t.cache = "runs/teachers"  # where teachers trained here are kept, by hash
    t.fold = True  # batch norms into the convolutions: the same to rounding
    # 0: the teacher runs in every step. V: methods with a teacher see each image in V
    # augmented views that come again every V epochs, and what the teacher says of them
    # is stored in `cache`, once for each seed; steps then run without the teacher.
    t.views = 0
    t.views_mib = 2048  # most that this may take, on disk and on each device
    t.floor = 0.0  # lowest accuracy accepted, in 0..1; 0: twice chance
    return t


def _optim() -> ConfigDict:
    o = ConfigDict()
    o.lr = 0.05
    o.lr_batch = 0  # the batch_size that lr is for, others in proportion; 0: any
    o.momentum = 0.9
    o.nesterov = False
    # DOT: momentum - this for the labels' losses, momentum + this for all others, such
    # as 0.075 on CIFAR and 0.09 on ImageNet; 0: one momentum for all.
    o.dot_delta = 0.0
    o.weight_decay = 5e-4  # on every parameter, as the field does
    o.schedule = "step"  # step | cosine | constant
    o.milestones = (150.0, 180.0, 210.0)  # epochs after which lr falls (step)
    o.decay = 0.1  # factor at each milestone
    o.warmup_epochs = 0.0  # linear, from 0
    o.clip_norm = 0.0  # largest gradient norm of a module; 0: no clipping
    return o


def _kd() -> ConfigDict:
    k = ConfigDict()
    k.ce_weight = 0.1  # of the cross-entropy with the labels
    k.kd_weight = 0.9  # of the softened divergence to the teacher
    k.temperature = 4.0
    k.standardise = False  # z-scores of the logits; then temperature=2, kd_weight=9
    return k


def _lakd() -> ConfigDict:
    k = ConfigDict()
    k.preset = "default"  # default | literal (the bare formula; see docs/design.md)
    k.head_weight = 1.0  # of L_h, the loss of the classifier
    k.attention_weight = 1.0  # of L_att
    k.feature_weight = 1.0  # of L_lf
    k.alpha = 0.5  # preset=literal: L = alpha L_h + (1-alpha) s L_att + beta L_lf
    k.beta = 100.0
    k.att_scale = 1.0  # s above
    k.head_loss = "ce+kd"  # Q1: ce | ce+kd (weights and temperature in kd)
    k.attention = "weight"  # Q2: weight | map | logits | inside
    k.power = "2"  # Q3: of the mask on the squared error: 2 | 1 | softmax
    k.window = 3  # Q4: side of the pooling window; 0: the whole map
    k.stride = 1  # Q4: above 1, pooled coarsely and enlarged again
    k.f_sum = "abs"  # Q5: sum over channels of: abs | signed | square
    k.normalise = "mean"  # Q6: mean | l2 | max | sigmoid | none
    k.a = 0.5  # weight of average pooling in the mask
    k.b = 0.5  # weight of max pooling in the mask
    k.task = "last"  # Q7: last | aux_heads | teacher_suffix
    k.aux_weight = 1.0  # of the earlier modules' task loss, when they have one
    k.att_global = False  # Q8: L_att crosses the cuts
    k.reduction = "mean"  # Q11: mean | per_sample_sum
    k.preact = False  # Q12: compare before the last ReLU (stage ends only)
    k.adapter = "always"  # always | shape: 1x1 convolution only where widths differ
    return k


def _afd() -> ConfigDict:
    k = ConfigDict()  # the temperature is kd.temperature
    k.qk_dim = 128  # width of queries and keys
    k.ce_weight = 1.0  # of the cross-entropy with the labels
    k.kd_weight = 0.9  # of the softened divergence to the teacher
    k.beta = 200.0  # of the attention-weighted feature distance
    return k


def _rtk() -> ConfigDict:
    k = ConfigDict()  # our reading, docs/rtk.md; the temperature is kd.temperature
    k.qk_dim = 128  # width of queries and keys
    k.ce_weight = 1.0  # of the cross-entropy with the labels
    k.kd_weight = 0.9  # of the softened divergence to the teacher
    k.beta = 4.0  # of the attention-weighted feature distance; with mean, 200
    k.selection = "stage"  # of teacher taps: stage | topr | threshold | pooled | none
    k.top_r = 3  # how many selection=topr keeps
    k.scope = "sample"  # select for each image (sample) or once for all (batch)
    k.distance_reduce = "sum"  # over the positions of a map: sum | mean
    return k


def _hme() -> ConfigDict:
    # Of student.name=hme. optim's momentum, weight_decay and clip_norm hold for it,
    # too; optim.lr and its schedule are then those of a teacher that is trained first.
    k = ConfigDict()
    k.layout = "ltb"  # ltb (as released) | split (of a wide ResNet; our reading)
    k.base = "wrn_40_1"  # layout=split: the network that is split into experts
    k.output = "nce"  # of a class's head: nce (the larger of two units) | ce (one)
    k.loss = "kway"  # kway | binary (a yes-or-no task a class; our reading)
    k.positive_weight = 1.0  # loss=binary: of the one class that is right
    k.stage1_epochs = 0  # weights and gates; 0: as many as stage 2, which has `epochs`
    k.stage1_lr = 0.05  # Adam
    k.gate_lr = 0.01  # stage 1: of the gates
    k.temperature = 10.0  # stage 1: of the gates, divided by the epoch from 1
    k.stage2_lr = 0.05  # SGD, halved at every tenth of the epochs
    return k


def _local() -> ConfigDict:
    m = ConfigDict()
    m.granularity = "stage"  # Q14: stage | block | none (one) | list | bytes | flops
    m.modules = 0  # granularity=bytes, flops: how many, balanced by activations or work
    m.cuts = ()  # granularity=list: student joints, e.g. ("stage1", "stage2.block1")
    m.engine = "fused"  # fused | dispatch (a program a module) | pipeline (on devices)
    # Q8: gradient kept at a cut: 0 isolates, 1 is end to end. -1: as the method does,
    # 0 for lakd, 1 for the others with a loss in each module (at, fitnet, ...).
    m.cut_scale = -1.0
    m.module_input = "student"  # Q10: student | teacher
    m.module_start_epochs = ()  # Q9: epoch at which each module starts; empty: 0
    return m


def _checkpoint() -> ConfigDict:
    k = ConfigDict()
    k.every_steps = 0  # 0: at the end of every epoch
    k.keep = 2
    return k


def with_pair(config: ConfigDict, arg: str) -> ConfigDict:
    """`config` with "TEACHER,STUDENT,METHOD" set; parts left out stay as they are.

    Raises:
      ValueError: more than three parts.
    """
    parts = arg.split(",") if arg else []
    if len(parts) > 3:
        raise ValueError(f"expected TEACHER,STUDENT,METHOD, got {arg!r}")
    fields = ("teacher.name", "student.name", "method")
    given = {f: p.strip() for f, p in zip(fields, parts, strict=False) if p.strip()}
    return changed(config, given)


LITERAL = {"adapter": "shape", "normalise": "none", "head_loss": "ce"}


def resolve(config: ConfigDict) -> ConfigDict:
    """A copy with presets and "same as" fields written out.

    `lakd.preset="literal"` pins the fields in `LITERAL`; `teacher.epochs=0` and
    `hme.stage1_epochs=0` become the student's epochs; `baselines` loses `method` and
    repetitions. Of registered methods only the blocks of those that run are kept, so
    that registering one changes no other run and no teacher's hash.
    """
    c = copy.deepcopy(config)
    named = {part for m in (c.method, *c.baselines) for part in m.split("+")}
    with c.unlocked():
        for name in _ADDED.keys() - named:
            del c[name]
        others = dict.fromkeys(m for m in c.baselines if m != c.method)
        c.baselines = tuple(others)
        if c.lakd.preset == "literal":
            c.lakd.update(LITERAL)
        c.teacher.epochs = c.teacher.epochs or c.epochs
        c.hme.stage1_epochs = c.hme.stage1_epochs or c.epochs
    return c


def to_dict(config: ConfigDict) -> dict[str, Any]:
    """Plain nested dictionaries and lists, as they are written to JSON."""
    return json.loads(json.dumps(config.to_dict()))


def from_dict(values: dict[str, Any]) -> ConfigDict:
    """What `to_dict` gave, for example as a run's config.json; the inverse.

    Fields that did not exist then have their defaults.

    Raises:
      ValueError: naming fields that do not exist now.
    """
    config = default()
    fields, given = flat(config), flat(ConfigDict(values))
    unknown = ", ".join(sorted(given.keys() - fields.keys()))
    if unknown:
        raise ValueError(
            f"fields that this version does not know: {unknown}; a method of your own "
            "must be registered first"
        )
    return changed(
        config,
        {f: tuple(v) if type(fields[f]) is tuple else v for f, v in given.items()},
    )


def digest(config: ConfigDict) -> str:
    """Twelve hex digits that change with any field."""
    text = json.dumps(to_dict(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def flat(config: ConfigDict, prefix: str = "") -> dict[str, Any]:
    """`{"data.pad": 4, ...}` of every field that is not a block."""
    out: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            out |= flat(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = value
    return out


def changed(config: ConfigDict, fields: dict[str, Any]) -> ConfigDict:
    """A copy in which each `{"block.field": value}` is set."""
    c = copy.deepcopy(config)
    c.update_from_flattened_dict(fields)
    return c


def teacher_config(config: ConfigDict) -> ConfigDict:
    """The config that trains `config`'s teacher: plain training of its network.

    Only what matters to the teacher is kept; student and method fields are
    reset, so that every student that needs this teacher finds the same one.
    """
    c, t = default(), config.teacher
    c.update(method="none", seed=t.seed, epochs=t.epochs)
    for name in ("batch_size", "eval_batch_size", "dtype", "log_every", "eval_every"):
        c[name] = config[name]
    c.data = copy.deepcopy(config.data)
    c.optim = copy.deepcopy(config.optim)
    c.optim.lr = t.lr or config.optim.lr
    c.optim.dot_delta = 0.0  # there is one loss only
    c.student.update(name=t.name, shortcut=t.shortcut, image_size=t.image_size)
    return resolve(c)
