"""Checks relations between config fields that are each valid on their own.

These relate fields of several blocks. Rules between the options of a single method are
declared by the method, see `lakd_jax.distill.base.rules`; `of_methods` applies them.
"""

import contextlib
import functools
from collections.abc import Callable, Mapping, Set
from typing import Any

from lakd_jax import config as config_lib
from lakd_jax import distill, fields, models
from lakd_jax.config import blocks
from lakd_jax.distill.base import registry
from lakd_jax.distill.base import rules as rules_lib
from lakd_jax.interop import published
from lakd_jax.local import cuts
from lakd_jax.models import chain

Config = config_lib.ConfigDict
Relation = Callable[[Config, int], str | None]  # (config, devices) -> the fault

# Relations with the fields they read; a relation runs only if these are in range.
TABLE: list[tuple[tuple[str, ...], Relation]] = []

METHODS = ("method", "baselines")
_PATCHES = 8  # along an image of a size that is not known yet
_CUTS = (
    "student.name",
    "student.patch",
    "student.image_size",
    "teacher.name",
    "teacher.patch",
    "teacher.image_size",
    "local.granularity",
    "local.cuts",
    "local.modules",
)


def reads(*fields: str, only_lakd: bool = False) -> Callable[[Relation], Relation]:
    """Registers a relation in `TABLE`, with the fields it reads."""

    def register(relation: Relation) -> Relation:
        def if_lakd(c: Config, devices: int) -> str | None:
            return relation(c, devices) if "lakd" in named(c) else None

        entry = ((*METHODS, *fields), if_lakd) if only_lakd else (fields, relation)
        TABLE.append(entry)
        return relation

    return register


@reads("batch_size")
def _batch(c: Config, devices: int) -> str | None:
    return _indivisible("batch_size", c.batch_size, devices)


@reads("eval_batch_size")
def _eval_batch(c: Config, devices: int) -> str | None:
    return _indivisible("eval_batch_size", c.eval_batch_size, devices)


@reads("epochs", "optim.warmup_epochs")
def _warmup(c: Config, _: int) -> str | None:
    return _warmup_too_long(c.optim.warmup_epochs, "epochs", c.epochs)


@reads(*METHODS, "teachers", "teacher.init", "teacher.epochs", "optim.warmup_epochs")
def _teacher_warmup(c: Config, _: int) -> str | None:
    epochs = c.teacher.epochs
    if epochs and not (c.teacher.init or c.teachers) and needs_teacher(c):
        return _warmup_too_long(c.optim.warmup_epochs, "teacher.epochs", epochs)


@reads("kd.ce_weight", "kd.kd_weight")  # whichever method runs: several read them
def _kd_weights(c: Config, _: int) -> str | None:
    if not (c.kd.ce_weight or c.kd.kd_weight):
        return "kd.ce_weight and kd.kd_weight are both 0: nothing is learnt"


@reads(*METHODS, "local.cut_scale", "local.cut_end")
def _cut_scale(c: Config, _: int) -> str | None:
    for name in ("cut_scale", "cut_end"):
        share = getattr(c.local, name)
        if share not in (-1, 1) and not staged(c):
            return (
                f"local.{name} is {share:g}, but method {c.method} has no loss in the "
                "modules before the last: set it to -1, or add a method that has, as "
                "in kd+at"
            )


@reads("local.cut_end", "local.module_input")
def _cut_end(c: Config, _: int) -> str | None:
    if c.local.cut_end > 0 and c.local.module_input == "teacher":
        return (
            f"local.cut_end is {c.local.cut_end:g}, but no gradient crosses a cut with "
            "local.module_input=teacher: set it to -1, or module_input to student"
        )


@reads(*METHODS, "batch_size", "optim.accumulate")
def _least_batch(c: Config, _: int) -> str | None:
    parts = c.optim.accumulate
    split = f" in {parts} parts (optim.accumulate)" if parts > 1 else ""
    for name in methods(c):
        least = distill.facts(name).least_batch
        if c.batch_size // parts < least:
            return (
                f"batch_size is {c.batch_size}{split}, but method {name} normalises by "
                f"the batch, which needs at least {least}"
            )


@reads(*METHODS, "local.granularity")
def _preacts(c: Config, _: int) -> str | None:
    found = [m for m in methods(c) if distill.facts(m).needs_preacts]
    if found and c.local.granularity not in ("stage", "none"):
        return (
            f"method {found[0]} compares the ends of stages before their ReLU: it "
            "needs local.granularity=stage or none"
        )


