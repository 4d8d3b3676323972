"""The configuration: its fields, their ranges, and what must hold between them."""

import pytest

from lakd_jax import config as config_lib
from lakd_jax import errors, models
from lakd_jax.config import check, listing, resolved
from lakd_jax.distill import lakd

# How ml_collections loads a config file is deprecated from Python 3.12 on.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

# Text that is no choice, and cut points, which are checked against the networks.
FREE = {
    "data.source",
    "compile_cache",
    "data.data_dir",
    "student.init",
    "student.init_key",
    "teacher.init",
    "teacher.init_key",
    "teacher.cache",
    "teachers",
    "local.cuts",
}
RANGES = {name: o.check for name, o in listing.options().items() if o.check}


def changed(**fields):
    """The default config with `fields`, "__" for dots, set without a type check."""
    c = config_lib.default()
    for name, value in fields.items():
        *above, last = name.split("__")
        block = c[".".join(above)] if above else c
        with block.ignore_type():
            block[last] = value
    return c


def dunder(field):
    return field.replace(".", "__")


def problems(devices=1, **fields):
    return check.problems(changed(**fields), devices)


def test_every_number_and_choice_has_a_range():
    fields = config_lib.flat(config_lib.default())
    without = {f for f, v in fields.items() if f not in RANGES and type(v) is not bool}
    assert without == {"local.cuts", "student.init_key", "teacher.init_key"}
    assert RANGES.keys() <= fields.keys()


def wrong_values():
    """A value out of range for every field that has a range."""
    for field, value in config_lib.flat(config_lib.default()).items():
        if field not in FREE and type(value) is not bool:
            entry = value
            if isinstance(value, tuple):
                words = ("baselines", "trackers", "local.cuts")
                entry = "" if field in words else 0.0
            wrong = "nonsense" if isinstance(entry, str) else type(entry)(-2)
            yield dunder(field), (wrong,) * 3 if isinstance(value, tuple) else wrong


def test_value_out_of_range_is_one_line_naming_the_field():
    """All at once, as the command line has it: none hides another."""
    wrong = dict(wrong_values())
    lines = problems(**wrong)
    assert sorted(dunder(line.split(" ")[0]) for line in lines) == sorted(wrong)
    assert all("must be" in line and "\n" not in line for line in lines)


@pytest.mark.parametrize(
    ("field", "wrong", "says"),
    [
        ("epochs", 1.5, "epochs must be int, is float 1.5"),
        ("epochs", True, "epochs must be int, is bool True"),
        ("method", None, "method must be str, is NoneType None"),
        ("data.flip", 1, "data.flip must be bool, is int 1"),
        ("optim.lr", "0.1", "optim.lr must be float, is str '0.1'"),
        ("optim.lr", float("nan"), "optim.lr must be above 0, is nan"),
        ("optim.lr", float("inf"), "optim.lr must be above 0, is inf"),
        ("optim.milestones", ("a",), "optim.milestones must hold numbers, is ('a',)"),
        ("local.cuts", (1,), "local.cuts must hold names, is (1,)"),
        ("baselines", (1,), "baselines must hold names, is (1,)"),
        ("data.mean", (0.5,), "data.mean must have 3 entries, one per channel, has 1"),
        ("seed", 2**32, "seed must be from 0 to 4294967295, is 4294967296"),
        ("method", "lakt", "did you mean 'lakd'?"),
        ("student.name", "resnet8x", "did you mean 'resnet8x4'?"),
        ("baselines", ("kd", "lakt"), "baselines is 'lakt'; did you mean 'lakd'?"),
        ("trackers", ("wanbd",), "trackers is 'wanbd'; did you mean 'wandb'?"),
    ],
)
def test_fault_says_what_is_wrong(field, wrong, says):
    (line,) = problems(**{dunder(field): wrong})
    assert says in line


def test_unknown_field_names_the_nearest():
    """Promise 20: a suggestion for what was mistyped."""
    (line,) = problems(optim__milestone=(1.0,))
    assert line.endswith("did you mean optim.milestones?")
    (line,) = problems(lr=0.1)
    assert line.endswith("did you mean optim.lr?")
    (line,) = problems(zzz=0.1)
    assert line == "zzz is not a field of the configuration"


def test_missing_field_is_named():
    c = config_lib.default()
    del c.optim.momentum
    assert check.problems(c, 1) == ["optim.momentum is missing from the configuration"]


