"""The registry of networks, and arguments that `create` rejects."""

import pytest

from lakd_jax import models


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
        "hme",
    ]
    assert models.create("resnet110", num_classes=10).stage_sizes == (18, 18, 18)


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
