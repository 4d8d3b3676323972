"""The resolved config: typed and frozen, the only form that a run reads."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from lakd_jax import config as config_lib
from lakd_jax import distill, fields
from lakd_jax.config import blocks, listing, optimiser, several
from lakd_jax.distill.base import registry

# Fields outside of any block that no result depends on: a run may be resumed with other
# values, and a trained teacher is found with any.
NO_RESULT = ("trackers",)


@dataclasses.dataclass(frozen=True)
class Student(blocks.Student):
    """The student."""

    vam: blocks.Vam = blocks.Vam()


@dataclasses.dataclass(frozen=True)
class Config(blocks.Run):
    """All fields of a run. A changed copy is made by `dataclasses.replace`.

    Attributes:
      methods: the options of each method, by its name.
    """

    data: blocks.Data = blocks.Data()
    student: Student = Student()
    teacher: blocks.Teacher = blocks.Teacher()
    optim: optimiser.Optim = optimiser.Optim()
    methods: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    hme: blocks.Hme = blocks.Hme()
    local: blocks.Local = blocks.Local()
    checkpoint: blocks.Checkpoint = blocks.Checkpoint()

    @property
    def teacher_title(self) -> str:
        """Returns the name of the teacher's network, or those of several."""
        own = self.teacher.name
        names = [several.parts(entry, own)[0] for entry in self.teachers]
        return " + ".join(names or [own])

    def method_options(self, method: str) -> dict[str, Any]:
        """Returns the options of `distill.create` for a single method."""
        values = self.flat()
        sources = distill.option_sources(method)
        return {option: values[field] for option, field in sources.items()}

    def flat(self) -> dict[str, Any]:
        """Returns `{"data.pad": 4, ...}` with every field."""
        return config_lib.flat(self._nested())

    def to_dict(self) -> dict[str, Any]:
        """Returns plain nested dictionaries and lists, as they are written to JSON."""
        return json.loads(json.dumps(self._nested()))

    def digest(self) -> str:
        """Returns twelve hex digits that change with any field but `NO_RESULT`."""
        values = self.to_dict()
        for name in NO_RESULT:
            del values[name]
        return config_lib.digest(values)

    def _nested(self) -> dict[str, Any]:
        """Returns the fields by block, in the order of `config_lib.default`."""
        nested = {}
        for name, value in dataclasses.asdict(self).items():
            nested |= value if name == "methods" else {name: value}
        return nested


LITERAL = {"adapter": "shape", "normalise": "none", "head_loss": "ce"}


def resolve(config: config_lib.ConfigDict) -> Config:
    """Returns a checked config, with presets and "same as" fields written out.

    `lakd.preset="literal"` pins the fields in `LITERAL`; `teacher.epochs=0` and
    `hme.stage1_epochs=0` become the student's epochs; `baselines` loses `method` and
    repetitions. Of registered methods only the blocks of those that run are kept, so
    that registering one changes no other run and no teacher's hash.
    """
    values = config_lib.flat(config)
    baselines = dict.fromkeys(m for m in config.baselines if m != config.method)
    values["baselines"] = tuple(baselines)
    if config.lakd.preset == "literal":
        values |= {f"lakd.{name}": value for name, value in LITERAL.items()}
    for epochs in ("teacher.epochs", "hme.stage1_epochs"):
        values[epochs] = values[epochs] or config.epochs
    named = {part for m in (config.method, *baselines) for part in m.split("+")}
    unused = set(registry.added()) - named
    methods = {
        block.name: _values_of(block.options, values, block.name)
        for block in listing.of_methods()
        if block.name not in unused
    }
    parts = {
        name: cls(**_values_of(fields.options(cls), values, name))
        for name, cls in listing.CLASSES.items()
        if name and "." not in name
    }
    vam = blocks.Vam(**_values_of(fields.options(blocks.Vam), values, "student.vam"))
    parts["student"] = Student(**vars(parts["student"]), vam=vam)
    run = _values_of(fields.options(blocks.Run), values, "")
    return Config(**run, **parts, methods=methods)


def _values_of(
    options: tuple[fields.Option, ...], values: Mapping[str, Any], block: str
) -> dict[str, Any]:
    return {o.name: values[f"{block}.{o.name}".lstrip(".")] for o in options}


def of_teacher(config: Config) -> Config:
    """Returns the config that trains the teacher: plain training of its network.

    Only what matters to the teacher is kept; student and method fields are
    reset, so that every student that needs this teacher finds the same one.
    """
    t, values = config.teacher, config.flat()
    same = ("batch_size", "eval_batch_size", "dtype", "log_every", "eval_every")
    same += NO_RESULT
    kept = {k: v for k, v in values.items() if k.startswith(("data.", "optim."))}
    kept |= {name: values[name] for name in same}
    kept |= {
        "method": "none",
        "seed": t.seed,
        "epochs": t.epochs,
        "optim.lr": t.lr or config.optim.lr,
        "optim.dot_delta": 0.0,  # there is one loss only
        "data.per_class": 0,
        "student.name": t.name,
    }
    same = ("shortcut", "patch", "dropout", "drop_path", "layer_scale", "image_size")
    kept |= {f"student.{name}": getattr(t, name) for name in same}
    return resolve(config_lib.changed(config_lib.default(), kept))
