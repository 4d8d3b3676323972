"""Distillation methods by name; "a+b" is the sum of two."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from lakd_jax import fields
from lakd_jax.distill.base import method, registry, term

registry.discover(__name__, __path__)


@dataclasses.dataclass(frozen=True)
class Facts:
    """The properties of a method that a run depends on; see `method.Method`.

    In `momenta` each shift is a field of the config. Of a sum they are those of the
    first part that declares some.
    """

    local: bool
    staged: bool
    cut_scale: float
    needs_teacher: bool
    needs_heads: bool
    needs_preacts: bool
    reads_labels: bool
    least_batch: int
    teacher_reads: tuple[str, ...]
    per_example: bool = False
    borrower: str = ""  # the part of a sum with `borrows_head`
    momenta: tuple[method.Momentum, ...] = ()

    @property
    def reads_classes(self) -> bool:
        """Whether it reads logits of the teacher, so that its classes matter."""
        return not {"logits", "head"}.isdisjoint(self.teacher_reads)


def names() -> list[str]:
    """Returns all methods; `none` is plain training without a teacher."""
    return list(registry.TABLE)


def parts(name: str) -> tuple[str, ...]:
    """Splits a sum, "dkd+at" -> ("dkd", "at"); a single method gives itself.

    Raises:
      ValueError: an unknown method, with the nearest name; one that is named twice;
        `none` in a sum.
    """
    found = tuple(name.split("+"))
    for one in found:
        fields.check("method", one, names())
    if len(found) > 1 and "none" in found:
        raise ValueError(f"method {name!r}: none has nothing to add to a sum")
    if again := [one for one in found if found.count(one) > 1]:
        raise ValueError(f"method {name!r} names {again[0]} twice")
    return found


def facts(name: str) -> Facts:
    """Returns the facts of a method or a sum; ValueError as `parts`."""
    found = [registry.get(one).cls for one in parts(name)]
    reads = dict.fromkeys(part for one in found for part in one.teacher_reads)
    return Facts(
        local=len(found) == 1 and found[0].local,
        staged=any(one.staged for one in found),
        cut_scale=min(one.cut_scale for one in found),
        needs_teacher=any(one.needs_teacher for one in found),
        needs_heads=any(one.needs_heads for one in found),
        needs_preacts=any(one.needs_preacts for one in found),
        reads_labels=any(one.reads_labels for one in found),
        least_batch=max(one.least_batch for one in found),
        teacher_reads=tuple(reads),
        per_example=all(
            registry.get(n).fact("per_example", False) for n in parts(name)
        ),
        borrower=next(
            (n for n, one in zip(parts(name), found, strict=True) if one.borrows_head),
            "",
        ),
        momenta=next(filter(None, map(_momenta, parts(name))), ()),
    )


def _momenta(name: str) -> tuple[method.Momentum, ...]:
    """Returns the momenta of a single method, with fields of the config as shifts."""
    sources = option_sources(name)
    return tuple(
        momentum._replace(shift=sources[momentum.shift])
        for momentum in registry.get(name).cls.momenta
    )


def title(name: str) -> str:
    """Returns the name of a method or a sum in tables; ValueError as `parts`."""
    return " + ".join(
        registry.get(one).fact("title", one.upper()) for one in parts(name)
    )


def option_names(name: str) -> list[str]:
    """Returns the options that `create` takes for a method.

    Raises ValueError for an unknown method, with the nearest name.
    """
    return [option.name for option in registry.get(name).options]


def option_sources(name: str) -> dict[str, str]:
    """Returns, for each of `option_names`, the field of the config it is read from."""
    options = registry.get(name).options
    return {o.name: o.source or f"{name}.{o.name}" for o in options}


def with_two_classes(name: str, options: Mapping[str, Any]) -> tuple[str, str]:
    """Describes what of a single method cannot teach when there are two classes.

    Args:
      name: of the method.
      options: all of its options.

    Returns:
      (fault, remark): a fault if nothing of the method's own can teach, else a remark
      if a part of it cannot; both may be "".
    """
    sources, weight = option_sources(name), registry.get(name).cls.two_classes
    if options.get("standardise"):
        return (
            f"{sources['standardise']} is True, but with two classes z-scores of "
            f"logits are always 1 and -1, so that method {name} learns nothing from "
            "the teacher: set it to False"
        ), ""
    if weight is None:
        return "", ""
    if weight and not options[weight]:
        return (
            f"{sources[weight]} is 0, but with two classes only what it weighs can "
            f"teach in method {name}: the rest is constant"
        ), ""
    of = f"the one that {sources[weight]} weighs" if weight else "the label's"
    return "", f"two classes: of the losses of {name} only {of} can teach"


def create(name: str, options: Mapping[str, Any]) -> method.Method:
    """Makes the method `name`; its parameters come from `init` with `Signals`.

    Args:
      name: one of `names()`.
      options: by the names of `option_names(name)`; the others have their defaults.

    Raises:
      ValueError: unknown method or option, or a value that is not allowed.
    """
    make: Any = registry.get(name).cls
    for option in options:
        fields.check(f"an option of method {name}", option, option_names(name))
    if make.options_class:
        return make(make.options_class(**options))
    return make(**options)


def create_sum(options: Mapping[str, Mapping[str, Any]]) -> method.Method:
    """Makes the sum of methods, given the options of each by its name."""
    return term.Sum(tuple(create(name, own) for name, own in options.items()))
