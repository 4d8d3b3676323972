import math
import subprocess
import sys

import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest

from lakd_jax.report import curves, maps, pictures


def _load(path):
    return np.round(matplotlib.image.imread(path)[..., :3] * 255).astype(np.uint8)


def _has(pixels, colour):
    """Returns whether the colour "#rrggbb" occurs, up to rounding."""
    rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    return bool((np.abs(pixels.astype(int) - rgb).max(axis=-1) <= 1).any())


def _attention(path, images, modules, masked=True, truth="cat"):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (images, 16, 16, 3), dtype=np.uint8)
    shape = [(images, 8, 8), (images, 4, 4), (images, 2, 2)]
    parts = [
        pictures.ModuleMaps(
            f"module {k + 1}",
            rng.random(shape[k % 3]),
            3 + 5 * rng.random(shape[k % 3]) if masked else None,
            rng.random(shape[k % 3]),
        )
        for k in range(modules)
    ]
    rows = [
        pictures.Caption(truth, "cat", "cat" if i else "dog") for i in range(images)
    ]
    pictures.attention(path, pixels, rows, parts)
    groups = tuple(len(part.columns()) for part in parts)
    return pictures.Layout(images, groups), pixels, parts


@pytest.mark.parametrize(
    ("images", "modules", "masked"), [(6, 3, True), (8, 9, True), (1, 1, False)]
)
def test_every_tile_is_in_its_place(tmp_path, images, modules, masked):
    path = tmp_path / "attention.png"
    layout, pixels, parts = _attention(path, images, modules, masked)
    picture = _load(path)
    assert picture.shape[1::-1] == layout.size
    assert layout.groups == (3 if masked else 2,) * modules
    side = layout.tile
    for row in range(images):
        for column in range(1 + sum(layout.groups)):
            y, x = layout.y(row), layout.x(column)
            tile = picture[y : y + side, x : x + side]
            around = picture[y - 2 : y + side + 2, x - 2 : x + side + 2]
            assert tile.std() > 20, (row, column)
            # A white frame: the tile is neither shifted nor too large.
            assert (around[[0, 1, -2, -1]] == 255).all()
            assert (around[:, [0, 1, -2, -1]] == 255).all()
    corners = (
        picture[layout.y(0), layout.x(0)],
        picture[layout.y(0) + side - 1, layout.x(0) + side - 1],
    )
    assert (corners == pixels[0, [0, -1], [0, -1]]).all()
    # Every map spans the full scale, and its brightest cell is its maximum.
    y, x = layout.y(images - 1), layout.x(sum(layout.groups))
    tile = picture[y : y + side, x : x + side].astype(int)
    student = parts[-1].student[-1]
    brightest = np.unravel_index(np.argmax(tile.sum(-1)), (side, side))
    cell = tuple(int(i * student.shape[0] // side) for i in brightest)
    assert cell == np.unravel_index(np.argmax(student), student.shape)
    assert _has(tile, "#fde725") and _has(tile, "#440154")


def test_wrong_predictions_and_only_those_are_marked(tmp_path):
    layout, *_ = _attention(tmp_path / "a.png", images=2, modules=1)
    picture = _load(tmp_path / "a.png")
    margin = slice(0, layout.left)
    first = picture[layout.y(0) : layout.y(1), margin]
    second = picture[layout.y(1) : layout.y(1) + layout.tile, margin]
    assert _has(first, "#b3400a") and not _has(second, "#b3400a")
    assert _has(second, "#222222")


def test_long_names_are_cut_before_the_image(tmp_path):
    name = "WWWWWWWWWW $W$ WWWWWWWWWWWWWWWWWWWWWWW"
    layout, *_ = _attention(tmp_path / "a.png", images=2, modules=1, truth=name)
    picture = _load(tmp_path / "a.png")
    gap = picture[: layout.y(2), layout.left - 8 : layout.left]
    assert (gap == 255).all()
    assert (picture[:, :4] == 255).all() and (picture[:, -4:] == 255).all()
    assert (picture[:4] == 255).all() and (picture[-4:] == 255).all()


def test_constant_and_broken_maps_are_drawn_flat(tmp_path):
    images = np.zeros((1, 4, 4, 3), np.uint8)
    flat, broken = np.ones((1, 4, 4)), np.full((1, 4, 4), math.nan)
    part = pictures.ModuleMaps("m", flat, broken, flat)
    rows = [pictures.Caption("a", "a", "a")]
    pictures.attention(tmp_path / "a.png", images, rows, [part])
    layout = pictures.Layout(1, (3,))
    for column in (1, 2, 3):
        x, y, side = layout.x(column), layout.y(0), layout.tile
        tile = _load(tmp_path / "a.png")[y : y + side, x : x + side]
        assert (tile == (0x44, 0x01, 0x54)).all()


def test_lengths_must_agree(tmp_path):
    part = pictures.ModuleMaps("m", np.ones((2, 4, 4)), None, np.ones((2, 4, 4)))
    images = np.zeros((2, 4, 4, 3), np.uint8)
    with pytest.raises(ValueError, match="one length"):
        pictures.attention(tmp_path / "a.png", images, [], [part])


def _run(top, epochs):
    return [
        {
            "step": e,
            "kind": "eval",
            "epoch": e,
            "accuracy": top * e / epochs,
            "loss": 1 / e,
        }
        for e in range(1, epochs + 1)
    ] + [{"step": 1, "kind": "train", "loss": 1e9}]


def test_curves_show_every_run_and_the_teacher(tmp_path):
    path = tmp_path / "curves.png"
    names = [f"method {i}" for i in range(7)]
    runs = {name: _run(0.9 + 0.001 * i, 10 + i) for i, name in enumerate(names)}
    pictures.curves(path, runs, teacher_accuracy=0.95)
    picture = _load(path)
    assert picture.shape == (1050, 1350, 3)
    for colour in curves.COLOURS:
        assert _has(picture[:560], colour) and _has(picture[620:], colour)
    assert _has(picture[:560], "#767676")
    edges = (picture[:3], picture[-3:], picture[:, :3], picture[:, -3:])
    assert all((edge == 255).all() for edge in edges)


def test_many_runs_and_very_long_names_stay_inside(tmp_path):
    runs = {f"{i} " + "W" * 60: _run(0.9, 5) for i in range(16)}
    pictures.curves(tmp_path / "c.png", runs)
    assert (_load(tmp_path / "c.png")[:, -3:] == 255).all()


@pytest.mark.parametrize(
    "records",
    [
        [],
        [{"step": 1, "kind": "train", "loss": 2.0}],
        [{"step": 1, "kind": "eval", "epoch": 1, "accuracy": math.nan, "loss": 1.0}],
        _run(0.5, 1),
    ],
)
def test_curves_of_runs_with_little_to_show(tmp_path, records):
    pictures.curves(tmp_path / "c.png", {"LAKD": records}, teacher_accuracy=0.9)
    assert _load(tmp_path / "c.png").std() > 1


def test_labels_are_spread_in_order_and_within_bounds():
    targets = [50.0, 50.0, 49.0, 98.0, 99.0, 10.0]
    placed = curves.spread(targets, 12, 100)
    in_order = [placed[i] for i in np.argsort(targets, kind="stable")]
    assert all(b - a >= 12 - 1e-9 for a, b in zip(in_order, in_order[1:], strict=False))
    assert min(placed) >= 0 and max(placed) <= 100
    assert placed[5] == 10.0
    assert curves.spread([], 12, 100) == []


def test_attention_maps_are_sums_of_magnitudes_scaled_to_one():
    feature = jnp.array([[[[1.0, -2.0], [0.0, 1.0]]], [[[5.0, 5.0], [-5.0, -5.0]]]])
    (result,) = maps.attention_maps([feature.astype(jnp.bfloat16)])
    assert result.dtype == jnp.float32 and result.shape == (2, 1, 2)
    np.testing.assert_array_equal(result, [[[1.0, 0.0]], [[0.0, 0.0]]])


def test_importing_the_reports_stays_light():
    code = (
        "import sys, lakd_jax.report.pictures, lakd_jax.report.metrics,"
        " lakd_jax.report.progress, lakd_jax.report.table;"
        "heavy = {'matplotlib', 'tensorboardX', 'rich', 'jax', 'PIL'};"
        "print(sorted(heavy & sys.modules.keys()))"
    )
    command = [sys.executable, "-c", code]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert out == "[]\n"
