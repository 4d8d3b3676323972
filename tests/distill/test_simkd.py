"""SimKD: the public values, and a student that is its projector and classifier, too."""

import dataclasses
import functools

import golden_weights
import jax
import jax.numpy as jnp
import newer
import numpy as np
import pytest
import tiny
import toys

import lakd_jax
from lakd_jax import distill, errors, export, interop, models
from lakd_jax.config import check, resolved
from lakd_jax.distill import simkd
from lakd_jax.interop import weights
from lakd_jax.models import chain, folding, heads, layers, projector
from lakd_jax.training import borrowed, optim

GOLDEN = golden_weights.arrays("simkd")
CASES = {  # (student's map, teacher's, classifier, projector)
    "equal": ("2", "2", "teacher_head", projector.Options(96, 48)),
    "larger": ("1", "2", "teacher_head", projector.Options(96, 48, (4, 4))),
    "larger_odd": ("odd", "2", "teacher_head", projector.Options(96, 24, (4, 4))),
    "smaller": ("2", "1", "teacher_head_small", projector.Options(48, 24)),
}
LAYERS = [("conv1", 0), ("bn1", 1), ("conv2", 3), ("bn2", 4), ("conv3", 6), ("bn3", 7)]


def variables(case):
    """The public projector's, and the classifier's, as a head has them."""
    source, _, name, options = CASES[case]
    given = newer.feature(f"feat_student_{source}").shape[-1]
    sizes = [(options.inner, given, 1), (options.inner,) * 2 + (3,)]
    sizes.append((options.width, options.inner, 1))
    params, stats = {}, {}
    for i, (features, channels, size) in enumerate(sizes):
        conv, bn = (f"simkd.{case}.transfer.{3 * i + k}" for k in (0, 1))
        kernel = golden_weights.conv(conv, features, channels, size, size)
        params[f"conv{i + 1}"] = kernel
        params[f"bn{i + 1}"] = golden_weights.norm(bn, features)
        stats[f"bn{i + 1}"] = newer.norm_state(bn, features)
    matrix = golden_weights.tensor(f"{name}.weight", (10, options.width)).T
    layer = {"kernel": matrix, **golden_weights.bias(name, 10)}
    params = {options.name: params, projector.BORROWED: layer}
    return params, {options.name: stats}


@functools.cache
def found(case, train):
    """(loss, (map, logits, new statistics)), and gradients to map and parameters."""
    source, target, _, options = CASES[case]
    head = layers.Head(10, layers.Style(projector=options))
    theirs = newer.feature(f"feat_teacher_wide_{target}")
    params, stats = variables(case)

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def run(joint, params):
        given = {"params": params, "batch_stats": stats}
        apply = functools.partial(head.apply, mutable=["batch_stats"])
        found, new = apply(given, joint, train=train, method=head.with_map)
        logits, pooled, ours = found
        np.testing.assert_array_equal(pooled.shape, (8, options.width))
        return simkd.simkd_loss(ours, theirs), (ours, logits, new["batch_stats"])

    joint = newer.feature(f"feat_student_{source}")
    with jax.default_matmul_precision("highest"):
        return jax.device_get(run(joint, params))


def assert_golden(key, got):
    norm = GOLDEN.get(f"{key}/norm")
    if norm is not None:
        np.testing.assert_allclose(np.linalg.norm(got), norm, rtol=newer.CLOSE)
        got = got[:2]
    assert golden_weights.distance(got, GOLDEN[key]) < newer.CLOSE


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_the_public_ones(case, mode):
    (value, (ours, logits, _)), (grad, _) = found(case, mode == "train")
    assert_golden(f"simkd/{case}/{mode}_out", ours)
    assert_golden(f"simkd/{case}/{mode}_logits", logits)
    np.testing.assert_allclose(
        value, GOLDEN[f"simkd/{case}/{mode}_loss"], rtol=newer.CLOSE
    )
    assert_golden(f"simkd/{case}/{mode}_loss/grad_s", grad)