@reads(
    *METHODS,
    "student.name",
    "hme.loss",
    "hme.output",
    "label_smoothing",
    "kd.standardise",
)
def _binary(c: Config, _: int) -> str | None:
    if c.student.name != "hme" or c.hme.loss != "binary":
        return None
    if c.kd.standardise and "kd" in methods(c):
        return "hme.loss=binary does not support kd.standardise: set it to False"
    if c.hme.output != "nce":
        return "hme.loss=binary needs heads with two units: set hme.output to nce"
    if others := [m for m in methods(c) if m not in ("none", "kd")]:
        return f"hme.loss=binary supports methods none and kd, not {others[0]}"
    if c.label_smoothing:
        return "hme.loss=binary does not support label_smoothing: set it to 0"


@reads("student.name", "hme.loss", "label_smoothing", "optim.class_weights")
def _class_weights(c: Config, _: int) -> str | None:
    if not c.optim.class_weights:
        return None
    other = ""
    if c.label_smoothing:
        other = f"label_smoothing={c.label_smoothing:g}: set one of them to its default"
    if c.student.name == "hme" and c.hme.loss == "binary":
        other = "hme.loss=binary, which has hme.positive_weight: set it to empty"
    return other and f"optim.class_weights does not go with {other}"


@reads("student.name", "student.init")
def _hme_init(c: Config, _: int) -> str | None:
    if c.student.name == "hme" and c.student.init:
        return (
            "student.init must be empty for student.name=hme: stage 1 starts randomly"
        )


@reads("student.init", "student.init_key")
def _student_key(c: Config, _: int) -> str | None:
    return _key_without_file("student", c.student)


@reads("teacher.init", "teacher.init_key")
def _teacher_key(c: Config, _: int) -> str | None:
    return _key_without_file("teacher", c.teacher)


@reads("student.name", "student.init")
def _student_weights(c: Config, _: int) -> str:
    return published.other_network("student", c.student.name, c.student.init)


@reads("teacher.name", "teacher.init")
def _teacher_weights(c: Config, _: int) -> str:
    return published.other_network("teacher", c.teacher.name, c.teacher.init)


@reads("student.init", "student.new_head")
def _new_head(c: Config, _: int) -> str:
    if c.student.init or not c.student.new_head:
        return ""
    return (
        "student.new_head replaces the classifier of the weights in student.init, "
        "which is empty: set student.init, or student.new_head to False"
    )


@reads(*METHODS, "teacher.name", "teachers", "teacher.init")
def _hme_teacher(c: Config, _: int) -> str | None:
    given = c.teacher.init or c.teachers
    if c.teacher.name == "hme" and not given and needs_teacher(c):
        return (
            "teacher.name=hme needs teacher.init, a finished run: a teacher that this "
            "run trains first can only have one stage"
        )


_OPTIONS = ("shortcut", "patch", "dropout", "drop_path", "layer_scale")


@reads("student.name", "student.image_size", *(f"student.{o}" for o in _OPTIONS))
def _student_options(c: Config, _: int) -> str | None:
    return _network_options("student", c)


@reads("student.name", "student.vam.enabled")
def _gates(c: Config, _: int) -> str | None:
    if c.student.vam.enabled and not models.family(c.student.name).GATED:
        return (
            f"student.vam.enabled is True, but {c.student.name} has no convolutions to "
            "gate: choose another student, or set it to False"
        )


@reads("teacher.name", "teacher.image_size", *(f"teacher.{o}" for o in _OPTIONS))
def _teacher_options(c: Config, _: int) -> str | None:
    return _network_options("teacher", c)


@reads(*METHODS, *_CUTS)
def _cuts(c: Config, _: int) -> str | None:
    if staged(c):
        try:
            _partition(c)
        except ValueError as e:
            return str(e)


def _network_options(part: str, c: Config) -> str | None:
    """Returns the fault of an option that the network does not have, if any."""
    block, offered = getattr(c, part), models.family(getattr(c, part).name).OPTIONS
    defaults = {
        option.name: option.default for option in fields.options(blocks.Network)
    }
    for option in _OPTIONS:
        value = getattr(block, option)
        if value != defaults[option] and option not in offered:
            having = [n for n in models.names() if option in models.family(n).OPTIONS]
            return (
                f"{part}.{option} is {value!r}, which {block.name} does not offer: "
                f"leave it at {defaults[option]!r}, or choose another network "
                f"({', '.join(having[:4])}, ...)"
            )
    if "image_size" in offered and block.image_size % (block.patch or 1):
        return (
            f"{part}.patch is {block.patch}, which does not divide {part}.image_size "
            f"({block.image_size})"
        )


def _key_without_file(field: str, block: Config) -> str | None:
    if block.init_key and not block.init:
        return (
            f"{field}.init_key is {block.init_key!r}, an entry of a PyTorch file: set "
            f"{field}.init to the file"
        )


