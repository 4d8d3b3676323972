"""Paths in all flags and fields: `~` is the home folder, and only gs:// is a place."""

import pathlib
import sys
import types

import commands
import numpy as np
import pytest
import tiny
from PIL import Image

import lakd_jax
from benchmarks import flag_types, table, throughput
from benchmarks import input as input_benchmark
from lakd_jax import api, data, errors, explain, export, interop, paths
from lakd_jax.config import check, resolved
from lakd_jax.data import device
from lakd_jax.data.streaming import batches
from lakd_jax.data.tfds import source as source_lib
from lakd_jax.interop import weights as weights_lib
from lakd_jax.runs import single, teacher, teacher_source
from lakd_jax.runtime import backend, interrupt
from lakd_jax.runtime import mesh as mesh_lib
from lakd_jax.store import workdir

# ml_collections loads config files in a way deprecated since Python 3.12.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

FIELDS = {
    "data.source": "folder:gs://bucket/images",
    "data.data_dir": "gs://bucket/sets",
    "student.init": "s3://bucket/student.pth",
    "teacher.init": "https://host/teacher.pth",
    "teacher.cache": "s3://bucket/teachers",
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current folder, in which nothing may be created."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)

    def begun(*_):  # a test that fails must not train
        raise errors.DataError("the run began")

    monkeypatch.setattr(single, "environment", begun)
    yield folder
    assert not list(folder.iterdir())


@pytest.fixture
def home(tmp_path, monkeypatch, here):
    """The user's home folder, which is not the current folder."""
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    return folder


def assert_lines(result, *names):
    """Checks that the result is refused with one line starting with each name."""
    lines = commands.assert_refused(result).splitlines()
    assert len(lines) == len(names)
    for line, name in zip(sorted(lines), sorted(names), strict=True):
        assert line.startswith(f"{name} must be a local path")
        assert "use a local folder, or mount the bucket" in line


# ------------------------------------------------------------------------- URLs


@pytest.mark.parametrize(
    "url",
    ["gs://bucket/run", "file:///tmp/run", pathlib.Path("gs://bucket/run"), "s3:/b"],
)
def test_a_url_is_no_path(url):
    assert "must be a local path" in paths.fault(url)
    with pytest.raises(errors.ConfigError, match="^--out must be a local path, is '"):
        paths.local(url, "--out")


@pytest.mark.parametrize("path", ["", "run", "/tmp/a:b/run", "a/b:/c", "C:/run", "x:y"])
def test_a_local_path_stays_as_it_is(path):
    assert paths.local(path, "--out") == pathlib.Path(path)


def test_a_place_may_be_in_a_bucket(monkeypatch):
    monkeypatch.setattr(paths.importlib.util, "find_spec", lambda name: name)
    found = paths.place("gs://bucket/run/", "--out", pathlib.Path("/below"))
    assert str(found / "a" / "b.json") == "gs://bucket/run/a/b.json"
    assert paths.absolute(found) == found == paths.of(found)
    assert paths.is_bucket(found) and not paths.is_bucket("gs:/bucket")
    folder = pathlib.Path("/below")
    assert paths.place("run", "--out", folder) == folder / "run"
    assert paths.place("/run", "--out", folder) == pathlib.Path("/run")
    assert paths.within(folder, "gs://bucket/run", "--out") == "gs://bucket/run"


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("gs://bucket", "must be gs://BUCKET/FOLDER, is 'gs://bucket'"),
        ("gs://", "must be gs://BUCKET/FOLDER"),
        ("gs:/bucket/run", "must be a local path or gs://BUCKET/FOLDER, is 'gs:/"),
        ("s3://bucket/run", "must be a local path or gs://BUCKET/FOLDER, is 's3:/"),
    ],
)
def test_other_places_are_refused(url, words):
    with pytest.raises(errors.ConfigError, match=f"^--out {words}"):
        paths.place(url, "--out")


