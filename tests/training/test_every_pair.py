"""What every method promises of every kind of pair of networks, and a step of each.

`PROMISED` is the table that users were promised: a method takes a kind of pair, or is
refused with these words before any work. What it takes is traced as the run traces it,
from the config to the step, and not compiled; one step per method is, of which the
parameters that move are those that docs/methods.md says it compares.
"""

import functools
import pathlib
import re

import flax
import jax
import jax.numpy as jnp
import marks
import numpy as np
import pytest
import tiny
import toys

from lakd_jax import distill, models
from lakd_jax.config import check, resolved
from lakd_jax.data import device
from lakd_jax.interop import weights
from lakd_jax.local import cuts
from lakd_jax.models import chain, vit
from lakd_jax.training import borrowed, setup, step
from lakd_jax.training import state as state_lib

# ------------------------------------------------------------------------- networks


class Headed:
    """The head of most families, which may have a projector."""

    make_head = chain.Chain.make_head


class Small(Headed, toys.Toy, kw_only=True):
    """Two stages of one block, maps of 8x8 and 4x4."""

    growth: int = 0
    stage_sizes: tuple[int, ...] = (1, 1)


class Odd(Headed, toys.Flat, kw_only=True):
    """As wide, but of three stages, with signed maps of 3x3: no part of the others."""

    stage_sizes: tuple[int, ...] = (2, 1, 1)


SIZES = {"width": 64, "stage_sizes": (1, 1), "patch": 4, "image_size": 8}
NETWORKS = {
    "small": functools.partial(Small),
    "wide": functools.partial(Small, width=6, growth=1),
    "odd": functools.partial(Odd),
    "vit": functools.partial(vit.ViT, **SIZES),
    "distilled": functools.partial(vit.DistilledViT, **SIZES),
}
KINDS = {  # (student, teacher)
    "same": ("small", "small"),
    "wider": ("small", "wide"),
    "deeper": ("small", "odd"),
    "from_vit": ("small", "vit"),
    "to_vit": ("distilled", "small"),
}

# ------------------------------------------------------------------------ the promise

_CNNS = ("same", "wider", "deeper", "from_vit")
_WIDTHS = dict.fromkeys(
    ("wider", "from_vit", "to_vit"), "needs networks of the same widths"
)
_HEADS = dict.fromkeys(
    ("from_vit", "to_vit"), "applies both networks' heads to positions of the last map"
)
REFUSED = {  # method: {kind: words of the reason}
    "fsp": _WIDTHS,
    "kdsvd": _WIDTHS,
    "sdd": _HEADS,
    "catkd": _HEADS,
    "deit": dict.fromkeys(_CNNS, "trains a distillation token"),
    "simkd": {
        "from_vit": "this one reads no such mean",
        "to_vit": "which this network's head does not allow",
    },
}
TAKES_ALL = (
    *("none", "kd", "lakd", "afd", "rtk", "dkd", "dist", "nkd", "ttm", "wttm", "ctkd"),
    *(
        "deepkd",
        "mlkd",
        "rld",
        "wkd_l",
        "ofa",
        "at",
        "sp",
        "rkd",
        "pkt",
        "nst",
        "cc",
        "crd",
    ),
    *("vid", "fitnet", "ab", "ft", "ofd", "review", "wkd_f", "srrl", "kdpp", "fam"),
    "cd",
)
PROMISED = dict.fromkeys(TAKES_ALL, {}) | REFUSED
# What the second column of docs/methods.md says, and the parts of the student that a
# step leaves as they are if the labels have no weight and each stage its own gradient.
STILL = {
    **dict.fromkeys(("nothing", "logits", "logits of parts", "logits of stages"), ()),
    **dict.fromkeys(("blocks", "class maps", "stages, cut"), ()),
    **dict.fromkeys(("stages + KD", "pooled + KD"), ()),
    **dict.fromkeys(("stages", "stages, fused", "stages, before ReLU"), ("head",)),
    **dict.fromkeys(("last stage", "pooled", "pairs of stages"), ("head",)),
    "one stage": ("stem", "stage1", "head"),
    "last map": ("head/borrowed",),
}
OTHERWISE = {"deit": ("head/head",)}  # the class token's, which learns the labels

# What the toys need, or what makes all of a method count in the first step.
FIELDS = {
    "afd": {"afd__qk_dim": 8},
    "rtk": {"rtk__qk_dim": 8},
    "crd": {"crd__negatives": 4},
    "kdpp": {"kdpp__kd_warmup_epochs": 0.0},
    **{name: {f"{name}__init_epochs": 1.0} for name in ("ab", "fsp")},
    "ft": {"ft__init_epochs": 0.0},
}


# ------------------------------------------------------------------------- the pieces

EXAMPLES, BATCH = 16, 8


