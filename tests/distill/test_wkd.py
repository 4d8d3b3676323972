"""Wasserstein distances: the public code's values, costs, projectors and refusals."""

import functools

import commands
import golden_weights
import jax
import jax.numpy as jnp
import newer
import numpy as np
import precision
import pytest
import tiny
import toys

from lakd_jax import config as config_lib
from lakd_jax import distill, errors
from lakd_jax.config import check, recipes
from lakd_jax.distill import wkd, wkd_costs, wkd_projector

GOLDEN, LABELS = newer.GOLDEN, newer.LABELS
STUDENT, TEACHER = newer.INPUTS["logits_student"], newer.INPUTS["logits_teacher"]
DISTANCES = 1 - GOLDEN["inputs/wkd_cka"]
COSTS = {
    "cka_s1": GOLDEN["wkd/cka_s1_cost"],
    "cka_s2": GOLDEN["wkd/cka_s2_cost"],
    "fc_s1": GOLDEN["wkd/fc_cost"],
}

# ---------------------------------------------------------------------------- logits


@functools.cache
def distance():
    run = jax.value_and_grad(wkd.logit_distance, argnums=(0, 1, 3))
    return jax.jit(run, static_argnums=4)


@pytest.mark.parametrize(
    ("cost", "temperature"),
    [("cka_s1", 8), ("cka_s1", 2), ("cka_s2", 2), ("fc_s1", 8), ("fc_s1", 2)],
)
def test_distances_of_logits_are_the_public_ones(cost, temperature):
    given = STUDENT, TEACHER, LABELS, COSTS[cost], float(temperature)
    value, (ours, theirs, of_cost) = distance()(*given)
    newer.assert_public(f"wkdl/{cost}/wd_t{temperature}", value, ours)
    assert not np.any(theirs) and not np.any(of_cost)


def test_the_labels_part_is_the_public_one():
    run = jax.jit(jax.value_and_grad(wkd.target_loss, argnums=(0, 1)))
    value, (ours, theirs) = run(STUDENT, TEACHER, LABELS)
    newer.assert_public("wkdl/target", value, ours)
    assert not np.any(theirs)


def test_costs_are_the_public_ones():
    for sharpness in (1, 2):
        ours = wkd_costs.sharpened(DISTANCES, sharpness)
        wanted = GOLDEN[f"wkd/cka_s{sharpness}_cost"]
        assert golden_weights.distance(ours, wanted) < newer.CLOSE
    assert wkd_costs.sharpened(DISTANCES, 0.0) is DISTANCES
    matrix, _ = newer.teacher_head()
    ours = wkd_costs.sharpened(wkd_costs.classifier_distances(matrix), 1.0)
    assert golden_weights.distance(ours, GOLDEN["wkd/fc_cost"]) < newer.CLOSE


def without(row, label):
    """The probabilities of the other classes, in float64."""
    powers = np.exp(np.delete(np.float64(row), label))
    return powers / powers.sum()


def test_transport_goes_from_the_student_to_the_teacher():
    """Costs that differ with the direction, example by example, the label cut out."""
    cost = np.abs(toys.noise(0, 10, 10)) / 5
    values = []
    for ours, theirs, label in zip(STUDENT, TEACHER, LABELS, strict=True):
        ours, theirs = without(ours, label), without(theirs, label)
        own = np.delete(np.delete(cost, label, 0), label, 1) + 1e-8
        kernel = np.exp(-own / 0.05)
        u = np.full(9, 1 / 9)
        for _ in range(10):
            v = theirs / (kernel.T @ u + 1e-8)
            u = ours / (kernel @ v + 1e-8)
        values.append(np.sum(u[:, None] * kernel * v * own))
    value, _ = distance()(STUDENT, TEACHER, LABELS, cost, 1.0)
    np.testing.assert_allclose(value, np.mean(values), rtol=1e-5)
    turned, _ = distance()(STUDENT, TEACHER, LABELS, cost.T, 1.0)
    assert abs(turned - value) > 0.01 * value


def test_the_label_costs_nothing():
    """Neither its logits nor its costs matter."""
    value, _ = distance()(STUDENT, TEACHER, LABELS, COSTS["fc_s1"], 8.0)
    moved = STUDENT + 5 * np.eye(10, dtype=np.float32)[LABELS]
    again, (grad, *_) = distance()(moved, TEACHER, LABELS, COSTS["fc_s1"], 8.0)
    np.testing.assert_allclose(again, value, rtol=1e-6)
    assert not np.any(grad[np.arange(8), LABELS])


