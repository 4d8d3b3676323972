"""Tests knowledge points against the authors' code, and against hand-made grids."""

import dataclasses
import functools
import itertools
import re
import types

import golden_weights
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import linen as nn
from PIL import Image

from lakd_jax import errors, explain
from lakd_jax.explain import entropy, learnt, points, regions, subject
from lakd_jax.models import pooling
from lakd_jax.runs import command
from lakd_jax.runtime import interrupt
from lakd_jax.store import workdir
from lakd_jax.training import spec as spec_lib
from lakd_jax.training import updates

# How ml_collections loads a config file is deprecated from Python 3.12 on.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

with np.load(golden_weights.FOLDER / "points.npz") as _file:
    GOLDEN = dict(_file)
CLOSE = 1e-5  # relative, of the public code's float32

# ------------------------------------------------------------------ the entropy


def features(variables, x):
    """The network of the golden values: convolution, ReLU, pooling."""
    x = jax.lax.conv_general_dilated(
        x,
        variables["kernel"],
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    x = jax.nn.relu(x + variables["bias"][None, None, None])
    return nn.max_pool(x, (2, 2), (2, 2))


def nhwc(name):
    return jnp.moveaxis(jnp.asarray(GOLDEN[f"inputs/{name}"]), -3, -1)


VARIABLES = golden_weights.conv("kq.0", 8, 3, 3, 3) | golden_weights.bias("kq.0", 8)
CASES = {
    "l7": entropy.Settings(rounds=20, check_after=15, weight=7.0),
    "l14": entropy.Settings(rounds=20, check_after=15, weight=14.0),
    "clamp": entropy.Settings(rounds=20, check_after=0, weight=7.0, learning_rate=0.05),
}


def is_initial(i):
    """Whether `i` stands for the first draws; the number of a round is traced."""
    return not isinstance(i, jax.Array) and i == entropy.INITIAL


@functools.cache
def fitted(case):
    """The attributes of the one image's `Fit`."""
    initial, later = nhwc("kq_noise_init"), nhwc("kq_noise")

    def noise(number, i, shape):
        return initial if is_initial(i) else later[i % len(later)]

    fitter = entropy.Fitter(features, nhwc("kq_image"), CASES[case], noise)
    with jax.default_matmul_precision("highest"):
        fit = fitter(VARIABLES, lambda: None)
    return {
        field.name: getattr(fit, field.name)[0] for field in dataclasses.fields(fit)
    }


@pytest.mark.parametrize("case", CASES)
def test_the_noise_is_the_authors(case):
    found, key = fitted(case), f"kq/{case}"
    steps = int(GOLDEN[f"{key}/steps"])
    assert found["rounds"] == steps
    assert found["round"] == GOLDEN[f"{key}/best_index"]
    assert found["weight"] == pytest.approx(float(GOLDEN[f"{key}/last_lambda"]))
    np.testing.assert_allclose(found["scale"], GOLDEN["kq/sigma_f"], rtol=CLOSE)
    for name, golden in (
        (found["sigma"], GOLDEN[f"{key}/best_sigma"]),
        (found["entropies"][:steps], GOLDEN[f"{key}/entropy"][:steps]),
        (found["errors"][:steps], GOLDEN[f"{key}/feature_loss"][:steps]),
    ):
        assert golden_weights.distance(name, golden) < CLOSE


def test_the_weight_is_raised_only_where_the_target_was_not_passed():
    assert fitted("l7")["weight"] > CASES["l7"].weight
    assert fitted("l14")["rounds"] < CASES["l14"].rounds


def test_cells_are_the_nearest_ones():
    grid = np.arange(256.0, dtype=np.float32).reshape(16, 16)

    def enlarged(side):
        return pooling.resize_nearest(grid[None, ..., None], side, side)[0, ..., 0]

    repeated = np.repeat(np.repeat(grid, 2, 0), 2, 1)
    np.testing.assert_array_equal(enlarged(32), repeated)
    at = np.arange(20) * 16 // 20
    np.testing.assert_array_equal(enlarged(20), grid[at][:, at])
    assert (entropy.cells(8), entropy.cells(227)) == (8, 16)


def left_half(variables, x):
    """A feature that depends on the left half of the image only."""
    return variables["scale"] * x[:, :, : x.shape[2] // 2]


@pytest.fixture(scope="module")
def fitter_results():
    images = 1 + np.random.default_rng(0).random((3, 8, 8, 3), np.float32)
    settings = entropy.Settings(rounds=12, draws=64, check_after=9, weight=7.0)
    fitter, checks = entropy.Fitter(left_half, images, settings), []

    def run(together, scale):
        fitter._together = together
        return fitter({"scale": jnp.float32(scale)}, lambda: checks.append(1))

    return run(3, 1.0), run(2, 1.0), run(3, 0.0), checks


def test_entropy_is_lower_where_the_network_looks(fitter_results):
    together, _, _, checks = fitter_results
    assert together.grids.shape == (3, 8, 8)
    left, right = together.grids[..., :4], together.grids[..., 4:]
    assert left.max() < right.min()
    assert len(checks) == 12 * (1 + 2 + 1)  # every round of every program


def test_images_do_not_depend_on_the_others_in_their_program(fitter_results):
    together, two_by_two, *_ = fitter_results
    np.testing.assert_allclose(two_by_two.sigma, together.sigma, rtol=1e-5)
    assert np.abs(together.sigma[0] - together.sigma[1]).max() > 1e-4


def test_all_rounds_are_one_program_and_can_be_interrupted_between():
    """Noise is drawn by Python code once per program that is compiled."""
    images = np.ones((2, 4, 4, 3), np.float32)
    traced, checks = [], []

    def noise(number, i, shape):
        traced.append(is_initial(i))
        return entropy.normal(number, i, shape)

    def interrupted():
        checks.append(1)
        if len(checks) == 3:
            raise interrupt.Interrupted

    fitter = entropy.Fitter(left_half, images, entropy.Settings(5, 2), noise)
    with pytest.raises(interrupt.Interrupted):
        fitter({"scale": jnp.float32(1)}, interrupted)
    again = fitter({"scale": jnp.float32(2)}, lambda: None)
    assert traced == [True, False]
    assert len(checks) == 3 and again.errors.shape == (2, 5)


def test_a_network_that_ignores_the_image_has_no_scale(fitter_results):
    together, _, constant, _ = fitter_results
    assert np.all(together.scale > 0) and not constant.scale.any()
    assert np.isfinite(constant.sigma).all()


# ------------------------------------------------------------------ the points


def golden_points():
    grids = entropy.entropy(GOLDEN["inputs/kq_sigma_maps"].astype(np.float64))
    return points.count(grids, np.broadcast_to(points.central(16), (6, 16, 16)))


def test_points_are_the_authors():
    found = golden_points()
    np.testing.assert_allclose(
        found.background, GOLDEN["kq/measures/background_mean"], rtol=CLOSE
    )
    np.testing.assert_array_equal(found.on_foreground, GOLDEN["kq/measures/n_fg"])
    np.testing.assert_array_equal(found.on_background, GOLDEN["kq/measures/n_bg"])
    np.testing.assert_allclose(found.ratio, GOLDEN["kq/measures/ratio"], rtol=1e-6)


def test_learning_order_and_stability_are_the_authors():
    found, epochs = golden_points(), GOLDEN["inputs/kq_checkpoints"]
    distance = np.cumsum(GOLDEN["inputs/kq_weight_diff"])[epochs]
    when = found.when(distance)
    assert when.mean() == pytest.approx(float(GOLDEN["kq/measures/d_mean"]), rel=1e-6)
    assert when.std() == pytest.approx(float(GOLDEN["kq/measures/d_std"]), rel=1e-6)
    rho = float(GOLDEN["kq/measures/rho_fg"])
    assert found.stability == pytest.approx(rho, rel=1e-6)


def test_points_by_hand():
    """One image, a 4x4 grid, the middle 2x2 is the object; two checkpoints."""
    inside = points.central(4)
    assert inside.sum() == 4 and inside[1:3, 1:3].all()
    first, last = np.zeros((4, 4)), np.zeros((4, 4))
    first[1, 1] = first[1, 2] = last[2, 2] = -1.0
    last[0, 0] = -12.0  # of twelve cells outside, so that their mean is -1
    found = points.count(np.stack([first, last])[None], inside[None])
    np.testing.assert_allclose(found.background, [0.0, -1.0])
    assert found.on_foreground.tolist() == [[2, 0]]  # -1 is the mean, no point
    assert found.on_background.tolist() == [[0, 1]]
    assert found.ratio.tolist() == [[1.0, 0.0]]
    assert found.stability == 0.0
    assert found.when(np.array([0.5, 2.0])).tolist() == [0.5]
    assert points.usable(found.grids, inside[None]).tolist() == [False]
    assert points.usable(found.grids[:, :1], inside[None]).tolist() == [True]


# ------------------------------------------------------------------ masks


def grey(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array.astype(np.uint8)).save(path)


def test_masks_name_the_images_and_their_foreground(tmp_path):
    test = tiny.dataset().test
    left = np.zeros((32, 32))
    left[:, :16] = 1  # of 255: what is not black is object
    grey(tmp_path / "3.png", left)
    grey(tmp_path / "7.png", left.T)
    grey(tmp_path / "9.png", 255 * np.ones((32, 32)))  # no background
    grey(tmp_path / "other.png", left)
    found = regions.of_masks(tmp_path, test, 20, {8, 16})
    assert found.chosen.tolist() == [3, 7]
    first, second = found.foreground(8)
    assert first[:, :4].all() and not first[:, 4:].any()
    np.testing.assert_array_equal(second, first.T)
    assert regions.of_masks(tmp_path, test, 1, {8}).chosen.tolist() == [3]


def test_masks_of_files_are_named_after_them(tmp_path):
    test = tiny.dataset().test
    names = np.array([f"/data/test/cat/photo{i}.v2.jpg" for i in range(len(test))])
    test = dataclasses.replace(test, names=names)
    grey(tmp_path / "cat" / "photo5.v2.png", np.eye(8) * 0 + np.tri(8) * 255)
    assert regions.of_masks(tmp_path, test, 20, {8}).chosen.tolist() == [5]
    with pytest.raises(errors.DataError, match="no mask of a test image, named CLASS"):
        regions.of_masks(tmp_path / "elsewhere", test, 20, {8})


def test_without_masks_the_images_are_drawn_once():
    found = regions.central(45, 20)
    assert len(set(found.chosen.tolist())) == 20
    np.testing.assert_array_equal(regions.central(45, 20).chosen, found.chosen)
    assert regions.central(5, 20).chosen.tolist() == [0, 1, 2, 3, 4]
    assert found.foreground(16).shape == (20, 16, 16)
    assert found.foreground(16)[0].sum() == 12 * 12


# ------------------------------------------------------------------ the section

EXTENT = learnt.Extent(4, entropy.Settings(rounds=4, draws=4, check_after=3))


def network(title, steps, distance, seed):
    """A network with other weights at each of its checkpoints."""
    model = tiny.SMALL(num_classes=3)
    variables = tiny.variables(model)

    def over_training():
        for i in range(len(steps)):
            uniform = np.random.default_rng(seed + i).uniform
            noisy = functools.partial(
                lambda draw, x: x * draw(0.5, 1, x.shape), uniform
            )
            yield jax.tree.map(noisy, variables)

    pixels = spec_lib.Pixels((0.4,) * 3, (0.3,) * 3, jnp.dtype("bfloat16"))
    return learnt.Network(title, model, pixels, steps, steps, over_training, distance)


@pytest.fixture
def two_networks(monkeypatch):
    """A subject with a teacher of one checkpoint and a student of two."""
    found = [
        network("teacher", (0,), None, 0),
        network("student, kd", (4, 8), [0.5, 0.75], 5),
    ]
    monkeypatch.setattr(learnt, "networks", lambda s: found)
    environment = types.SimpleNamespace(dataset=tiny.dataset(), guard=interrupt.Guard())
    return types.SimpleNamespace(environment=environment, teacher=None)


def cells(row):
    return re.findall("<td>(.*?)</td>", row)


@pytest.mark.long
def test_networks_are_reported_side_by_side(two_networks, tmp_path, monkeypatch):
    monkeypatch.setattr(learnt, "_usable", lambda g, f: np.arange(4) != 2)
    told = []
    parts = learnt.section(two_networks, EXTENT, None, tmp_path, told.append)
    table, text = parts[0], "".join(parts)
    _, teacher, student = table.split("<tr>")[1:]
    assert cells(teacher)[:2] == ["teacher", "1"]
    assert cells(teacher)[5:] == ["-", "-", "-"]
    assert cells(student)[:2] == ["student, kd", "2"]
    mean, deviation, rho = map(float, cells(student)[5:])
    assert 0.5 <= mean <= 0.75 and 0 <= deviation <= 0.125 and 0 <= rho <= 1
    assert "3 of 4 test images, 4 rounds of 4 noisy images" in text
    assert "log_updates=true" in text and "fewer than 10 checkpoints" in text
    assert text.count("<img") == 2
    # 4 images, 4 rounds of 4 copies, three checkpoints.
    assert told[0] == "knowledge points: 192 forward and backward passes"
    assert told[-1] == "knowledge points: student, kd, 2 of 2"


@pytest.mark.long
def test_without_comparable_images_there_is_no_table(
    two_networks, tmp_path, monkeypatch
):
    monkeypatch.setattr(learnt, "_usable", lambda g, f: np.zeros(4, bool))
    parts = learnt.section(two_networks, EXTENT, None, tmp_path, lambda text: None)
    assert len(parts) == 1 and "None of 4 images can be compared" in parts[0]


def test_images_are_dropped_for_their_later_checkpoints_and_without_effect():
    inside = np.broadcast_to(points.central(4), (3, 4, 4))
    grids = np.zeros((3, 4, 4, 4))
    grids[0, :2] += inside[0]  # the object discarded at first only
    grids[1, 3] += inside[1]
    grids[2, 0] = np.nan
    assert learnt._usable(grids, inside).tolist() == [True, False, False]


def test_a_teacher_is_followed_if_its_weights_are_the_last_of_a_run(tmp_path):
    run = tiny.save_student(tmp_path / "run", tiny.SMALL(num_classes=3), "small")
    file = run / workdir.STUDENT
    assert learnt._teacher_run(str(file)) is None
    (run / workdir.CONFIG).touch()
    assert learnt._teacher_run(str(file)) == run == learnt._teacher_run(str(run))
    assert learnt._teacher_run(str(run / workdir.BEST)) is None
    assert learnt._teacher_run("resnet18.imagenet") is None


def test_flags_of_points_are_checked(main, tmp_path):
    where = ("--mode=explain", f"--workdir={tmp_path}")
    code, _, err = main(*where, "--points=oficial")
    assert code == 2 and "--points is 'oficial'; did you mean 'official'?" in err
    code, _, err = main(*where, f"--masks={tmp_path}")
    assert code == 2 and "--masks has no effect without --points" in err
    code, _, err = main("--mode=evaluate", f"--workdir={tmp_path}", "--points=short")
    assert code == 2 and "--points has no effect with --mode=evaluate" in err


@pytest.mark.long
def test_a_run_is_explained_by_its_points(tmp_path, monkeypatch):
    """Twelve steps, each with a checkpoint; teacher, student alone and student."""
    fields = {"method": "kd", "baselines": ("none",), "log_updates": True}
    fields |= {"checkpoint__every_steps": 1, "checkpoint__keep": 12, "log_every": 1}
    monkeypatch.setitem(learnt.EXTENTS, "short", EXTENT)
    with tiny.environment():
        run = tmp_path / "run"
        command.run(tiny.small(tmp_path, **fields), run, **tiny.quiet())
        text = explain.run(run, points="short", **tiny.quiet()).read_text()
        s = subject.load(run, **tiny.quiet())
        teacher, alone, student = learnt.networks(s)
    assert "<h2>How much was learnt</h2>" in text
    assert (teacher.title, teacher.steps, teacher.distance) == ("teacher", (4,), None)
    assert (alone.title, student.title) == ("student alone", "student, kd")
    assert student.steps == tuple(range(1, 13))
    assert student.epochs[-1] == 3.0 and student.epochs[3] == 1.0
    # The distances are those that the checkpoints show, in units of the first norm.
    weights = [
        updates.kernels(student.model, v["params"])[updates.metric(3)]
        for v in student.variables()
    ]
    moved = [np.linalg.norm(b - a) for a, b in itertools.pairwise(weights)]
    logged = np.diff(student.distance)
    np.testing.assert_allclose(
        logged / logged[0], np.array(moved) / moved[0], rtol=0.01
    )
    assert 0 < student.distance[0] < student.distance[-1]
    assert alone.distance != student.distance
