"""Tests that every optimiser trains cut students, alike in all engines."""

import dataclasses
import functools
import json

import golden_weights
import jax
import numpy as np
import optax
import pytest
import test_train_engines as engines
import test_train_step as steps

from lakd_jax import models
from lakd_jax.config import optimiser
from lakd_jax.models import chain
from lakd_jax.training import optim, segments

LONG = pytest.mark.long
ADAMW = {"optim__name": "adamw", "optim__lr": 1e-3, "optim__decay_mask": True}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Returns a cached function that runs three steps of an engine with AdamW."""
    folder = tmp_path_factory.mktemp("adamw")

    @functools.cache
    def setting(devices):
        fields = ADAMW | {"optim__clip_norm": 0.1, "optim__weight_decay": 1.0}
        return steps.small(folder, devices, method="lakd", **fields)

    @functools.cache
    def run(kind, devices=1):
        engine = engines.engine(kind, setting(devices), folder)
        metrics = [engine.read(engine.run(row[None])) for row in steps.rows(3)]
        return jax.device_get(engine.state()), metrics

    return run


@LONG
@pytest.mark.parametrize(("kind", "devices"), [("dispatch", 1), ("pipeline", 3)])
def test_engines_train_alike_with_adamw(kind, devices, trained):
    """Every module's count is the same, so that any engine resumes any checkpoint."""
    (ours, metrics), (fused, expected) = trained(kind, devices), trained("fused")
    for one, other in zip(metrics, expected, strict=True):
        steps.assert_same_metrics(one, other)
    steps.assert_close(ours, fused, rtol=2e-4, atol=2e-6)
    structures = [jax.tree.structure(state) for state in (ours, fused)]
    assert structures[0] == structures[1]
    counts = [x for x in jax.tree.leaves(ours.opt_state) if np.ndim(x) == 0]
    assert len(counts) == 2 and all(count == 3 for count in counts)


@LONG
def test_decay_norm_is_of_what_is_decayed(trained):
    """With the mask, these are the kernels, in the student and in the adapters."""
    state, metrics = trained("fused")

    def kernels(tree):
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return [x for path, x in leaves if path[-1].key == "kernel"]

    parts = [state.params["student"]["stage2"], state.params["method"]["module2"]]
    norm = np.sqrt(sum(np.sum(np.square(x)) for x in kernels(parts)))
    np.testing.assert_allclose(metrics[-1]["module2/decay_norm"][0], norm, rtol=1e-5)


@pytest.mark.parametrize("name", optimiser.NAMES[1:])
def test_states_of_every_optimiser_are_cut_and_joined(name, trained, tmp_path):
    """What a segment's state lacks would raise a KeyError."""
    spec, *_ = steps.spec_of(tmp_path, 1, method="lakd")
    options = optimiser.Optim(name=name, decay_mask=True)
    make = functools.partial(optim.create, options, optax.constant_schedule(0.1))
    spec = dataclasses.replace(spec, optimizer=make(spec.labels), optimizer_of=make)
    state = trained("fused")[0]
    state = state.replace(opt_state=spec.optimizer.init(state.params))
    parts = []
    for segment in segments.of_student(spec):
        names = segments.student_names(spec, segment)
        part = segments.state_of(spec, state, segment)
        placed = segments.renamed_state(names.remove, part)
        assert "stage" not in str(jax.tree.structure(placed.opt_state))
        restored = segments.renamed_state(names.restore, placed)
        jax.tree.map(np.testing.assert_array_equal, restored, part)
        parts.append(restored)
    jax.tree.map(np.testing.assert_array_equal, segments.joined(state, *parts), state)


@pytest.mark.parametrize(
    ("name", "golden"),
    [
        ("deit_tiny_distilled", "deit_tiny_distilled_patch16_224"),
        ("convnext_pico", "convnext_pico"),
    ],
)
def test_the_mask_decays_what_timm_decays(name, golden):
    """Of these networks, the numbers of arrays that timm's groups have."""
    counts = json.loads((golden_weights.FOLDER / "recipes/optim.json").read_text())[
        "weight_decay_of"
    ][golden]
    model = models.create(name, num_classes=1000)
    shapes = chain.variable_shapes(model)["params"]
    kept = jax.tree.leaves(optim.decays(shapes, masked=True))
    assert sum(kept) == counts["decayed"]
    assert len(kept) - sum(kept) == counts["not_decayed"]
