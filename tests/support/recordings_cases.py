"""The runs of `recordings`: fields of the config by the name of each."""

from lakd_jax import distill

BASE = {
    "epochs": 1,
    "batch_size": 16,  # of 48 images: an epoch has three steps
    "eval_batch_size": 16,
    "log_every": 1,
    "compile_cache": "",
    "data.minival": 0.0,
    "data.pad": 1,
    "student.name": "resnet8",
    "teacher.name": "resnet8",
    "teacher.floor": 1e-9,
    # Small, so that rounding errors stay small: runs of other processors must agree.
    "optim.lr": 1e-3,
    "optim.schedule": "constant",
    "checkpoint.every_steps": 100,
    "checkpoint.keep": 1,
}
# Three epochs of one step: what a method does epoch by epoch is in the three steps.
PHASES = {"epochs": 3, "batch_size": 48}
# What a method needs so that all of it takes part in those.
_NEEDS = {
    "lakd": {"local.module_start_epochs": (0, 1, 2)},
    "afd": {"afd.qk_dim": 16},
    "rtk": {"rtk.qk_dim": 16},
    "dkd": {"dkd.warmup_epochs": 2.0},
    "ctkd": {"ctkd.lambda_epochs": 2.0},
    "cc": {"cc.dim": 16},
    "ab": {"ab.init_epochs": 1.0},
    "fsp": {"fsp.init_epochs": 1.0},
    "ft": {"ft.init_epochs": 1.0},
    "crd": {"crd.dim": 16, "crd.negatives": 32},
    "review": {"review.warmup_epochs": 2.0},
    # Other widths than the teacher's, as it has its layer and dropout only then.
    "kdpp": {"student.name": "resnet8x4", "kdpp.kd_warmup_epochs": 2.0},
    "deit": {"student.name": "deit_tiny_distilled", "student.patch": 8},
    "fam": {"fam.warmup_epochs": 2.0},
    "cd": {"cd.alone_epochs": 1.0, "cd.decay_epochs": (3,)},
    "rld": {"rld.warmup_epochs": 2.0},
    # Weights at which steps stay so small that rounding errors do.
    "wkd_l": {"wkd_l.decay_after_epochs": 1.0, "wkd_l.weight": 6.0},
    "wkd_f": {"wkd_f.decay_after_epochs": 1.0, "wkd_f.weight": 0.001},
    "ofa": {"ofa.eps": (1.0, 1.1, 1.2, 1.3)},
    "deepkd": {"deepkd.warmup_epochs": 2.0, "deepkd.share_epochs": (0.0, 2.0)},
}
METHODS = {name: _NEEDS.get(name, {}) for name in distill.names()}
CUT, UNCUT = {"local.cut_scale": 0.0}, {"local.cut_scale": 1.0}
# The other engines are for isolated modules, and kd has no loss at a cut: the config
# is refused where an engine or a cut is missing here.
ENGINES = {
    "kd-fused-uncut": {"method": "kd", **UNCUT},
    "at-fused-cut": {"method": "at", **CUT},
    "at-fused-uncut": {"method": "at", **UNCUT},
    "lakd-fused-cut": {"method": "lakd", **CUT},
    "lakd-fused-uncut": {"method": "lakd", **UNCUT},
    "lakd-dispatch-cut": {"method": "lakd", "local.engine": "dispatch", **CUT},
    "lakd-pipeline-cut": {"method": "lakd", "local.engine": "pipeline", **CUT},
}
_LAKD = {"method": "lakd"}
_DISPATCH = {"method": "lakd", "local.engine": "dispatch"}
READINGS = {
    "lakd-literal": _LAKD | {"lakd.preset": "literal"},
    "lakd-half-cut": _LAKD | {"local.cut_scale": 0.5},
    "lakd-attention-global": _LAKD | {"lakd.att_global": True},
    "lakd-preact": _LAKD | {"lakd.preact": True},
    "lakd-preact-dispatch": _DISPATCH | {"lakd.preact": True},
    "lakd-attention-logits": _LAKD | {"lakd.attention": "logits"},
    "lakd-aux-heads": _LAKD | {"lakd.task": "aux_heads"},
    "lakd-teacher-suffix": _LAKD | {"lakd.task": "teacher_suffix"},
    "lakd-teacher-input": _LAKD | {"local.module_input": "teacher"},
    "lakd-teacher-input-dispatch": _DISPATCH | {"local.module_input": "teacher"},
    "lakd-block-dispatch": _DISPATCH | {"local.granularity": "block"},
    "lakd-normalises-first": _LAKD | {"student.name": "wrn_16_1"},
}
# The learning rate of the gates is 0 before the third epoch.
_HME = PHASES | {"student.name": "hme", "hme.stage1_lr": 1e-4, "hme.stage2_lr": 1e-3}
HME = {
    "hme-kd": _HME | {"method": "kd"},
    "hme-binary": _HME | {"method": "kd", "hme.loss": "binary"},
}
_VAM = {"student.vam.enabled": True, "student.vam.init_std": 0.1}
VAM = {
    "vam-static-kd": _VAM | {"method": "kd"},
    "vam-dynamic-lakd": _VAM | {"method": "lakd", "student.vam.gate": "dynamic"},
}
_DOT = {"optim.dot_delta": 0.075}
DOT = {
    "dot-kd": _DOT | {"method": "kd"},
    "dot-at": _DOT | {"method": "at"},
    "dot-lakd": _DOT | {"method": "lakd", **UNCUT},
}
_VIEWS = PHASES | {"teacher.views": 2}
VIEWS = {
    "views-kd": _VIEWS | {"method": "kd"},
    "views-at": _VIEWS | {"method": "at", **CUT},
    "views-lakd": _VIEWS | {"method": "lakd"},
}
_OPTIM = {
    "optim.schedule": "cosine",
    "optim.warmup_epochs": 1.0,
    "optim.nesterov": True,
    "optim.clip_norm": 0.1,
}
_SHORT = {"epochs": 2, "batch_size": 40}  # and 8 images are left for a second step
OTHERS = {
    "sum": PHASES | {"method": "dkd+at", "dkd.warmup_epochs": 2.0},
    "optimiser-kd": PHASES | _OPTIM | {"method": "kd", "label_smoothing": 0.1},
    "optimiser-dispatch": PHASES | _OPTIM | _DISPATCH,
    "several-steps-in-a-program": {"method": "kd", "steps_per_dispatch": 3},
    "short-batch-kd": _SHORT | {"method": "kd"},
    "short-batch-lakd": _SHORT | {"method": "lakd"},
    "short-batch-dispatch": _SHORT | _DISPATCH,
    "eight-devices-kd": {"method": "kd"},
    "eight-devices-lakd": {"method": "lakd"},
    "sizes": {"method": "at", "student.image_size": 16, "teacher.image_size": 12},
}
CASES = {
    **{m: PHASES | own | {"method": m} for m, own in METHODS.items()},
    **ENGINES,
    **READINGS,
    **HME,
    **VAM,
    **DOT,
    **VIEWS,
    **OTHERS,
}
# Others have one. A batch is shared by all; of four, three have a module each.
DEVICES_OF = {"lakd-pipeline-cut": 4, "eight-devices-kd": 8, "eight-devices-lakd": 8}
# To the bit only: what bfloat16 rounds to differs between processors.
BITS_ONLY = {
    "bfloat16-kd": {"method": "kd", "dtype": "bfloat16"},
    "bfloat16-lakd": {"method": "lakd", "dtype": "bfloat16"},
}
