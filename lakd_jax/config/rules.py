"""What must hold between fields of a configuration that are each fine alone."""

from collections.abc import Callable, Sequence

from lakd_jax import config as config_lib
from lakd_jax import distill, models
from lakd_jax.config import methods as methods_lib
from lakd_jax.distill import lakd
from lakd_jax.local import cuts
from lakd_jax.models import chain

Config = config_lib.ConfigDict
Relation = Callable[[Config, int], str]  # (config, devices) -> the fault, or ""

# Every relation with the fields it reads, which must be in range.
TABLE: list[tuple[tuple[str, ...], Relation]] = []

METHODS = ("method", "baselines")
_CUTS = (
    "student.name",
    "teacher.name",
    "local.granularity",
    "local.cuts",
    "local.modules",
)


def reads(*fields: str, only_lakd: bool = False) -> Callable[[Relation], Relation]:
    """Enters a relation in the table, with the fields that it reads."""

    def enter(relation: Relation) -> Relation:
        def if_lakd(c: Config, devices: int) -> str:
            return relation(c, devices) if "lakd" in named(c) else ""

        if only_lakd:
            TABLE.append(((*METHODS, *fields), if_lakd))
        else:
            TABLE.append((fields, relation))
        return relation

    return enter


@reads("batch_size")
def _batch(c: Config, devices: int) -> str:
    return _shared("batch_size", c.batch_size, devices)


@reads("eval_batch_size")
def _eval_batch(c: Config, devices: int) -> str:
    return _shared("eval_batch_size", c.eval_batch_size, devices)


@reads("epochs", "optim.warmup_epochs")
def _warmup(c: Config, _: int) -> str:
    return _longer(c.optim.warmup_epochs, "epochs", c.epochs)


@reads(*METHODS, "teacher.init", "teacher.epochs", "optim.warmup_epochs")
def _teacher_warmup(c: Config, _: int) -> str:
    if not c.teacher.epochs or c.teacher.init or not needs_teacher(c):
        return ""
    return _longer(c.optim.warmup_epochs, "teacher.epochs", c.teacher.epochs)


@reads("kd.ce_weight", "kd.kd_weight")
def _kd_weights(c: Config, _: int) -> str:
    if c.kd.ce_weight or c.kd.kd_weight:
        return ""
    return "kd.ce_weight and kd.kd_weight are both 0: nothing is learnt"


@reads(
    "lakd.preset",
    "lakd.head_weight",
    "lakd.attention_weight",
    "lakd.feature_weight",
    only_lakd=True,
)
def _lakd_weights(c: Config, _: int) -> str:
    weights = ("head_weight", "attention_weight", "feature_weight")
    if c.lakd.preset != "default" or any(c.lakd[w] for w in weights):
        return ""
    return f"lakd.{', lakd.'.join(weights)} are all 0: nothing is learnt"


@reads(*METHODS, "afd.ce_weight", "afd.kd_weight", "afd.beta")
def _afd_weights(c: Config, _: int) -> str:
    return _all_zero("afd", c)


@reads(*METHODS, "rtk.ce_weight", "rtk.kd_weight", "rtk.beta")
def _rtk_weights(c: Config, _: int) -> str:
    return _all_zero("rtk", c)


def weights(name: str) -> None:
    """Enters the relation between `ce_weight` and `weight` of a method's block."""

    @reads(*METHODS, f"{name}.ce_weight", f"{name}.weight")
    def relation(c: Config, _: int) -> str:
        return _all_zero(name, c, ("ce_weight", "weight"))


def _block_start(name: str) -> None:
    """Enters the relation between `init_epochs` of such a block and all epochs."""

    @reads(*METHODS, f"{name}.init_epochs", "epochs")
    def relation(c: Config, _: int) -> str:
        first = c[name].init_epochs
        if name not in named(c) or first < c.epochs:
            return ""
        return (
            f"{name}.init_epochs is {first:g}, but epochs is {c.epochs}: lower it, so "
            "that some are left for what comes after"
        )


for block, fields in methods_lib.blocks().items():
    weights(block)
    if "init_epochs" in fields:
        _block_start(block)


@reads(*METHODS, "local.cut_scale")
def _cut(c: Config, _: int) -> str:
    if c.local.cut_scale in (-1, 1) or any(distill.facts(m).staged for m in methods(c)):
        return ""
    return (
        f"local.cut_scale is {c.local.cut_scale:g}, but method {c.method} has no loss "
        "in the modules before the last: set it to -1, or add such a method, as in "
        "kd+at"
    )


