"""Virtual attention: properties 15 to 20 of the KDExplainer specification, and folding.

The plain convolution is `nn.Conv`, the one of all networks without attention.
"""

import functools

import flax
import jax
import jax.numpy as jnp
import marks
import numpy as np
import pytest
import tiny
from flax import linen as nn

from lakd_jax import models
from lakd_jax.models import chain, folding, layers, vam

STATIC = vam.Options("static", 4, 1.0, True, 0.0)
DYNAMIC = vam.Options("dynamic", 4, 1.0, True, 0.0)
ONCE = vam.Options("static", 4, 1.0, False, 0.0)  # not times the number of blocks
KEY = jax.random.key(0)

# (inputs, outputs, size, stride, groups, bias)
KERNELS = {
    "3x3": (8, 12, 3, 1, 1, False),
    "strided": (8, 16, 3, 2, 1, True),
    "grouped": (24, 36, 1, 1, 3, False),
    "1x1": (8, 4, 1, 1, 1, False),
    "uneven": (24, 54, 1, 1, 1, False),  # 54 channels make three blocks
}
# A small network of every family that trains on small images in seconds.
FAMILIES = ["resnet8", "wrn_16_1", "vgg8", "mobilenet_v2", "shuffle_v1", "shuffle_v2"]


def noise(*shape, seed=0):
    values = np.random.default_rng(seed).standard_normal(shape)
    return values.astype(np.float32)


def pair(kind, options=STATIC):
    """Returns a plain convolution, its gated counterpart, and an input for both."""
    inputs, outputs, size, stride, groups, bias = KERNELS[kind]
    make = functools.partial(layers.conv, outputs, size, stride, name="conv")
    make = functools.partial(make, groups=groups, bias=bias, gated=True)
    plain, gated = (make(layers.Style(vam=v)) for v in (None, options))
    assert type(plain) is nn.Conv and type(gated) is vam.Conv
    return plain, gated, noise(2, 6, 6, inputs)


def with_gates(variables):
    """Returns the variables with random numbers in all gates."""
    flat = flax.traverse_util.flatten_dict(dict(variables))
    gates = [path for path in flat if vam.is_gate(path)]
    assert gates
    for seed, path in enumerate(gates):
        flat[path] = noise(*flat[path].shape, seed=seed)
    return flax.traverse_util.unflatten_dict(flat)


def split(variables):
    """Returns (parameters of the plain network, gates), both flat."""
    flat = flax.traverse_util.flatten_dict(dict(variables["params"]))
    gates = {path: x for path, x in flat.items() if vam.is_gate(path)}
    return {path: x for path, x in flat.items() if path not in gates}, gates


@functools.cache
def network(name, options=STATIC):
    """Returns (network, variables) with random gates."""
    model = models.create(name, num_classes=5, vam=options)
    return model, with_gates(tiny.variables(model))


@functools.cache
def compiled(model):
    return jax.jit(lambda v, x: model.apply(v, x, train=False).logits)


def logits(model, variables):
    return np.asarray(compiled(model)(variables, noise(4, 8, 8, 3)))


def weights(layer, x):
    """Returns random variables of a convolution, drawn by NumPy."""
    shapes = jax.eval_shape(layer.init, KEY, x)
    rng = np.random.default_rng(3)
    return jax.tree.map(lambda s: rng.standard_normal(s.shape).astype("f4") / 4, shapes)


# One convolution


@functools.cache
def begun(kind):
    """Returns {options or None for the plain one: (initial variables, output)}."""
    options = (None, STATIC, DYNAMIC, ONCE)
    made = [pair(kind, each or STATIC)[bool(each)] for each in options]

    @jax.jit
    def run(x):  # one program draws the equal kernels once
        drawn = [(layer, layer.init(KEY, x)) for layer in made]
        return [(variables, layer.apply(variables, x)) for layer, variables in drawn]

    found = jax.device_get(run(pair(kind)[2]))
    return dict(zip(options, found, strict=True))


@pytest.mark.parametrize("options", [STATIC, DYNAMIC], ids=vam.GATES)
@pytest.mark.parametrize("kind", KERNELS)
def test_15_uniform_attention_is_the_plain_convolution(kind, options):
    (plain, expected), (ours, got) = begun(kind)[None], begun(kind)[options]
    params, gates = split(ours)
    assert gates and all(not np.any(g) for g in gates.values())
    np.testing.assert_array_equal(params["kernel",], plain["params"]["kernel"])
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_without_rescale_uniform_attention_divides_by_the_blocks():
    found = begun("3x3")
    np.testing.assert_allclose(found[ONCE][1], found[None][1] / 4, atol=1e-6)


def test_init_std_is_the_gates_deviation_and_leaves_the_kernel_alone():
    options = vam.Options("static", 8, 1.0, True, 0.5)
    layer = functools.partial(layers.conv, 64, 3, 1, name="c", gated=True)
    x = noise(1, 4, 4, 64)
    both = [layer(layers.Style(vam=v)) for v in (STATIC, options)]
    init = jax.jit(lambda key: [one.init(key, x) for one in both])
    still, moved = map(split, jax.device_get(init(KEY)))
    np.testing.assert_array_equal(still[0]["kernel",], moved[0]["kernel",])
    assert 0.35 < np.std(moved[1]["vam_gate",]) < 0.65