def _indivisible(field: str, size: int, devices: int) -> str | None:
    if size % devices:
        return (
            f"{field} is {size}, which {devices} devices cannot share equally; use a "
            f"multiple of {devices}"
        )


def _warmup_too_long(warmup: float, field: str, epochs: int) -> str | None:
    if warmup > epochs:
        return f"optim.warmup_epochs is {warmup:g}, more than {field} ({epochs})"


def methods(c: Config) -> tuple[str, ...]:
    """Returns the methods that will run."""
    return (c.method, *c.baselines)


def named(c: Config) -> set[str]:
    """Returns the methods that will run; sums count as their parts."""
    return {part for name in methods(c) for part in distill.parts(name)}


def staged(c: Config) -> bool:
    """Returns whether any method that will run has losses in inner modules."""
    return any(distill.facts(m).staged for m in methods(c))


def needs_teacher(c: Config) -> bool:
    """Returns whether any method that will run needs a teacher."""
    return any(distill.facts(m).needs_teacher for m in methods(c))


class _Unreadable(Exception):
    """Raised when a rule of a method reads a field that is itself out of range."""


class _Run:
    """A config, presented to the rules of one method as `distill.base.rules.Run`."""

    def __init__(self, method: str, config: Config, faults: Set[str]):
        self.method = method
        self._config, self._faults = config, faults
        self._values = config_lib.flat(config)

    def __getitem__(self, field: str) -> Any:
        if field in self._faults:
            raise _Unreadable(field)
        return self._values[field]

    @property
    def modules(self) -> tuple[str, ...]:
        """Returns the names of the student's modules."""
        return self._partition[2].names

    @functools.cached_property
    def joints(self) -> tuple[rules_lib.Joint, ...]:
        """Returns the joints at the ends of the modules, with both networks' shapes.

        Heights and widths are those of the run only if the config has its image size.
        """
        student, teacher, partition = self._partition

        def shapes(part: str, model: chain.Chain, names: tuple[str, ...]) -> Any:
            side = self[f"{part}.image_size"] or self["data.image_size"]
            return chain.joint_shapes(model, names, model.fixed_side or side)

        ours = shapes("student", student, partition.student_joints)
        theirs = shapes("teacher", teacher, partition.teacher_joints)
        joints = zip(partition.student_joints, ours, theirs, strict=True)
        return tuple(rules_lib.Joint(*joint) for joint in joints)

    @functools.cached_property
    def _partition(self) -> tuple[chain.Chain, chain.Chain, cuts.Partition]:
        if not self._faults.isdisjoint(_CUTS):
            raise _Unreadable(*_CUTS)
        try:
            return _partition(self._config)
        except ValueError as e:  # reported by `_cuts`
            raise _Unreadable(*_CUTS) from e


class _Options:
    """The options of a method as attributes, with the config's values."""

    def __init__(self, run: _Run):
        self._run, self._sources = run, distill.option_sources(run.method)

    def __getattr__(self, name: str) -> Any:
        return self._run[self._sources[name]]


def of_methods(config: Config, faults: Mapping[str, str]) -> list[str]:
    """Applies the rules of the methods that will run; returns the faults they find.

    Args:
      config: as given by the user.
      faults: the fields that are themselves out of range.
    """
    if not faults.keys().isdisjoint(METHODS):
        return []
    found = []
    for name in distill.names():
        if name in named(config):
            run = _Run(name, config, faults.keys())
            for rule in registry.get(name).cls.rules:
                with contextlib.suppress(_Unreadable):
                    found += filter(None, [rule(_Options(run), run)])
    return found


def _network(part: str, c: Config) -> chain.Chain:
    """Returns a network as far as its joints are known before data and weights."""
    block = getattr(c, part)
    options = {"patch": block.patch, "image_size": block.image_size}
    if "image_size" in models.family(block.name).OPTIONS and block.patch:
        options["image_size"] = block.image_size or c.data.image_size
        if options["image_size"] % block.patch or not options["image_size"]:
            options["image_size"] = _PATCHES * block.patch
    offered = models.family(block.name).OPTIONS
    options = {k: v for k, v in options.items() if k in offered and v}
    return models.create(block.name, num_classes=2, **options)


def _partition(c: Config) -> tuple[chain.Chain, chain.Chain, cuts.Partition]:
    """Returns both networks and their cuts; raises ValueError if there are none."""
    student, teacher = _network("student", c), _network("teacher", c)
    at = (c.local.granularity, c.local.cuts, c.local.modules)
    return student, teacher, cuts.modules(student, teacher, *at)