@reads(*METHODS, "batch_size")
def _least_batch(c: Config, _: int) -> str:
    for name in methods(c):
        least = distill.facts(name).least_batch
        if c.batch_size < least:
            return (
                f"batch_size is {c.batch_size}, but method {name} normalises by the "
                f"batch, which needs at least {least}"
            )
    return ""


@reads("lakd.a", "lakd.b", only_lakd=True)
def _mask(c: Config, _: int) -> str:
    if c.lakd.a or c.lakd.b:
        return ""
    return "lakd.a and lakd.b are both 0: the mask would be empty"


@reads("lakd.att_global", "lakd.attention", only_lakd=True)
def _att_global(c: Config, _: int) -> str:
    if not c.lakd.att_global or c.lakd.attention != "inside":
        return ""
    return "lakd.att_global needs a separate L_att; lakd.attention=inside has none"


@reads("lakd.preact", "local.granularity", only_lakd=True)
def _preact(c: Config, _: int) -> str:
    if not c.lakd.preact or c.local.granularity in ("stage", "none"):
        return ""
    return "lakd.preact needs local.granularity=stage or none"


@reads("lakd.preact", "lakd.task", "lakd.attention", only_lakd=True)
def _preact_suffix(c: Config, _: int) -> str:
    if not (c.lakd.preact and lakd.needs_suffix(c.lakd.task, c.lakd.attention)):
        return ""
    return (
        "lakd.preact cannot go with lakd.task=teacher_suffix or lakd.attention=logits: "
        "the teacher goes on from what its blocks put out"
    )


@reads(*METHODS, "local.granularity")
def _preacts(c: Config, _: int) -> str:
    found = [m for m in methods(c) if distill.facts(m).needs_preacts]
    if not found or c.local.granularity in ("stage", "none"):
        return ""
    return (
        f"method {found[0]} reads pre-activations, which are recorded at the ends of "
        "stages: it needs local.granularity=stage or none"
    )


@reads("lakd.att_global", "local.module_input", only_lakd=True)
def _att_global_input(c: Config, _: int) -> str:
    if not c.lakd.att_global or c.local.module_input == "student":
        return ""
    return "lakd.att_global needs local.module_input=student: no gradient crosses"


@reads(*METHODS, "label_smoothing")
def _smoothing(c: Config, _: int) -> str:
    others = [m for m in methods(c) if m not in ("none", "kd")]
    if not c.label_smoothing or not others:
        return ""
    return (
        f"label_smoothing is {c.label_smoothing:g}, but method {others[0]} takes hard "
        "labels: set it to 0, or method (and baselines) to none or kd"
    )


@reads(
    *METHODS,
    "student.name",
    "hme.loss",
    "hme.output",
    "label_smoothing",
    "kd.standardise",
)
def _binary(c: Config, _: int) -> str:
    if c.student.name != "hme" or c.hme.loss != "binary":
        return ""
    if c.kd.standardise and "kd" in methods(c):
        return "hme.loss=binary has no kd.standardise: set it to False"
    if c.hme.output != "nce":
        return "hme.loss=binary needs heads of two units: set hme.output to nce"
    if others := [m for m in methods(c) if m not in ("none", "kd")]:
        return f"hme.loss=binary is for methods none and kd, not {others[0]}"
    if c.label_smoothing:
        return "hme.loss=binary has no label_smoothing: set it to 0"
    return ""


@reads("student.name", "student.init")
def _hme_init(c: Config, _: int) -> str:
    if c.student.name != "hme" or not c.student.init:
        return ""
    return "student.init must be empty for student.name=hme: stage 1 starts from random"


@reads(*METHODS, "teacher.name", "teacher.init")
def _hme_teacher(c: Config, _: int) -> str:
    if c.teacher.name != "hme" or c.teacher.init or not needs_teacher(c):
        return ""
    return (
        "teacher.name=hme needs teacher.init, a finished run: teachers that are "
        "trained first have one stage only"
    )


@reads("student.name", "student.shortcut")
def _student_shortcut(c: Config, _: int) -> str:
    return _shortcut("student", c.student)


@reads("student.name", "student.vam.enabled")
def _gates(c: Config, _: int) -> str:
    if not c.student.vam.enabled or models.family(c.student.name).GATED:
        return ""
    return (
        f"student.vam.enabled is True, but {c.student.name} has no convolutions for "
        "it: choose another student, or set it to False"
    )


@reads("teacher.name", "teacher.shortcut")
def _teacher_shortcut(c: Config, _: int) -> str:
    return _shortcut("teacher", c.teacher)


