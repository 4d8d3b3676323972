"""Taps: every block behind its ReLU, as AFD compares them (property 11)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tap_toys

from lakd_jax import distill, models

KEY = jax.random.key(0)
IMAGES = np.random.default_rng(0).standard_normal((4, 8, 8, 3)).astype(np.float32)

TAPS = {
    "resnet20": [(32, 16)] * 3 + [(16, 32)] * 3 + [(8, 64)] * 3,
    "resnet110": [(32, 16)] * 9 + [(16, 32)] * 9 + [(8, 64)] * 9,
    "wrn_16_2": [(32, 32)] * 2 + [(16, 64)] * 2 + [(8, 128)] * 2,
    "wrn_40_2": [(32, 32)] * 6 + [(16, 64)] * 6 + [(8, 128)] * 6,
    "cifar_resnet18": [(32, 64)] * 2
    + [(16, 128)] * 2
    + [(8, 256)] * 2
    + [(4, 512)] * 2,
    "vgg8": [(16, 128), (8, 256), (4, 512), (4, 512)],
    "shuffle_v2": [(16, 116)] * 4 + [(8, 232)] * 8 + [(4, 464)] * 4,
    "mobilenet_v2": [
        *([(16, 8)] + [(16, 12)] * 2 + [(8, 16)] * 3 + [(4, 32)] * 4 + [(4, 48)] * 3),
        *([(2, 80)] * 3 + [(2, 160)]),
    ],
}


QUICK = ["resnet20", "resnet110", "wrn_16_2", "cifar_resnet18", "vgg8", "mobilenet_v2"]
QUICK += ["wrn_10_1", "hme"]
LONG = ["wrn_40_2", "shuffle_v2", "resnet18", "cifar_resnet50", "mobilenet_v1"]
LONG += ["mobilenet_v2_imagenet", "shuffle_v1"]


@pytest.mark.parametrize(
    "name", [*QUICK, *(pytest.param(n, marks=pytest.mark.long) for n in LONG)]
)
def test_11_every_family_has_taps_that_afd_takes(name):
    student = models.create(name, num_classes=4)
    module = distill.create("afd", {"qk_dim": 8})
    theirs = tap_toys.taps(tap_toys.TEACHER, 0, batch=2)

    def traced(images):
        ours, _ = student.init_with_output(KEY, images, train=False)
        seen = tap_toys.signals(ours.taps, theirs)
        return ours.taps, module.init_with_output(KEY, seen, train=True)

    images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    taps, ((found,), variables) = jax.eval_shape(traced, images)
    if name in TAPS:
        assert [t.shape for t in taps] == [(2, s, s, c) for s, c in TAPS[name]]
    assert len(taps) == sum(student.stage_sizes) or name == "resnet110"
    assert {t.ndim for t in taps} == {4} and found.terms["afd"].shape == ()
    positions = variables["params"]["module1"]["key_positions"]
    assert positions.shape == (len(taps), 8)


@pytest.mark.parametrize("name", ["resnet8", "wrn_10_1"])
def test_11_a_tap_is_non_negative(name):
    model = models.create(name, num_classes=4)
    apply = functools.partial(model.apply, train=True, mutable=["batch_stats"])
    out, _ = jax.jit(apply)(tap_toys.variables(model, IMAGES), IMAGES)
    for tap, block in zip(out.taps, sum(out.blocks, ()), strict=True):
        assert tap.shape == block.shape
        assert np.min(tap) == 0 and np.max(tap) > 0
    for tap, preact in zip(out.taps, out.preacts[1:], strict=True):
        np.testing.assert_array_equal(tap, np.maximum(preact, 0))


def test_11_taps_of_a_part_are_those_behind_its_start():
    model = models.create("wrn_16_1", num_classes=4)

    @jax.jit
    def both(variables, images):
        whole = model.apply(variables, images, train=False)
        rest = whole.blocks[1][0]
        part = model.apply(variables, rest, train=False, after="stage2.block1")
        return whole.taps, part.taps

    whole, part = both(tap_toys.variables(model, IMAGES), IMAGES)
    assert len(whole) == 6 and len(part) == 3
    for a, b in zip(whole[3:], part, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("cut", [False, True])
def test_the_next_unit_s_norm_learns_from_a_tap_unless_the_network_is_cut(cut):
    model = models.create("wrn_10_1", num_classes=4)
    variables = tap_toys.variables(model, IMAGES)
    joint = (lambda name, h: jax.lax.stop_gradient(h)) if cut else None

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def gradient(params):
        whole = {**variables, "params": params}
        out, changed = model.apply(
            whole, IMAGES, train=True, joint=joint, mutable=["batch_stats"]
        )
        return jnp.sum(out.taps[0] ** 3), changed

    grads, changed = gradient(variables["params"])
    norm = grads["stage2"]["block1"].pop("entry_bn")
    assert (tap_toys.largest(norm) == 0) == cut
    assert tap_toys.largest(grads["stage1"]) > 0
    above = {unit: grads[unit] for unit in ("stage2", "stage3", "head")}
    assert tap_toys.largest(above) == 0
    mean = changed["batch_stats"]["stage2"]["block1"]["entry_bn"]["mean"]
    assert tap_toys.largest(mean) > 0  # moved, by the network's own pass
