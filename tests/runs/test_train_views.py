"""Stored outputs of a teacher: same training, reading, damage, size limits."""

import dataclasses
import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_train_resume as resume
import test_train_step as steps
import tiny

from lakd_jax import config as config_lib
from lakd_jax import errors
from lakd_jax.config import check, resolved
from lakd_jax.runs import command, phases, single, teacher_cache, teacher_source
from lakd_jax.runs import teacher as teacher_lib
from lakd_jax.runtime import interrupt
from lakd_jax.store import manifest, workdir
from lakd_jax.training import segments, setup, step, teacher_outputs
from lakd_jax.training import spec as spec_lib

LONG = pytest.mark.long
VIEWS = 2
BATCH = 32


def computer(made, guard=None):
    spec, _, variables, data = made
    return teacher_cache.OutputsComputer(
        spec, variables, data, BATCH, guard or interrupt.Guard()
    )


def key(made, compute_outputs):
    spec, _, variables, _ = made
    names = {"teacher": "resnet8", "data": "tiny", "seed": 0}
    return teacher_cache.settings(spec, variables, compute_outputs.shapes(), **names)


def kept(made, cache, guard=None, notify=lambda text: None):
    compute_outputs = computer(made, guard)
    labels = tiny.split(160, 0).labels
    return teacher_cache.kept(
        cache, compute_outputs, key(made, compute_outputs), labels, notify
    )


@pytest.fixture(scope="module")
def lakd(tmp_path_factory):
    """(the result of `steps.small` for LAKD with views, a folder with its outputs)."""
    folder = tmp_path_factory.mktemp("views")
    made = steps.small(folder, 1, method="lakd", teacher__views=VIEWS)
    kept(made, folder / "cache")
    return made, folder / "cache"


@pytest.fixture
def copy(lakd, tmp_path):
    """(as above, a copy of the cache, the only folder in it)."""
    made, cache = lakd
    shutil.copytree(cache, tmp_path / "copy")
    (folder,) = (tmp_path / "copy").glob("resnet8-views-*")
    return made, tmp_path / "copy", folder


# ---------------------------------------------------------------- the same training


def trained(program, made, source):
    """Returns state and metrics after three steps, the last in another epoch."""
    _, state, _, data = made
    state = dataclasses.replace(state, step=jnp.int32(18))
    metrics_of_steps = []
    for row in steps.rows(3):
        state, metrics = program(state, source, data, row)
        metrics_of_steps.append(jax.device_get(metrics))
    return jax.device_get(state), metrics_of_steps


@pytest.mark.parametrize(
    ("devices", "fields"),
    [
        (1, {"method": "kd"}),
        pytest.param(1, {"method": "lakd"}, marks=LONG),
        pytest.param(1, {"method": "lakd", "local__cut_scale": 0.3}, marks=LONG),
        pytest.param(8, {"local__module_input": "teacher"}, marks=LONG),
        pytest.param(1, {"lakd__preact": True}, marks=LONG),
        pytest.param(1, {"dtype": "bfloat16"}, marks=LONG),
    ],
    ids=["kd", "cut", "uncut", "teacher_input", "preact", "bfloat16"],
)
def test_stored_outputs_train_as_the_teacher_does(devices, fields, tmp_path):
    made = steps.small(tmp_path, devices, teacher__views=VIEWS, **fields)
    cached_outputs = kept(made, tmp_path / "cache")
    program = jax.jit(functools.partial(step.train_step, made[0]))
    ours, metrics = trained(program, made, cached_outputs)
    live, expected = trained(program, made, made[2])
    # The two programs round differently.
    tolerance = 2e-2 if "dtype" in fields else 1e-4
    for mine, theirs in zip(metrics, expected, strict=True):
        assert mine.keys() == theirs.keys()
        for name, value in theirs.items():
            np.testing.assert_allclose(
                mine[name], value, rtol=tolerance, atol=1e-6, err_msg=name
            )
    other, _ = trained(program, made, jax.tree.map(lambda x: x[::-1], cached_outputs))
    near, far = distance(ours, live), distance(other, live)
    assert near < tolerance / 10 and far > 5 * near


