"""Weights of one network under the names of torchvision and of timm.

One of the two lists of keys is the reference's own (tests/golden/models); the other is
written out here in the order in which its layers are made, which is the same.
"""

import functools

import golden_weights
import marks
import numpy as np
import pytest
import resnet_weights

from lakd_jax import errors, interop, models
from lakd_jax.interop import layout

assert_same_tree = resnet_weights.assert_same_tree
PARTS = ("weight", "bias")
NORM = (*PARTS, "running_mean", "running_var")


def named(*layers, parts=PARTS):
    return [f"{layer}.{part}" for layer in layers for part in parts]


def convnext_timm(depths):
    keys = named("stem.0", "stem.1")
    for stage, depth in enumerate(depths):
        if stage:
            keys += named(
                f"stages.{stage}.downsample.0", f"stages.{stage}.downsample.1"
            )
        for index in range(depth):
            block = f"stages.{stage}.blocks.{index}"
            layers = ("conv_dw", "norm", "mlp.fc1", "mlp.fc2")
            keys += [f"{block}.gamma", *named(*(f"{block}.{x}" for x in layers))]
    return keys + named("head.norm", "head.fc")


def convnext_torchvision(depths):
    keys = named("features.0.0", "features.0.1")
    for stage, depth in enumerate(depths):
        if stage:
            keys += named(f"features.{2 * stage}.0", f"features.{2 * stage}.1")
        for index in range(depth):
            block = f"features.{2 * stage + 1}.{index}"
            layers = [f"{block}.block.{number}" for number in (0, 2, 3, 5)]
            keys += [f"{block}.layer_scale", *named(*layers)]
    return keys + named("classifier.0", "classifier.2")


def efficientnet_timm(depths):
    def conv_norm(conv, norm):
        return [f"{conv}.weight", *named(norm, parts=NORM)]

    keys = conv_norm("conv_stem", "bn1")
    for stage, depth in enumerate(depths):
        for index in range(depth):
            block = f"blocks.{stage}.{index}"
            squeeze = named(f"{block}.se.conv_reduce", f"{block}.se.conv_expand")
            pairs = [("conv_pw", "bn1"), ("conv_dw", "bn2"), ("conv_pwl", "bn3")]
            if stage == 0:
                pairs = [("conv_dw", "bn1"), ("conv_pw", "bn2")]
            convs = [conv_norm(f"{block}.{a}", f"{block}.{b}") for a, b in pairs]
            keys += sum(convs[:-1], []) + squeeze + convs[-1]
    return keys + conv_norm("conv_head", "bn2") + named("classifier")


# Network -> the other naming, its keys, and the shapes that differ in it.
OTHERS = {
    "convnext_pico": ("torchvision", convnext_torchvision((2, 2, 6, 2))),
    "convnext_tiny": ("timm", convnext_timm((3, 3, 9, 3))),
    "efficientnet_b0": ("timm", efficientnet_timm((1, 2, 2, 3, 3, 4, 1))),
}


def in_other_shape(key, value):
    """An array of the reference in the shape that the other publisher gives it."""
    if key.endswith(".layer_scale"):  # torchvision's, to timm's
        return value.reshape(-1)
    if key.endswith(".gamma"):
        return value.reshape(-1, 1, 1)
    if ".mlp.fc" in key and value.ndim == 4:  # of the networks that timm added
        return value.reshape(value.shape[:2])
    return value


@functools.cache
def weights(name):
    """The golden weights, by the reference's names and by the other ones."""
    reference = golden_weights.state_dict(name)
    pairs = zip(OTHERS[name][1], reference.items(), strict=True)
    other = {new: in_other_shape(key, value) for new, (key, value) in pairs}
    return reference, other


@pytest.mark.parametrize("name", marks.others_long(OTHERS, ["convnext_pico"]))
def test_weights_are_read_and_written_under_both_names(name):
    reference, other = weights(name)
    naming = OTHERS[name][0]
    assert set(models.family(name).NAMINGS) == {"timm", "torchvision"}
    variables = interop.from_torch(name, reference)
    assert_same_tree(interop.from_torch(name, other), variables)
    options = interop.options_from_torch(name, reference)
    assert interop.options_from_torch(name, other) == options
    assert_same_tree(interop.to_torch(name, variables, naming), other)
    assert_same_tree(interop.to_torch(name, variables), reference)


