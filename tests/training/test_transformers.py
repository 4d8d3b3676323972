"""Transformers train cut and uncut with every engine, and distil into themselves."""

import functools

import jax
import numpy as np
import pytest
import test_train_engines as engines
import test_train_resume as resume
import test_train_step as steps
import tiny

from lakd_jax import models
from lakd_jax.models import vit
from lakd_jax.training import segments

SIZES = {"width": 64, "stage_sizes": (1, 1, 1), "patch": 2, "image_size": 8}
VIT = functools.partial(vit.ViT, **SIZES, drop_path=0.5, layer_scale=0.1)
DISTILLED = functools.partial(vit.DistilledViT, **SIZES, dropout=0.1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Returns a cached function: the state and losses after two steps of an engine."""
    folder = tmp_path_factory.mktemp("transformers")

    @functools.cache
    def run(kind, devices=1, **fields):
        fields = {"method": "lakd", "optim__lr": 0.01} | fields
        setting = steps.small(folder, devices, VIT, **fields)
        engine = engines.engine(kind, setting, folder)
        metrics = [engine.read(engine.run(row[None])) for row in steps.rows(2)]
        assert len(segments.of_student(setting[0])) == 3
        return jax.device_get(engine.state()), metrics, setting[1]

    return run


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "devices", "fields"),
    [
        ("dispatch", 1, {}),
        ("pipeline", 3, {}),
        ("dispatch", 1, {"local__module_input": "teacher"}),
    ],
)
def test_engines_drop_the_same_examples(kind, devices, fields, trained):
    """Class tokens cross the cuts, and stochastic depth follows seed, step and unit."""
    ours, fused = trained(kind, devices, **fields), trained("fused", **fields)
    for found, expected in zip(ours[1], fused[1], strict=True):
        steps.assert_same_metrics(found, expected)
    steps.assert_close(ours[0].params, fused[0].params, rtol=2e-4, atol=2e-6)


@pytest.mark.long
def test_every_weight_is_trained(trained):
    after, _, before = trained("fused")
    params = (x.variables("student")["params"] for x in (after, before))
    moved = jax.tree.map(lambda a, b: np.any(a != b), *params)
    assert all(jax.tree.leaves(moved))


@pytest.mark.long
def test_both_heads_learn(tmp_path):
    """From the labels alone, too; test_every_pair.py has the method with a token."""
    setting = steps.small(tmp_path, 1, DISTILLED, method="kd")
    ((after, metrics),) = steps.train(setting, steps.rows(1))
    assert np.isfinite(metrics["loss"])
    params = [x.variables("student")["params"] for x in (after, setting[1])]
    for part, name in (("head", "head"), ("head", "head_dist"), ("stem", "dist_token")):
        one, other = (jax.tree.leaves(p[part][name]) for p in params)
        assert np.any(np.asarray(one[0]) != np.asarray(other[0])), name


CNN = functools.partial(tiny.SMALL, stage_sizes=(2, 1), widths=(4, 6))


@pytest.mark.parametrize(
    ("method", "student", "teacher"),
    [("at", CNN, VIT), pytest.param("lakd", VIT, CNN, marks=pytest.mark.long)],
)
def test_cut_students_learn_from_the_other_kind(method, student, teacher, tmp_path):
    """A CNN of two stages and a transformer of three; every module of theirs moves.

    Of other methods, test_every_pair.py traces the steps.
    """
    setting = steps.small(
        *(tmp_path, 1, student),
        teacher_network=teacher,
        method=method,
        local__granularity="list",
        local__cuts=("stage1",),
        local__cut_scale=0.0,
    )
    ((after, metrics),) = steps.train(setting, steps.rows(1))
    assert np.isfinite(metrics["loss"])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after.params))
    assert metrics["module1/grad_norm"] > 0 and metrics["module2/grad_norm"] > 0


@pytest.fixture
def lab(tmp_path, monkeypatch):
    monkeypatch.setitem(models._NETWORKS, "small_vit", VIT)
    yield from resume.lab_of(tmp_path)


@pytest.mark.long
def test_a_run_resumes_and_is_exported(lab, tmp_path):
    fields = {"method": "none", "student__name": "small_vit", "optim__lr": 0.01}
    fields |= {"student__drop_path": 0.5, "student__patch": 2}
    lab.assert_resumes_and_exports(tmp_path, **fields)