@reads(*METHODS, *_CUTS)
def _cuts(c: Config, _: int) -> str:
    if not any(distill.facts(m).staged for m in methods(c)):
        return ""
    try:
        _partition(c)
    except ValueError as e:
        return str(e)
    return ""


@reads(*_CUTS, "local.module_start_epochs", only_lakd=True)
def _module_starts(c: Config, devices: int) -> str:
    starts = c.local.module_start_epochs
    if not starts or _cuts(c, devices):
        return ""
    modules = len(_partition(c)[2].names)
    if len(starts) == modules:
        return ""
    return (
        f"local.module_start_epochs has {len(starts)} entries, the student "
        f"{modules} modules"
    )


@reads(*_CUTS, "local.module_input", only_lakd=True)
def _module_input(c: Config, devices: int) -> str:
    if c.local.module_input == "student" or _cuts(c, devices):
        return ""
    student, teacher, partition = _partition(c)
    inner = slice(len(partition.names) - 1)  # the last joint feeds no module
    ours, theirs = partition.student_joints[inner], partition.teacher_joints[inner]
    have, want = chain.joint_shapes(student, ours), chain.joint_shapes(teacher, theirs)
    for joint, mine, other in zip(ours, have, want, strict=True):
        if mine != other:
            return (
                f"local.module_input=teacher: at {joint!r} the student has "
                f"{mine[-1]} channels and the teacher {other[-1]}; use "
                "local.module_input=student"
            )
    return ""


@reads(*METHODS, "fitnet.hint_layer", *_CUTS)
def _hint(c: Config, devices: int) -> str:
    if "fitnet" not in named(c) or _cuts(c, devices):
        return ""
    modules = len(_partition(c)[2].names)
    if c.fitnet.hint_layer <= modules:
        return ""
    return (
        f"fitnet.hint_layer is {c.fitnet.hint_layer}, but the student has {modules} "
        "modules: choose one of them"
    )


@reads(*METHODS, *_CUTS)
def _pairs(c: Config, devices: int) -> str:
    found = [name for name in ("fsp", "kdsvd") if name in named(c)]
    if not found or _cuts(c, devices):
        return ""
    student, teacher, partition = _partition(c)
    if len(partition.names) == 1:
        return f"method {found[0]} compares stages: use local.granularity=stage"
    have = chain.joint_shapes(student, partition.student_joints)
    want = chain.joint_shapes(teacher, partition.teacher_joints)
    for joint, mine, other in zip(partition.student_joints, have, want, strict=True):
        if mine[-1] != other[-1]:
            return (
                f"method {found[0]} needs networks of the same widths, but at "
                f"{joint!r} the student has {mine[-1]} channels and the teacher "
                f"{other[-1]}: choose another student, or another method"
            )
    return ""


def _shortcut(field: str, block: Config) -> str:
    offered = models.family(block.name).OPTIONS.get("shortcut", ("projection",))
    if block.shortcut in offered:
        return ""
    return (
        f"{field}.shortcut is {block.shortcut!r}, which {block.name} has not: only the "
        "CIFAR ResNets of three stages have a choice"
    )


def _shared(field: str, size: int, devices: int) -> str:
    if size % devices == 0:
        return ""
    return (
        f"{field} is {size}, which {devices} devices cannot share equally; use a "
        f"multiple of {devices}"
    )


def _longer(warmup: float, field: str, epochs: int) -> str:
    if warmup <= epochs:
        return ""
    return f"optim.warmup_epochs is {warmup:g}, more than {field} ({epochs})"


def _all_zero(
    name: str, c: Config, fields: Sequence[str] = ("ce_weight", "kd_weight", "beta")
) -> str:
    if name not in named(c) or any(c[name][f] for f in fields):
        return ""
    return f"{name}.{f', {name}.'.join(fields)} are all 0: nothing is learnt"


def methods(c: Config) -> tuple[str, ...]:
    """Every method that runs."""
    return (c.method, *c.baselines)


def named(c: Config) -> set[str]:
    """Every method that runs, alone or in a sum."""
    return {part for name in methods(c) for part in distill.parts(name)}


def needs_teacher(c: Config) -> bool:
    """Whether any method that runs has a teacher."""
    return any(distill.facts(m).needs_teacher for m in methods(c))


def _partition(c: Config) -> tuple[chain.Chain, chain.Chain, cuts.Partition]:
    """Both networks and where they are cut; ValueError if they cannot be."""
    student = models.create(c.student.name, num_classes=2)
    teacher = models.create(c.teacher.name, num_classes=2)
    local = c.local
    at = (local.granularity, local.cuts, local.modules)
    partition = cuts.modules(student, teacher, *at)
    return student, teacher, partition
