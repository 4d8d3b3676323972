"""Faults during a run, and things that training must not change."""

import errno

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint
import pytest
import test_train_resume as resume
import tiny
from jax.sharding import Mesh

from lakd_jax import errors
from lakd_jax.config import resolved
from lakd_jax.data import device
from lakd_jax.runs import phase_run, single, teacher_floor
from lakd_jax.runs import teacher as teacher_lib
from lakd_jax.runtime import interrupt
from lakd_jax.runtime import mesh as mesh_lib
from lakd_jax.store import checkpoint, workdir
from lakd_jax.training import evaluate
from lakd_jax.training import spec as spec_lib


@pytest.fixture(scope="module")
def mesh():
    """One device and the tiny data, for all runs of this file."""
    with tiny.environment() as one:
        yield one


def train(directory, *, guard=None, teacher=None, method="none", **fields):
    config = tiny.small(directory, method=method, **fields)
    guard = guard or interrupt.Guard()
    return resume.train(config, directory, resume.make_environment, guard, teacher)


@pytest.fixture(scope="module")
def unbroken(mesh, tmp_path_factory):
    """The files of an uninterrupted run of `train`: 12 steps, saved every 4."""
    directory = tmp_path_factory.mktemp("unbroken")
    train(directory)
    return resume.finished(directory)


@pytest.fixture
def run(mesh, tmp_path):
    """A directory to train in."""
    return tmp_path / "run"


# ---------------------------------------------------------- losses not finite


def test_learning_rate_too_high_stops_the_run(run):
    """Promise 25: exit code 4, the step, the term, the last good checkpoint."""
    # The rate explodes from step 8 on: the parameters overflow in step 9, whose losses
    # are still finite. That step is due to be saved and must not be.
    fields = {"optim__schedule": "step", "optim__milestones": (2.0,)}
    messages = []
    for _ in range(2):  # a second start fails in the same way
        with pytest.raises(errors.NonFiniteError) as caught:
            train(run, optim__decay=1e30, checkpoint__every_steps=3, **fields)
        messages.append(str(caught.value))
    first, last, advice = messages[0].splitlines()
    assert caught.value.exit_code == 4
    assert first.startswith("step 9 (window of steps 9 to 9): module1/")
    assert f"Last good checkpoint: step 6, in {run}" in last
    assert "optim.lr" in advice
    assert messages[0] == messages[1]
    assert checkpoint.list_steps(run / "checkpoints") == [3, 6]
    step, arrays, _ = checkpoint.read_arrays(run / "checkpoints", None)
    assert step == 6
    assert all(np.all(np.isfinite(a)) for a in arrays.values())
    assert not (run / workdir.RESULT).exists()


def test_term_that_is_not_finite_is_named(run, tmp_path, mesh):
    """Promise 25: the term is named, not the totals that it makes infinite."""
    model = tiny.SMALL(num_classes=3)
    changed = tiny.variables(model)
    changed["params"]["stage2"]["block1"]["conv"]["kernel"][:] = np.nan
    init = tiny.save_student(tmp_path / "init", model, tiny.NETWORK, changed)
    fields = {"method": "lakd", "student__init": str(init)}
    with pytest.raises(errors.NonFiniteError) as caught:
        train(run, teacher=tiny.teacher(mesh), **fields)
    first = str(caught.value).splitlines()[0]
    assert first.startswith("step 1 (window of steps 1 to 1): module2/")
    assert "module2/feature" in first and "module1" not in first
    assert "none yet" in str(caught.value)


# ---------------------------------------------------------------- checkpoints


def test_save_that_fails_ends_the_run_and_the_next_goes_on(run, unbroken, monkeypatch):
    """Promise 34: exit code 5, and older checkpoints are kept."""
    manager = orbax.checkpoint.CheckpointManager
    save = manager.save

    def fail(self, step, **kwargs):
        if step == 8:
            raise OSError(errno.ENOSPC, "No space left on device")
        return save(self, step, **kwargs)

    with monkeypatch.context() as m:
        m.setattr(manager, "save", fail)
        with pytest.raises(errors.CheckpointWriteError, match="No space") as caught:
            train(run)
    assert caught.value.exit_code == 5
    assert str(caught.value).count("\n") < 10
    assert checkpoint.list_steps(run / "checkpoints") == [4]
    train(run)
    resume.assert_equal_runs(resume.finished(run), unbroken)