def test_a_bucket_needs_its_package(main, here, monkeypatch):
    monkeypatch.setattr(paths.importlib.util, "find_spec", lambda name: None)
    flags = ["--workdir=gs://b/run", "--config.teacher.cache=gs://b/teachers"]
    err = commands.assert_refused(main(commands.DIGITS, *flags))
    assert [line.split()[0] for line in err.splitlines()] == [
        "--workdir",
        "teacher.cache",
    ]
    assert err.count('which needs gcsfs: pip install "lakd-jax[gcs]"') == 2


def test_downloads_are_not_kept_in_a_bucket(tmp_path, monkeypatch):
    monkeypatch.setattr(paths.importlib.util, "find_spec", lambda name: name)
    config = tiny.config(tmp_path, teacher__cache="gs://bucket/teachers")
    assert not [f for f in check.problems(config, 1) if "teacher.cache" in f]
    config.student.init = "torchvision:resnet34.IMAGENET1K_V1"
    (line,) = (f for f in check.problems(config, 1) if "teacher.cache" in f)
    assert "the weights that student.init downloads, which takes a local folder" in line


@pytest.mark.parametrize(
    "args",
    [
        [commands.DIGITS],
        [commands.DIGITS, "--dry_run"],
        ["--mode=export", "--to=safetensors"],
        ["--mode=explain"],
    ],
)
def test_workdir_in_another_bucket(main, here, args):
    assert_lines(main(*args, "--workdir=s3://bucket/run"), "--workdir")


def test_urls_in_fields_are_told_with_all_other_faults(main, here):
    flags = [f"--config.{field}={url}" for field, url in FIELDS.items()]
    assert_lines(main(commands.DIGITS, *flags), *FIELDS)
    flags += ["--config.epochs=0", "--workdir=s3://bucket/run"]
    err = commands.assert_refused(main(commands.DIGITS, *flags))
    assert err.count("must be a local path") == len(FIELDS) + 1
    assert "epochs must be at least 1" in err


@pytest.mark.parametrize(
    ("source", "faults"),
    [
        ("npz:gs://bucket/a.npz", 1),
        ("gs://bucket/a", 1),
        ("npz:/tmp/a.npz", 0),
        ("folder:/tmp/images", 0),
        ("cifar10:3.0.2", 0),
    ],
)
def test_urls_of_data(tmp_path, source, faults):
    config = tiny.config(tmp_path, data__source=source)
    found = [f for f in check.problems(config, 1) if f.startswith("data.source")]
    assert len(found) == faults


def test_export_to_a_bucket(main, here):
    args = ("--mode=export", "--to=gs://bucket/out")
    (line,) = commands.assert_refused(main(*args, "--workdir=run")).splitlines()
    assert line == (
        "--to is 'gs://bucket/out'; it must be one of "
        "safetensors, torch, stablehlo, onnx"
    )
    lines = commands.assert_refused(
        main(*args, "--workdir=s3://bucket/run")
    ).splitlines()
    assert [text.split()[0] for text in lines] == ["--workdir", "--to"]


def test_config_file_in_a_bucket(main, here):
    result = main("--config=gs://bucket/config.py", "--workdir=run")
    (line,) = commands.assert_refused(result).splitlines()
    assert line.startswith("gs://bucket/config.py: ")


@pytest.mark.parametrize("bucket", ["s3://b/run", pathlib.Path("gs://b/run")])
def test_buckets_from_python(here, tmp_path, bucket):
    """A `Path` has already dropped one of the slashes."""
    config = tiny.config(tmp_path, epochs=0)
    with pytest.raises(errors.ConfigError) as caught:
        lakd_jax.train(config, bucket)
    first, second = caught.value.problems
    assert first.startswith("--workdir must be a local path")
    assert second == "epochs must be at least 1, is 0"
    guard = interrupt.Guard()
    for door in (
        lambda: lakd_jax.load(bucket),
        lambda: export.run(bucket, "torch"),
        lambda: explain.run(bucket, guard=guard),
        lambda: workdir.prepare(bucket, {}),
        lambda: interop.load_torch_file(bucket),
        lambda: interop.save_torch_file(bucket, {}),
        lambda: interop.save_variables(bucket, {}, {}),
    ):
        with pytest.raises(errors.ConfigError, match="must be a local path or gs://"):
            door()


