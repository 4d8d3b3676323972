"""Runs with several teachers: each verified and recorded, and what they give."""

import jax
import numpy as np
import pytest
import tiny

import lakd_jax
from lakd_jax import errors, models
from lakd_jax.config import check, resolved
from lakd_jax.interop import weights
from lakd_jax.models import vgg
from lakd_jax.runs import command, single
from lakd_jax.runs import teacher as teacher_lib
from lakd_jax.runtime import interrupt
from lakd_jax.store import workdir
from lakd_jax.training import phase


@pytest.fixture(autouse=True)
def known(monkeypatch):
    """Data are those of `tiny`; "narrow" is another network than NETWORK."""
    with tiny.environment():
        monkeypatch.setattr(models, "_NETWORKS", dict(models._NETWORKS))
        lakd_jax.register.network("narrow", Narrow)
        yield


class Narrow(vgg.VGG, kw_only=True):
    stem_widths: tuple[int, ...] = (3,)
    stage_sizes: tuple[int, ...] = (1, 1)
    widths: tuple[int, ...] = (3, 4)


@pytest.fixture
def files(tmp_path):
    """Finished runs: of NETWORK, and of "narrow" with the classes in another order."""
    folders = tmp_path / "first", tmp_path / "second"
    for folder, name, names in zip(
        folders,
        (tiny.NETWORK, "narrow"),
        (tiny.CLASSES, tiny.CLASSES[::-1]),
        strict=True,
    ):
        model = models.create(name, num_classes=3)
        tiny.save_student(folder, model, name, class_names=list(names))
    return [str(folders[0]), f"narrow={folders[1]}"]


def settings(tmp_path, entries, **fields):
    """A run of KD from some teachers: an epoch of four steps."""
    own = {"method": "kd", "teachers": tuple(entries), "teacher__floor": 1e-3}
    return tiny.small(tmp_path, **(own | {"epochs": 1} | fields))


def started(tmp_path, entries, **fields):
    """Returns (config, environment, lines)."""
    config, lines = resolved.resolve(settings(tmp_path, entries, **fields)), []
    environment = single.environment(config, interrupt.Guard(), lines.append)
    return config, environment, lines


def logits(config, environment, teacher):
    evaluator = single.evaluator(config, teacher.network, teacher.pixels, environment)
    return evaluator.predict(teacher.network.variables, environment.test).logits


def test_each_is_tested_and_the_combination_is_the_teacher(files, tmp_path):
    config, environment, lines = started(tmp_path, files, teacher__image_size=12)
    teacher = teacher_lib.make(config, environment)
    assert "order of the data's" in lines[1] and len(lines) == 4
    for line, start in zip(
        (lines[0], *lines[2:]),
        (
            "teacher small from ",
            "teacher narrow from ",
            "teacher small + narrow from 2",
        ),
        strict=True,
    ):
        assert line.startswith(start) and "of 45 test images right" in line
    alone = [logits(config, environment, member) for member in teacher.members]
    together = logits(config, environment, teacher)
    np.testing.assert_allclose(
        together, (alone[0] + alone[1]) / 2, rtol=1e-4, atol=1e-6
    )
    assert (
        teacher.score.right
        == (together.argmax(-1) == environment.dataset.test.labels).sum()
    )
    assert teacher.parameters == sum(member.parameters for member in teacher.members)


@pytest.mark.long
@pytest.mark.parametrize("method", ["kd", "lakd"])
def test_one_of_several_is_a_teacher(method, files, tmp_path):
    """The same steps, to rounding: LAKD runs its modules one by one."""
    params = []
    for i, fields in enumerate(({"teacher__init": files[0]}, {"teachers": files[:1]})):
        entries = fields.pop("teachers", ())
        given = {"method": method, "optim__lr": 0.01} | fields
        config, environment, _ = started(tmp_path, entries, **given)
        teacher = teacher_lib.make(config, environment)
        (tmp_path / str(i)).mkdir()
        job = single.training_job(
            phase.Phase(config), tmp_path / str(i), environment, teacher
        )
        assert job.spec.isolated == (method == "lakd")
        params.append(single.fit(job, environment).run().last["params"])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), *params
    )