def distance(one, other):
    """Returns the largest difference between two states' parameters."""
    parts = jax.tree.map(lambda a, b: np.abs(a - b).max(), one.params, other.params)
    return max(jax.tree.leaves(parts))


def test_views_repeat_those_of_the_first_epochs(lakd):
    spec = lakd[0][0]
    free = dataclasses.replace(spec, views=0)
    at = [int(spec.view(jnp.int32(10 * epoch + 9))) for epoch in range(5)]
    assert at == [0, 1, 0, 1, 0]
    assert [int(free.view(jnp.int32(10 * epoch))) for epoch in range(5)] == [*range(5)]


@LONG
def test_stored_outputs_are_those_of_the_teacher_on_that_view(lakd):
    (spec, _, variables, data), cache = lakd
    stored = kept(lakd[0], cache)
    assert stored.logits.shape == (VIEWS, 160, 3)
    assert [j.shape[2:] for j in stored.joints] == [(4, 4, 4), (2, 2, 6), (2, 2, 8)]
    rows = np.array([3, 150, 7, 7])
    for step_number in (0, 12):  # of epochs 0 and 1
        images, _ = spec_lib.batch(spec, jnp.int32(step_number), data, rows)
        below, whole = spec.teacher_pixels(images), segments.whole_student(spec)
        seen = teacher_outputs.Live(spec, variables).segment(whole, below)
        outputs, joints = seen.outputs, seen.features
        view = step_number // 10
        np.testing.assert_allclose(stored.logits[view, rows], outputs.logits, atol=1e-4)
        np.testing.assert_allclose(stored.joints[1][view, rows], joints[1], atol=1e-4)


@LONG
def test_a_stopped_run_resumes_bit_for_bit(tmp_path):
    """Promise 12: with stored outputs of the teacher."""
    fields = {"method": "lakd", "teacher__views": VIEWS}
    for lab in resume.lab_of(tmp_path):
        lab.train(tmp_path / "unbroken", **fields)
        # Checks: 8 to compare the stored outputs, 4 steps, 2 of minival, then steps.
        with pytest.raises(interrupt.Interrupted):
            lab.train(tmp_path / "parts", tiny.StopAfter(8 + 4 + 2 + 1), **fields)
        assert resume.saved_steps(tmp_path / "parts") == [4, 6]
        lab.train(tmp_path / "parts", **fields)
    ends = [resume.finished(tmp_path / name) for name in ("unbroken", "parts")]
    resume.assert_equal_runs(*ends)


@LONG
def test_both_stages_of_an_experts_tree_share_what_is_stored(tmp_path):
    fields = {"method": "kd", "student__name": "hme", "epochs": 1}
    config = resolved.resolve(tiny.small(tmp_path, **fields, teacher__views=1))
    with tiny.environment() as mesh:
        lines = []
        environment = single.environment(config, interrupt.Guard(), lines.append)
        with workdir.prepare(tmp_path / "run", config.to_dict()):
            folder, teacher = tmp_path / "run", tiny.teacher(mesh)
            result = phases.train(config, folder, environment, teacher)
    assert result["test_last"]["examples"] == 45 and result["stage1"]["epochs"] == 1
    assert sum("the teacher's outputs, 1 of 1" in line for line in lines) == 1


# --------------------------------------------------------------------- on the disk


def test_the_second_start_reads(copy, monkeypatch):
    made, cache, folder = copy
    first = kept(made, cache)
    monkeypatch.setattr(teacher_cache, "_compute", None)
    again = kept(made, cache)
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert [p.name for p in cache.iterdir()] == [folder.name]
    assert workdir.read_json(folder / "config.json")["views"] == VIEWS


