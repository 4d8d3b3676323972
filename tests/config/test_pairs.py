"""What a pair of networks does not allow is refused, with the reason."""

import pytest
import tiny
import toys

from lakd_jax import models
from lakd_jax.config import check
from lakd_jax.distill.base import registry, term


class Tokens(toys.Toy, kw_only=True):
    """A network as vision transformers are: its maps lack the class token."""

    RESUMABLE = False


class Resuming(term.Term):
    ce_weight: float = 1.0
    weight: float = 1.0
    resume: bool = True

    @property
    def needs_suffix(self):
        return self.resume


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """Networks and a method that only these tests know."""
    monkeypatch.setattr(registry, "TABLE", dict(registry.TABLE))
    monkeypatch.setattr(models, "_NETWORKS", dict(models._NETWORKS))
    models.register("toy", toys.Toy)
    models.register("flat", toys.Flat)
    models.register("tokens", Tokens)
    registry.enter("resuming", Resuming)


def problems(tmp_path, student, teacher, **fields):
    """Returns the faults of a run of LAKD, unless `fields` name another method."""
    names = {"student__name": student, "teacher__name": teacher}
    return check.problems(tiny.config(tmp_path, **(names | fields)), 1)


SUFFIX = {"lakd__task": "teacher_suffix"}
LOGITS = {"lakd__attention": "logits"}


@pytest.mark.parametrize(
    ("student", "teacher", "fields", "words"),
    [
        ("toy", "tokens", SUFFIX, "lakd.task=teacher_suffix resumes the teacher"),
        ("toy", "tokens", LOGITS, "lakd.attention=logits resumes the teacher"),
        ("toy", "tokens", {"method": "lakd+dkd", **LOGITS}, "lakd.attention=logits"),
        ("toy", "tokens", {"baselines": ("lakd",), **SUFFIX}, "lakd.task"),
        ("toy", "tokens", {"method": "resuming"}, "method resuming resumes"),
        ("toy", "tokens", {"method": "sdd"}, "sdd applies both networks' heads"),
        ("tokens", "toy", {"method": "sdd"}, "a map of tokens lacks the class token"),
        ("tokens", "toy", {"method": "kd+catkd"}, "kd+catkd applies both"),
        ("toy", "tokens", {"local__module_input": "teacher"}, "units of tokens pass"),
        ("tokens", "toy", {"local__module_input": "teacher"}, "units of tokens pass"),
        (
            *("tokens", "tokens"),
            {"local__module_input": "teacher", "teacher__views": 2},
            "teacher.views stores maps",
        ),
    ],
)
def test_a_map_without_its_class_token_resumes_nothing(
    student, teacher, fields, words, tmp_path
):
    (line,) = problems(tmp_path, student, teacher, **fields)
    assert words in line and "tokens" in line


@pytest.mark.parametrize(
    ("student", "teacher", "fields"),
    [
        ("toy", "tokens", {}),
        ("tokens", "toy", SUFFIX | LOGITS),  # it is the teacher that is resumed
        ("tokens", "tokens", {"local__module_input": "teacher"}),
        ("toy", "tokens", {"method": "kd", **SUFFIX}),  # nothing reads the option
        ("toy", "tokens", {"method": "resuming", "resuming__resume": False}),
        ("toy", "tokens", {"method": "review+at"}),
        ("toy", "toy", {"method": "sdd"}),
        ("tokens", "toy", {"method": "none", "baselines": ("kd",)}),
        ("toy", "flat", {"local__granularity": "block"}),
        ("flat", "toy", {"method": "review", "local__cut_scale": 0.0}),
    ],
)
def test_what_needs_no_more_than_maps_is_allowed(student, teacher, fields, tmp_path):
    assert problems(tmp_path, student, teacher, **fields) == []


@pytest.mark.parametrize(
    ("student", "teacher", "fields", "words"),
    [
        ("flat", "toy", {"local__granularity": "block"}, "left for 'stage1.block1'"),
        (
            *("toy", "flat", {"local__module_input": "teacher"}),
            "'stage1.block1' the student has maps of 32x32 and the teacher of 11x11",
        ),
        (
            "toy",
            "flat",
            {"method": "fsp", "fsp__init_epochs": 1.0},
            "'stage2.block1' the student has 5 channels",
        ),
    ],
)
def test_what_does_not_fit_is_refused(student, teacher, fields, words, tmp_path):
    (line,) = problems(tmp_path, student, teacher, **fields)
    assert words in line
