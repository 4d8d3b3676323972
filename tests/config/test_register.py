"""Networks, methods and data of one's own: what config, checks and runs know."""

import dataclasses
import functools
import importlib.util
import math
import pathlib
import re
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from lakd_jax import config as config_lib
from lakd_jax import data, distill, errors, interop, models, register
from lakd_jax.config import check, listing, recipes, resolved
from lakd_jax.data import sources
from lakd_jax.distill.base import registry, term
from lakd_jax.models import vgg

Narrow = functools.partial(vgg.VGG, stem_widths=(4,), stage_sizes=(1, 1), widths=(6, 8))


class Mine(term.Term):
    ce_weight: float = 1.0
    weight: float = 2.0
    warmup_epochs: float = 0.0
    margin: float = -0.5

    def losses(self, signals, *, train):
        return [{"mine": jnp.mean(signals.student.logits**2) + self.margin}]


class Bare(term.Term):
    margin: float = 0.0


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    """What a test registers is gone after it."""
    monkeypatch.setattr(registry, "TABLE", dict(registry.TABLE))
    monkeypatch.setattr(models, "_NETWORKS", dict(models._NETWORKS))


def faults(tmp_path, **fields):
    return check.problems(tiny.config(tmp_path, **fields), 1)


def test_a_method_has_its_block_its_ranges_and_its_place_in_sums(tmp_path):
    register.method("mine", Mine)
    config = config_lib.default()
    assert config.mine.to_dict() == {
        "ce_weight": 1.0,
        "weight": 2.0,
        "warmup_epochs": 0.0,
        "margin": -0.5,
    }
    assert faults(tmp_path, method="mine+kd", mine__margin=-3.0) == []
    for fields, words in (
        ({"mine__weight": -1.0}, "mine.weight must be at least 0"),
        ({"mine__margin": math.nan}, "mine.margin must be finite"),
        ({"mine__weight": 0.0, "mine__ce_weight": 0.0}, "nothing is learnt"),
        ({"method": "mime"}, "did you mean 'mine'"),
    ):
        (line,) = faults(tmp_path, **{"method": "mine", **fields})
        assert words in line


def test_a_config_from_before_is_told_to_be_made_anew(tmp_path):
    config = tiny.config(tmp_path)
    register.method("mine", Mine)
    lines = check.problems(config, 1)
    assert len(lines) == 4
    assert all("default() after registering" in line for line in lines)


def test_a_registered_method_changes_no_other_run(tmp_path):
    before = resolved.resolve(tiny.config(tmp_path, method="kd"))
    teacher = resolved.of_teacher(before).digest()
    register.method("mine", Mine)
    other = resolved.resolve(tiny.config(tmp_path, method="kd"))
    own = resolved.resolve(tiny.config(tmp_path, method="kd+mine"))
    assert other.digest() == before.digest()
    assert resolved.of_teacher(own).digest() == teacher
    recorded = own.to_dict()
    assert recorded["mine"]["margin"] == -0.5
    assert config_lib.from_dict(recorded).mine.margin == -0.5
    del registry.TABLE["mine"]
    with pytest.raises(ValueError, match="mine.margin.*must be registered first"):
        config_lib.from_dict(recorded)


def test_registering_again_replaces():
    before = len(registry.TABLE)
    for number in (1.0, 3.0):

        class Own(Mine):
            margin: float = number

        register.method("mine", Own)
        assert config_lib.default().mine.margin == number
        assert registry.get("mine").cls is Own
    assert len(registry.TABLE) == before + 1


@pytest.mark.parametrize(
    ("name", "cls", "words"),
    [
        *((n, Mine, f"'{n}': the config") for n in ("kd", "data", "epochs", "dkd")),
        ("none", Mine, "'none'"),
        ("a+b", Mine, "must be a word in small letters"),
        ("mine", Bare, "Bare.weight needs a default"),
    ],
)
def test_a_method_that_cannot_be_is_refused(name, cls, words):
    before = dict(registry.TABLE)
    with pytest.raises(ValueError, match=words):
        register.method(name, cls)
    assert registry.TABLE == before


def test_a_network_is_known_everywhere_and_a_new_one_takes_its_place(tmp_path):
    with pytest.raises(ValueError, match="network"):
        models.family("narrow")
    wide = functools.partial(Narrow, widths=(6, 12))
    for build, width in ((Narrow, 8), (wide, 12)):
        register.network("narrow", build)
        assert faults(tmp_path, student__name="narrow", method="kd") == []
        model = models.create("narrow", num_classes=3)
        variables = tiny.variables(model)
        weights = interop.to_torch("narrow", variables)
        assert weights["classifier.weight"].shape == (3, width)
        back = interop.from_torch("narrow", weights)
        kernel = back["params"]["stage2"]["block1"]["conv"]["kernel"]
        own = variables["params"]["stage2"]["block1"]["conv"]["kernel"]
        np.testing.assert_array_equal(kernel, own)


