"""Defines the two training stages of an HME: schedules, optimisers, initial variables.

Source: the code released with KDExplainer (arXiv 2105.04181). The schedules reproduce
it for its 300 epochs; for other numbers of epochs they are stretched, our own choice.

Stage 1 learns weights and gates together, with soft gates that harden. Stage 2 fixes
the tree and retrains its weights from scratch; it keeps the gates and the batch
statistics of stage 1.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import flax
import jax
import jax.numpy as jnp
import optax

from lakd_jax.config import resolved
from lakd_jax.data import device
from lakd_jax.distill.base import method as method_lib
from lakd_jax.hme import losses, network
from lakd_jax.models import chain
from lakd_jax.training import optim, phase

PyTree = Any

_STRETCH = 1.03093  # stage 1's linear decay reaches 0 at this multiple of the epochs
_HALVINGS = 10  # of the learning rate in stage 2
_GATE, _OTHER = "gate", "other"


class _Stage(phase.Phase):
    """What the stages share."""

    def method(self) -> method_lib.Method | None:
        """Returns the method on one task per class; None for `hme.loss=kway`."""
        if self.config.hme.loss != "binary":
            return None
        weight = self.config.hme.positive_weight
        if self.config.method == "none":
            return losses.BinaryPlain(weight)
        kd = self.config.methods["kd"]
        options = {n: v for n, v in kd.items() if n != "standardise"}
        return losses.BinaryKD(**options, positive_weight=weight)

    def _by_epoch(
        self, steps_per_epoch: int, lr: float, factor: Callable[[Any, int], jax.Array]
    ) -> optax.Schedule:
        """Returns `lr` times a factor of (the epoch from 1, the number of epochs)."""

        def rate(step: Any) -> jax.Array:
            return lr * factor(step // steps_per_epoch + 1, self.config.epochs)

        return rate


@dataclasses.dataclass(frozen=True)
class First(_Stage):
    """Stage 1: weights and gates, with soft gates that harden."""

    keeps_best: ClassVar[bool] = True

    def learning_rate(self, steps_per_epoch: int) -> optax.Schedule:
        """Returns the schedule of all parameters but the gates; steps count from 0."""
        return self._by_epoch(steps_per_epoch, self.config.hme.stage1_lr, warm_line)

    def optimizer(
        self, steps_per_epoch: int, labels: PyTree
    ) -> optax.GradientTransformation:
        """Returns PyTorch's Adam (weight decay enters the moments) with two rates.

        While their rate is 0, the gates still accumulate moments.
        """
        o = self.config.optim
        rates = {
            _GATE: self.gate_rate(steps_per_epoch),
            _OTHER: self.learning_rate(steps_per_epoch),
        }
        scales: Any = {k: optax.scale_by_learning_rate(r) for k, r in rates.items()}
        adam = optax.chain(
            optax.add_decayed_weights(o.weight_decay),
            optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8),
            optax.multi_transform(scales, groups(labels)),
        )
        return optax.chain(_clipped(o, labels), adam)

    def gate_rate(self, steps_per_epoch: int) -> optax.Schedule:
        """Returns the schedule of the gates; steps count from 0."""

        def factor(epoch: Any, epochs: int) -> jax.Array:
            return jnp.where(epoch < 3, 0.0, warm_line(epoch, epochs))

        return self._by_epoch(steps_per_epoch, self.config.hme.gate_lr, factor)

    def student_at(
        self, student: chain.Chain, steps_per_epoch: int
    ) -> Callable[[Any], chain.Chain]:
        """Returns the student by step; its gates have temperature / epoch (from 1)."""

        def softened(step: Any) -> chain.Chain:
            epoch = jnp.asarray(step // steps_per_epoch + 1, jnp.float32)
            return student.clone(temperature=self.config.hme.temperature / epoch)

        return softened


@dataclasses.dataclass(frozen=True)
class Second(_Stage):
    """Stage 2: the tree is fixed and its weights are retrained from scratch.

    Attributes:
      start: the variables that stage 1 ends with.
    """

    start: PyTree = None

    purpose: ClassVar[int] = device.INITIALISE_AGAIN

    def learning_rate(self, steps_per_epoch: int) -> optax.Schedule:
        """Returns the schedule of all parameters but the gates; steps count from 0."""
        return self._by_epoch(steps_per_epoch, self.config.hme.stage2_lr, halving)

    def optimizer(
        self, steps_per_epoch: int, labels: PyTree
    ) -> optax.GradientTransformation:
        """Returns SGD with momentum that leaves the gates unchanged."""
        o = self.config.optim
        momentum = optim.sgd(
            self.learning_rate(steps_per_epoch),
            momentum=o.momentum,
            nesterov=o.nesterov,
            weight_decay=o.weight_decay,
            clip_norm=0.0,
            labels=None,
        )
        rules: Any = {_GATE: optax.set_to_zero(), _OTHER: momentum}
        return optax.chain(
            _clipped(o, labels), optax.multi_transform(rules, groups(labels))
        )

    def first_variables(self, drawn: PyTree) -> PyTree:
        """Returns `drawn` with stage 1's gates and batch statistics."""
        flat = flax.traverse_util.flatten_dict
        old = flat(self.start["params"])
        kept = {path: x for path, x in old.items() if network.is_gate(path)}
        params = flax.traverse_util.unflatten_dict(flat(drawn["params"]) | kept)
        return {"params": params, "batch_stats": self.start["batch_stats"]}


def _clipped(o: Any, labels: PyTree) -> optax.GradientTransformation:
    if not o.clip_norm:
        return optax.identity()
    return optim.clip_by_module_norm(o.clip_norm, labels)


def first(config: resolved.Config) -> First:
    """Returns stage 1 of a run."""
    return First(dataclasses.replace(config, epochs=config.hme.stage1_epochs))


def second(config: resolved.Config, start: PyTree, facts: Any) -> Second:
    """Returns stage 2 of a run, from stage 1's variables and recorded results."""
    return Second(config, {"stage1": facts}, start)


def network_options(config: resolved.Config) -> dict[str, Any]:
    """Returns the options of `models.create` that only an HME has."""
    h = config.hme
    output = "odds" if h.loss == "binary" else h.output
    return {"layout": h.layout, "base": h.base, "output": output}


def warm_line(epoch: Any, epochs: int) -> jax.Array:
    """Returns stage 1's learning-rate factor in `epoch`, counted from 1.

    It is 0.25, 0.5, 1, 1 in the first four epochs, and then decays linearly towards 0,
    changing every other epoch.
    """
    done = jnp.asarray(epoch) - 1
    even = done - done % 2
    line = 1.0 - even / int(epochs * _STRETCH)
    later = jnp.where(even < 4, 1.0, line)
    return jnp.where(done == 0, 0.25, jnp.where(done == 1, 0.5, later))


def halving(epoch: Any, epochs: int) -> jax.Array:
    """Returns stage 2's factor in `epoch`, from 1: halved at each tenth of `epochs`."""
    return 0.5 ** (_HALVINGS * jnp.asarray(epoch) // epochs)


def groups(params: PyTree) -> PyTree:
    """Returns the group of every parameter: gates or others."""

    def group(path: tuple[Any, ...], _: Any) -> str:
        keys = [str(key.key) for key in path]
        return _GATE if network.is_gate(keys) else _OTHER

    return jax.tree_util.tree_map_with_path(group, params)