def test_sure_networks_give_finite_gradients():
    flat = np.zeros((8, 10), np.float32)
    sure = 1000 * np.eye(10, dtype=np.float32)[LABELS]
    other = np.roll(sure, 1, 1)
    for both in ((flat, other), (other, flat), (other, np.roll(other, 1, 1))):
        value, (grad, *_) = distance()(*both, LABELS, COSTS["cka_s1"], 1.0)
        assert np.isfinite(value) and np.all(np.isfinite(grad))


def test_distances_of_bfloat16_are_computed_in_float32():
    loss = functools.partial(
        wkd.logit_distance, labels=LABELS, cost=COSTS["fc_s1"], temperature=2.0
    )
    assert precision.arithmetic(loss, *precision.halves((STUDENT, TEACHER))) == {
        "float32"
    }


def options(name, **fields):
    """The block's defaults without cross-entropy."""
    return config_lib.default()[name].to_dict() | {"ce_weight": 0.0} | fields


def logit_signals(student, epoch=0):
    given = toys.outputs(student), toys.outputs(TEACHER), LABELS
    fields = {"epoch": np.float32(epoch), "teacher_classifier": newer.teacher_head}
    return toys.signals(*given, **fields)


@pytest.fixture
def file(tmp_path):
    """The golden distances, in a file."""
    np.save(tmp_path / "cka.npy", DISTANCES)
    return str(tmp_path / "cka.npy")


@pytest.mark.parametrize(
    ("key", "fields", "epoch"),
    [
        ("fc_s1/total_t8_g600", {}, 149.9),
        ("fc_s1/epoch195_of_240", {}, 194),  # counted from 0
        ("cka_s1/total_t8_g600", {"cost": "file"}, 0),
        (
            "cka_s2/total_t2_g25",
            {"cost": "file", "sharpness": 2.0, "weight": 25.0, "temperature": 2.0},
            0,
        ),
    ],
)
def test_the_methods_settings_are_the_public_ones(key, fields, epoch, file):
    fields |= {"cost": file} if "cost" in fields else {}
    made = distill.create("wkd_l", options("wkd_l", **fields))

    @jax.jit
    @jax.value_and_grad
    def total(student):
        signals = logit_signals(student, epoch)
        (loss,) = made.apply({}, signals, train=True)
        return loss.total()

    newer.assert_public(f"wkdl/{key}", *total(STUDENT))


def test_the_weight_falls_along_a_cosine_of_the_runs_epochs():
    made = distill.create("wkd_f", options("wkd_f", decay_after_epochs=4.0, epochs=8))

    def weight(epoch):
        return float(made.weigh(logit_signals(STUDENT, epoch))[1]) / made.weight

    found = [weight(epoch) for epoch in (0, 3.9, 4, 5, 7)]
    turns = np.cos(np.pi * np.array([0, 0, 1, 2, 4]) / 4)
    np.testing.assert_allclose(found, (1 + turns) / 2, atol=1e-6)
    assert distill.option_sources("wkd_l")["epochs"] == "epochs"


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (lambda p: np.save(p, np.zeros((3, 4))), "a square .* has shape \\(3, 4\\)"),
        (lambda p: np.save(p, np.full((3, 3), np.nan)), "finite numbers from 0 on"),
        (lambda p: np.save(p, -np.ones((3, 3))), "finite numbers from 0 on"),
        (lambda p: np.save(p, np.array({}), allow_pickle=True), "must be an .npy"),
        (lambda p: p.write_bytes(b""), "must be an .npy or .npz file"),
        (lambda p: p.write_bytes(b"PK\3\4"), "must be an .npy or .npz file"),
        (lambda p: None, "must be an .npy or .npz file"),
    ],
)
def test_a_file_of_no_use_is_refused_before_any_work(write, words, tmp_path):
    path = tmp_path / "cost.npy"
    write(path)
    fields = {"method": "wkd_l", "wkd_l__cost": str(path)}
    (line,) = check.problems(tiny.config(tmp_path, **fields), 1)
    assert line.startswith("wkd_l.cost must be")
    with pytest.raises(ValueError, match=words):
        wkd_costs.read_distances(path)


def test_files_of_one_array_are_read(tmp_path):
    np.savez(tmp_path / "cost.npz", distances=DISTANCES - 1e-8)
    found = wkd_costs.read_distances(tmp_path / "cost.npz")
    np.testing.assert_allclose(found, DISTANCES, atol=1e-7)
    np.savez(tmp_path / "two.npz", a=DISTANCES, b=DISTANCES)
    with pytest.raises(ValueError, match="one array, has a, b"):
        wkd_costs.read_distances(tmp_path / "two.npz")


