"""Networks without batch norm train, resume, fold and export like all others."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_train_engines as engines
import test_train_resume as resume
import test_train_step as steps
import tiny
import toys
from flax import linen as nn

from lakd_jax import models
from lakd_jax.models import folding
from lakd_jax.training import segments


class Unit(nn.Module):
    """A 3x3 convolution, LayerNorm or GroupNorm, and ReLU."""

    features: int
    stride: int
    groups: int

    @nn.compact
    def __call__(self, x, *, train):
        strides = (self.stride, self.stride)
        x = nn.Conv(self.features, (3, 3), strides, use_bias=False, name="conv")(x)
        group_norm = functools.partial(nn.GroupNorm, self.groups)
        make = group_norm if self.groups else nn.LayerNorm
        x = make(name="norm")(x)
        return nn.relu(x), x


class Plain(toys.Toy, kw_only=True):
    """`toys.Toy` with GroupNorm of `groups`, or LayerNorm if 0."""

    growth: int = 2
    groups: int = 0

    @nn.nowrap
    def make_stem(self, name):
        return Unit(self.width, 1, self.groups, name=name)

    @nn.nowrap
    def make_block(self, stage, index, name):
        features = self.width + self.growth * stage
        return Unit(features, 2 if stage else 1, self.groups, name=name)


LAYER = Plain
GROUP = functools.partial(Plain, groups=2)


@pytest.mark.parametrize(
    ("network", "kind"),
    [
        pytest.param(LAYER, "fused", id="layer-fused"),
        pytest.param(GROUP, "dispatch", id="group-dispatch"),
        pytest.param(LAYER, "pipeline", id="layer-pipeline", marks=pytest.mark.long),
    ],
)
def test_every_engine_trains_it(network, kind, tmp_path):
    """With LAKD, losses are finite and all weights of the student move."""
    devices = 3 if kind == "pipeline" else 1
    setting = steps.small(tmp_path, devices, network, method="lakd")
    spec, state, *_ = setting
    assert not state.variables("student").get("batch_stats")
    engine = engines.engine(kind, setting, tmp_path)
    losses = [engine.read(engine.run(row[None]))["loss"] for row in steps.rows(2)]
    after = jax.device_get(engine.state())
    params = (x.variables("student")["params"] for x in (after, state))
    moved = jax.tree.map(lambda a, b: np.any(a != b), *params)
    assert all(jax.tree.leaves(moved)) and np.all(np.isfinite(losses))
    assert len(segments.of_student(spec)) == 3


@pytest.mark.parametrize("method", ["none", "kd", "at"])
def test_methods_make_a_step(method, tmp_path):
    setting = steps.small(tmp_path, 1, GROUP, method=method)
    ((after, metrics),) = steps.train(setting, steps.rows(1))
    assert np.isfinite(metrics["loss"]) and int(after.step) == 1


@pytest.fixture
def lab(tmp_path, monkeypatch):
    monkeypatch.setitem(models._NETWORKS, "grouped", GROUP)
    yield from resume.lab_of(tmp_path)


@pytest.mark.long
def test_a_run_resumes_and_is_exported(lab, tmp_path):
    fields = {"method": "none", "student__name": "grouped"}
    assert lab.assert_resumes_and_exports(tmp_path, **fields).keys() == {"params"}


def test_folding_changes_nothing():
    model = GROUP(num_classes=3)
    variables = tiny.variables(model)
    assert variables.keys() == {"params"}
    folded_model, folded_variables = folding.fold(model, variables)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 8, 8, 3)), jnp.float32)
    folded = folded_model.apply(folded_variables, x, train=False).logits
    plain = model.apply(variables, x, train=False).logits
    np.testing.assert_array_equal(folded, plain)
