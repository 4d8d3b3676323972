"""Tests steps on mixed images: both networks' inputs, labels, devices and parts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_collections
import test_train_engines as engines
import test_train_step as steps
import tiny

from lakd_jax.data import device
from lakd_jax.training import segments
from lakd_jax.training import spec as spec_lib

LONG = pytest.mark.long
MIXED = {"data__mixup": 0.8, "data__cutmix": 1.0, "label_smoothing": 0.1}
SGD = {"optim__momentum": 0.0, "optim__weight_decay": 0.0, "optim__warmup_epochs": 0.0}


def test_both_networks_see_the_mixed_image(tmp_path):
    """The share changes from step to step and is that of the labels."""
    spec, _, _ = steps.spec_of(tmp_path, 1, method="kd", **MIXED)
    data = device.device_data(tiny.split(160, 0), 0, spec.mesh)
    (row,) = steps.rows(1)

    @jax.jit
    def start(number):
        below, batch = segments.start(spec, number, data, row)
        plain, labels = spec_lib.batch(spec, number, data, row)
        key = jax.random.fold_in(batch.noise, segments._MIXING)
        images, soft = spec.mixing(key, plain, labels)
        expected = spec.student_pixels(images), labels, soft
        return below, batch, expected, jnp.mean(spec.mixing.share(key, 8, 8))

    shares = []
    for number in range(4):
        below, batch, expected, share = jax.device_get(start(number))
        np.testing.assert_array_equal(below.student, below.teacher)
        found = below.student, batch.labels, batch.soft_labels
        for ours, wanted in zip(found, expected, strict=True):
            np.testing.assert_allclose(ours, wanted, atol=1e-5)
        shares.append(float(share))
    assert len(set(shares)) == 4


def test_steps_do_without_mixing_by_default(tmp_path):
    spec, _, _ = steps.spec_of(tmp_path, 1, method="kd", label_smoothing=0.1)
    assert spec.mixing is None


@LONG
def test_a_short_batch_on_eight_devices_is_mixed_as_on_one(tmp_path):
    """Its partners are on other devices: the batch is reversed as a whole."""
    row = steps.rows(1, 12)[0]
    found = []
    for devices in (1, 8):
        for batch in (row, row[:8]):
            spec, _, _ = steps.spec_of(tmp_path, devices, method="none", **MIXED)
            data = device.device_data(tiny.split(160, 0), 0, spec.mesh)
            start = jax.jit(lambda row, s=spec, d=data: segments.start(s, 1, d, row))
            below, seen = jax.device_get(start(batch))
            found.append((below.student, seen.soft_labels))
    for one, eight in zip(found[:2], found[2:], strict=True):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), one, eight
        )


@pytest.mark.long
def test_parts_are_those_of_the_mixed_batch(tmp_path):
    setting = steps.small(
        *(tmp_path, 1, test_collections.GROUP),
        method="kd",
        optim__lr=1.0,
        **MIXED,
        **SGD,
    )
    spec, state, *rest = setting
    both = [
        steps.train(
            (dataclasses.replace(spec, accumulate=n), state, *rest), steps.rows(1)
        )
        for n in (1, 2)
    ]
    ((whole, expected),), ((parts, metrics),) = both
    steps.assert_close(parts.params, whole.params, rtol=1e-4, atol=1e-5)
    steps.assert_same_metrics(metrics, expected, rtol=1e-4)


@pytest.mark.long
@pytest.mark.parametrize(("kind", "devices"), [("dispatch", 1), ("pipeline", 3)])
def test_engines_hand_the_mixed_labels_on(kind, devices, tmp_path):
    options = {"lakd__task": "aux_heads", "lakd__head_loss": "ce"}
    setting = steps.small(tmp_path, devices, method="lakd", **options, **MIXED)
    (row,) = steps.rows(1)
    found = {}
    for one in ("fused", kind):
        run = engines.engine(one, setting, tmp_path)
        found[one] = run.read(run.run(row[None])), jax.device_get(run.state())
    steps.assert_same_metrics(
        jax.tree.map(np.ravel, found[kind][0]),
        jax.tree.map(np.ravel, found["fused"][0]),
    )
    states = (state.params for _, state in found.values())
    steps.assert_close(*states, rtol=1e-4, atol=1e-5)