def test_gradients_of_the_projector_are_the_public_ones():
    _, (_, grads) = found("equal", True)
    for name, index in LAYERS:
        layer = grads["projector"][name]
        wanted = f"simkd/equal/train_loss/grad_transfer.{index}"
        if "kernel" in layer:
            assert_golden(f"{wanted}.weight", newer.as_torch(layer["kernel"]))
        else:
            assert_golden(f"{wanted}.weight", layer["scale"])
            assert_golden(f"{wanted}.bias", layer["bias"])


def test_running_statistics_are_the_public_ones():
    """But for variances: the public ones average that of n - 1."""
    *_, (_, _, new) = found("equal", True)[0]
    _, before = variables("equal")
    n = 8 * 4 * 4
    for name, index in LAYERS[1::2]:
        old, now = (tree["projector"][name] for tree in (before, new))
        key = f"simkd/equal/after_step/transfer.{index}"
        assert_golden(f"{key}.running_mean", now["mean"])
        batch = (now["var"] - 0.9 * old["var"]) / 0.1
        unbiased = 0.9 * old["var"] + 0.1 * batch * n / (n - 1)
        assert_golden(f"{key}.running_var", unbiased)


def test_maps_of_other_channels_or_larger_ones_are_no_projectors():
    teacher = np.zeros((2, 4, 4, 6), np.float32)
    for shape in ((2, 4, 4, 5), (2, 8, 8, 6)):
        with pytest.raises(ValueError, match="needs a `projector`"):
            simkd.simkd_loss(np.zeros(shape, np.float32), teacher)
    assert simkd.simkd_loss(np.ones((2, 2, 2, 6), np.float32), teacher) == 1


# ------------------------------------------------------------------------ the network


def test_a_projector_has_the_parameters_of_the_paper():
    options = projector.Options(256, 128)
    model = models.create("resnet8x4", num_classes=100, projector=options)
    params = chain.variable_shapes(model)["params"]["head"]
    assert set(params) == {"projector", "borrowed"}
    assert sum(x.size for x in jax.tree.leaves(params["projector"])) == 214016


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet8", projector.Options(12, 6, (4, 2))),
        ("wrn_10_1", projector.Options(6, 3)),
        ("mobilenet_v2", projector.Options(8, 2)),
    ],
)
def test_its_arrays_say_what_the_network_is(name, options):
    """In PyTorch's names, too; the backbone has the reference's."""
    model = models.create(name, num_classes=3, projector=options)
    own = tiny.variables(model)
    state = interop.to_torch(name, own)
    assert interop.options_from_torch(name, state)["projector"] == options
    back = interop.from_torch(name, state)
    assert jax.tree.structure(back) == jax.tree.structure(own)
    jax.tree.map(np.testing.assert_array_equal, back, own)
    plain = models.create(name, num_classes=3)
    known = interop.to_torch(name, tiny.variables(plain)).keys()
    surplus = {k for k in state if not k.startswith(f"{options.name}.")} - known
    assert not surplus


def test_the_classifier_reads_the_mean_of_the_map_also_if_folded():
    """Of a wide ResNet behind its norm and ReLU; a ConvNeXt's classifier reads none."""
    model = models.create("wrn_10_1", num_classes=3)
    own = toys.drawn(chain.variable_shapes(model, 8), 3)
    x = toys.noise(1, 2, 8, 8, 3)
    out = jax.jit(functools.partial(model.apply, train=False))(own, x)
    last = np.asarray(out.last_map)
    assert last.min() == 0 and np.asarray(out.features[-1]).min() < 0
    assert last.shape[1:] == heads.map_shape(model, 8, 8)
    np.testing.assert_allclose(last.mean((1, 2)), out.pooled, rtol=1e-5, atol=1e-6)
    folded, arrays = folding.fold(model, own)
    again = jax.jit(functools.partial(folded.apply, train=False))(arrays, x)
    np.testing.assert_allclose(again.last_map, last, rtol=1e-4, atol=1e-5)
    for name in ("convnext_tiny", "deit_tiny", "hme"):
        assert heads.map_shape(models.create(name, num_classes=3)) is None


