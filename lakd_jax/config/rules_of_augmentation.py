"""Checks what goes together with mixed images."""

from lakd_jax import distill
from lakd_jax.config import rules

_MIXING = ("data.mixup", "data.cutmix")


def _mixes(c: rules.Config) -> str:
    """Returns the first field that mixes images, with its value; "" if none does."""
    for name in ("mixup", "cutmix"):
        if c.data[name]:
            return f"data.{name}={c.data[name]:g}"
    return ""


@rules.reads(*rules.METHODS, *_MIXING)
def _labels(c: rules.Config, _: int) -> str | None:
    for name in sorted(rules.named(c)) if _mixes(c) else ():
        if distill.facts(name).reads_labels:
            return (
                f"{_mixes(c)} gives an image two labels, but method {name} compares "
                "the networks by the one label of each: set it to 0, or choose another "
                "method"
            )


@rules.reads(*rules.METHODS, "teacher.views", *_MIXING)
def _views(c: rules.Config, _: int) -> str | None:
    if _mixes(c) and c.teacher.views and rules.needs_teacher(c):
        return (
            f"{_mixes(c)} mixes other images in every step, so that the teacher's "
            "outputs cannot be stored: set it to 0, or teacher.views to 0"
        )


@rules.reads("optim.class_weights", *_MIXING)
def _class_weights(c: rules.Config, _: int) -> str | None:
    if _mixes(c) and c.optim.class_weights:
        return (
            f"{_mixes(c)} gives an image two labels, and optim.class_weights weighs "
            "images by their one label: set one of them to its default"
        )


@rules.reads("student.name", "hme.loss", *_MIXING)
def _binary(c: rules.Config, _: int) -> str | None:
    if _mixes(c) and c.student.name == "hme" and c.hme.loss == "binary":
        return (
            f"{_mixes(c)} gives an image two labels, which hme.loss=binary does not "
            "support: set it to 0"
        )
