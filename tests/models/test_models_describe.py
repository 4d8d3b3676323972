"""Counts and shapes of networks against published figures."""

import pytest

from lakd_jax import models
from lakd_jax.models import describe


@pytest.mark.parametrize(
    ("name", "classes", "parameters", "macs"),
    [
        # Published: 25.56 M and 4.09 G; 3.50 M and 0.30 G; 11.69 M and 1.81 G.
        pytest.param(
            *("resnet50", 1000, 25_557_032, 4_089_184_256), marks=pytest.mark.long
        ),
        ("mobilenet_v2_imagenet", 1000, 3_504_872, 300_774_272),
        ("resnet18", 1000, 11_689_512, 1_814_073_344),
        # By hand: 3x3x3x16 at 32x32, then per stage, then 64 x 100.
        ("resnet8", 100, 83_892, 12_507_392),
    ],
)
def test_describe_counts(name, classes, parameters, macs):
    described = describe.describe(name, num_classes=classes)
    assert described.parameters == parameters
    assert described.macs == macs


def test_describe_scales_with_the_image_and_prints_one_line():
    small, large = (describe.describe("resnet8", image_size=s) for s in (16, 32))
    convolutions = [network.macs - 64 * 100 for network in (small, large)]
    assert convolutions[1] == 4 * convolutions[0]
    assert large.features == ((32, 32, 16), (32, 32, 16), (16, 16, 32), (8, 8, 64))
    assert str(large).split()[0] == "resnet8"
    assert "\n" not in str(large)
    assert "8x8x64" in str(large)


def test_networks_are_listed_on_the_command_line(main, monkeypatch):
    monkeypatch.setattr(models, "names", lambda: ["vgg8"])
    code, out, _ = main("--mode=networks")
    assert code == 0
    assert "3.965 M      96.2 M  32x32x64 16x16x128" in out


def test_the_table_has_a_line_for_every_network(monkeypatch):
    monkeypatch.setattr(models, "names", lambda: ["resnet8", "vgg8"])
    lines = list(describe.table())
    assert [line.split()[0] for line in lines] == [
        "network",
        "resnet8",
        "vgg8",
        "wrn_D_K",
    ]
    assert len({line.index("32") for line in lines[1:3]}) == 1  # a column