def test_16_rows_sum_to_one_and_entropy_is_between_zero_and_one():
    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def entropy(gate, tau):
        rows = jnp.sum(vam.attention(gate, tau), -1)
        return vam.entropy(vam.log_attention(gate, tau)), rows

    for seed, scale in enumerate((0.1, 1.0, 10.0)):
        (value, rows), _ = entropy(np.float32(scale) * noise(12, 4, seed=seed), 0.5)
        np.testing.assert_allclose(rows, 1.0, rtol=1e-5)
        assert 0 <= value < 1
    # The maximum, with no slope, and the minimum, with a finite one.
    (value, _), slope = entropy(np.zeros((12, 4), np.float32), 1.0)
    np.testing.assert_allclose(value, 1.0, rtol=1e-6)
    np.testing.assert_allclose(slope, 0.0, atol=1e-7)
    one_hot = np.float32(1e4) * np.eye(4, dtype=np.float32)[np.arange(12) % 3]
    (value, _), slope = entropy(one_hot, 1.0)
    assert value == 0 and np.all(np.isfinite(slope))
    # Rows (1/2, 1/4, 1/4) and uniform; tau divides the logits.
    gate = np.log(np.array([[0.5, 0.25, 0.25], [1.0, 1.0, 1.0]], np.float32))
    expected = (1.5 * np.log(2) / np.log(3) + 1) / 2
    for tau in (1.0, 2.0):
        (value, _), _ = entropy(np.float32(tau) * gate, tau)
        np.testing.assert_allclose(value, expected, rtol=1e-6)


def scaled_copies(x, a, groups):
    """Repeats each group of channels for each of its output blocks, scaled by 4 A."""
    (*front, channels), (rows, columns) = x.shape, a.shape
    scale = columns * a.reshape(1, 1, 1, groups, rows // groups, columns, 1)
    x = x.reshape(*front, groups, 1, columns, channels // groups // columns)
    return (x * scale).reshape(*front, rows * channels // groups)


@pytest.mark.parametrize("kind", KERNELS)
def test_18_scaled_kernel_is_a_grouped_convolution_over_scaled_copies(kind):
    _, outputs, size, stride, groups, bias = KERNELS[kind]
    _, static, x = pair(kind)
    _, dynamic, _ = pair(kind, DYNAMIC)
    variables = with_gates(weights(static, x))
    # The dynamic form, with a slope of zero, has the same attention for all images.
    zeros = jax.tree.map(np.zeros_like, weights(dynamic, x)["params"])
    make = functools.partial(layers.conv, outputs, size, stride, layers.Style())

    @jax.jit
    def run(params, slopes, x):
        a = vam.attention(params["vam_gate"], 1.0)
        grouped = make(name="conv", groups=len(a), bias=bias)
        plain = {name: x for name, x in params.items() if name != "vam_gate"}
        expected = grouped.apply({"params": plain}, scaled_copies(x, a, groups))
        both = {"params": {**slopes, **params}}
        return expected, static.apply({"params": params}, x), dynamic.apply(both, x)

    expected, of_static, of_dynamic = run(variables["params"], zeros, x)
    np.testing.assert_allclose(of_static, expected, atol=1e-5)
    np.testing.assert_allclose(of_dynamic, expected, atol=1e-5)


def test_18_by_hand():
    """Two blocks each way, 1x1: y_j = 2 sum_i A_ji W_ij x_i."""
    kernel = np.array([[1.0, 2.0], [3.0, 4.0]])[None, None]
    a = np.array([[0.25, 0.75], [1.0, 0.0]])
    scaled = jax.jit(vam.scaled_kernel)(kernel, 2 * a)
    np.testing.assert_allclose(scaled[0, 0], [[0.5, 4.0], [4.5, 0.0]])
    x = np.array([[[[10.0, 100.0]]]])
    scale = jax.jit(vam.scaled_inputs)
    first = scale(x, 2 * a[None, :1])
    np.testing.assert_allclose(first[0, 0, 0], [5.0, 150.0])
    np.testing.assert_allclose(scale(x, a[None, 1:]), [[[[10, 0]]]])


def test_dynamic_gates_follow_the_image():
    _, gated, x = pair("3x3", DYNAMIC)
    variables = with_gates(weights(gated, x))
    apply = jax.jit(functools.partial(gated.apply, mutable=["intermediates"]))
    before, entropy = apply(variables, x)
    # Every image has its own attention: the first result does not depend on the second.
    after, other = apply(variables, np.stack([x[0], 3 * x[1]]))
    np.testing.assert_allclose(before[0], after[0], atol=1e-5)
    assert entropy["intermediates"] != other["intermediates"]


def test_channels_without_a_divisor_stay_plain():
    x = noise(1, 4, 4, 7)  # seven channels make one block
    layer = layers.conv(8, 3, 1, layers.Style(vam=STATIC), name="c", gated=True)
    (_, sown), variables = traced(layer, x)
    assert list(variables["params"]) == ["kernel"] and not sown
    assert [vam.num_blocks(c, 4) for c in (7, 54, 18, 58, 4, 8)] == [1, 3, 3, 2, 4, 4]


def traced(layer, x):
    """Returns the shapes of ((result, sown values), variables)."""
    variables = jax.eval_shape(layer.init, KEY, x)
    apply = functools.partial(layer.apply, mutable=["intermediates"])
    return jax.eval_shape(apply, variables, x), variables


def test_gated_convolutions_compute_in_their_dtype():
    style = layers.Style(jnp.bfloat16, vam=STATIC)
    layer = layers.conv(8, 3, 1, style, name="c", gated=True, bias=True)
    (y, sown), _ = traced(layer, noise(2, 4, 4, 8))
    assert y.dtype == jnp.bfloat16
    assert sown["intermediates"][vam.ENTROPY].dtype == jnp.float32


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("gate", "statik"), ("blocks", 1), ("temperature", 0.0), ("init_std", -1.0)),
        *(("temperature", float("nan")), ("init_std", float("inf"))),
    ],
)
def test_options_out_of_range(field, value):
    fields = {"gate": "static", "blocks": 4, "temperature": 1.0, "rescale": True}
    fields |= {"init_std": 0.0, field: value}
    with pytest.raises(ValueError, match=f"vam {field}"):
        vam.Options(**fields)


