"""What LAKD's modules and masks contribute: by hand, and in the report of a run."""

import types

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import toys

from lakd_jax.config import resolved
from lakd_jax.explain import contribution, deletion, subject, swap
from lakd_jax.interop import weights
from lakd_jax.local import cuts
from lakd_jax.training import spec as spec_lib


def test_least_squares_find_a_map_with_a_bias():
    x, rng = toys.noise(0, 3, 4, 4, 5), np.random.default_rng(1)
    matrix = rng.standard_normal((6, 2))
    y = swap.predicted(matrix, x)
    found = swap.least_squares(x, y)
    np.testing.assert_allclose(found, matrix, atol=1e-5)
    assert swap.explained(swap.predicted(found, x), y) == pytest.approx(1.0)
    constant = np.broadcast_to(y.mean((0, 1, 2), keepdims=True), y.shape)
    assert swap.explained(constant, y) == pytest.approx(0.0, abs=1e-6)
    assert swap.explained(x[..., :2], 0 * x[..., :2]) == 0.0


def test_pixels_come_by_the_mask_and_equal_ones_in_any_order():
    masks = np.array([[[1.0, 4.0], [3.0, 2.0]], [[0, 0], [0, 9]]])
    places = deletion.ranks(masks, np.random.default_rng(0))
    np.testing.assert_array_equal(places[0], [[0.75, 0.0], [0.25, 0.5]])
    assert places[1, 1, 1] == 0.0
    assert sorted(places[1].ravel()) == [0.0, 0.25, 0.5, 0.75]


def test_a_share_of_the_pixels_is_deleted_or_inserted():
    images = np.full((1, 2, 2, 3), 200, np.uint8)
    places = np.array([[[0.75, 0.0], [0.25, 0.5]]])
    colour = np.array([10.0, 20.0, 30.0])
    gone = deletion.changed_at(images, places, 0.5, "deletion", colour)
    alone = deletion.changed_at(images, places, 0.5, "insertion", colour)
    first = places[0] < 0.5
    for found, kept in ((gone, ~first), (alone, first)):
        assert (found[0][kept] == 200).all()
        np.testing.assert_array_equal(found[0][~kept], [colour, colour])
    for kind, whole in (("deletion", 0.0), ("insertion", 1.0)):
        same = deletion.changed_at(images, places, whole, kind, colour)
        np.testing.assert_array_equal(same, images)


def test_masks_are_enlarged_and_areas_are_of_the_unit_square():
    mask = np.array([0.0, 1.0, 0.0, 1.0]).reshape(1, 2, 2, 1)
    large = deletion.enlarged(mask, (4, 4))
    assert (
        large.shape == (1, 4, 4) and large[0, 0, 0] < large[0, 0, 2] <= large[0, 0, 3]
    )
    flat = deletion.Curve("student", "stage1", "deletion", False, (1.0,) * 8)
    assert flat.area == pytest.approx(1.0)
    falling = [1 - share for share in deletion.SHARES]
    assert deletion.Curve("", "", "", True, tuple(falling)).area == pytest.approx(0.5)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run of LAKD whose student is its teacher, as `subject.load` returns it."""
    model = tiny.SMALL(num_classes=3)
    network = weights.Loaded(model, tiny.variables(model), "it")
    pixels = spec_lib.Pixels((0.4,) * 3, (0.3,) * 3, jnp.dtype("float32"))
    config = resolved.resolve(tiny.config(tmp_path_factory.mktemp("it"), method="lakd"))
    return subject.Subject(
        directory=None,
        config=config,
        environment=types.SimpleNamespace(
            dataset=types.SimpleNamespace(preview=tiny.dataset())
        ),
        student=network,
        pixels=pixels,
        teacher=types.SimpleNamespace(network=network, pixels=pixels),
        result={},
    )


def test_a_student_that_is_its_teacher_loses_nothing_by_its_features(made):
    model = made.student.model
    found = swap.measure(made, cuts.modules(model, model, "stage", ()))
    assert [m.joint for m in found] == [f"stage{k}.block1" for k in (1, 2, 3)]
    for m in found:
        assert m.explained == pytest.approx(1.0, abs=1e-5)
        assert m.teacher == m.plain
    # The last module's are averaged by the head anyway.
    assert found[-1].mean == found[-1].plain


def test_places_matter_before_the_last_module(made):
    """The class of an image is where it is light: means over positions hide it."""
    model = made.student.model
    parts = cuts.modules(model, model, "stage", ())
    images = made.environment.dataset.preview.test.images
    logits, features = subject.observe(
        model, made.student.variables, made.pixels, images, parts.student_joints
    )
    u = features[0].astype(np.float32)
    mean = np.broadcast_to(u.mean((1, 2), keepdims=True), u.shape)
    own, flat = swap.resumed(made, parts.student_joints[0], (u, mean))
    np.testing.assert_allclose(own, logits, rtol=1e-4, atol=1e-4)
    assert np.abs(flat - own).max() > 0.1 * np.abs(own).max()


def test_curves_begin_and_end_where_they_must(made):
    model = made.student.model
    curves = deletion.measure(made, cuts.modules(model, model, "stage", ()))
    assert len(curves) == 3 * 2 * 2 * 2
    whole = {c.values[0] for c in curves if c.kind == "deletion"}
    whole |= {c.values[-1] for c in curves if c.kind == "insertion"}
    blank = {c.values[-1] for c in curves if c.kind == "deletion"}
    blank |= {c.values[0] for c in curves if c.kind == "insertion"}
    assert len(whole) == len(blank) == 1 and whole != blank
    orders = {c.values for c in curves if c.network == "student"}
    assert len(orders) == 12  # no two of the masks, random ones or not, are one


def test_the_section_is_for_lakd_alone(made, tmp_path):
    lines = []
    parts = contribution.section(made, tmp_path, lines.append)
    text = "".join(parts)
    assert "with the teacher" in text and "stage2" in text and len(lines) == 2
    assert text.count("<table>") == 2 and text.count("<img ") == 1
    other = types.SimpleNamespace(config=types.SimpleNamespace(method="kd"))
    assert contribution.section(other, tmp_path, lines.append) == []