def test_networks_with_other_heads_take_no_projector():
    options = projector.Options(8, 4)
    for name in ("deit_tiny", "hme"):
        with pytest.raises(ValueError, match=f"projector of {name}: its head"):
            models.create(name, num_classes=3, projector=options)
    with pytest.raises(ValueError, match="sizes below 1"):
        projector.Options(8, 0)
    with pytest.raises(ValueError, match="no pair"):
        projector.Options(8, 4, (2,))


def test_a_borrowed_classifier_has_no_gradient_and_no_decay():
    _, (_, grads) = found("equal", True)
    model = layers.Borrowed(4, jnp.float32)
    x, layer = toys.noise(0, 2, 3), {"kernel": toys.noise(1, 3, 4), "bias": np.ones(4)}
    loss = lambda params: jnp.sum(model.apply({"params": params}, x) ** 2)  # noqa: E731
    value, grad = jax.value_and_grad(loss)(layer)
    assert value > 0 and not any(np.any(g) for g in jax.tree.leaves(grad))
    decayed = optim.decays({"student": {"head": grads}}, masked=False)
    assert jax.tree.leaves(decayed["student"]["head"]["borrowed"]) == [False, False]
    assert all(jax.tree.leaves(decayed["student"]["head"]["projector"]))


# ---------------------------------------------------------------------------- the run


def config(tmp_path, **fields):
    return tiny.config(tmp_path, **{"method": "simkd", **fields})


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"student__name": "deit_tiny"}, "student.name is deit_tiny, but method simkd"),
        ({"teacher__name": "convnext_tiny"}, "teacher.name is convnext_tiny, but"),
        ({"teacher__name": "deit_tiny"}, "reads no such mean"),
        ({"simkd__factor": 65}, "simkd.factor is 65, more than the 64 channels"),
        ({"teacher__views": 2}, "method simkd reads the teacher's map, head"),
        ({"method": "simkd+kd", "student__name": "hme"}, "student.name is hme, but"),
        ({"student__name": "mobilenet_v2", "teacher__name": "wrn_16_1"}, ""),
    ],
)
def test_what_networks_do_not_allow_is_refused(fields, words, tmp_path):
    given = {"teacher__init": "runs/it", **fields}
    lines = check.problems(config(tmp_path, **given), 1)
    assert not words or any(words in line for line in lines)
    assert words or not lines


def teacher(options=None, classes=3):
    model = models.create("wrn_10_1", num_classes=classes, projector=options)
    return weights.Loaded(model, tiny.variables(model), "the teacher")


def made(tmp_path, student, sizes=((8, 8), (8, 8)), **fields):
    resolved_config = resolved.resolve(config(tmp_path, **fields))
    return borrowed.student(resolved_config, student, teacher(), sizes)


def drawn(name="resnet8", **options):
    model = models.create(name, num_classes=3, **options)
    return weights.Loaded(model, tiny.variables(model), "a file")


@pytest.mark.parametrize(
    ("sizes", "pooled"),
    [
        (((8, 8), (8, 8)), ()),
        (((8, 8), (16, 16)), ()),
        (((32, 16), (16, 16)), (4, 4)),
    ],
)
def test_the_student_pools_to_the_teachers_size(sizes, pooled, tmp_path):
    student = dataclasses.replace(drawn(), variables=None)
    found = made(tmp_path, student, sizes, simkd__factor=4)
    assert found.model.projector == projector.Options(64, 16, pooled)


def test_a_student_from_a_file_keeps_all_but_its_head(tmp_path):
    file = drawn("mobilenet_v2")
    found = made(tmp_path, file)
    head, own = found.variables["params"].pop("head"), teacher().variables
    assert set(head) == {"borrowed"}  # the projector is drawn
    layer = own["params"]["head"]["dense"]
    jax.tree.map(np.testing.assert_array_equal, head["borrowed"], layer)
    kept = {**file.variables["params"]}
    del kept["head"]
    jax.tree.map(np.testing.assert_array_equal, found.variables["params"], kept)