@pytest.mark.long
def test_a_run_is_recorded_and_found_again(files, tmp_path):
    run, fields = tmp_path / "run", {"teacher__combine": "confidence"}
    result = command.run(settings(tmp_path, files, **fields), run, **tiny.quiet())
    assert result["teacher"] == "small + narrow"
    note = workdir.read_json(run / workdir.TEACHER)
    assert len(note["teachers"]) == 2
    sources = [one["source"] for one in note["teachers"]]
    assert sources == [
        str(tmp_path / f"{name}/student.safetensors") for name in ("first", "second")
    ]
    config, environment, _ = started(tmp_path, files, **fields)
    found = teacher_lib.load_recorded(run, config, environment)
    assert found.digest == note["weights"]
    assert found.score.right == result["teacher_test"]["right"]
    model = models.create("narrow", num_classes=3)
    other = jax.tree.map(lambda x: x + 1, tiny.variables(model))
    tiny.save_student(
        tmp_path / "second", model, "narrow", other, class_names=list(tiny.CLASSES)
    )
    with pytest.raises(errors.TeacherError, match=r"^teachers\[1\]: .* other weights"):
        command.run(settings(tmp_path, files, **fields), run, **tiny.quiet())
    with pytest.raises(errors.TeacherError, match="second.* now has others"):
        teacher_lib.load_recorded(run, config, environment)


@pytest.mark.long
def test_stored_outputs_depend_on_how_they_are_combined(files, tmp_path):
    folders = []
    for combine in ("mean", "confidence"):
        fields = {"teacher__combine": combine, "teacher__views": 1}
        config, environment, _ = started(tmp_path, files, **fields)
        teacher = teacher_lib.make(config, environment)
        job = single.training_job(phase.Phase(config), tmp_path, environment, teacher)
        assert job.source.logits.shape == (1, 64, 3)
        folders.append({path.name for path in (tmp_path / "teachers").iterdir()})
    assert len(folders[1]) == 2


def test_a_fault_names_its_entry(files, tmp_path):
    (tmp_path / "four").mkdir()
    model = models.create("narrow", num_classes=4)
    tiny.save_student(tmp_path / "four", model, "narrow")
    for entry, words in (
        (f"narrow={tmp_path}/none", "none does not exist"),
        (f"{tmp_path}/second", "holds a narrow, not the small"),
        (f"narrow={tmp_path}/four", "has 4 classes, the data has 3"),
    ):
        config, environment, _ = started(tmp_path, [files[0], entry], method="at")
        with pytest.raises(
            errors.TeacherError, match=r"(?s)^teachers\[1\]: "
        ) as caught:
            teacher_lib.make(config, environment)
        assert words in str(caught.value)
    config, environment, _ = started(tmp_path, files[:1], teacher__floor=0.99)
    with pytest.raises(errors.TeacherError, match=r"^teachers\[0\]: .* 99.00 % of"):
        teacher_lib.make(config, environment)


def test_a_function_may_be_one_of_them(files, tmp_path):
    lakd_jax.teacher_from(lambda x: x.mean((1, 2)), name="mine")
    assert check.problems(settings(tmp_path, [files[0], "mine"]), 1) == []
    config, environment, _ = started(tmp_path, [files[0], "mine"])
    teacher = teacher_lib.make(config, environment)
    assert teacher.members[1].network.source == weights.FUNCTION


@pytest.mark.parametrize(
    ("entries", "fields", "words"),
    [
        (["a"], {"teacher__init": "b"}, "teacher.init is 'b' beside teachers"),
        ([""], {}, "teachers must not be empty"),
        (["s3://b/a"], {}, "teachers"),
        (["a", "narrow="], {}, "teachers[1] is 'narrow=', without weights"),
        (["narrow=a"], {}, "teachers[0] is 'narrow=a', of the network narrow"),
        (
            ["a", "narrow=akamaster:resnet20.CIFAR10"],
            {},
            "teachers[1] is 'akamaster:resnet20.CIFAR10', weights of the network",
        ),
        (["a"], {"teacher__combine": "vote"}, "teacher.combine is 'vote'"),
        (["a"], {"method": "sdd"}, "but several teachers (teachers) only run"),
        (["a"], {"method": "lakd", "local__engine": "dispatch"}, "engine=fused"),
        (
            ["a"],
            {"method": "lakd", "lakd__attention": "logits"},
            "resumes the teacher from a feature map, but several",
        ),
        (
            ["a"],
            {"method": "at", "local__granularity": "flops", "local__modules": 2},
            "use local.granularity=bytes",
        ),
    ],
)
def test_what_does_not_fit_is_refused(entries, fields, words, tmp_path):
    (line,) = check.problems(settings(tmp_path, entries, **fields), 1)
    assert words in line


def test_a_published_name_says_its_network(tmp_path):
    names = ("akamaster:resnet56.CIFAR10", "akamaster:resnet20.CIFAR10")
    fields = {"teacher__name": "resnet56"}
    assert check.problems(settings(tmp_path, names, **fields), 1) == []
    config = resolved.resolve(settings(tmp_path, names, **fields))
    assert config.teacher_title == "resnet56 + resnet20"
