"""Runs whose teacher is a function of images: verified, recorded, and trained from."""

import os

import jax
import numpy as np
import pytest
import tiny
from flax import nnx

import lakd_jax
from lakd_jax import errors, models
from lakd_jax.config import check, resolved
from lakd_jax.interop import weights
from lakd_jax.runs import command, phase_run, single
from lakd_jax.runs import teacher as teacher_lib
from lakd_jax.runtime import interrupt
from lakd_jax.store import workdir
from lakd_jax.training import phase


@pytest.fixture(autouse=True)
def known(monkeypatch):
    """Data and NETWORK are those of `tiny`; what a test registers is forgotten."""
    with tiny.environment():
        monkeypatch.setattr(models, "_NETWORKS", dict(models._NETWORKS))
        yield


class Net(nnx.Module):
    """Two maps of 6x6 and 3x3, of other widths than the student's."""

    def __init__(self, seed=0):
        rngs = nnx.Rngs(seed)
        self.first = nnx.Conv(3, 5, (3, 3), padding="VALID", rngs=rngs)
        self.norm = nnx.BatchNorm(5, rngs=rngs)
        self.second = nnx.Conv(5, 7, (3, 3), strides=2, rngs=rngs)
        self.dense = nnx.Linear(7, len(tiny.CLASSES), rngs=rngs)

    def __call__(self, images):
        first = nnx.relu(self.norm(self.first(images)))
        second = nnx.relu(self.second(first))
        return self.dense(second.mean((1, 2))), {"first": first, "second": second}


def register(seed=0, **fields):
    """Registers a `Net` as "mine"."""
    net = Net(seed)
    net.eval()
    lakd_jax.teacher_from(net, name="mine", **({"mean": (0.4,) * 3} | fields))


def light(images):
    """Answers right where the light is; gives no maps."""
    half = images.shape[2] // 2
    left, right = (
        images[:, :, :half].mean((1, 2, 3)),
        images[:, :, half:].mean((1, 2, 3)),
    )
    return jax.numpy.stack([0.8 - left - right, left - right, right - left], 1)


def settings(tmp_path, **fields):
    """A run of KD from the function "mine": an epoch of four steps."""
    own = {"method": "kd", "teacher__name": "mine", "teacher__floor": 1e-3}
    return tiny.small(tmp_path, **(own | {"epochs": 1} | fields))


def started(tmp_path, **fields):
    """Returns (config, environment, lines)."""
    config, lines = resolved.resolve(settings(tmp_path, **fields)), []
    environment = single.environment(config, interrupt.Guard(), lines.append)
    return config, environment, lines


@pytest.mark.parametrize("method", [pytest.param("kd", marks=pytest.mark.long), "lakd"])
def test_a_module_of_nnx_teaches(method, tmp_path):
    """LAKD cuts the student in two; the maps pair by their share of depth."""
    register()
    cut = {"local__granularity": "list", "local__cuts": ("stage2",)}
    fields = cut if method == "lakd" else {}
    assert check.problems(settings(tmp_path, method=method, **fields), 1) == []
    config, environment, lines = started(tmp_path, method=method, **fields)
    teacher = teacher_lib.make(config, environment)
    assert lines[-1].startswith("teacher mine from lakd_jax.teacher_from: ")
    assert teacher.pixels.mean == (0.4,) * 3 and teacher.parameters == 506
    job = single.training_job(phase.Phase(config), tmp_path, environment, teacher)
    assert job.spec.partition.teacher_joints == (
        ("stage1.block1", "stage2.block1") if fields else ("stage2.block1",)
    )
    before, trained = job.record.first_state(), single.fit(job, environment).run()
    same = jax.tree.map(
        lambda a, b: bool(np.all(a == b)),
        before.variables("student")["params"],
        dict(trained.last["params"]),
    )
    assert not all(jax.tree.leaves(same))


def test_a_run_is_recorded_and_found_again(tmp_path, monkeypatch):
    """With other weights it is refused; without the function, so is a report."""
    register()
    run = tmp_path / "run"
    config = settings(tmp_path)
    result = command.run(config, run, **tiny.quiet())
    assert result["teacher"] == "mine" and result["teacher_test"]["examples"] == 45
    assert (run / "attention.png").exists()
    note = workdir.read_json(run / workdir.TEACHER)
    assert note["source"] == weights.FUNCTION == "lakd_jax.teacher_from"
    c, environment, _ = started(tmp_path)
    found = teacher_lib.load_recorded(run, c, environment)
    assert found.digest == note["weights"] and found.score.examples == 45
    register(seed=1)
    with pytest.raises(
        errors.TeacherError, match="^teacher.name: .* has other weights"
    ):
        command.run(config, run, **tiny.quiet())
    with pytest.raises(errors.TeacherError, match="now has others"):
        teacher_lib.load_recorded(run, c, environment)
    monkeypatch.delitem(models._NETWORKS, "mine")
    with pytest.raises(errors.TeacherError, match="call lakd_jax.teacher_from as for"):
        teacher_lib.load_recorded(run, c, environment)
    (line,) = check.problems(config, 1)
    assert "teacher.name is 'mine'" in line and "must be registered first" in line


