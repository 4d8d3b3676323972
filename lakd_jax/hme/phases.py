"""The two trainings of an HME: schedules, optimisers, and where each begins.

Source: the code released with KDExplainer (arXiv 2105.04181), exact for its 300 epochs;
for other numbers of epochs the same shapes are stretched, which is ours.

Stage 1 learns weights and gates together, with soft gates that harden. Stage 2 fixes
the tree and trains its weights anew; besides the gates, batch statistics remain.
"""

import dataclasses
from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax

from lakd_jax import config as config_lib
from lakd_jax.hme import network
from lakd_jax.training import optim
from lakd_jax.training import state as state_lib

PyTree = Any

_STRETCH = 1.03093  # the line of stage 1 would reach 0 at this multiple of the epochs
_HALVINGS = 10  # of the learning rate in stage 2
_GATE, _OTHER = "gate", "other"


@dataclasses.dataclass(frozen=True)
class Stage:
    """One training.

    Attributes:
      number: 1 or 2.
      config: of the run, resolved, with the epochs of this stage.
      start: stage 1's variables, from which stage 2 begins; None in stage 1.
      told: what the result also tells.
    """

    number: int
    config: config_lib.ConfigDict
    start: PyTree | None
    told: dict[str, Any]

    @property
    def anneal(self) -> float | None:
        """Temperature of the gates times the epoch; None: hard gates."""
        return self.config.hme.temperature if self.number == 1 else None

    @property
    def purpose(self) -> int:
        """What the initial weights are drawn for, see `state`."""
        again = state_lib.INITIALISE_AGAIN
        return state_lib.INITIALISE if self.number == 1 else again

    def learning_rate(self, steps_per_epoch: int) -> optax.Schedule:
        """Of all parameters but the gates, at a step counted from 0."""
        epochs = self.config.epochs
        if self.number == 1:
            lr, factor = self.config.hme.stage1_lr, warm_line
        else:
            lr, factor = self.config.hme.stage2_lr, halving

        def rate(step: Any) -> jax.Array:
            return lr * factor(step // steps_per_epoch + 1, epochs)

        return rate

    def optimizer(
        self, params: PyTree, labels: PyTree, steps_per_epoch: int
    ) -> optax.GradientTransformation:
        """Of all parameters; `labels` are their modules, as in `optim.sgd`."""
        clip, o = self.config.optim.clip_norm, self.config.optim
        rate = self.learning_rate(steps_per_epoch)
        first = optim.clip_by_module_norm(clip, labels) if clip else optax.identity()
        if self.number == 1:
            gate_rate = self._gate_rate(steps_per_epoch)
            return optax.chain(first, adam(rate, gate_rate, o.weight_decay, params))
        momentum = optim.sgd(
            rate,
            momentum=o.momentum,
            nesterov=o.nesterov,
            weight_decay=o.weight_decay,
            clip_norm=0.0,
            labels=None,
        )
        rules: Any = {_GATE: optax.set_to_zero(), _OTHER: momentum}
        return optax.chain(first, optax.multi_transform(rules, groups(params)))

    def _gate_rate(self, steps_per_epoch: int) -> optax.Schedule:
        lr, epochs = self.config.hme.gate_lr, self.config.epochs

        def rate(step: Any) -> jax.Array:
            epoch = step // steps_per_epoch + 1
            return jnp.where(epoch < 3, 0.0, lr * warm_line(epoch, epochs))

        return rate

    def first_variables(self, drawn: PyTree) -> PyTree:
        """Of the student: `drawn`, or with stage 1's gates and batch statistics."""
        if self.start is None:
            return drawn
        return graft(drawn, self.start)


def first(config: config_lib.ConfigDict) -> Stage:
    """Stage 1 of a run."""
    epochs = config.hme.stage1_epochs
    return Stage(1, config_lib.changed(config, {"epochs": epochs}), None, {})


def second(config: config_lib.ConfigDict, start: PyTree, told: dict[str, Any]) -> Stage:
    """Stage 2 of a run, from the variables of stage 1 and what is known of them."""
    return Stage(2, config, start, {"stage1": told})


def warm_line(epoch: Any, epochs: int) -> jax.Array:
    """Stage 1's factor on the learning rate in `epoch`, counted from 1.

    A quarter, a half, two whole ones, then a line towards 0 that moves every other
    epoch.
    """
    done = jnp.asarray(epoch) - 1
    even = done - done % 2
    line = 1.0 - even / int(epochs * _STRETCH)
    later = jnp.where(even < 4, 1.0, line)
    return jnp.where(done == 0, 0.25, jnp.where(done == 1, 0.5, later))


def halving(epoch: Any, epochs: int) -> jax.Array:
    """Stage 2's factor in `epoch`, counted from 1: halved at each tenth of them."""
    return 0.5 ** (_HALVINGS * jnp.asarray(epoch) // epochs)


def adam(
    rate: optax.Schedule,
    gate_rate: optax.Schedule,
    weight_decay: float,
    params: PyTree,
) -> optax.GradientTransformation:
    """Adam as PyTorch has it (decay enters the moments), in two groups.

    Gates with a rate of 0 keep gathering moments.
    """
    rates: Any = {
        _GATE: optax.scale_by_learning_rate(gate_rate),
        _OTHER: optax.scale_by_learning_rate(rate),
    }
    return optax.chain(
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8),
        optax.multi_transform(rates, groups(params)),
    )


def groups(params: PyTree) -> PyTree:
    """The name of every parameter's group: gates or others."""

    def group(path: tuple[Any, ...], _: Any) -> str:
        keys = [str(key.key) for key in path]
        return _GATE if network.is_gate(keys) else _OTHER

    return jax.tree_util.tree_map_with_path(group, params)


def graft(drawn: PyTree, old: PyTree) -> PyTree:
    """A student's drawn variables with the gates and batch statistics of `old`."""
    ours = flax.traverse_util.flatten_dict(drawn["params"])
    theirs = flax.traverse_util.flatten_dict(old["params"])
    kept = {path: theirs[path] for path in ours if network.is_gate(path)}
    params = flax.traverse_util.unflatten_dict(ours | kept)
    return {"params": params, "batch_stats": old["batch_stats"]}
