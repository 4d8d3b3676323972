"""The registry: names, arguments that `create` rejects, counts, initial values."""

import math

import flax
import jax
import jax.numpy as jnp
import marks
import numpy as np
import pytest

from lakd_jax import models
from lakd_jax.models import describe

IDENTITY = {"shortcut": "identity"}


def long(*values):
    return pytest.param(*values, marks=pytest.mark.long)


def test_registry_names():
    assert models.names() == [
        *(f"resnet{depth}" for depth in (8, 14, 20, 32, 44, 56, 110)),
        *("resnet8x4", "resnet32x4"),
        *(f"cifar_resnet{depth}" for depth in (18, 34, 50)),
        *(f"resnet{depth}" for depth in (18, 34, 50, 101, 152)),
        *("wrn_16_1", "wrn_16_2", "wrn_28_2", "wrn_40_1", "wrn_40_2"),
        *(f"vgg{depth}" for depth in (8, 11, 13, 16, 19)),
        *("mobilenet_v2", "mobilenet_v1", "mobilenet_v2_imagenet"),
        *("shuffle_v1", "shuffle_v2"),
        *(f"convnext_{size}" for size in ("atto", "pico", "nano", "tiny", "small")),
        *(f"efficientnet_b{number}" for number in range(5)),
        *(f"{kind}_{s}" for kind in ("vit", "deit") for s in ("tiny", "small", "base")),
        *(f"deit_{size}_distilled" for size in ("tiny", "small", "base")),
        "hme",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "resnet-20"}, "did you mean 'resnet20'"),
        ({"name": "zzz"}, "network is 'zzz'; it must be one of resnet8, "),
        ({"name": "wrn_17_2"}, "wide ResNet is 6n [+] 4 .*, not 17"),
        ({"name": "wrn_4_2"}, "wide ResNet is 6n [+] 4 .*, not 4"),
        ({"name": "wrn_16"}, "did you mean 'wrn_16_2'"),
        ({"name": "vgg8", "shortcut": "identity"}, "option of vgg8 is 'shortcut'"),
        ({"shortcutt": "identity"}, "did you mean 'shortcut'"),
        ({"name": "convnext_atto", "patch": 0}, "patch of convnext_atto must be at"),
        ({"name": "convnext_atto", "drop_path": 1.0}, "from 0 to below 1, is 1"),
        ({"name": "convnext_atto", "layer_scale": -1.0}, "must be at least 0"),
        ({"name": "convnext_atto", "vam": None}, "option of convnext_atto is 'vam'"),
        ({"name": "efficientnet_b0", "patch": 2}, "option of efficientnet_b0 is"),
        ({"shortcut": "B"}, "must be one of projection, identity"),
        ({"dtype": "int8"}, "floating type"),
        ({"dtype": "float33"}, "unknown dtype"),
        ({"num_classes": 0}, "at least 1"),
        ({"num_classes": True}, "integer"),
        ({"num_classes": 2.0}, "integer"),
    ],
)
def test_create_rejects(arguments, message):
    with pytest.raises(ValueError, match=message):
        models.create(**{"name": "resnet20", "num_classes": 10} | arguments)


@pytest.mark.parametrize(
    ("name", "options", "classes", "parameters", "macs"),
    [
        # Published: 25.56 M and 4.09 G; 3.50 M and 0.30 G; 11.69 M and 1.81 G.
        long("resnet50", {}, 1000, 25_557_032, 4_089_184_256),
        ("mobilenet_v2_imagenet", {}, 1000, 3_504_872, 300_774_272),
        ("resnet18", {}, 1000, 11_689_512, 1_814_073_344),
        # The reference's own counts.
        ("convnext_pico", {}, 1000, 9_045_672, 1_367_055_360),
        long("convnext_tiny", {}, 1000, 28_589_128, 4_455_531_264),
        long("efficientnet_b0", {}, 1000, 5_288_548, 385_814_752),
        # Published.
        long("convnext_small", {}, 1000, 50_223_688, None),
        long("efficientnet_b1", {}, 1000, 7_794_184, None),
        long("efficientnet_b2", {}, 1000, 9_109_994, None),
        long("efficientnet_b3", {}, 1000, 12_233_232, None),
        long("efficientnet_b4", {}, 1000, 19_341_616, None),
        # By hand: 3x3x3x16 at 32x32, then per stage, then 64 x 100.
        ("resnet8", {}, 100, 83_892, 12_507_392),
        # 269,722 and 1,727,962 are what the authors of the public checkpoints state.
        ("resnet20", IDENTITY, 10, 269_722, None),
        ("resnet110", IDENTITY, 10, 1_727_962, None),
        # Less three projections: (32*64 + 2*64) + (64*128 + 2*128) + (128*256 + 2*256).
        ("resnet8x4", IDENTITY, 100, 1_233_540 - 2_176 - 8_448 - 33_280, None),
    ],
)
def test_describe_counts(name, options, classes, parameters, macs):
    described = describe.describe(name, num_classes=classes, **options)
    assert described.parameters == parameters
    assert macs in (described.macs, None)


