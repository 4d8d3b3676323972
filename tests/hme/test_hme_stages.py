"""Tests the two stages of an HME: rates, groups, and the start of stage 2."""

import flax
import hme_weights
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from lakd_jax.config import resolved
from lakd_jax.data import device
from lakd_jax.hme import network, phases


def stage(number, tmp_path, epochs=300, **fields):
    config = tiny.config(tmp_path, student__name="hme", epochs=epochs, **fields)
    config = resolved.resolve(config)
    if number == 1:
        return phases.first(config)
    variables = hme_weights.drawn(hme_weights.small("nce"))
    return phases.second(config, variables, {"epochs": 1})


@pytest.mark.parametrize(
    ("epoch", "rate", "gates", "second"),
    [
        (1, 0.0125, 0.0, 0.05),
        (2, 0.025, 0.0, 0.05),
        (3, 0.05, 0.01, 0.05),
        (4, 0.05, 0.01, 0.05),
        (5, 0.049353, 0.01 * (1 - 4 / 309), 0.05),
        (6, 0.049353, 0.01 * (1 - 4 / 309), 0.05),
        (29, 0.05 * (1 - 28 / 309), 0.01 * (1 - 28 / 309), 0.05),
        (30, 0.05 * (1 - 28 / 309), 0.01 * (1 - 28 / 309), 0.025),
        (59, 0.05 * (1 - 58 / 309), 0.01 * (1 - 58 / 309), 0.025),
        (60, 0.05 * (1 - 58 / 309), 0.01 * (1 - 58 / 309), 0.0125),
        (101, 0.033819, 0.01 * (1 - 100 / 309), 0.05 / 8),
        (201, 0.017638, 0.01 * (1 - 200 / 309), 0.05 / 2**6),
        (299, 0.00178, 0.01 * (1 - 298 / 309), 0.05 / 2**9),
        (300, 0.00178, 0.01 * (1 - 298 / 309), 0.05 / 2**10),
    ],
)
def test_property_10_rates(epoch, rate, gates, second, tmp_path):
    one, two = stage(1, tmp_path), stage(2, tmp_path)
    for step in (7 * (epoch - 1), 7 * epoch - 1):  # the first and last of the epoch
        assert float(one.learning_rate(7)(step)) == pytest.approx(rate, abs=6e-7)
        assert float(one.gate_rate(7)(step)) == pytest.approx(gates, rel=1e-5)
        assert float(two.learning_rate(7)(step)) == pytest.approx(second, rel=1e-6)


@pytest.mark.parametrize("epochs", [1, 2, 3, 7, 30])
def test_other_numbers_of_epochs_keep_the_shape(epochs):
    all_epochs = range(1, epochs + 1)
    one = [float(phases.warm_line(e, epochs)) for e in all_epochs]
    assert one[:4] == [0.25, 0.5, 1.0, 1.0][:epochs]
    assert min(one) > 0 and one[2:] == sorted(one[2:], reverse=True)
    two = [float(phases.halving(e, epochs)) for e in all_epochs]
    assert two == sorted(two, reverse=True) and two[-1] == 2**-10


def toy():
    """Returns one gate and one other parameter, and gradients of both."""
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    params = {"head": {"gate": {"logits": draw(3, 2)}, "fc1": {"kernel": draw(4)}}}
    grads = [jax.tree.map(lambda x: draw(*x.shape), params) for _ in range(4)]
    return params, grads


def updated(optimizer, params, grads):
    state = optimizer.init(params)
    for gradient in grads:
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params


def test_stage_1_is_torchs_adam_in_two_groups(tmp_path):
    """Gates have rate 0 for two epochs, while their moments accumulate."""
    torch = pytest.importorskip("torch")
    params, grads = toy()
    made = stage(1, tmp_path, optim__weight_decay=0.3)
    ours = updated(made.optimizer(1, params), params, grads)
    # Leaves in order: the kernel, the gate.
    leaves = jax.tree.leaves(params)
    theirs = [torch.nn.Parameter(torch.tensor(np.asarray(x))) for x in leaves]
    adam = torch.optim.Adam([{"params": [p]} for p in theirs], weight_decay=0.3)
    rates = [(0.0125, 0), (0.025, 0), (0.05, 0.01), (0.05, 0.01)]
    for gradient, both in zip(grads, rates, strict=True):
        parts = zip(
            theirs, adam.param_groups, jax.tree.leaves(gradient), both, strict=True
        )
        for parameter, group, g, rate in parts:
            group["lr"], parameter.grad = rate, torch.tensor(np.asarray(g))
        adam.step()
    for mine, expected in zip(jax.tree.leaves(ours), theirs, strict=True):
        np.testing.assert_allclose(mine, expected.detach().numpy(), rtol=2e-5)
    still = updated(made.optimizer(1, params), params, grads[:2])
    np.testing.assert_array_equal(still["head"]["gate"]["logits"], leaves[1])


def test_property_11_gates_stay_in_stage_2(tmp_path):
    params, grads = toy()
    made = stage(2, tmp_path)
    after = updated(made.optimizer(1, params), params, grads)
    old, new = params["head"], after["head"]
    np.testing.assert_array_equal(new["gate"]["logits"], old["gate"]["logits"])
    assert np.all(new["fc1"]["kernel"] != old["fc1"]["kernel"])


def test_property_11_stage_2_starts_from_gates_and_statistics(tmp_path):
    made = stage(2, tmp_path)
    kept = made.start
    kept["batch_stats"] = jax.tree.map(lambda x: x + 0.5, kept["batch_stats"])
    drawn = jax.tree.map(lambda x: x + 1.0, kept)
    begin = made.first_variables(drawn)
    for mine, expected in zip(
        network.gates(begin["params"]), network.gates(kept["params"]), strict=True
    ):
        np.testing.assert_array_equal(mine, expected)
    jax.tree.map(
        np.testing.assert_array_equal, begin["batch_stats"], kept["batch_stats"]
    )
    flat = flax.traverse_util.flatten_dict(begin["params"])
    new = flax.traverse_util.flatten_dict(drawn["params"])
    assert all(flat[p] is new[p] for p in flat if not network.is_gate(p))
    assert stage(1, tmp_path).first_variables(drawn) is drawn
    assert made.purpose != stage(1, tmp_path).purpose == device.INITIALISE


def test_stages_have_their_own_epochs_and_gates(tmp_path):
    one = stage(1, tmp_path, epochs=4, hme__stage1_epochs=9)
    two = stage(2, tmp_path, epochs=4, hme__stage1_epochs=9)
    assert (one.config.epochs, two.config.epochs) == (9, 4)
    model = hme_weights.small("nce")
    assert two.student_at(model, 5) is None
    found = [float(one.student_at(model, 5)(step).temperature) for step in (0, 4, 5)]
    assert found == [10.0, 10.0, 5.0]  # over the number of the epoch
    assert stage(1, tmp_path, epochs=4).config.epochs == 4
