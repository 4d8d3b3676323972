"""Networks without batch norm train, resume, fold and export like all others."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_train_resume as resume
import test_train_step as steps
import tiny
import toys
from flax import linen as nn

from lakd_jax import export, interop, models
from lakd_jax.models import chain, folding
from lakd_jax.report import metrics
from lakd_jax.runtime import interrupt
from lakd_jax.runtime import mesh as mesh_lib
from lakd_jax.store import workdir
from lakd_jax.training import segments, setup


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


class Plain(chain.Chain, kw_only=True):
    """Three stages of one unit, with GroupNorm of `groups`, or LayerNorm if 0."""

    groups: int = 0
    stage_sizes: tuple[int, ...] = (1, 1, 1)

    @nn.nowrap
    def make_stem(self, name):
        return Unit(4, 1, self.groups, name=name)

    @nn.nowrap
    def make_block(self, stage, index, name):
        return Unit(4 + 2 * stage, 2 if stage else 1, self.groups, name=name)

    @nn.nowrap
    def make_head(self, name):
        return toys.Head(self.num_classes, name=name)


LAYER = Plain
GROUP = functools.partial(Plain, groups=2)


@pytest.mark.parametrize("network", [LAYER, GROUP], ids=["layer", "group"])
@pytest.mark.parametrize("kind", ["fused", "dispatch", "pipeline"])
def test_every_engine_trains_it(network, kind, tmp_path):
    """With LAKD, losses are finite and all weights of the student move."""
    devices = 3 if kind == "pipeline" else 1
    setting = steps.make(tmp_path, devices, network, method="lakd")
    spec, state, teacher, data = setting
    assert not state.variables("student").get("batch_stats")
    config = tiny.config(tmp_path, method="lakd", local__engine=kind)
    engine = setup.engine(config, spec, teacher, data, interrupt.Guard())
    engine.load(mesh_lib.replicate(state, spec.mesh))
    losses = []
    for row in steps.rows(2):
        losses.append(engine.read(engine.run(row[None]))["loss"])
    after = jax.device_get(engine.state())
    before = state.variables("student")["params"]
    moved = jax.tree.map(
        lambda a, b: np.any(a != b), after.variables("student")["params"], before
    )
    assert all(jax.tree.leaves(moved)) and np.all(np.isfinite(losses))
    assert len(segments.of_student(spec)) == 3


@pytest.mark.parametrize("method", ["none", "kd", "at"])
def test_methods_make_a_step(method, tmp_path):
    spec, state, teacher, data = steps.make(tmp_path, 1, GROUP, method=method)
    after, metrics = steps.one_step((spec, state, teacher, data), steps.rows(1)[0])
    assert np.isfinite(metrics["loss"]) and int(after.step) == 1


@pytest.fixture
def lab(tmp_path, monkeypatch):
    monkeypatch.setitem(models._NETWORKS, "grouped", GROUP)
    for lab in resume.lab_of(tmp_path):
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(models._NETWORKS, "grouped", GROUP)
            yield lab


@pytest.mark.long
def test_a_run_resumes_and_is_exported(lab, tmp_path):
    fields = {"method": "none", "student__name": "grouped"}
    lab.train(tmp_path / "whole", **fields)
    with pytest.raises(interrupt.Interrupted):
        lab.train(tmp_path / "parts", tiny.StopAfter(5), **fields)
    lab.train(tmp_path / "parts", **fields)
    whole, parts = (resume.finished(tmp_path / n) for n in ("whole", "parts"))
    resume.assert_equal_runs(whole, parts)
    assert metrics.read(tmp_path / "whole")
    file = export.run(tmp_path / "whole", "safetensors")
    state = interop.load_torch_file(file)
    restored = interop.from_torch("grouped", state)
    variables, _ = interop.load_variables(tmp_path / "whole" / workdir.STUDENT)
    assert variables.keys() == {"params"}
    jax.tree.map(np.testing.assert_array_equal, restored["params"], variables["params"])


def test_folding_changes_nothing():
    model = GROUP(num_classes=3)
    variables = tiny.variables(model)
    assert variables.keys() == {"params"}
    folded_model, folded_variables = folding.fold(model, variables)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 8, 8, 3)), jnp.float32)
    folded = folded_model.apply(folded_variables, x, train=False).logits
    plain = model.apply(variables, x, train=False).logits
    np.testing.assert_array_equal(folded, plain)