def test_data_in_a_bucket_from_python(here):
    views = batches.Views(8, (0.1, 1.0), 8)
    options = {"minival": 0.0, "data_dir": "", "workers": 0}
    for load in (
        lambda: data.load("folder:gs://bucket/images"),
        lambda: data.load("npz:gs://bucket/a"),
        lambda: batches.load("folder:gs://bucket/images", views, **options),
    ):
        with pytest.raises(errors.ConfigError, match=r"data\.source must be a local"):
            load()


def test_benchmarks_in_a_bucket(here, capsys):
    flags = ["--data=digits", "--pairs=a:b", "--methods=kd", "--budget=1"]
    with pytest.raises(SystemExit) as caught:
        table.main([*flags, "--out=gs://bucket/table"])
    assert caught.value.code == 2
    assert "argument --out: must be a local path" in capsys.readouterr().err


# ----------------------------------------------------------------- the home folder


def test_home_in_workdir(main, home):
    result = main(commands.DIGITS, "--workdir=~/run")
    commands.assert_refused(result, "the run began")
    names = {path.name for path in (home / "run").iterdir()}
    assert names == {"environment.json", ".lock"}  # free for another config


@pytest.mark.parametrize("args", [["--mode=export", "--to=torch"], ["--mode=explain"]])
def test_home_in_other_modes(main, home, args):
    result = main(*args, "--workdir=~/run")
    commands.assert_refused(result, f"{home / 'run'}: is not a run")


@pytest.mark.parametrize(
    "flag", ["--config=~/c.py", "-config=~/c.py", "--config ~/c.py"]
)
def test_home_in_config(main, home, flag):
    (home / "c.py").write_text("def get_config(): return 3")
    commands.assert_refused(main(*flag.split()), "--config: get_config() gave int")


def test_home_of_nobody(main, here):
    result = main(commands.DIGITS, "--workdir=~nobody-here/run")
    (line,) = commands.assert_refused(result).splitlines()
    assert "~nobody-here has no home folder here: write the full path" in line


def test_home_from_python(home):
    for door in (lakd_jax.load, lambda path: export.run(path, "torch")):
        with pytest.raises(errors.ExportError, match=f"^{home / 'run'}: is not a run"):
            door("~/run")
    weights = {"fc.weight": np.ones((2, 3), np.float32)}
    interop.save_torch_file("~/a.safetensors", weights)
    assert (home / "a.safetensors").exists()
    assert interop.load_torch_file("~/a.safetensors").keys() == weights.keys()
    interop.save_variables("~/b.safetensors", weights, {"a": 1})
    assert interop.load_variables("~/b.safetensors")[1] == {"a": 1}
    workdir.prepare("~/run", {}).close()
    assert (home / "run" / "config.json").exists()


def test_home_of_several_seeds_from_python(home, monkeypatch):
    monkeypatch.setattr(api.command, "run", lambda *_: None)
    monkeypatch.setattr(api, "load", lambda path: path)
    config = tiny.config(home, seeds=(3, 1))
    found = lakd_jax.train(config, "~/run")
    assert found == [home / "run" / "seed3", home / "run" / "seed1"]


@pytest.mark.parametrize("source", ["folder:~/images", "npz:~/images"])
def test_home_in_data_source(home, source):
    with pytest.raises(errors.DataError, match=f"^{home / 'images'}"):
        data.load(source)


def test_home_in_a_folder_of_images(home):
    for name in ("train/cat", "train/dog", "test/cat", "test/dog"):
        folder = home / "images" / name
        folder.mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(folder / "a.png")
    assert len(data.load("folder:~/images").train) == 2


