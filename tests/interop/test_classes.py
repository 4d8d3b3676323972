"""Weights whose classes have other names, or another order, than the data's."""

import types

import jax
import numpy as np
import pytest
import tiny
from jax.sharding import Mesh

from lakd_jax import errors, models
from lakd_jax.interop import classes, weights
from lakd_jax.models import chain
from lakd_jax.runs import teacher_floor
from lakd_jax.store import manifest
from lakd_jax.training import setup

NAMES = ("dark", "left", "right")


def saved(folder, names=NAMES, network="resnet8"):
    """A student of a run with these classes; returns its file and variables."""
    model = models.create(network, num_classes=len(names))
    variables = tiny.variables(model)
    variables["params"]["head"]["dense"]["bias"] = np.arange(len(names), dtype="f4")
    loaded = weights.Loaded(model, None, "", (0.4,) * 3, (0.3,) * 3)
    result = {"student": network, "class_names": list(names)}
    file = folder / "student.safetensors"
    weights.save(file, variables, loaded, result)
    return file, variables


def load(file, names, field="student", **options):
    return weights.load(
        field,
        "resnet8",
        str(file),
        dtype="float32",
        num_classes=len(names),
        classes=names,
        **options,
    )


def bias(loaded):
    return np.asarray(loaded.variables["params"]["head"]["dense"]["bias"]).tolist()


def test_the_same_names_in_another_order_are_permuted(tmp_path):
    """The digest is of the weights as they lie there."""
    file, variables = saved(tmp_path)
    same, other = load(file, NAMES), load(file, ("right", "dark", "left"))
    assert bias(same) == [0, 1, 2] and same.remark == ""
    assert bias(other) == [2, 0, 1] and "order of the data's" in other.remark
    kernel = variables["params"]["head"]["dense"]["kernel"]
    moved = other.variables["params"]["head"]["dense"]["kernel"]
    np.testing.assert_array_equal(moved, kernel[:, [2, 0, 1]])
    assert same.digest == other.digest == manifest.digest(variables)
    assert other.classes == ("right", "dark", "left")


def test_other_names_are_an_error_with_the_difference(tmp_path):
    """Promise 21: names are compared, too."""
    file, _ = saved(tmp_path)
    with pytest.raises(errors.TeacherError) as caught:
        load(file, ("dark", "left", "top"))
    for words in (
        f"student.init: {file} has other classes than the data",
        "only in the weights: right\n",
        "only in the data: top\n",
        "set student.new_head",
    ):
        assert words in str(caught.value)
    found = load(file, ("dark", "left", "top"), "teacher", any_classes=True)
    assert bias(found) == [0, 1, 2] and found.classes == NAMES
    assert found.difference == classes.difference(NAMES, ("dark", "left", "top"), 3, 3)


@pytest.mark.parametrize(
    ("theirs", "ours", "differ"),
    [
        (("a", "b"), ("b", "a"), False),
        (("a", "b"), ("a", "c"), True),
        ((), ("a", "b"), False),  # PyTorch's files have no names
        (("0", "1"), ("a", "b"), False),  # nor has an .npz without `classes`
        (("1", "0"), ("a", "b"), True),
        (("a", "b", "c"), ("a", "b"), True),
    ],
)
def test_names_are_compared_where_both_sides_have_them(theirs, ours, differ):
    counts = len(theirs) or len(ours), len(ours)
    assert bool(classes.difference(theirs, ours, *counts)) == differ


def test_long_differences_are_cut():
    theirs, ours = [f"c{k}" for k in range(10, 30)], ["c10", "x"]
    text = classes.difference(theirs, ours, 20, 2)
    assert "20 classes, the data has 2" in text
    assert "only in the weights: c11, c12, c13, c14, c15 and 14 more" in text


def test_new_head_keeps_all_but_the_classifier(tmp_path):
    """What is left out is drawn from the seed, as in a run without weights."""
    file, variables = saved(tmp_path)
    loaded = load(file, ("top", "bottom"), new_head=True)
    assert loaded.model.num_classes == 2 and "head" not in loaded.variables["params"]
    drawn = jax.tree.map(
        lambda x: np.full(x.shape, 7, x.dtype), chain.variable_shapes(loaded.model)
    )
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
    split = {kind: {"student": tree} for kind, tree in drawn.items()}
    spec = types.SimpleNamespace(
        optimizer=types.SimpleNamespace(init=lambda params: ()),
        average=None,
        mesh=mesh,
    )
    phase = types.SimpleNamespace(first_variables=lambda student: student)
    params = split.pop("params")
    state = setup.FirstState(spec, lambda: (params, split), loaded.variables, phase)()
    first = state.variables("student")
    assert np.all(np.asarray(first["params"]["head"]["dense"]["kernel"]) == 7)
    for kind in ("params", "batch_stats"):
        jax.tree.map(
            np.testing.assert_array_equal,
            {k: v for k, v in first[kind].items() if k != "head"},
            {k: v for k, v in variables[kind].items() if k != "head"},
        )


@pytest.mark.parametrize(("right", "good"), [(60, False), (61, True)])
def test_the_floor_is_above_the_most_frequent_class(right, good):
    """Promise 15: always answering that class is not enough."""
    confusion = np.zeros((10, 10), int)
    confusion[0, 0] = 60
    confusion[1, :2] = 40 - (right - 60), right - 60
    assert (teacher_floor.fault(0.0, confusion) == "") == good
    assert teacher_floor.fault(0.5, confusion) == ""  # if the user says so


def test_answers_in_another_order_are_recognised():
    names = [f"c{k}" for k in range(11)]
    order = sorted(range(11), key=str)  # folders sorted as text: 0, 1, 10, 2, ...
    confusion = np.zeros((11, 11), int)
    confusion[np.arange(11), order] = 9
    confusion[:, 0] += 1
    text = teacher_floor.other_order(confusion, names)
    assert "100 of 110 would be right" in text
    assert "2 is c3, 3 is c4" in text and "and 1 more" in text
    noise = np.random.default_rng(0).integers(0, 10, (11, 11))
    assert teacher_floor.other_order(noise, names) == ""
    constant = np.zeros((11, 11), int)
    constant[:, 3] = 10
    assert teacher_floor.other_order(constant, names) == ""