@pytest.mark.parametrize("fault", ["flipped", "short", "lost", "no_manifest"])
def test_a_damaged_view_is_reported_and_computed_again(fault, copy):
    made, cache, folder = copy
    damaged, sound = folder / "view1" / "joints-2.bin", folder / "view0" / "logits.bin"
    before, untouched = damaged.read_bytes(), sound.stat().st_mtime_ns
    if fault == "flipped":
        damaged.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    elif fault == "short":
        damaged.write_bytes(before[:-4])
    elif fault == "lost":
        damaged.unlink()
    else:
        (folder / "view1" / "manifest.json").unlink()
    lines = []
    kept(made, cache, notify=lines.append)
    reports = [line for line in lines if "computing it again" in line]
    assert len(reports) == (fault != "no_manifest")
    assert all(line.startswith(str(folder / "view1")) for line in reports)
    assert damaged.read_bytes() == before
    assert sound.stat().st_mtime_ns == untouched
    assert any("1 of 2 views" in line for line in lines)


def tamper(folder, name, change):
    """Changes an array of view 1 and corrects its checksums."""
    view_folder = folder / "view1"
    stored = workdir.read_json(view_folder / "manifest.json")
    parts = {}
    for leaf, entry in stored["leaves"].items():
        file = view_folder / f"{leaf.replace('/', '-')}.bin"
        values = np.fromfile(file, np.dtype(entry["dtype"])).reshape(entry["shape"])
        parts[leaf] = change(values) if leaf == name else values
        file.write_bytes(parts[leaf].tobytes())
    workdir.write_json(view_folder / "manifest.json", manifest.describe(1, parts, {}))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("joints/1", lambda x: x * np.float32(1.01), "joints/1 differs by"),
        ("logits", lambda x: -x, "logits differs by .*\n.* right answers, not"),
        ("joints/0", lambda x: x * np.float32("nan"), "joints/0 differs by nan"),
    ],
)
def test_what_the_teacher_does_not_say_is_refused(name, change, message, copy):
    """Promise 19: stored outputs are compared with the teacher's on 512 images."""
    made, cache, folder = copy
    tamper(folder, name, lambda x: x)
    kept(made, cache)
    tamper(folder, name, change)
    with pytest.raises(errors.TeacherError, match=message) as caught:
        kept(made, cache)
    assert str(caught.value).startswith(f"{folder}: ")
    assert "Delete that folder" in str(caught.value)


def test_a_stop_keeps_whole_views(lakd, tmp_path):
    made, cache = lakd[0], tmp_path / "cache"
    with pytest.raises(interrupt.Interrupted):
        kept(made, cache, guard=tiny.StopAfter(5 + 3))  # 5 batches per view
    (folder,) = cache.iterdir()
    assert {p.name for p in folder.glob("view*")} == {"view0"}
    lines = []
    kept(made, cache, notify=lines.append)
    assert "1 of 2 views" in lines[0]


def test_what_outputs_depend_on_is_in_the_key(lakd):
    made = spec, _, variables, _ = lakd[0]
    compute_outputs = computer(made)
    same = key(made, compute_outputs)
    assert key(made, computer(made)) == same
    pixels = dataclasses.replace(spec.teacher_pixels, size=4)
    fields = {"pad": 2, "flip": False, "views": 3, "preact": True}
    for name, value in (fields | {"teacher_pixels": pixels}).items():
        changed = dataclasses.replace(spec, **{name: value})
        assert key((changed, None, variables, 0), compute_outputs) != same, name
    weights = jax.tree.map(lambda x: x + 1e-6, variables)
    assert key((spec, None, weights, 0), compute_outputs) != same


# ----------------------------------------------------------------- what is refused


def test_too_little_room_is_reported_with_the_total():
    def shape(*dims):
        return jax.ShapeDtypeStruct((30, 50_000, *dims), jnp.float32)

    shapes = teacher_outputs.TeacherOutputs(shape(10), (shape(8, 8, 4),))
    teacher_cache.require_room(shapes, 1_526)  # 1 MiB is 2**20
    with pytest.raises(errors.ConfigError) as caught:
        teacher_cache.require_room(shapes, 1_000)
    (line,) = caught.value.problems
    assert "1,064 bytes per image (logits 40, joints/0 1,024)" in line
    assert "x 50,000 images x 30 views = 1,522 MiB" in line
    assert "teacher.views_mib (1000): lower teacher.views to at most 19, or" in line
    with pytest.raises(errors.ConfigError, match="set teacher.views to 0, or raise"):
        teacher_cache.require_room(shapes, 50)