def test_describe_scales_with_the_image_and_prints_one_line():
    small, large = (describe.describe("resnet8", image_size=s) for s in (16, 32))
    convolutions = [network.macs - 64 * 100 for network in (small, large)]
    assert convolutions[1] == 4 * convolutions[0]
    assert large.features == ((32, 32, 16), (32, 32, 16), (16, 16, 32), (8, 8, 64))
    assert str(large).split()[0] == "resnet8"
    assert "\n" not in str(large)
    assert "8x8x64" in str(large)


def test_networks_are_listed_on_the_command_line(main, monkeypatch):
    monkeypatch.setattr(models, "names", lambda: ["resnet8", "vgg8"])
    code, out, _ = main("--mode=networks")
    assert code == 0
    assert "3.965 M      96.2 M  32x32x64 16x16x128" in out
    lines = out.splitlines()
    names = [line.split()[0] for line in lines]
    assert names == ["network", "resnet8", "vgg8", "wrn_D_K"]
    assert len({line.index("32") for line in lines[1:3]}) == 1  # a column


QUICK = ["wrn_16_2", "vgg8", "mobilenet_v2", "resnet8x4", "resnet18", "shuffle_v1"]
HE = [*QUICK[:-1], "mobilenet_v2_imagenet", "cifar_resnet18"]
TORCH = ["mobilenet_v1", "shuffle_v1", "shuffle_v2"]


@pytest.mark.parametrize("name", marks.others_long(HE + TORCH, QUICK))
def test_initialisation_is_the_family_s_own(name):
    """He's normal by the fan-out, or torch's uniform by the fan-in; both published."""
    model = models.create(name, num_classes=100)
    x = jnp.zeros((1, 4, 4, 24 if name.startswith("shuffle_v1") else 32))
    features = jnp.zeros((1, 2, 2, 256))

    @jax.jit
    def init(key):
        """Initialises a block and the head; XLA compiles rbg's generator quickly."""
        block = model.make_block(1, 0, None).init(key, x, train=False)
        return block, model.make_head(None).init(key, features, train=False)

    block, head = jax.device_get(init(jax.random.key(2, impl="unsafe_rbg")))
    flat = flax.traverse_util.flatten_dict(block["params"])
    kernels = [k for path, k in flat.items() if path[-1] == "kernel"]
    kernel = max(kernels, key=lambda k: k.size)
    fan_out = kernel.shape[0] ** 2 * kernel.shape[-1]
    fan_in = kernel.size // kernel.shape[-1]
    expected = math.sqrt(2 / fan_out if name in HE else 1 / 3 / fan_in)
    assert np.std(kernel) == pytest.approx(expected, rel=0.1)
    # Normal without truncation, or uniform.
    assert (np.max(np.abs(kernel)) > 3 * expected) == (name in HE)
    for tree, ones in ((block["params"], "scale"), (block["batch_stats"], "var")):
        for path, leaf in flax.traverse_util.flatten_dict(tree).items():
            if path[-1] != "kernel":
                np.testing.assert_array_equal(leaf, float(path[-1] == ones))
    kernel, bias = head["params"]["dense"]["kernel"], head["params"]["dense"]["bias"]
    if name.startswith(("vgg", "mobilenet_v2")):
        assert np.std(kernel) == pytest.approx(0.01, rel=0.05)
    elif "conv" not in head["params"]:  # before the pool: fewer channels otherwise
        assert 0.9 / 16 < np.max(np.abs(kernel)) <= 1 / 16
    plain = name in TORCH or "resnet" in name
    assert (np.max(np.abs(bias)) > 0) == plain
    if plain and "conv" not in head["params"]:
        assert 0.9 / 16 < np.max(np.abs(bias)) <= 1 / 16