def test_all_faults_at_once():
    """Promise 20: a person wants to mend all in one go."""
    found = problems(
        devices=8,
        unheard=1,
        epochs="many",
        optim__lr=-1.0,
        method="lakt",
        batch_size=7,
        eval_batch_size=9,
        kd__ce_weight=0.0,
        kd__kd_weight=0.0,
    )
    starts = ["unheard", "epochs", "optim.lr", "method"]
    starts += ["batch_size", "eval_batch_size", "kd.ce_weight"]
    assert len(found) == len(starts)
    for start in starts:
        assert sum(line.startswith(f"{start} ") for line in found) == 1, start
    with pytest.raises(errors.ConfigError) as caught:
        check.require(changed(epochs=0, optim__lr=0.0), 1)
    assert str(caught.value).count("\n") == 1


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"batch_size": 60, "devices": 8}, "batch_size is 60, which 8 devices"),
        ({"eval_batch_size": 4, "devices": 8}, "eval_batch_size is 4, which 8"),
        ({"optim__warmup_epochs": 241.0}, "more than epochs (240)"),
        (
            {"optim__warmup_epochs": 2.0, "teacher__epochs": 1},
            "more than teacher.epochs (1)",
        ),
        (
            {
                "lakd__head_weight": 0.0,
                "lakd__attention_weight": 0.0,
                "lakd__feature_weight": 0.0,
            },
            "lakd.feature_weight are all 0",
        ),
        ({"lakd__a": 0.0, "lakd__b": 0.0}, "mask would be empty"),
        (
            {"lakd__att_global": True, "lakd__attention": "inside"},
            "lakd.att_global needs",
        ),
        (
            {"lakd__preact": True, "local__granularity": "block"},
            "lakd.preact needs local.granularity=stage",
        ),
        (
            {"local__engine": "pipeline", "method": "kd"},
            "local.engine=pipeline runs the modules of a student that is cut",
        ),
        (
            {"local__engine": "dispatch", "steps_per_dispatch": 2},
            "set steps_per_dispatch to 0",
        ),
        *(
            ({"local__engine": "dispatch", **fields}, f"separately, which {named}")
            for fields, named in (
                ({"local__cut_scale": 0.5}, "local.cut_scale above 0"),
                ({"local__cut_end": 0.5}, "local.cut_end above 0"),
                ({"lakd__att_global": True}, "lakd.att_global"),
                ({"lakd__task": "aux_heads"}, "lakd.task=aux_heads with"),
                ({"student__vam__enabled": True}, "student.vam.enabled"),
            )
        ),
        (
            {"local__granularity": "list", "local__cuts": ("stage4",)},
            "local.cuts: joint is 'stage4'; did you mean 'stage",
        ),
        (
            {"local__granularity": "block", "teacher__name": "resnet8"},
            "local.granularity: no joint of the teacher",
        ),
        (
            {"local__module_start_epochs": (0.0, 1.0)},
            "local.module_start_epochs has 2 entries, the student 3 modules",
        ),
        (
            {"local__module_input": "teacher", "teacher__name": "resnet32x4"},
            "at 'stage1.block3' the student has 16 channels and the teacher 64",
        ),
        (
            {
                "student__name": "vgg8",
                "method": "none",
                "student__shortcut": "identity",
            },
            "student.shortcut is 'identity', which vgg8 does not offer",
        ),
        (
            {"student__name": "vgg8", "teacher__name": "resnet8"},
            "local.granularity: the student has 4 stages and the teacher 3",
        ),
        *(
            ({"method": "kd", "optim__name": name, f"optim__{field}": value}, says)
            for name, field, value, says in (
                ("adamw", "momentum", 0.8, "optim.momentum is 0.8, which optim.name="),
                ("lion", "nesterov", True, "optim.nesterov is True, which"),
                ("adam", "dot_delta", 0.05, "optim.dot_delta is 0.05, which"),
                ("sgd", "beta2", 0.99, "not have, only adamw, adam, lamb, lion: set"),
                ("lion", "eps", 1e-6, "optim.eps is 1e-06, which"),
                (
                    "sgd",
                    "lr_floor",
                    1e-5,
                    "schedule=cosine has it, not step",
                ),
                ("sgd", "cosine_from", "start", "optim.cosine_from is start, but only"),
                ("sgd", "lr_start", 1e-5, "set optim.warmup_epochs"),
            )
        ),
        (
            {"optim__schedule": "cosine", "optim__lr_floor": 0.04, "teacher__lr": 0.03},
            "optim.lr_floor is 0.04, more than teacher.lr (0.03)",
        ),
        (
            {"method": "kd", "student__name": "hme", "optim__name": "adamw"},
            "optim.name is adamw, but student.name=hme has its own optimisers",
        ),
    ],
)
def test_relation_between_fields(fields, says):
    """Promise 21: what must hold between fields is checked before any work."""
    fields = dict(fields)
    (line,) = problems(fields.pop("devices", 1), **fields)
    assert says in line


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"optim__lr": 1, "teacher__mean": (0, 1, 0), "optim__milestones": (1, 2.5)},
        # None of these fields is read by the methods asked for.
        {"method": "kd", "lakd__a": 0.0, "lakd__b": 0.0},
        {"method": "none", "local__cuts": ("stage1",)},
        {"method": "kd", "student__name": "vgg8"},
        {"teacher__name": "wrn_22_3"},
        {"optim__warmup_epochs": 2.0, "teacher__epochs": 1, "teacher__init": "x.pt"},
        {"local__module_input": "teacher"},
        {
            "local__module_input": "teacher",
            "local__granularity": "none",
            "teacher__name": "resnet32x4",
        },
    ],
)
def test_no_fault_is_found_where_none_is(fields):
    assert problems(**fields) == []


