"""The table of published weights, and what they bring along."""

import dataclasses
import re

import numpy as np
import pytest
import tiny

from lakd_jax import config as config_lib
from lakd_jax import errors, interop, models
from lakd_jax.config import check
from lakd_jax.data.tfds import imagenet
from lakd_jax.interop import published, weights
from lakd_jax.models import heads

NAMES = ("red", "green", "blue")


def test_every_row_is_complete():
    """The files carry the hash in their name, which they are checked against."""
    for name, entry in published.TABLE.items():
        assert entry.name == name and published.is_name(name)
        assert re.fullmatch(r"[0-9a-f]{8}([0-9a-f]{56})?", entry.sha256)
        assert f"-{entry.sha256[:8]}." in entry.file
        assert entry.address.startswith("https://") and entry.source
        assert entry.network in models.names()
        assert 0.6 < entry.accuracy < 1 and len(entry.mean) == len(entry.std) == 3
        assert entry.preparation.shorter in (0, *range(entry.size, 2 * entry.size))
    assert len({entry.file for entry in published.TABLE.values()}) == len(
        published.TABLE
    )


def test_torchvisions_first_resnet34_is_that_of_the_recipe():
    name = published.first_of("torchvision", "resnet34")
    assert name == "torchvision:resnet34.IMAGENET1K_V1"
    entry = published.TABLE[name]
    assert entry.file == "resnet34-b627a593.pth"
    assert entry.accuracy == pytest.approx(0.73314)
    assert published.first_of("torchvision", "resnet20") == ""


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("torchvision:resnet34.IMAGENET1K_V1", ""),
        ("torchvision:resnet34.IMAGENET1K_V3", "did you mean 'torchvision:resnet34"),
        ("akamaster:", "--mode=teachers"),
        ("hf:timm/resnet34.a1_in1k", ""),
        ("hf:timm/resnet34.a1_in1k@v1:sub/a.safetensors", ""),
        ("hf:resnet34", "hf:ORG/REPO"),
        ("hf:timm/resnet34@", "hf:ORG/REPO"),
        ("hf:../..", "hf:ORG/REPO"),
        ("hf:a/b:model.bin", "must be a .safetensors file"),
        ("hf:a/b:../c.safetensors", "must be a .safetensors file"),
    ],
)
def test_faults_of_names(name, words):
    assert published.is_name(name)
    found = published.fault(name)
    assert words in found and bool(words) == bool(found)


def test_paths_are_not_names():
    for path in ("runs/a", "hf/a/b", "./hf:a/b", "resnet34.pth", "c:/x", "gs://b/c"):
        assert not published.is_name(path)


def test_files_of_the_hub():
    assert published.hub_file("hf:a/b.c") == published.HubFile(
        "hf:a/b.c", "a/b.c", "main", "model.safetensors"
    )
    found = published.hub_file("hf:a/b@v1:c/d.safetensors")
    assert (found.repository, found.revision) == ("a/b", "v1")
    assert found.file == "c/d.safetensors"


def test_a_config_with_another_network_or_an_unknown_name_is_refused():
    config = config_lib.default()
    config.teacher.update(name="resnet20", init="akamaster:resnet56.CIFAR10")
    config.student.init = "akamaster:resnet57.CIFAR10"
    found = "\n".join(check.problems(config, 1))
    assert "weights of the network resnet56, but teacher.name is 'resnet20'" in found
    assert "student.init is 'akamaster:resnet57.CIFAR10', which is not listed" in found
    config.teacher.name, config.student.init = "resnet56", ""
    assert check.problems(config, 1) == []


def test_imagenets_classes_are_known_by_their_numbers():
    entry = published.TABLE["torchvision:resnet18.IMAGENET1K_V1"]
    names = imagenet.class_names()
    assert len(names) == 1000 and list(names) == sorted(names)
    assert entry.class_names(names[::-1]) == names
    assert entry.class_names(("tench", *names[1:])) == entry.class_names(()) == ()


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """Returns a file of weights and what its publisher says."""
    monkeypatch.setitem(models._NETWORKS, tiny.NETWORK, tiny.SMALL)
    variables = tiny.variables(models.create(tiny.NETWORK, num_classes=3))
    file = tmp_path / "weights.safetensors"
    interop.save_torch_file(file, interop.to_torch(tiny.NETWORK, variables))
    entry = published.Published(
        "torchvision:small.TEST",
        tiny.NETWORK,
        "https://publisher.invalid/small.pth",
        "0" * 64,
        (0.4,) * 3,
        (0.3,) * 3,
        8,
        classes=NAMES,
    )
    return file, entry, variables


def load(file, entry, names=NAMES, **options):
    return weights.load(
        "teacher",
        tiny.NETWORK,
        str(file),
        dtype="float32",
        num_classes=len(names),
        classes=names,
        origin=entry,
        **options,
    )


def test_a_name_brings_normalisation_size_and_classes(saved):
    file, entry, variables = saved
    loaded = load(file, entry)
    assert (loaded.mean, loaded.std, loaded.size) == (entry.mean, entry.std, 8)
    assert loaded.preparation == entry.preparation and loaded.origin == entry
    moved = load(file, entry, NAMES[::-1])
    expected = heads.reordered(loaded.model, variables, [2, 1, 0])
    np.testing.assert_array_equal(
        moved.variables["params"]["head"]["dense"]["kernel"],
        expected["params"]["head"]["dense"]["kernel"],
    )
    assert moved.digest == loaded.digest
    other = load(file, entry, ("red", "green", "black"), any_classes=True)
    assert "only in the data: black" in other.difference


def test_a_publisher_that_names_other_classes_is_not_believed(saved):
    file, entry, _ = saved
    entry = dataclasses.replace(entry, classes=NAMES[:2])
    with pytest.raises(errors.TeacherError, match="has 3 classes, but .* names 2"):
        load(file, entry)
