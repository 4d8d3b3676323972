"""Tests the fields of HME: faults are reported before anything runs."""

import importlib.util
import pathlib

import pytest
import tiny

from lakd_jax.config import check, resolved
from lakd_jax.training import setup

CONFIG = pathlib.Path(__file__).parents[2] / "configs" / "cifar10_hme.py"
HME = {"student__name": "hme", "method": "kd"}


def faults(tmp_path, **fields):
    return check.problems(tiny.config(tmp_path, **{**HME, **fields}), 1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hme__layout": "tree"}, "hme.layout is 'tree'"),
        ({"hme__output": "odds"}, "hme.output is 'odds'"),
        ({"hme__temperature": 0.0}, "hme.temperature must be above 0"),
        ({"label_smoothing": 1.0}, "label_smoothing must be from 0 to below 1, is 1"),
        ({"hme__loss": "binary", "hme__output": "ce"}, "set hme.output to nce"),
        ({"hme__loss": "binary", "method": "lakd"}, "none and kd, not lakd"),
        (
            {"hme__loss": "binary", "label_smoothing": 0.1},
            "not support label_smoothing",
        ),
        ({"student__init": "runs/x"}, "student.init must be empty"),
        ({"teacher__name": "hme"}, "teacher.name=hme needs teacher.init"),
    ],
)
def test_fault(fields, message, tmp_path):
    (found,) = faults(tmp_path, **fields)
    assert message in found


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"hme__loss": "binary", "method": "none"},
        {"method": "none", "label_smoothing": 0.1},
        {"method": "lakd", "label_smoothing": 0.1},
        {"method": "lakd"},
        {"teacher__name": "hme", "teacher__init": "runs/x"},
        {"teacher__name": "hme", "method": "none"},
    ],
)
def test_no_fault(fields, tmp_path):
    assert faults(tmp_path, **fields) == []


def test_the_released_recipe():
    spec = importlib.util.spec_from_file_location("cifar10_hme", CONFIG)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert check.problems(module.get_config(), 1) == []
    config = resolved.resolve(module.get_config("resnet56,,none"))
    assert (config.teacher.name, config.method) == ("resnet56", "none")
    assert (config.epochs, config.hme.stage1_epochs) == (300, 300)
    assert config.batch_size == 128


def test_options_of_networks_and_methods(tmp_path):
    def config(**fields):
        return resolved.resolve(tiny.config(tmp_path, **fields))

    split = {"layout": "split", "base": "wrn_40_1", "output": "ce"}
    plain = config(**HME, hme__output="ce", hme__layout="split")
    assert setup.network_options(plain) == split
    binary = config(**HME, hme__loss="binary")
    assert setup.network_options(binary)["output"] == "odds"
    assert setup.network_options(config()) == {"shortcut": "projection"}