def test_relations_hold_for_baselines_too():
    (line,) = problems(method="none", baselines=("lakd",), lakd__a=0.0, lakd__b=0.0)
    assert line.startswith("lakd.a ")


def test_skipped_fields_are_not_spoken_of():
    c = changed(optim__lr=-1.0, epochs=0, local__granularity="list")
    found = check.problems(c, 1, skip=("optim.lr", "local.cuts"))
    assert found == ["epochs must be at least 1, is 0"]


def test_choices_are_those_of_the_library():
    for field, names in lakd.CHOICES.items():
        for name in names:
            assert RANGES[f"lakd.{field}"](name) == ""
        line = RANGES[f"lakd.{field}"]("?")
        assert line.endswith(", ".join(names))
    assert f"{', '.join(models.names())}. Your own" in RANGES["student.name"]("?")


def test_literal_pins_its_fields():
    c = resolved.resolve(changed(lakd__preset="literal", lakd__adapter="always"))
    for field, value in resolved.LITERAL.items():
        assert c.methods["lakd"][field] == value
    default = resolved.resolve(config_lib.default())
    assert default.methods["lakd"]["adapter"] == "always"


def test_resolve_writes_out_what_was_left_open():
    c = changed(epochs=7, baselines=("kd", "none", "lakd", "kd"))
    done = resolved.resolve(c)
    assert (done.teacher.epochs, done.baselines) == (7, ("kd", "none"))
    assert (c.teacher.epochs, len(c.baselines)) == (0, 4)  # a copy
    again = resolved.resolve(config_lib.from_dict(done.to_dict()))
    assert again == done
    assert again.to_dict() == done.to_dict()
    assert resolved.resolve(changed(teacher__epochs=3)).teacher.epochs == 3


def another(value):
    """Of the same type."""
    if isinstance(value, bool):
        return not value
    return (*value, 1) if isinstance(value, tuple) else value + type(value)(1)


def test_digest_changes_with_any_field():
    fields = config_lib.flat(config_lib.default())
    changes = [{}, *({dunder(f): another(value)} for f, value in fields.items())]
    trees = [config_lib.to_dict(changed(**change)) for change in changes]
    assert len({*map(config_lib.digest, trees)}) == 1 + len(fields)


UNRELATED_TO_THE_TEACHER = (
    {"method": "kd", "baselines": ("none",), "seed": 3},
    {"student.name": "resnet8", "student.init": "x", "student.shortcut": "identity"},
    {"kd.temperature": 2.0, "lakd.preset": "literal", "local.cut_scale": 0.5},
    {"teacher.cache": "elsewhere", "teacher.floor": 0.5, "teacher.init": "x"},
    {"checkpoint.every_steps": 3, "checkpoint.keep": 9},
    {"trackers": ()},
)
OF_THE_TEACHER = {
    "teacher.name": "resnet32",
    "teacher.shortcut": "identity",
    "teacher.seed": 1,
    "teacher.epochs": 5,
    "epochs": 5,
    "batch_size": 32,
    "dtype": "bfloat16",
    "data.pad": 3,
    "data.source": "cifar10",
    "optim.lr": 0.2,
}


def test_teacher_depends_on_its_own_fields_alone():
    def digest(fields):
        config = config_lib.changed(config_lib.default(), fields)
        return resolved.of_teacher(resolved.resolve(config)).digest()

    for fields in UNRELATED_TO_THE_TEACHER:
        assert digest(fields) == digest({}), fields
    for field, value in OF_THE_TEACHER.items():
        assert digest({field: value}) != digest({}), field


def test_teacher_config_trains_the_teacher():
    c = changed(epochs=9, teacher__seed=4, teacher__shortcut="identity", seed=8)
    t = resolved.of_teacher(resolved.resolve(c))
    assert (t.method, t.student.name, t.seed, t.epochs) == ("none", "resnet56", 4, 9)
    assert (t.student.shortcut, t.student.init) == ("identity", "")
    assert check.problems(config_lib.from_dict(t.to_dict()), 1) == []


def test_config_comes_back_from_its_json():
    config = changed(lakd__power="1", local__cuts=("stage1",))
    values = config_lib.to_dict(config)
    assert config_lib.from_dict(values) == config
    del values["teacher"]["fold"]  # as an older version wrote it
    assert config_lib.from_dict(values).teacher.fold is True
    with pytest.raises(ValueError, match="does not know: lakd.gone"):
        config_lib.from_dict({"lakd": {"gone": 1}})


def test_changed_returns_a_copy():
    c = config_lib.default()
    other = config_lib.changed(c, {"data.pad": 1, "seed": 2})
    assert (other.data.pad, other.seed) == (1, 2)
    assert (c.data.pad, c.seed) == (4, 0)
