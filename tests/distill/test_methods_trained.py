"""Methods in the real step: on several devices, several seeds, after a stop."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import test_methods
import test_train_resume as resume
import tiny
import toys

from lakd_jax import config as config_lib
from lakd_jax import distill, models
from lakd_jax.config import resolved
from lakd_jax.data import device
from lakd_jax.interop import weights
from lakd_jax.runtime import mesh as mesh_lib
from lakd_jax.training import setup, step
from lakd_jax.training import spec as spec_lib

environment, teacher_dir = resume.environment, resume.teacher_dir

STATEFUL = ("crd", "ctkd", "kdpp", "ofd")
# Losses that are means over examples, of each of which they see nothing else: that
# devices take the step of one holds of them as it does of the networks.
PER_EXAMPLE = (
    *("ab", "catkd", "dkd", "fitnet", "fsp", "ft", "kdsvd", "nkd", "nst", "review"),
    *("sdd", "ttm", "vid", "wttm", "fam", "rld", "wkd_l", "wkd_f", "ofa", "srrl"),
    "deepkd",
)
FIELDS = {"crd": {"crd__negatives": 16}}


def fields(name):
    """A method at once at its full weight, where it has a warm-up."""
    own = {f"{name}__warmup_epochs": 0.0}
    if "init_epochs" in config_lib.default()[name]:
        own[f"{name}__init_epochs"] = 1
    return {"method": name, "optim__lr": 1e-4, **own, **FIELDS.get(name, {})}


def spec(tmp_path, model, **fields):
    """(learner, function of its first state, the teacher's variables) on one device."""
    config = resolved.resolve(tiny.config(tmp_path, **fields))
    mesh = mesh_lib.data_mesh()
    variables = mesh_lib.replicate(toys.network(model, 7), mesh)
    made, first = setup.spec(
        config,
        weights.Loaded(model, toys.network(model, 1), "drawn"),
        weights.Loaded(model, variables, "drawn"),
        teacher_pixels=setup.pixels(config),
        image_shape=(8, 8, 3),
        steps_per_epoch=10,
        examples=160,
        mesh=mesh,
    )
    return made, first, variables


def row():
    return np.random.default_rng(3).integers(0, 160, 16).astype(np.int32)


@pytest.mark.long
@pytest.mark.parametrize(
    "name", [n for n in test_methods.METHODS if n not in PER_EXAMPLE]
)
def test_devices_take_the_step_of_one(name, tmp_path):
    made, first, teacher = spec(tmp_path, toys.Toy(), **fields(name))
    # From the same state on each of the meshes.
    start = jax.device_get((first(), teacher))

    def taken(devices):
        mesh = jax.sharding.Mesh(np.array(jax.devices()[:devices]), ("data",))
        own = dataclasses.replace(made, mesh=mesh)
        state, variables = mesh_lib.replicate(start, mesh)
        data = device.device_data(tiny.split(160, 0), 0, mesh)
        take = jax.jit(functools.partial(step.train_step, own))
        return take(state, variables, data, row())

    (one, its), (eight, theirs) = taken(1), taken(8)
    np.testing.assert_allclose(theirs["loss"], its["loss"], rtol=1e-4)
    for part, tolerance in {"collections": 1e-3, "params": 0.0}.items():
        both = (jax.tree.leaves(getattr(s, part)) for s in (eight, one))
        for a, b in zip(*both, strict=True):
            np.testing.assert_allclose(a, b, rtol=tolerance, atol=1e-3)


@pytest.mark.long
@pytest.mark.parametrize("name", STATEFUL)
def test_a_stop_loses_nothing_of_its_state(name, tmp_path, environment, teacher_dir):
    """Promise 12: memories, centres, margins and temperatures go on."""
    config = tiny.config(tmp_path, epochs=2, **fields(name))

    def train(folder, guard):
        return resume.train(config, tmp_path / folder, environment, guard, teacher_dir)

    whole = train("whole", resume.interrupt.Guard())
    assert whole["method"] == name
    with pytest.raises(resume.interrupt.Interrupted):
        train("parts", tiny.StopAfter(17))  # within the second epoch
    train("parts", resume.interrupt.Guard())
    one, other = (resume.finished(tmp_path / folder) for folder in ("whole", "parts"))
    resume.assert_equal_runs(one, other)


def test_features_of_two_shapes_are_told(tmp_path):
    made, *_ = spec(tmp_path, models.create("resnet8", num_classes=3), method="at")
    assert spec_lib.mismatched_joints(made, 8) == []
    wide = dataclasses.replace(made, teacher=models.create("resnet8x4", num_classes=3))
    assert spec_lib.mismatched_joints(wide, 8)[0] == "stage1.block1 8x8x16 from 8x8x64"
    larger = dataclasses.replace(made.teacher_pixels, size=16)
    large = dataclasses.replace(made, teacher_pixels=larger)
    assert spec_lib.mismatched_joints(large, 8)[2] == "stage3.block1 2x2x64 from 4x4x64"
    blind = dataclasses.replace(wide, facts=distill.facts("kd"))
    assert spec_lib.mismatched_joints(blind, 8) == []