def test_a_student_of_simkd_goes_on_or_is_refused(tmp_path):
    file = drawn(projector=projector.Options(64, 32))
    params = made(tmp_path, file).variables["params"]["head"]
    jax.tree.map(
        np.testing.assert_array_equal,
        params["projector"],
        file.variables["params"]["head"]["projector"],
    )
    with pytest.raises(errors.TeacherError, match="for another teacher or factor"):
        made(tmp_path, file, simkd__factor=8)
    with pytest.raises(errors.TeacherError, match="method kd cannot train"):
        made(tmp_path, file, method="kd")
    assert made(tmp_path, drawn(), method="kd").model.projector is None


def test_a_sum_trains_the_network_with_the_other_losses(tmp_path):
    assert distill.facts("kd+simkd").borrower == "simkd"
    assert not distill.facts("kd+at").borrower
    found = made(tmp_path, drawn(), method="kd+simkd")
    assert found.model.projector == projector.Options(64, 32)


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_data):
    folder = tmp_path_factory.mktemp("simkd")
    fields = {"method": "simkd", "epochs": 2, "baselines": ("none",)}
    return lakd_jax.train(tiny.small(folder, **fields), folder / "r")


@pytest.mark.long
@pytest.mark.usefixtures("tiny_data")
class TestRun:
    def test_the_trained_network_is_the_one_that_is_read_again(self, run):
        assert run.model.projector == projector.Options(8, 4)
        again = lakd_jax.load(run.directory)
        x = tiny.split(5, 3).images
        np.testing.assert_array_equal(again(x), run(x))
        right = (
            run(tiny.split(45, 2).images).argmax(-1) == tiny.split(45, 2).labels
        ).sum()
        assert right == run.result["test_last"]["right"]
        assert run.history[-1]["step"] == 8

    def test_its_classifier_is_the_teachers_to_the_bit(self, run):
        (file,) = (run.directory.parent / "teachers").glob("*/student.safetensors")
        own, _ = weights.student(file, "float32")
        for ours, theirs in zip(
            heads.classifier(run.model, run.variables),
            heads.classifier(own.model, own.variables),
            strict=True,
        ):
            np.testing.assert_array_equal(ours, theirs)

    def test_parameters_are_counted_with_both(self, run):
        plain = lakd_jax.load(run.directory / "none")
        assert plain.model.projector is None
        classifier = 8 * 3 + 3
        added = 8 * 4 + 9 * 4 * 4 + 4 * 8 + 2 * (4 + 4 + 8)
        same = plain.result["parameters"] - classifier
        assert run.result["parameters"] == same + added + classifier

    def test_exports_compute_the_same(self, run):
        path = run.export("safetensors")
        state = interop.load_torch_file(path)
        model = models.create("small", **interop.options_from_torch("small", state))
        assert model.projector == run.model.projector
        x = tiny.split(5, 3).images
        own = interop.from_torch("small", state)
        got = model.apply(own, run.pixels(jnp.asarray(x)), train=False).logits
        np.testing.assert_allclose(got, run(x), rtol=1e-5, atol=1e-6)
        program = jax.export.deserialize(
            bytearray(run.export("stablehlo").read_bytes())
        )
        np.testing.assert_allclose(program.call(x), run(x), rtol=1e-5, atol=1e-6)
        card = (run.directory / export.FOLDER / "small.md").read_text()
        assert "small, with a projector and its teacher's classifier" in card
        assert "Its head is not the small's own" in card

    def test_it_can_teach(self, run, tmp_path):
        fields = {"teacher__init": str(run.directory), "method": "simkd", "epochs": 1}
        found = lakd_jax.train(tiny.small(tmp_path, **fields), tmp_path / "r")
        assert found.result["teacher_test"]["right"] == run.result["test_last"]["right"]