@pytest.mark.parametrize(
    ("name", "build", "words"),
    [
        ("resnet20", Narrow, "is built in"),
        ("wrn_10_3", Narrow, "is built in"),
        ("narrow", vgg.Stem, "must be a subclass"),
        ("narrow", Narrow(num_classes=3), "must be a subclass"),
    ],
)
def test_a_network_that_cannot_be_is_refused(name, build, words):
    with pytest.raises(ValueError, match=words):
        register.network(name, build)


TWINS = {
    "twin_review": "review",
    "twin_fitnet": "fitnet",
    "twin_ab": "ab",
    "rtk2": "rtk",
}


@pytest.fixture
def twin(request, tmp_path):
    """A built-in method's file under another name, registered as a user's own."""
    name, built_in = request.param, TWINS[request.param]
    source = pathlib.Path(distill.__file__).with_name(f"{built_in}.py").read_text()
    path = tmp_path / f"{name}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    register.method(name, module.METHODS[built_in])
    yield name, built_in
    del sys.modules[name]


def out_of_range(name):
    """For every option of a method a value that is wrong for most."""
    block = config_lib.default()[name]
    return {
        f"{name}.{field}": "?" if isinstance(value, str) else type(value)(-1)
        for field, value in block.items()
        if not isinstance(value, bool)
    }


def rule_breaking(name):
    """Fields that are each in range, and that no rule of the method lets pass."""
    block = config_lib.default()[name]
    broken = {"ce_weight": 0.0, "weight": 0.0, "kd_weight": 0.0, "beta": 0.0}
    broken |= {"hint_layer": 7, "init_epochs": 1e6}
    return {f"{name}.{f}": v for f, v in broken.items() if f in block}


@pytest.mark.parametrize("twin", TWINS, indirect=True)
def test_a_users_method_has_all_that_a_built_in_one_has(twin, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(pathlib.Path(__file__).parents[2])
    from docs import make_configuration

    def seen(name):
        config = tiny.config(tmp_path, method=name, student__name="resnet20")
        found = {b.name: b for b in listing.of_methods()}
        facts = distill.facts(f"{name}+dkd")
        wrong = [
            check.problems(config_lib.changed(config, fields), 1)
            for fields in (out_of_range(name), rule_breaking(name))
        ]
        assert all(wrong)
        title = registry.get(name).fact("title", "")
        text = [wrong, make_configuration.section("###", found[name])]
        pairs = recipes.of_pair("resnet32x4", "resnet8x4")
        own = {f: v for f, v in pairs.items() if f.partition(".")[0] == name}
        options = resolved.resolve(config).method_options(name)
        made = [config[name].to_dict(), options, distill.title(f"{name}+dkd")]
        # Names are the only difference, also in capital letters, as in titles.
        text = repr([text, own, facts, title, made])
        return re.sub(rf"\b({'|'.join(twin)})\b", "NAME", text, flags=re.IGNORECASE)

    users, built_in = map(seen, twin)
    assert users == built_in


@pytest.mark.parametrize("name", ["Pictures", "two words", "digits", "npz"])
def test_a_data_set_that_cannot_be_is_refused(name):
    with pytest.raises(ValueError, match=f"data '{name}'"):
        register.data(name, lambda rest, image_size: None)


def test_a_data_set_is_loaded_by_its_function(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_ADDED", {})
    digits = data.load("digits")
    asked = []

    def load(rest, image_size):
        asked.append((rest, image_size))
        return digits if rest != "nothing" else None

    assert faults(tmp_path, data__source="mine:gs://a/b")  # a URL, as yet
    register.data("mine", load)
    assert faults(tmp_path, data__source="mine:gs://a/b") == []
    (line,) = faults(tmp_path, data__source="mine", data__streaming=True)
    assert line.startswith("data.streaming is for image files")
    found = data.load("mine:gs://a/b", image_size=16, minival=0.1)
    assert asked == [("gs://a/b", 16)] and found.name == "mine:gs://a/b"
    assert len(found.minival) + len(found.train) == len(digits.train)
    assert data.load("mine").fingerprint() == digits.fingerprint()
    kept = dataclasses.replace(digits, minival=digits.test)
    register.data("mine", lambda rest, image_size: kept)
    assert data.load("mine", minival=0.1).fingerprint() == kept.fingerprint()
    register.data("mine", load)
    with pytest.raises(errors.DataError, match="gave NoneType, not data.Dataset"):
        data.load("mine:nothing")
    grey = dataclasses.replace(digits.train, images=digits.train.images[..., :1])
    register.data("mine", lambda *_: dataclasses.replace(digits, train=grey))
    with pytest.raises(errors.DataError, match="images of train must be uint8"):
        data.load("mine")