def test_it_is_tested_as_any_teacher(tmp_path):
    lakd_jax.teacher_from(light, name="mine", mean=(0,) * 3, std=(1,) * 3)
    config, environment, lines = started(tmp_path, teacher__floor=0.9)
    assert teacher_lib.make(config, environment).score.right == 45
    assert "45 of 45 test images right" in lines[-1]
    lakd_jax.teacher_from(lambda x: -light(x), name="mine")
    with pytest.raises(errors.TeacherError, match="^teacher.name: .* 90.00 % of teach"):
        teacher_lib.make(config, environment)
    lakd_jax.teacher_from(lambda x: x.mean((1, 2))[:, :2], name="mine")
    with pytest.raises(errors.TeacherError, match="has 2 classes, the data has 3"):
        teacher_lib.make(config, environment)


def test_its_classes_are_put_into_the_order_of_the_data(tmp_path):
    lakd_jax.teacher_from(
        lambda x: light(x)[:, ::-1],
        name="mine",
        mean=(0,) * 3,
        std=(1,) * 3,
        classes=tiny.CLASSES[::-1],
    )
    config, environment, lines = started(tmp_path)
    assert teacher_lib.make(config, environment).score.right == 45
    assert "order of the data's" in lines[0]


def test_its_outputs_can_be_stored(tmp_path):
    register()
    fields = {"method": "at", "teacher__views": 1, "local__granularity": "none"}
    config, environment, _ = started(tmp_path, **fields)
    teacher = teacher_lib.make(config, environment)
    job = single.training_job(phase.Phase(config), tmp_path, environment, teacher)
    assert [x.shape for x in job.source.joints] == [(1, 64, 3, 3, 7)]


WITH_MAPS = [
    ({"teacher__init": "somewhere"}, "leave teacher.init empty"),
    ({"method": "sdd"}, "which mine cannot run on from: it is a function"),
    ({"method": "lakd", "lakd__task": "teacher_suffix"}, "cannot run on from"),
    ({"method": "lakd", "local__engine": "dispatch"}, "use local.engine=fused"),
    ({"method": "lakd", "local__module_input": "teacher"}, "module_input=student"),
    ({"method": "review"}, "before their ReLU, which mine does not have"),
    ({"method": "lakd", "lakd__preact": True}, "with lakd.preact compares maps"),
    (
        {
            "method": "at",
            "local__granularity": "list",
            "local__cuts": ("stem", "stage2"),
        },
        "nothing to compare at 'stem'",
    ),
    (
        {"method": "at", "local__granularity": "flops", "local__modules": 2},
        "use local.granularity=bytes",
    ),
    ({"student__name": "mine", "method": "none"}, "it cannot be trained"),
]
WITHOUT = [
    ({"method": "rkd"}, "rkd compares features, but mine gives logits alone"),
    ({"method": "lakd"}, "gives no feature maps"),
    ({"method": "kd+at"}, "gives no feature maps"),
]


@pytest.mark.parametrize(
    ("fn", "fields", "words"),
    [(None, *case) for case in WITH_MAPS] + [(light, *case) for case in WITHOUT],
)
def test_what_a_function_cannot_do_is_refused(fn, fields, words, tmp_path):
    if fn:
        lakd_jax.teacher_from(fn, name="mine")
    else:
        register()
    if fn is None:  # it has two maps for the student's three stages
        fields = {"local__granularity": "none"} | fields
    (line,) = check.problems(settings(tmp_path, **fields), 1)
    assert words in line


def test_a_keras_model_teaches(tmp_path):
    """On the JAX backend, which is chosen before Keras is imported."""
    os.environ.setdefault("KERAS_BACKEND", "jax")
    keras = pytest.importorskip("keras")
    layers = keras.layers
    images = keras.Input((8, 8, 3))
    first = layers.Conv2D(4, 3, activation="relu")(images)
    first = layers.BatchNormalization()(first)
    second = layers.Conv2D(6, 3, strides=2, activation="relu")(first)
    pooled = layers.Dropout(0.5)(layers.GlobalAveragePooling2D()(second))
    logits = layers.Dense(len(tiny.CLASSES))(pooled)
    model = keras.Model(images, [logits, {"first": first, "second": second}])

    def fn(x):
        with jax.numpy_rank_promotion("allow"):  # which is an error in tests of ours
            return model(x, training=False)

    lakd_jax.teacher_from(fn, name="mine", image_size=8)
    config, environment, _ = started(tmp_path, method="at", local__granularity="none")
    teacher = teacher_lib.make(config, environment)
    assert len(teacher.network.model.function.arrays) == 10
    batch = environment.dataset.test.images[:5]
    found = teacher.network.model.apply(
        teacher.network.variables, teacher.pixels(batch), train=False
    )
    expected = fn(teacher.pixels(batch))[0]
    np.testing.assert_allclose(found.logits, expected, rtol=1e-5, atol=1e-6)
    with single.prepare(tmp_path / "run", config):
        result = phase_run.train_one(
            phase.Phase(config), tmp_path / "run", environment, teacher
        )
    assert result["teacher"] == "mine"