# Networks


@pytest.mark.parametrize(
    "name", marks.others_long(FAMILIES, [*FAMILIES[:3], "shuffle_v1"])
)
def test_where_the_gates_are(name):
    """Section 7.3: never at stems, shortcuts, depthwise convolutions, classifiers."""
    kernels, gates = split(network(name)[1])
    gated = {path[:-1] for path in gates}
    plain = {p[:-1] for p in kernels if p[-1] == "kernel"} - gated
    for path in plain:
        depthwise = kernels[*path, "kernel"].shape[2:3] == (1,)
        other = path[0] == "stem" or path[-1] == "dense" or "shortcut" in path[-1]
        assert other or depthwise, path
    assert not any(path[0] == "stem" for path in gated)
    assert ("head", "conv") in gated or name in ("resnet8", "wrn_16_1", *FAMILIES[2::2])


def test_first_unit_of_shuffle_v1_has_three_blocks_where_four_do_not_divide():
    _, gates = split(network("shuffle_v1")[1])
    first = {p[2]: g.shape for p, g in gates.items() if p[:2] == ("stage1", "block1")}
    # 24 -> 54 in one group, then 3 x (18 -> 72).
    assert first == {"conv1": (3, 4), "conv3": (12, 3)}
    assert gates["stage3", "block2", "conv3", "vam_gate"].shape == (12, 4)


@pytest.mark.parametrize("name", marks.others_long(FAMILIES, ["resnet8", "wrn_16_1"]))
def test_19_folded_is_the_plain_network_with_the_same_logits(name):
    model, variables = network(name)
    plain_model, plain = folding.fold_gates(model, variables)
    assert plain_model == models.create(name, num_classes=5)
    shapes = jax.tree.map(jnp.shape, plain)
    assert shapes == jax.tree.map(jnp.shape, chain.variable_shapes(plain_model))
    expected = logits(model, variables)
    np.testing.assert_allclose(logits(plain_model, plain), expected, atol=1e-5)
    # The gates made a difference.
    without, _ = split(variables)
    bare = {**variables, "params": flax.traverse_util.unflatten_dict(without)}
    assert np.abs(logits(plain_model, bare) - expected).max() > 1e-2


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet8", STATIC),
        ("resnet8", DYNAMIC),
        pytest.param("wrn_16_1", DYNAMIC, marks=pytest.mark.long),
        pytest.param("vgg8", STATIC, marks=pytest.mark.long),
    ],
)
def test_batch_norms_fold_into_gated_networks(name, options):
    model, variables = network(name, options)
    folded_model, folded = folding.fold(model, variables)
    assert folded_model.vam == (None if options.foldable else options)
    assert "batch_stats" not in folded
    expected = logits(model, variables)
    # Gates that depend on the image magnify rounding, differently on each machine.
    limit = 1e-4 * np.abs(expected).max()
    np.testing.assert_allclose(logits(folded_model, folded), expected, atol=limit)


def test_gates_are_never_dropped_silently():
    model, variables = network("resnet8", DYNAMIC)
    with pytest.raises(ValueError, match="dynamic gates depend on the image"):
        folding.fold_gates(model, variables)
    gate = "stage1/block1/conv1/vam_gate"
    with pytest.raises(ValueError, match=f"have gates, such as {gate}"):
        folding.fold(models.create("resnet8", num_classes=5), variables)