def test_distances_of_other_classes_are_refused(tmp_path):
    np.save(tmp_path / "three.npy", np.zeros((3, 3)))
    fields = {"cost": str(tmp_path / "three.npy")}
    made = distill.create("wkd_l", options("wkd_l", **fields))
    with pytest.raises(errors.ConfigError, match="of 3 classes, but the data has 10"):
        made.apply({}, logit_signals(STUDENT), train=True)


def test_stored_teachers_need_a_file(tmp_path, file):
    fields = {"method": "wkd_l", "teacher__views": 2}
    (line,) = check.problems(tiny.config(tmp_path, **fields), 1)
    assert "wkd_l.cost is empty" in line and "set teacher.views to 0" in line
    fields["wkd_l__cost"] = file
    assert check.problems(tiny.config(tmp_path, **fields), 1) == []


# -------------------------------------------------------------------------- features


@functools.cache
def terms(grid):
    """Each term and its gradient to the student's map."""

    def one(u, v, index):
        return wkd.feature_terms(u, v, grid)[index]

    run = jax.value_and_grad(one, argnums=(0, 1))
    return jax.jit(lambda u, v: [run(u, v, index) for index in (0, 1)])


@pytest.mark.parametrize(
    ("case", "map_", "grids"),
    [("same_2", "2", (1,)), ("same_1", "1", (1, 4)), ("odd", "odd", (1, 4))],
)
def test_feature_terms_are_the_public_ones(case, map_, grids):
    """With cells that overlap in the odd case."""
    pair = newer.feature(f"feat_student_{map_}"), newer.feature(f"feat_teacher_{map_}")
    for grid in grids:
        found = terms(grid)(*pair)
        for part, (value, (ours, theirs)) in zip(("mean", "std"), found, strict=True):
            key = f"wkdf/{case}/{part}_grid{grid}"
            np.testing.assert_allclose(value, GOLDEN[key], rtol=newer.CLOSE)
            if f"{key}/grad_s" in GOLDEN:
                newer.assert_public(key, value, ours)
            assert not np.any(theirs)


CASES = {  # (student's map, teacher's, kind, grid)
    "conv1x1": ("feat_student_2", "feat_teacher_wide_2", "conv1x1", 1),
    "bottleneck": ("feat_student_2", "feat_teacher_wide_2", "bottleneck", 1),
    "deconv": ("feat_student_2", "feat_teacher_wide_1", "conv1x1", 4),
}


def weights(case, width):
    """The public projector's variables."""
    prefix = f"wkdf.{case}"
    conv, bias = golden_weights.conv, golden_weights.bias
    if case == "bottleneck":
        shapes = {"conv1": (256, 64, 1, 1), "conv2": (256, 256, 3, 3)}
        shapes["conv3"] = (width, 256, 1, 1)
        params = {
            name: conv(f"{prefix}.{name}", *shape) | bias(f"{prefix}.{name}", shape[0])
            for name, shape in shapes.items()
        }
    elif case == "deconv":  # PyTorch's kernels are (in, out, h, w), and turned
        kernel = golden_weights.tensor(f"{prefix}.conv.weight", (64, width, 4, 4))
        kernel = kernel.transpose(2, 3, 0, 1)[::-1, ::-1]
        params = {"conv": {"kernel": kernel, **bias(f"{prefix}.conv", width)}}
    else:
        name = f"{prefix}.conv"
        params = {"conv": conv(name, width, 64, 1, 1) | bias(name, width)}
    params["bn"] = golden_weights.norm(f"{prefix}.bn", width)
    state = {"bn": newer.norm_state(f"{prefix}.bn", width)}
    return {"params": {"head": params}, "batch_stats": {"head": state}}


@pytest.mark.parametrize("case", CASES)
def test_projected_terms_are_the_public_ones(case):
    ours, theirs, kind, grid = CASES[case]
    ours, theirs = newer.feature(ours), newer.feature(theirs)
    width = theirs.shape[-1]
    project = wkd_projector.Projector(width, theirs.shape[1:3], kind)
    variables = jax.tree.map(jnp.asarray, weights(case, width))
    params, stats = (variables[k]["head"] for k in ("params", "batch_stats"))

    @jax.jit
    def run(params, ours):
        def one(params, ours, index):
            given = {"params": params, "batch_stats": stats}
            u, _ = project.apply(given, ours, train=True, mutable=["batch_stats"])
            return wkd.feature_terms(u, theirs, grid)[index]

        differentiated = jax.value_and_grad(one, argnums=(0, 1))
        return [differentiated(params, ours, index) for index in (0, 1)]

    for part, found in zip(("mean", "std"), run(params, ours), strict=True):
        value, (of_params, grad) = found
        key = f"wkdf/{case}/{part}_grid{grid}"
        newer.assert_public(key, value, grad)
        if case == "conv1x1":
            for leaf, name in {"scale": "weight", "bias": "bias"}.items():
                newer.assert_public_grad(f"{key}/grad_bn.{name}", of_params["bn"][leaf])