def test_too_little_room_is_known_before_the_teacher_is_trained(tmp_path):
    fields = {"method": "kd", "baselines": ("lakd",), "teacher__views": 4}
    config = resolved.resolve(tiny.config(tmp_path, **fields, teacher__views_mib=1))
    with tiny.environment(train=160):
        environment = resume.make_environment(config, interrupt.Guard())
        with pytest.raises(errors.ConfigError, match=r"160 images x 4 views = 4 MiB"):
            teacher_lib.make(config, environment)
    assert not (tmp_path / "teachers").exists()


def test_the_room_of_an_experts_tree_is_known(tmp_path, monkeypatch):
    fields = {"method": "kd", "student__name": "hme", "teacher__views": 4}
    config = resolved.resolve(tiny.small(tmp_path, **fields))
    requested = []
    monkeypatch.setattr(
        teacher_cache, "require_room", lambda shapes, _: requested.append(shapes)
    )
    with tiny.environment():
        environment = resume.make_environment(config, interrupt.Guard())
        teacher = single.load_network("teacher", config, environment)
        pixels = setup.pixels(config)
        teacher_source.require_room(
            config, teacher, pixels, environment.dataset, environment.mesh
        )
    (shapes,) = requested
    assert shapes.logits.shape == (4, 64, 3) and shapes.joints == ()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"epochs": 1}, "teacher.views is 2, more than epochs (1)"),
        ({"method": "afd"}, "method afd reads the teacher's taps"),
        ({"baselines": ("rtk",)}, "method rtk reads the teacher's taps"),
        ({"lakd.attention": "logits"}, "run the teacher's layers on"),
        ({"lakd.task": "teacher_suffix"}, "run the teacher's layers on"),
        ({"local.engine": "dispatch"}, "use local.engine=fused"),
        ({"local.engine": "pipeline"}, "use local.engine=fused"),
        (
            {"lakd.preact": True, "local.module_input": "teacher"}
            | {"student.name": config_lib.default().teacher.name},
            "teacher.views stores the features",
        ),
    ],
)
def test_what_cannot_be_stored_is_refused(fields, message):
    c = config_lib.changed(config_lib.default(), fields)
    assert check.problems(c, 1) == []
    c.teacher.views = VIEWS
    (line,) = check.problems(c, 1)
    assert message in line and "teacher.views" in line


@pytest.mark.parametrize(
    "fields", [{"method": "afd"}, {"lakd__task": "teacher_suffix"}]
)
def test_a_method_that_reads_more_has_no_stored_outputs(fields, tmp_path):
    fields = {"teacher__views": 1} | fields
    spec, _, variables = steps.spec_of(tmp_path, 1, tiny.SMALL, **fields)
    with pytest.raises(ValueError, match="only logits, joints are stored"):
        teacher_cache.shapes(spec, variables, (8, 8, 3), 160)


# -------------------------------------------------------------------- full commands


def stored_once(tmp_path):
    """Returns the config of a command that stores one view for two methods."""
    fields = {"method": "lakd", "baselines": ("kd",), "teacher__views": 1}
    return tiny.small(tmp_path, epochs=1, compile_cache="", **fields)


@LONG
def test_two_runs_share_stored_outputs(tmp_path):
    config, quiet, results = stored_once(tmp_path), interrupt.Guard(), []
    for name, count in (("one", 2), ("two", 0)):  # of KD and LAKD
        lines = []
        with tiny.environment():
            folder = tmp_path / name
            result = command.run(config, folder, guard=quiet, notify=lines.append)
        assert sum("teacher's outputs, 1 of 1 views" in line for line in lines) == count
        results.append(result["test_last"])
    assert len([*(tmp_path / "teachers").glob("small-views-*")]) == 2
    assert results[0] == results[1]


@LONG
def test_a_dry_run_stores_nothing(tmp_path):
    lines = []
    with tiny.environment():
        config = stored_once(tmp_path)
        command.dry_run(config, guard=interrupt.Guard(), notify=lines.append)
    out = "\n".join(lines)
    assert "zeros stand in for the teacher's outputs" in out and "first loss" in out
    assert not (tmp_path / "teachers").exists()