def damage(checkpoint_folder):
    """Flips a byte in the middle of the checkpoint's largest file."""
    files = [f for f in checkpoint_folder.rglob("*") if f.is_file()]
    file = max(files, key=lambda f: f.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0xFF
    file.write_bytes(content)


def test_broken_newest_checkpoint_is_set_aside(run, unbroken):
    """Promise 3: the run resumes from the older one and ends the same."""
    with pytest.raises(interrupt.Interrupted):
        train(run, guard=tiny.StopAfter(4 + 2 + 4 + 2 + 1))
    folder = run / "checkpoints"
    older, newest = checkpoint.list_steps(folder)
    assert (older, newest) == (8, 10)
    damage(folder / str(newest))
    train(run)
    assert (folder / f"{newest}.broken").is_dir()
    resume.assert_equal_runs(resume.finished(run), unbroken)


def test_no_usable_checkpoint_is_an_error(run):
    """Promise 3: exit code 3, and never a start from scratch."""
    with pytest.raises(interrupt.Interrupted):
        train(run, guard=tiny.StopAfter(3))
    (step,) = checkpoint.list_steps(run / "checkpoints")
    damage(run / "checkpoints" / str(step))
    for _ in range(2):  # nor does it start from scratch the next time
        with pytest.raises(errors.NoCheckpointError) as caught:
            train(run)
        assert caught.value.exit_code == 3
        assert str(run) in str(caught.value)


# --------------------------------------------------- teacher and evaluation


def test_teacher_is_the_same_before_and_after(run, mesh):
    """Promise 16: its variables are the same bytes after training."""
    teacher = tiny.teacher(mesh)
    before = jax.tree.map(lambda x: np.array(x).tobytes(), teacher.network.variables)
    # With this attention loss gradients flow through the teacher's layers.
    train(run, teacher=teacher, method="lakd", epochs=1, lakd__attention="logits")
    after = jax.tree.map(lambda x: np.array(x).tobytes(), teacher.network.variables)
    assert before == after


@pytest.mark.parametrize("batch_size", [16, 48])
def test_every_example_is_counted_once(batch_size):
    """Promise 27: also if the batch size does not divide the split."""
    model = tiny.SMALL(num_classes=3)
    variables = tiny.variables(model)
    test = tiny.split(45, 2)
    pixels = spec_lib.Pixels((0.4,) * 3, (0.3,) * 3, jnp.float32)
    mesh = Mesh(np.array(jax.devices()), ("data",))  # all eight devices
    evaluator = evaluate.Evaluator(model, pixels, batch_size, mesh, interrupt.Guard())
    logits = model.apply(variables, pixels(jnp.asarray(test.images)), train=False)
    logits = np.asarray(logits.logits, np.float64)
    test.labels[0] = logits[0].argmax()  # the example that pads the last batch
    score = evaluator(
        mesh_lib.replicate(variables, mesh), device.device_data(test, 0, mesh)
    )
    right = int(np.sum(logits.argmax(-1) == test.labels))
    chosen = logits[np.arange(45), test.labels]
    loss = np.mean(np.log(np.sum(np.exp(logits), -1)) - chosen)
    assert (score.right, score.examples) == (right, 45)
    assert 0 < right < 45
    assert score.accuracy == right / 45
    np.testing.assert_allclose(score.loss, loss, rtol=1e-5)


@pytest.mark.parametrize(
    ("classes", "floor", "right", "good"),
    [
        (10, 0.0, 20, True),
        (10, 0.0, 19, False),
        (10, 0.5, 49, False),
        (2, 0.0, 75, True),  # twice chance would be all of them
        (2, 0.0, 74, False),
        (2, 1.0, 99, False),
    ],
)
def test_floor_of_the_teacher(classes, floor, right, good):
    """Promise 15: accuracy at the floor is accepted, one answer less is not."""
    # Every class has a hundredth; what is wrong is answered by another.
    confusion = np.eye(classes, dtype=int) * right
    np.fill_diagonal(confusion[:, 1:], 100 - right)
    confusion[-1, 0] += 100 - right
    assert (teacher_floor.fault(floor, confusion) == "") == good


def made_teacher(directory, **fields):
    config = resolved.resolve(tiny.small(directory, method="kd", **fields))
    environment = resume.make_environment(config, interrupt.Guard())
    return teacher_lib.make(config, environment)


@pytest.mark.long
def test_teacher_is_folded_and_fed_at_the_size_it_was_trained_at(run):
    """Folding keeps the right answers, and the parameters reported."""
    plain = made_teacher(run, teacher__image_size=12, teacher__fold=False)
    assert not plain.network.model.folded
    folded = made_teacher(run, teacher__init=plain.network.source)
    assert folded.network.model.folded
    assert folded.score.right == plain.score.right
    assert folded.parameters == plain.parameters
    # Its run recorded 12; the images are 8x8.
    assert folded.pixels.size == plain.pixels.size == 12


def test_teacher_of_other_images_is_not_taken_from_the_cache(run, monkeypatch):
    trained = []

    def write_run(phase, directory, environment, teacher):
        name, model = phase.config.student.name, tiny.SMALL(num_classes=3)
        trained.append(tiny.save_student(directory, model, name))

    monkeypatch.setattr(phase_run, "train_one", write_run)
    first = made_teacher(run).network.source
    assert made_teacher(run).network.source == first and len(trained) == 1
    other = tiny.dataset(train=48)
    monkeypatch.setattr(single.data, "load", lambda *a, **k: other)
    assert made_teacher(run).network.source != first and len(trained) == 2