def test_the_method_weighs_both_terms():
    ours, theirs = newer.feature("feat_student_2"), newer.feature("feat_teacher_wide_2")
    made = distill.create("wkd_f", options("wkd_f"))
    logits = toys.outputs(STUDENT)
    given = {"student_joints": (ours,), "teacher_joints": (theirs,)}
    signals = toys.signals(logits, logits, LABELS, **given)
    run = jax.jit(lambda v, s: made.apply(v, s, train=True, mutable=["batch_stats"]))
    (loss,), _ = run(weights("conv1x1", 96), signals)
    means, deviations = (GOLDEN[f"wkdf/conv1x1/{p}_grid1"] for p in ("mean", "std"))
    wanted = 0.08 * (4 * means + deviations)
    np.testing.assert_allclose(loss.total(), wanted, rtol=newer.CLOSE)


@pytest.mark.parametrize(
    ("ours", "theirs", "kernel", "size"),
    [
        (4, 4, (1, 1), 4),
        (8, 4, (3, 3), 4),  # stride 2
        (4, 8, (4, 4), 8),  # transposed
        (5, 4, (2, 2), 4),
        (3, 4, (1, 1), 3),
    ],
)
def test_projectors_reach_the_teachers_size(ours, theirs, kernel, size):
    project = wkd_projector.Projector(6, (theirs, theirs), "conv1x1")
    start = functools.partial(project.init_with_output, train=True)
    x = jax.ShapeDtypeStruct((2, ours, ours, 5), "float32")
    out, variables = jax.eval_shape(start, jax.random.key(0), x)
    assert out.shape == (2, size, size, 6)
    assert variables["params"]["conv"]["kernel"].shape == (*kernel, 5, 6)
    sides = (ours,) * 2, (theirs,) * 2
    assert wkd_projector.projected_size(*sides, "conv1x1") == (size, size)
    assert wkd_projector.projected_size(*sides, "bottleneck") == (ours, ours)


def test_cells_of_one_element_are_refused(tmp_path):
    x = toys.noise(0, 2, 4, 4, 3)
    with pytest.raises(ValueError, match="cells of one element in a map of 4x4"):
        wkd.feature_terms(x, x, 4)
    fields = {"method": "wkd_f", "wkd_f__grid": 4}
    assert check.problems(tiny.config(tmp_path, **fields), 1) == []  # of 32 pixels?
    (line,) = check.problems(tiny.config(tmp_path, data__image_size=16, **fields), 1)
    assert "wkd_f.grid is 4" in line and "a last map of 4x4" in line
    fine = tiny.config(tmp_path, data__image_size=32, **fields)
    assert check.problems(fine, 1) == []
    made = distill.create("wkd_f", options("wkd_f", grid=4))
    given = {"student_joints": (x,), "teacher_joints": (x,)}
    signals = toys.signals(toys.outputs(STUDENT[:2]), **given)
    start = functools.partial(made.init, train=True)
    with pytest.raises(errors.ConfigError, match="a last map of 4x4"):
        jax.eval_shape(start, jax.random.key(0), signals)


def test_weights_are_the_pairs():
    found = recipes.of_pair("wrn_40_2", "shuffle_v1")
    assert (found["wkd_l.weight"], found["wkd_l.temperature"]) == (200.0, 6.0)
    wanted = {"weight": 0.3, "mean_weight": 3.0, "grid": 4}
    assert {k: found[f"wkd_f.{k}"] for k in wanted} == wanted
    assert not any("wkd" in k for k in recipes.of_pair("resnet32x4", "resnet8x4"))


def test_imagenets_weights_are_the_pairs():
    c = commands.get_config("imagenet_lakd", "resnet34,resnet18,wkd_l+wkd_f")
    assert check.problems(c, 8) == []
    assert (c.wkd_l.weight, c.wkd_l.temperature, c.wkd_l.sharpness) == (30.0, 2.0, 1.0)
    assert (c.wkd_f.weight, c.wkd_f.mean_weight, c.wkd_f.grid) == (0.02, 2.0, 4)
    assert c.wkd_f.decay_after_epochs == 0 and c.wkd_f.projector == "bottleneck"
    c = commands.get_config("imagenet_lakd", "resnet50,mobilenet_v1,wkd_f")
    assert (c.wkd_l.weight, c.wkd_l.sharpness) == (25.0, 2.0)
    assert (c.wkd_f.weight, c.wkd_f.decay_after_epochs) == (0.005, 30.0)
