"""Conversion of weights from and to PyTorch state dictionaries."""

import functools
import json
import math

import flax
import golden_weights
import jax
import jax.numpy as jnp
import marks
import numpy as np
import pytest
import resnet_weights

from lakd_jax import errors, interop, models
from lakd_jax.interop import layout

COUNTER = resnet_weights.COUNTER
RESNETS = ["resnet8", "resnet8x4", "resnet20", "resnet110"]
torch_weights = resnet_weights.torch_weights
assert_same_tree = resnet_weights.assert_same_tree
TIMM = sorted(p.stem for p in (golden_weights.FOLDER / "timm").glob("*.json"))
GOLDEN = sorted(p.stem for p in (golden_weights.FOLDER / "models").glob("*.json"))
# One network per family and kind of block.
SOME = ["resnet8", "resnet8x4", "cifar_resnet18", "resnet18"]
SOME += ["wrn_16_1", "wrn_16_2", "vgg8", "mobilenet_v1", "mobilenet_v2"]
SOME += ["mobilenet_v2_imagenet", "shuffle_v1", "shuffle_v2", "hme"]
SOME += ["convnext_atto"]
# The widest transformers have the arrays of the others and take gigabytes.
ALL = [name for name in models.names() if "_base" not in name]


# from_torch


@pytest.mark.parametrize("shortcut", ["projection", "identity"])
@pytest.mark.parametrize("name", marks.others_long(RESNETS, RESNETS[:2]))
def test_a_resnet_takes_its_state_dict_and_returns_it(name, shortcut):
    weights = torch_weights(name, shortcut)
    options = interop.options_from_torch(name, weights)
    assert options == {"num_classes": 7, "shortcut": shortcut}
    variables = interop.from_torch(name, weights)
    model = models.create(name, **options)
    images = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
    init = functools.partial(model.init, train=False)
    shapes = jax.eval_shape(init, jax.random.key(0), images)
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, shapes)
    assert_same_tree(interop.to_torch(name, variables), weights)


def test_dtype_of_the_result():
    half = {key: value.astype(np.float16) for key, value in torch_weights().items()}
    for leaf in jax.tree.leaves(interop.from_torch("resnet8", half)):
        assert leaf.dtype == np.float32


def wrapped():
    bare = torch_weights()
    counters = {f"bn1.{COUNTER}": np.asarray(5)}
    parallel = {f"module.{key}": value for key, value in bare.items()}
    linear = {key.replace("fc.", "linear."): value for key, value in bare.items()}
    shortcut = {
        key.replace(".downsample.", ".shortcut."): v for key, v in linear.items()
    }
    return {
        "bare": bare,
        "counters": bare | counters,
        "state_dict": {"state_dict": parallel, "best_prec1": 91.2, "epoch": 3},
        "model": {"epoch": 240, "model": bare, "accuracy": np.float32(0.7)},
        "net": {"net": {f"module.{key}": v for key, v in linear.items()}, "acc": 1},
        "nested": {"state_dict": {"model": bare}},
        "prefixes": {f"model.module.{key}": value for key, value in bare.items()},
        "shortcut": shortcut,
    }


@pytest.mark.parametrize("how", list(wrapped()))
def test_wrapped_state_dicts(how):
    variables = interop.from_torch("resnet8", wrapped()[how])
    assert_same_tree(variables, interop.from_torch("resnet8", torch_weights()))


def misfit(name, weights):
    with pytest.raises(errors.TeacherError) as caught:
        interop.from_torch(name, weights)
    message = str(caught.value)
    assert len(message.splitlines()) <= 10
    assert name in message
    return message


def test_missing_key_is_named():
    """Promise 17: no warning, but an error."""
    weights = dict(torch_weights())
    del weights["layer3.0.conv2.weight"]
    assert "1 missing: layer3.0.conv2.weight" in misfit("resnet8", weights)


def test_surplus_key_is_named_as_it_is_spelled_in_the_file():
    """Promise 17: no warning, but an error."""
    weights = {"module." + key: value for key, value in torch_weights().items()}
    weights["module.linear.weight"] = weights["module.fc.weight"]
    assert "1 surplus: linear.weight" in misfit("resnet8", weights)


def test_wrongly_shaped_key_is_named_with_both_shapes():
    """Promise 17: no warning, but an error."""
    weights = torch_weights() | {"layer1.0.bn1.bias": np.zeros(17, np.float32)}
    message = misfit("resnet8", weights)
    assert "1 of another shape: layer1.0.bn1.bias (17,) instead of (16,)" in message


def test_another_network_is_suggested_and_at_most_ten_keys_listed():
    message = misfit("resnet8", torch_weights("resnet14"))
    assert "they fit resnet14: " in message
    assert message.count("layer") == 10
    assert "and 20 more" in message  # three blocks of ten tensors
    message = misfit("resnet14", torch_weights("resnet8x4"))
    assert "they fit resnet8x4: " in message
    assert message.count("layer") + message.count("bn1.") >= 3


def test_partly_missing_projections_are_no_identity_shortcut():
    shortcut = "layer2.0.downsample"
    weights = {k: v for k, v in torch_weights().items() if not k.startswith(shortcut)}
    message = misfit("resnet8", weights)
    assert "5 missing" in message
    assert "no registered network fits" in message


@pytest.mark.parametrize("shape", [None, (), (7,), (0, 64)])
def test_class_count_must_be_readable(shape):
    weights = dict(torch_weights())
    del weights["fc.weight"]
    if shape is not None:
        weights["fc.weight"] = np.zeros(shape, np.float32)
    assert "fc.weight" in misfit("resnet8", weights)
    with pytest.raises(errors.TeacherError, match="fc.weight"):
        interop.options_from_torch("resnet8", weights)