def test_the_ones_at_the_end_of_a_shape_are_the_publishers():
    """timm has 1x1 convolutions in the networks it added, torchvision (C, 1, 1)."""
    cases = {
        ("convnext_atto", "timm"): [(160, 40, 1, 1), (40,)],
        ("convnext_atto", "torchvision"): [(160, 40), (40, 1, 1)],
        ("convnext_tiny", "timm"): [(384, 96), (96,)],
        ("convnext_tiny", "torchvision"): [(384, 96), (96, 1, 1)],
    }
    block = ("params", "stage1", "block1")
    for (name, naming), shapes in cases.items():
        table = layout.table(name, {"num_classes": 1}, naming)
        found = {entry.path: entry.torch_shape for entry in table.values()}
        paths = (*block, "fc1", "kernel"), (*block, "layer_scale")
        assert [found[path] for path in paths] == shapes


@functools.cache
def atto(**options):
    """Made-up weights of the smallest ConvNeXt by timm's names."""
    table = layout.table("convnext_atto", {"num_classes": 2, **options}, "timm")
    return {k: np.full(e.torch_shape, 0.5, np.float32) for k, e in table.items()}


def test_options_are_inferred_from_either_naming():
    for options in ({"patch": 2}, {"layer_scale": 0.0}, {"patch": 16}):
        given = atto(**options)
        variables = interop.from_torch("convnext_atto", given)
        expected = {"num_classes": 2, "patch": 4, "layer_scale": 1e-6} | options
        for naming in ("timm", "torchvision"):
            found = interop.to_torch("convnext_atto", variables, naming)
            assert interop.options_from_torch("convnext_atto", found) == expected
        assert_same_tree(interop.to_torch("convnext_atto", variables), given)


def misfit(weights):
    with pytest.raises(errors.TeacherError) as caught:
        interop.from_torch("convnext_atto", weights)
    return str(caught.value)


def test_faults_are_named_by_the_keys_of_the_file():
    pico = {k: v for k, v in atto().items() if k != "stages.1.blocks.0.gamma"}
    assert "1 missing: stages.1.blocks.0.gamma" in misfit(pico)
    variables = interop.from_torch("convnext_atto", atto())
    other = interop.to_torch("convnext_atto", variables, "torchvision")
    del other["features.3.0.block.2.bias"]
    other["features.1.0.layer_scale"] = np.zeros(40, np.float32)
    message = misfit(other)
    assert "1 missing: features.3.0.block.2.bias" in message
    assert "features.1.0.layer_scale (40,) instead of (40, 1, 1)" in message


def test_timm_s_other_network_of_patch_2_is_refused():
    """It halves the resolution before the first stage as well."""
    more = {
        "stages.0.downsample.0.weight": np.zeros(40, np.float32),
        "stages.0.downsample.1.weight": np.zeros((40, 40, 2, 2), np.float32),
    }
    assert "2 surplus: stages.0.downsample.0.weight" in misfit(atto(patch=2) | more)


def test_the_classifier_that_is_missing_is_the_reference_s():
    left = {k: v for k, v in atto().items() if not k.startswith("head.fc")}
    message = misfit(left)
    assert "no usable 'head.fc.weight'" in message
    # Of the networks with such a stem.
    assert "nearest is convnext_atto: 126 of its 128 tensors fit" in message


def test_an_unknown_naming_lists_those_there_are():
    variables = interop.from_torch("convnext_atto", atto())
    with pytest.raises(ValueError, match="naming of convnext_atto is 'tim'; did you"):
        interop.to_torch("convnext_atto", variables, "tim")
    resnet = interop.from_torch("resnet8", resnet_weights.torch_weights())
    with pytest.raises(ValueError, match="'timm', but resnet8 has only one"):
        interop.to_torch("resnet8", resnet, "timm")


def test_transposed_matrices_are_recognised_and_not_all_listed():
    """As of a network of another framework, which keeps (inputs, outputs)."""
    table = layout.table("convnext_tiny", {"num_classes": 2})
    given = {k: np.zeros(e.torch_shape, np.float32) for k, e in table.items()}
    given = {k: v.T if v.ndim == 2 else v for k, v in given.items()}
    with pytest.raises(errors.TeacherError) as caught:
        interop.from_torch("convnext_tiny", given)
    assert "and 27 more looks transposed" in str(caught.value)