@pytest.fixture(scope="module", autouse=True)
def known():
    """Configs may name the networks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "_NETWORKS", {**models._NETWORKS, **NETWORKS})
        yield


@functools.cache
def mesh():
    return jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))


@functools.cache
def data():
    return device.device_data(tiny.split(EXAMPLES, 0), 0, mesh())


def config(method, pair, **fields):
    """Of a run with `FIELDS`; each stage has its own gradient where it may have."""
    student, teacher = pair
    own = {"method": method, "student__name": student, "teacher__name": teacher}
    if distill.facts(method).staged:
        own["local__cut_scale"] = 0.0
    own |= {"batch_size": BATCH, "data__pad": 0} | FIELDS.get(method, {}) | fields
    return tiny.config(pathlib.Path("unused"), **own)


@functools.cache
def loaded(name, *, seed=None):
    model = NETWORKS[name](num_classes=toys.CLASSES)
    variables = None if seed is None else toys.network(model, seed)
    return weights.Loaded(model, variables, "drawn")


def prepared(method, pair, **fields):
    """Returns (spec, what makes its first state, the teacher's variables) of a run."""
    made = resolved.resolve(config(method, pair, **fields))
    student, teacher = loaded(pair[0]), None
    if distill.facts(method).needs_teacher:
        teacher = loaded(pair[1], seed=7)
    pixels = setup.pixels(made)
    spec, first = setup.spec(
        made,
        borrowed.student(made, student, teacher, ((8, 8),) * 2),
        teacher,
        teacher_pixels=pixels,
        image_shape=(8, 8, 3),
        steps_per_epoch=EXAMPLES // BATCH,
        examples=EXAMPLES,
        mesh=mesh(),
    )
    return spec, first, teacher and teacher.variables


def state_of(spec, variables):
    """A first state of {collection: {part: ...}}."""
    kinds = dict(variables)
    params = kinds.pop("params")
    return state_lib.TrainState(
        jnp.int32(0), params, kinds, spec.optimizer.init(params)
    )


def variables_of(first):
    params, collections = first.init()
    return {"params": params} | collections


def rows():
    return np.arange(BATCH, dtype=np.int32)


def traced(method, pair, **fields):
    """Returns the spec, and the shapes before a step, after it, and of its metrics."""
    spec, first, teacher = prepared(method, pair, **fields)
    # `setup.spec` has traced `first.init`: what JAX kept of it is used again.
    params, collections = jax.eval_shape(first.init)
    begin = functools.partial(state_of, spec)
    before = jax.eval_shape(begin, {"params": params} | collections)
    take = functools.partial(step.train_step, spec)
    after, metrics = jax.eval_shape(take, before, teacher, data(), rows())
    return spec, before, after, metrics


def assert_a_step(method, spec, before, after, metrics):
    """Asserts that a step may follow it, and what its variables and metrics are."""
    assert jax.tree.structure(after) == jax.tree.structure(before)
    for old, new in zip(*map(jax.tree.leaves, (before, after)), strict=True):
        assert (old.shape, old.dtype) == (new.shape, new.dtype)
    for parts in (before.params, *before.collections.values()):
        # Raises where a variable belongs to no module.
        cuts.label_tree(parts, spec.partition, spec.student)
    found = {(x.shape, x.dtype.name) for x in jax.tree.leaves(metrics)}
    assert found == {((), "float32")}
    modules = spec.partition.names
    assert len(modules) == (2 if distill.facts(method).staged else 1)
    assert {f"{name}/grad_norm" for name in modules} <= metrics.keys()
    terms = {name.partition("/")[2] for name in metrics} - {"", "head_ce"}
    assert len(terms - {"grad_norm", "decay_norm"}) >= (method != "none")


# -------------------------------------------------------------------------- the tests


def compared():
    """What docs/methods.md says each method compares."""
    page = pathlib.Path(__file__).parents[2] / "docs" / "methods.md"
    lines = re.findall(r"^\| (`[a-z_`, ]+`) \| ([^|]+) \|", page.read_text(), re.M)
    rows = [(name, what) for names, what in lines for name in re.findall(r"\w+", names)]
    return dict(rows[1:])  # the first one is the header


def test_every_method_has_a_row():
    """Here, with the kinds of pairs that it takes, and in the documentation."""
    assert not set(TAKES_ALL) & REFUSED.keys()
    assert PROMISED.keys() == set(distill.names()) == compared().keys()
    assert all(kinds.keys() < KINDS.keys() for kinds in PROMISED.values())
    for name, what in compared().items():
        assert what in STILL, f"{name}: {what}"
        inner = "stage" in what and what != "last stage"
        assert inner == distill.facts(name).staged, f"{name}: {what}"


def test_the_kinds_are_what_their_names_say():
    """In widths, depth, number of stages and sizes of maps, or the tests show less."""

    def shapes(kind):
        student, teacher = (loaded(name).model for name in KINDS[kind])
        found = cuts.modules(student, teacher, "stage", ())
        joints = (found.student_joints, found.teacher_joints)
        both = zip((student, teacher), joints, strict=True)
        return [[s[1:] for s in chain.joint_shapes(m, j, 8)] for m, j in both]

    small, patches = [(8, 8, 4), (4, 4, 4)], [(2, 2, 64)] * 2
    assert {kind: shapes(kind) for kind in KINDS} == {
        "same": [small, small],
        "wider": [small, [(8, 8, 6), (4, 4, 7)]],
        "deeper": [small, [(3, 3, 4)] * 2],
        "from_vit": [small, patches],
        "to_vit": [patches, small],
    }
    assert cuts.modules(Small(), Odd(), "stage", ()).teacher_joints == (
        "stage1.block2",
        "stage3.block1",
    )


@pytest.mark.parametrize("method", distill.names())
def test_a_method_takes_the_pairs_that_were_promised(method):
    """All others are refused before any work, with the reason and nothing else."""
    lines = {kind: check.problems(config(method, KINDS[kind]), 1) for kind in KINDS}
    found = {kind: line for kind, line in lines.items() if line}
    assert found.keys() == PROMISED[method].keys(), found
    for kind, words in PROMISED[method].items():
        assert len(found[kind]) == 1 and words in found[kind][0], found


CELLS = [
    (name, kind)
    for name in distill.names()
    for kind in KINDS
    if kind not in PROMISED.get(name, {})
]


def quick(name, kind):
    """Whether a cell is not long.

    One is quick of each method: networks of unlike depth if it reads maps of the
    teacher, else a transformer, as logits and pooled features, which all networks have
    in the same form, differ in width at most. Of two methods all unlike kinds are.
    """
    facts = distill.facts(name)
    maps = facts.staged or not {"logits", "pooled"}.issuperset(facts.teacher_reads)
    one = "deeper" if maps else "to_vit"
    return kind == one or (name in ("lakd", "ofa") and kind in ("from_vit", "to_vit"))


@pytest.mark.parametrize(
    ("method", "kind"),
    [
        pytest.param(*cell, marks=() if quick(*cell) else pytest.mark.long)
        for cell in CELLS
    ],
)
def test_a_step_of_it_can_be_traced(method, kind):
    assert_a_step(method, *traced(method, KINDS[kind]))


READINGS = {
    name: {"lakd__" + option: value for option, value in options.items()}
    for name, options in toys.READINGS.items()
    if name != "default"
} | {"preact": {"lakd__preact": True}, "global": {"lakd__att_global": True}}


@pytest.mark.parametrize("reading", marks.others_long(READINGS, ("logits",)))
def test_so_can_every_reading_of_lakd(reading):
    """With maps that are larger than the teacher's; some resize them to those."""
    assert_a_step("lakd", *traced("lakd", KINDS["deeper"], **READINGS[reading]))


def compiled_kind(method):
    """Of the kinds of a method the one in which most is unlike, and compiled fast."""
    return "to_vit" if "deeper" in PROMISED[method] else "deeper"


def begun(spec, first):
    """A first state; the student's weights are drawn by NumPy, which is fast."""

    @jax.jit
    def of_method():
        return {kind: parts["method"] for kind, parts in variables_of(first).items()}

    own, student = of_method(), toys.network(spec.student, 1)
    kinds = {
        kind: {"student": student.get(kind, {}), "method": tree}
        for kind, tree in own.items()
    }
    return state_of(spec, kinds)


def taken(method, pair, **fields):
    """Returns the states before and after a step of SGD with rate 1, and its metrics.

    No weight decays, and the labels' cross-entropy has none if the method weighs it, so
    that the method's own losses are all that moves the student.
    """
    own = {"lr": 1.0, "schedule": "constant", "warmup_epochs": 0.0, "weight_decay": 0.0}
    own = {f"optim__{name}": value for name, value in own.items()}
    if labels := distill.option_sources(method).get("ce_weight"):
        own[labels.replace(".", "__")] = 0.0
    own |= fields
    assert not check.problems(config(method, pair, **own), 1)
    spec, first, teacher = prepared(method, pair, **own)
    before = begun(spec, first)
    take = jax.jit(functools.partial(step.train_step, spec))
    after, metrics = take(before, teacher, data(), rows())
    return jax.device_get((before, after, metrics))


@pytest.mark.long
@pytest.mark.parametrize("method", distill.names())
def test_a_step_moves_the_parts_that_it_compares(method):
    before, after, metrics = taken(method, KINDS[compiled_kind(method)])
    assert np.isfinite(metrics["loss"]) and metrics["loss"] != 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after.params))
    one, other = (
        flax.traverse_util.flatten_dict(state.params["student"], sep="/")
        for state in (before, after)
    )
    still = {path for path in one if np.array_equal(one[path], other[path])}
    parts = OTHERWISE.get(method, STILL[compared()[method]])
    assert still == {
        p for p in one if f"{p}/".startswith(tuple(f"{x}/" for x in parts))
    }