def test_weights_must_be_finite():
    bad = torch_weights()["bn1.bias"].copy()
    bad[3] = np.nan
    message = misfit("resnet8", torch_weights() | {"bn1.bias": bad})
    assert "bn1.bias" in message
    assert "NaN" in message


def test_nothing_to_read():
    with pytest.raises(errors.TeacherError, match="no tensors found"):
        interop.from_torch("resnet8", {"epoch": 3})
    with pytest.raises(ValueError, match="did you mean 'resnet8'"):
        interop.from_torch("resnet9", torch_weights())


def test_integers_are_refused_as_weights():
    integers = torch_weights()["conv1.weight"].astype(np.int8)
    message = misfit("resnet8", torch_weights() | {"conv1.weight": integers})
    assert "int8 in 1 tensors: conv1.weight" in message


def test_transposed_classifier_is_recognised():
    transposed = torch_weights()["fc.weight"].T
    message = misfit("resnet8", torch_weights() | {"fc.weight": transposed})
    assert "fc.weight (64, 7) looks transposed" in message
    linear = {k.replace("fc.", "linear."): v for k, v in torch_weights().items()}
    message = misfit("resnet8", linear | {"linear.weight": transposed})
    assert "linear.weight (64, 7) looks transposed" in message
    # With a second fault, the message does not guess.
    short = torch_weights() | {"fc.weight": transposed, "bn1.bias": np.zeros(3, "f4")}
    assert "transposed" not in misfit("resnet8", short)


# timm's names


@pytest.mark.parametrize("arch", marks.others_long(TIMM, ["resnet18"]))
def test_every_tensor_of_timm_finds_its_place(arch):
    spec = json.loads((golden_weights.FOLDER / "timm" / f"{arch}.json").read_text())
    weights = {
        key: golden_weights.tensor(key, tuple(shape))
        for key, shape in spec["state_dict"]
    }
    name = spec["network"]
    back = interop.to_torch(name, interop.from_torch(name, weights))
    # Both packages create their layers in the same order.
    names = zip(spec.get("torchvision", weights), weights, strict=True)
    expected = {k: weights[timm] for k, timm in names if not timm.endswith(COUNTER)}
    assert_same_tree(back, expected)


# to_torch


def numbered(table):
    """Variables of a network of which every number is another."""
    leaves = {
        entry.path: np.arange(math.prod(entry.shape), dtype=np.float32).reshape(
            entry.shape
        )
        + index
        for index, entry in enumerate(table.values())
    }
    return flax.traverse_util.unflatten_dict(leaves)


@pytest.mark.parametrize("name", marks.others_long(ALL, SOME))
def test_every_network_goes_there_and_back(name):
    family = models.family(name)
    choices = {k: v for k, v in family.OPTIONS.items() if isinstance(v, tuple)}
    options = {key: values[0] for key, values in choices.items()}
    # With the number of classes of the golden weights, if any: traced already.
    classes = golden_weights.classes(name) if name in GOLDEN else 1
    options = {"num_classes": classes, **options}
    variables = numbered(layout.table(name, options))
    for naming in family.NAMINGS:
        weights = interop.to_torch(name, variables, naming)
        assert all(value.flags.c_contiguous for value in weights.values())
        found = interop.options_from_torch(name, weights)
        assert options.items() <= found.items()
        assert models.create(name, **found) == models.create(name, **options)
        assert_same_tree(interop.from_torch(name, weights), variables)
    if name in GOLDEN:  # in the names and shapes of the public implementation
        golden = golden_weights.state_dict(name)
        assert_same_tree(
            interop.to_torch(name, interop.from_torch(name, golden)), golden
        )


def test_back_from_other_types_and_jax_arrays():
    variables = interop.from_torch("resnet8", torch_weights(), dtype=jnp.bfloat16)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(variables))
    back = interop.to_torch("resnet8", jax.tree.map(jnp.asarray, variables))
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), torch_weights())
    assert_same_tree(back, jax.tree.map(lambda x: x.astype(np.float32), half))


def no_variables(name, variables):
    with pytest.raises(ValueError) as caught:
        interop.to_torch(name, variables)
    message = str(caught.value)
    assert len(message.splitlines()) <= 10
    return message


def test_variables_of_another_network_are_refused():
    deep = interop.from_torch("resnet14", torch_weights("resnet14"))
    message = no_variables("resnet8", deep)
    assert "not those of resnet8" in message
    assert message.count("block2") == 10 and "and 20 more" in message
    wide = interop.from_torch("resnet8x4", torch_weights("resnet8x4"))
    message = no_variables("resnet8", wide)
    assert "/bn1/mean (64,) instead of (16,)" in message
    assert "did you mean 'resnet8'" in no_variables("resnet9", deep)


def test_variables_that_lack_something_are_refused():
    variables = interop.from_torch("resnet8", torch_weights())
    leaves = flax.traverse_util.flatten_dict(variables)
    left = {k: v for k, v in leaves.items() if k[1:3] != ("stage2", "block1")}
    message = no_variables("resnet8", flax.traverse_util.unflatten_dict(left))
    assert "15 missing: " in message and "params/stage2/block1/bn1/scale" in message
    left = {k: v for k, v in leaves.items() if k[1] != "head"}
    message = no_variables("resnet8", flax.traverse_util.unflatten_dict(left))
    assert "fc.weight" in message
    assert "fc.weight" in no_variables("resnet8", {})