def test_home_in_data_dir(home, monkeypatch):
    def opened(name, data_dir):
        raise errors.DataError(data_dir)

    monkeypatch.setattr(source_lib, "_open", opened)
    with pytest.raises(errors.DataError, match=f"^{home / 'sets'}$"):
        data.load("cifar10", data_dir="~/sets")


@pytest.mark.parametrize("field", ["student", "teacher"])
def test_home_in_init(home, field):
    options = {"dtype": "float32", "num_classes": 3}
    words = f"{field}.init: {home / 'run'} does not exist"
    with pytest.raises(errors.TeacherError, match=words):
        weights_lib.load(field, "resnet8", "~/run", **options)


def test_home_in_teacher_cache(home):
    """The config, and with it the name of the teacher's folder, do not change."""
    environment = types.SimpleNamespace(dataset=tiny.dataset(), folder=pathlib.Path())
    given = tiny.config(home, teacher__cache="~/teachers")
    plain, config = map(resolved.resolve, (tiny.config(home), given))
    name = teacher._cached(plain, environment).name
    assert teacher._cached(config, environment) == home / "teachers" / name
    assert config.teacher.cache == "~/teachers"


def test_home_in_teacher_cache_of_views(home, monkeypatch):
    computer = types.SimpleNamespace(shapes=dict)
    cache = teacher_source.teacher_cache
    monkeypatch.setattr(cache, "OutputsComputer", lambda *_: computer)
    monkeypatch.setattr(cache, "require_room", lambda *_: None)
    monkeypatch.setattr(cache, "settings", lambda *_, **__: "key")
    monkeypatch.setattr(cache, "kept", lambda folder, *_: folder)
    given = tiny.config(home, teacher__cache="~/teachers")
    config, dataset = resolved.resolve(given), tiny.dataset()
    found = teacher_source.source(
        config,
        types.SimpleNamespace(views=2, mesh=None),
        {},
        device.device_data(dataset.train, 0, mesh_lib.data_mesh()),
        dataset,
        guard=interrupt.Guard(),
        notify=print,
        dry=False,
    )
    assert found == home / "teachers"


@pytest.mark.parametrize(
    ("cache", "kept"),
    [
        ("gs://bucket/programs", "gs://bucket/programs"),
        ("~/programs", "HOME/programs"),
        ("programs", "HERE/programs"),
    ],
)
def test_compile_cache_is_a_path_or_left_to_jax(home, here, monkeypatch, cache, kept):
    config = tiny.config(home, compile_cache=cache)
    assert not [f for f in check.problems(config, 1) if "compile_cache" in f]
    settings = types.SimpleNamespace(jax_compilation_cache_dir=None)
    settings.update = lambda name, value: setattr(settings, name, value)
    fake = types.SimpleNamespace(config=settings, default_backend=lambda: "tpu")
    monkeypatch.setattr(backend, "jax", fake)
    backend.prepare(cache)
    kept = kept.replace("HOME", str(home)).replace("HERE", str(here))
    assert settings.jax_compilation_cache_dir == kept


def test_compile_cache_of_nobody(tmp_path):
    config = tiny.config(tmp_path, compile_cache="~nobody-here/programs")
    (fault,) = check.problems(config, 1)
    assert fault.startswith("compile_cache is '~nobody-here/programs', and ")


def test_home_in_benchmarks(home, monkeypatch):
    assert flag_types.path("~/table") == home / "table"
    assert throughput.parse(["--results=~/found"]).results == home / "found"
    monkeypatch.setattr(sys, "argv", ["input", "--images=~/images"])
    with pytest.raises(SystemExit, match=f"{home / 'images'} holds no JPEGs"):
        input_benchmark.main()

    flags = ["--plan", "digits", "--out=~/runs", "--record=~/kept"]
    (series,) = table.series_of(table.parse(flags))
    assert series.out == home / "runs" / "digits"
    assert series.store._path == home / "kept" / "digits.json"
    images = table.parse(["--images=~/images"]).images
    assert images == home / "images"
