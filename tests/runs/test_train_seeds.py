"""Several seeds of one command; each can be resumed alone."""

import json

import pytest
import tiny

from lakd_jax import config as config_lib
from lakd_jax import errors, export
from lakd_jax.config import check as check_lib
from lakd_jax.config import resolved
from lakd_jax.runs import command, teacher
from lakd_jax.runs import single as single_lib
from lakd_jax.runtime import interrupt

pytestmark = pytest.mark.usefixtures("tiny_data")

LONG = pytest.mark.long


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("teachers")


def config(cache, **fields):
    """Returns a config of eight steps, at a rate that keeps rounding errors small."""
    fixed = {"epochs": 2, "optim__lr": 0.01, "compile_cache": "", "seeds": (3, 1)}
    return tiny.small(cache, **({"method": "none"} | fixed | fields))


def run(config, directory, guard=None):
    guard = guard or interrupt.Guard()
    return command.run(config, directory, guard=guard, notify=lambda line: None)


def stopped(config, directory, checks):
    """Stops at that check; trains the teacher first, so that only its test counts."""
    c = resolved.resolve(config)
    teacher.make(c, single_lib.environment(c, interrupt.Guard(), str))
    with pytest.raises(interrupt.Interrupted):
        run(config, directory, tiny.StopAfter(checks))


@LONG
def test_a_seed_goes_on_alone_and_more_are_added(tmp_path, cache):
    """Promise 8: seeds may be added; each is a separate run."""
    fields = {"method": "kd", "baselines": ("none",)}
    both = config(cache, **fields)
    stopped(both, tmp_path / "w", 3 + 12 + 2)  # in the baselines or soon after
    single = config(cache, seeds=(), seed=1, method="kd", baselines=("none",))
    result = run(single, tmp_path / "w" / "seed1")
    assert result["seed"] == 1
    more = config_lib.changed(both, {"seeds": (3, 1, 4)})
    all_seeds = run(more, tmp_path / "w")
    assert all_seeds["seeds"][1] == result  # it was not trained again
    assert [r["seed"] for r in all_seeds["seeds"]] == [3, 1, 4]
    table = (tmp_path / "w" / "table.md").read_text()
    assert table.count("(3)") >= 4 and "+-" in table
    for seed in (1, 3, 4):
        folder = tmp_path / "w" / f"seed{seed}"
        assert (folder / "curves.png").exists() and (folder / "none").is_dir()
        assert json.loads((folder / "config.json").read_text())["seeds"] == []
    with pytest.raises(errors.ExportError, match="seed1"):
        export.run(tmp_path / "w", "torch")


def test_a_seed_that_diverges_is_named(tmp_path, cache):
    with pytest.raises(errors.NonFiniteError, match="seed3"):
        run(config(cache, optim__lr=1e30), tmp_path / "w")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"seeds": (1, 2, 1)}, "seeds has 1 twice"),
        ({"seeds": (1, -2)}, "seeds must be from 0"),
        ({"seeds": (1, 0.5)}, "seeds must be whole numbers, is 0.5"),
    ],
)
def test_faults_of_seeds_are_reported(fields, words, tmp_path):
    found = check_lib.problems(tiny.config(tmp_path, **fields), 1)
    assert any(words in line for line in found), found


@LONG
def test_students_see_few_images_and_their_teacher_all(tmp_path, cache):
    lines = []
    few = config(
        cache, method="kd", data__per_class=8, batch_size=8, epochs=1, eval_every=9
    )
    guard = interrupt.Guard()
    found = command.run(few, tmp_path / "w", guard=guard, notify=lines.append)
    assert "the student sees 8 training images of each" in "".join(lines)
    trained = {result["data"] for result in found["seeds"]}
    assert len(trained) == 2  # each seed has its own 24 images
    text = (tmp_path / "w" / "seed3" / "metrics.jsonl").read_text()
    assert json.loads(text.splitlines()[-1])["step"] == 3
    resolved_all = resolved.resolve(config_lib.changed(few, {"data.per_class": 0}))
    bench = single_lib.environment(resolved_all, guard, str)
    of_all = teacher._cached(resolved_all, bench)
    assert (of_all / "result.json").exists()
    result = json.loads((of_all / "result.json").read_text())
    assert result["data"] == bench.dataset.fingerprint() not in trained
    too_few = config_lib.changed(few, {"data.per_class": 2})
    with pytest.raises(errors.DataError, match="do not fill one batch"):
        command.run(too_few, tmp_path / "x", guard=guard, notify=str)
