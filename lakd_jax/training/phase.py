"""Phases of training: networks trained in several phases override the default one."""

import dataclasses
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any, ClassVar

import jax
import optax

from lakd_jax import distill, models
from lakd_jax.config import resolved
from lakd_jax.data import device
from lakd_jax.distill.base import method as method_lib
from lakd_jax.models import chain
from lakd_jax.training import dot, optim

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Phase:
    """The default training phase; networks override what differs in theirs.

    Attributes:
      config: the resolved config of the run, with the epochs of this phase.
      facts: additional entries of the run's result.
      purpose: identifies the random key of the initial weights, see `key`.
      keeps_best: whether the run keeps its best epoch on minival instead of the last.
    """

    config: resolved.Config
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)

    purpose: ClassVar[int] = device.INITIALISE
    keeps_best: ClassVar[bool] = False

    def learning_rate(self, steps_per_epoch: int) -> optax.Schedule:
        """Returns the schedule that `config.optim` describes."""
        o = self.config.optim
        scale = self.config.batch_size / o.lr_batch if o.lr_batch else 1.0
        return optim.schedule(
            o.schedule,
            o.lr * scale,
            floor=o.lr_floor * scale,
            start=o.lr_start * scale,
            cosine_from=o.cosine_from,
            epochs=self.config.epochs,
            steps_per_epoch=steps_per_epoch,
            milestones=o.milestones,
            decay=o.decay,
            warmup_epochs=o.warmup_epochs,
        )

    def optimizer(
        self, steps_per_epoch: int, labels: PyTree
    ) -> optax.GradientTransformation:
        """Returns the optimiser for parameters with these labels."""
        o, rate = self.config.optim, self.learning_rate(steps_per_epoch)
        if groups := self.momenta():
            return dot.sgd(
                rate,
                groups,
                momentum=o.momentum,
                weight_decay=o.weight_decay,
                decay_mask=o.decay_mask,
            )
        return optim.create(o, rate, labels)

    def momenta(self) -> dot.Groups:
        """Returns the groups of loss terms with a momentum each; () for one of all."""
        if delta := self.config.optim.dot_delta:
            return dot.of_delta(delta)
        values = self.config.flat()
        groups = tuple(
            dot.Group(m.name, values[m.shift], m.terms, m.decays)
            for m in distill.facts(self.config.method).momenta
        )
        return groups if any(group.shift for group in groups) else ()

    def student_at(
        self, student: chain.Chain, steps_per_epoch: int
    ) -> Callable[[Any], chain.Chain] | None:
        """Returns a function from step to student; None if the student is constant."""
        del student, steps_per_epoch
        return None

    def first_variables(self, drawn: PyTree) -> PyTree:
        """Returns the student's first variables, given randomly initialised ones."""
        return drawn

    def method(self) -> method_lib.Method | None:
        """Returns the method that the network requires; None uses the config's."""
        return None


def module_of(network: str) -> ModuleType | None:
    """Returns the module that defines a network's phases; None if there is none."""
    name = models.family(network).PHASES
    return importlib.import_module(name) if name else None


def first(config: resolved.Config) -> Phase:
    """Returns the first or only phase of a run."""
    module = module_of(config.student.name)
    return module.first(config) if module else Phase(config)


def key(phase: Phase) -> jax.Array:
    """Returns the random key of the initial weights."""
    return jax.random.fold_in(jax.random.key(phase.config.seed), phase.purpose)
