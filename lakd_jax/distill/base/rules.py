"""Rules between the options of a method, and between these and the run.

A method lists its rules in `Method.rules`. The configuration's checks call each with
the options that the config has for the method, as attributes, and with the run. A rule
that reads a field which is out of range by itself is left out.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from lakd_jax import errors, models
from lakd_jax.models import chain, heads


class Joint(NamedTuple):
    """The end of one module: where features of both networks are compared."""

    name: str  # in the student
    student: tuple[int, ...]  # shape of the activation, channels last
    teacher: tuple[int, ...]


class Run(Protocol):
    """What a rule may read of a run.

    Attributes:
      method: the name of the method, which is also that of its block.
    """

    method: str

    def __getitem__(self, field: str) -> Any:
        """The value of any field of the config, such as "local.granularity"."""
        ...

    @property
    def modules(self) -> Sequence[str]:
        """The names of the student's modules."""
        ...

    @property
    def joints(self) -> Sequence[Joint]:
        """The end of each module."""
        ...


Rule = Callable[[Any, Run], str]  # (options, run) -> the fault, or ""


def some_weight(*names: str) -> Rule:
    """Returns the rule that not all of these weights are 0."""

    def rule(options: Any, run: Run) -> str:
        if any(getattr(options, name) for name in names):
            return ""
        fields = ", ".join(f"{run.method}.{name}" for name in names)
        return f"{fields} are all 0: nothing is learnt"

    return rule


def room_after_start(options: Any, run: Run) -> str:
    """Checks that `init_epochs` leaves some of all epochs."""
    if options.init_epochs < run["epochs"]:
        return ""
    return (
        f"{run.method}.init_epochs is {options.init_epochs:g}, but epochs is "
        f"{run['epochs']}: lower it, so that some are left for what comes after"
    )


def linear_teacher(options: Any, run: Run) -> str:
    """Checks that the teacher ends in one linear layer, which the method reads."""
    model = models.create(run["teacher.name"], num_classes=2)
    try:
        heads.classifier(model, chain.variable_shapes(model))
    except errors.TeacherError as e:
        return f"teacher.name is {run['teacher.name']}, but {e}"
    return ""


def equal_widths(options: Any, run: Run) -> str:
    """Checks that both networks have several stages, of the same widths."""
    if len(run.modules) == 1:
        return f"method {run.method} compares stages: use local.granularity=stage"
    for joint in run.joints:
        if joint.student[-1] != joint.teacher[-1]:
            return (
                f"method {run.method} needs networks of the same widths, but at "
                f"{joint.name!r} the student has {joint.student[-1]} channels and the "
                f"teacher {joint.teacher[-1]}: choose another student, or another "
                "method"
            )
    return ""
