"""Tests training, saving and exporting students with virtual attention."""

import dataclasses
import functools

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from jax.sharding import Mesh

from lakd_jax import config as config_lib
from lakd_jax import errors, export, models
from lakd_jax.config import check, resolved
from lakd_jax.data import device
from lakd_jax.distill.base import method as method_lib
from lakd_jax.explain import subject
from lakd_jax.interop import weights
from lakd_jax.local import cuts
from lakd_jax.models import folding, vam
from lakd_jax.runs import command, single
from lakd_jax.training import optim, phase, setup, step
from lakd_jax.training import state as state_lib
from lakd_jax.training import vam as vam_lib

LONG = pytest.mark.long

# The first stage has two gates, the others have one.
NETWORK = functools.partial(tiny.SMALL, stage_sizes=(2, 1, 1))
MESH = Mesh(np.array(jax.devices()[:1]), ("data",))
VAM = {"student__vam__enabled": True}
ROWS = np.random.default_rng(3).integers(0, 160, (5, 16)).astype(np.int32)


def make(tmp_path, **fields):
    """Returns (spec, first state, teacher variables, data) for a config."""
    config = resolved.resolve(tiny.config(tmp_path, **fields))
    plain = weights.Loaded(NETWORK(num_classes=3), None, "random weights")
    teacher = dataclasses.replace(plain, variables=tiny.variables(plain.model))
    spec, first = setup.spec(
        config,
        weights.gated(plain, setup.vam_options(config)),
        teacher if config.method != "none" else None,
        teacher_pixels=setup.pixels(config),
        image_shape=(8, 8, 3),
        steps_per_epoch=10,
        examples=160,
        mesh=MESH,
    )
    data = device.device_data(tiny.split(160, 0), config.seed, MESH)
    return spec, first(), teacher.variables, data


def run_steps(setting, indices=ROWS):
    """Returns the state after these steps, and the metrics of each."""
    spec, state, teacher, data = setting
    teacher = teacher if spec.teacher else None
    program = jax.jit(functools.partial(step.train_step, spec))
    metrics = []
    for row in indices:
        state, values = program(state, teacher, data, row)
        metrics.append(jax.device_get(values))
    return state, metrics


def flat(tree):
    return flax.traverse_util.flatten_dict(dict(tree))


def gates_of(params):
    return {path: x for path, x in flat(params).items() if vam.is_gate(path)}


def only_gates(tree):
    """Returns `tree` with zeros in place of all leaves that are not gates."""
    return jax.tree.map(jnp.subtract, tree, optim.decayed(tree))


def freeze(optimizer):
    """Returns `optimizer` with zero updates for gates."""

    def update(updates, state, params=None):
        del params
        return jax.tree.map(jnp.subtract, updates, only_gates(updates)), state

    return optax.chain(
        optimizer, optax.GradientTransformation(lambda _: optax.EmptyState(), update)
    )


def entropy_of(layers):
    """Returns the mean entropy of static gates at temperature 1."""
    values = [vam.entropy(vam.log_attention(gate, 1.0)) for gate in layers]
    return np.mean(values)


# The step


@LONG
@pytest.mark.parametrize("method", ["kd", "none", "lakd"])
def test_20_frozen_gates_without_entropy_train_as_the_plain_network(method, tmp_path):
    plain = make(tmp_path, method=method)
    spec, _, teacher, data = make(
        tmp_path, method=method, student__vam__gamma=0.0, **VAM
    )
    spec = dataclasses.replace(spec, optimizer=freeze(spec.optimizer))
    first = make(tmp_path, method=method, **VAM)[1]
    first = first.replace(opt_state=spec.optimizer.init(first.params))
    state, metrics = run_steps((spec, first, teacher, data))
    expected, plain_metrics = run_steps(plain)
    for ours, theirs in zip(metrics, plain_metrics, strict=True):
        np.testing.assert_allclose(ours["loss"], theirs["loss"], rtol=1e-5)
    ungated = folding.without_gates(state.params["student"])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
        ungated,
        expected.params["student"],
    )
    assert not any(np.any(g) for g in gates_of(state.params).values())


@pytest.mark.parametrize(
    ("method", "gate"),
    [
        ("lakd", "static"),
        *(
            pytest.param(*case, marks=LONG)
            for case in (("none", "static"), ("none", "dynamic"), ("lakd", "dynamic"))
        ),
    ],
)
def test_gates_learn_and_the_entropy_is_part_of_the_loss(method, gate, tmp_path):
    """At V = 0 attention is uniform, so that H is 1 and its gradient 0."""
    fields = {"student__vam__gate": gate, "student__vam__gamma": 0.5, **VAM}
    fields |= {
        "optim__lr": 1.0,
        "optim__warmup_epochs": 0.0,
    }  # to see an effect in five steps
    _, without = run_steps(make(tmp_path, method=method), ROWS[:1])
    state, metrics = run_steps(make(tmp_path, method=method, **fields))
    first = metrics[0]
    np.testing.assert_allclose(first["loss"], without[0]["loss"] + 0.5, rtol=1e-5)
    assert all(np.any(g) for g in gates_of(state.params).values())
    name = "module3/vam_entropy" if method == "lakd" else "module1/vam_entropy"
    assert metrics[-1][name] < first[name] == pytest.approx(1.0, rel=1e-5)


def test_each_module_has_the_entropy_of_its_own_layers(tmp_path):
    fields = {"student__vam__gamma": 0.3, "student__vam__init_std": 1.0, **VAM}
    spec, state, *rest = make(tmp_path, method="lakd", **fields)
    (values,) = run_steps((spec, state, *rest), ROWS[:1])[1]
    student = gates_of(state.params["student"])
    for k, count in ((1, 2), (2, 1), (3, 1)):
        gates = [gate for path, gate in student.items() if path[0] == f"stage{k}"]
        assert len(gates) == count
        entropy = values[f"module{k}/vam_entropy"]
        np.testing.assert_allclose(entropy, entropy_of(gates), rtol=1e-5)
    head = 0.1 * values["module3/head_ce"] + 0.9 * values["module3/head_kd"]
    maps = [values[f"module{k}/{t}"] for k in (1, 2, 3) for t in LAKD_TERMS]
    total = head + sum(maps) + 0.3 * entropy_of(list(student.values()))
    np.testing.assert_allclose(values["loss"], total, rtol=1e-5)


LAKD_TERMS = ("feature", "attention")


def test_entropy_weights_and_start_epochs_by_hand():
    """With one and two of three layers, weights are gamma / 3 and 2 gamma / 3."""
    loss = method_lib.ModuleLoss({"head_ce": jnp.float32(2)}, {"head_ce": 1.0}, {})
    values = {"a": 0.2, "b": 0.4, "c": 0.8}
    sown = {name: {vam.ENTROPY: jnp.float32(v)} for name, v in values.items()}
    sown["other"] = {"something_else": jnp.float32(7)}

    def added(starts=()):
        return vam_lib.with_entropy(
            (loss, loss),
            sown,
            gamma=0.3,
            owner=lambda path: int(path[1] != "a"),
            epoch=jnp.float32(1.5),
            starts=starts,
        )

    first, second = added()
    assert first.terms["vam_entropy"] == jnp.float32(0.2)
    np.testing.assert_allclose(second.terms["vam_entropy"], 0.6, rtol=1e-6)
    np.testing.assert_allclose(first.total(), 2 + 0.1 * 0.2, rtol=1e-6)
    np.testing.assert_allclose(second.total(), 2 + 0.2 * 0.6, rtol=1e-6)
    later = added(starts=(0.0, 2.0))
    np.testing.assert_allclose(later[0].total(), 2 + 0.1 * 0.2, rtol=1e-6)
    np.testing.assert_allclose(later[1].total(), 2.0)


def test_gates_are_not_decayed():
    params = {"conv": {"kernel": jnp.ones(3), "vam_gate": jnp.full(2, 5.0)}}
    labels = jax.tree.map(lambda _: 0, params)
    optimizer = optim.sgd(
        optax.constant_schedule(1.0),
        momentum=0.9,
        nesterov=False,
        weight_decay=0.1,
        clip_norm=1.0,
        labels=labels,
    )
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zero, optimizer.init(params), params)
    np.testing.assert_allclose(updates["conv"]["kernel"], -0.1, rtol=1e-6)
    np.testing.assert_array_equal(updates["conv"]["vam_gate"], 0.0)
    kept = optim.decayed(params)
    np.testing.assert_array_equal(kept["conv"]["vam_gate"], 0.0)
    assert kept["conv"]["kernel"] is params["conv"]["kernel"]
    params["conv"]["vam_gate"] = jnp.full(2, jnp.inf)
    assert np.isnan(optim.decayed(params)["conv"]["vam_gate"]).all()


def test_gates_belong_to_the_modules_of_their_convolutions(tmp_path):
    spec, state, *_ = make(tmp_path, method="lakd", **VAM)
    labels = cuts.label_tree(state.params, spec.partition, spec.student)
    owners = {path[1]: k for path, k in flat(labels).items() if vam.is_gate(path)}
    assert owners == {"stage1": 0, "stage2": 1, "stage3": 2}


# Runs


@pytest.fixture
def folder(tmp_path):
    """Yields a folder for runs on the tiny data, on one device."""
    with tiny.environment():
        yield tmp_path


def train_in(folder, name, **fields):
    """Trains for one epoch with `fields`, and returns (config, result, log lines)."""
    lines = []
    fields = {"method": "none", "epochs": 1, "optim__warmup_epochs": 0.0} | fields
    config = tiny.small(folder, **fields)
    result = command.run(config, folder / name, guard=guard(), notify=lines.append)
    return config, result, lines


def guard():
    return tiny.StopAfter(10**6)


def loaded(path, part="teacher"):
    return weights.load(
        part,
        tiny.NETWORK,
        str(path),
        shortcut="projection",
        dtype="float32",
        num_classes=3,
    )


def last_variables(folder, config, run_name):
    """Returns the student and its variables in the last checkpoint of a run."""
    environment = single.environment(config, guard(), print)
    job = single.training_job(phase.first(config), folder / run_name, environment, None)
    trained = single.fit(job, environment).run()
    return job.student.model, trained.last


@LONG
def test_a_finished_run_leaves_the_plain_network(folder):
    fields = {"student__vam__init_std": 0.5, **VAM}
    config, result, lines = train_in(folder, "run", **fields)
    network = loaded(folder / "run")
    assert network.model == models.create(tiny.NETWORK, num_classes=3)
    shapes = jax.tree.map(jnp.shape, tiny.variables(network.model))
    assert jax.tree.map(jnp.shape, network.variables) == shapes
    assert result["parameters"] == state_lib.parameter_count(
        network.variables["params"]
    )
    assert any("small with VAM, alone" in line for line in lines)
    # Its logits equal those of the trained network to 1e-5.
    model, variables = last_variables(folder, resolved.resolve(config), "run")
    assert gates_of(variables["params"])
    x = setup.pixels(config)(jnp.asarray(tiny.split(45, 2).images))
    exported, trained = (
        jax.jit(functools.partial(m.apply, train=False))(v, x).logits
        for m, v in ((network.model, network.variables), (model, variables))
    )
    np.testing.assert_allclose(exported, trained, atol=1e-5)
    for to in export.ENDINGS:
        export.run(folder / "run", to, notify=print)
    # The report also reads checkpoints as the plain network.
    past = list(subject.past(subject.load(folder / "run", guard(), print)))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        past[-1][1],
        network.variables,
    )
    # It can be trained further, with new gates or without.
    for name, more in (("on", VAM), ("off", {})):
        train_in(folder, name, student__init=str(folder / "run"), **more)


@pytest.mark.long
def test_dynamic_gates_stay_in_the_student(folder):
    fields = {"student__vam__gate": "dynamic", **VAM}
    config, result, _ = train_in(folder, "run", **fields)
    network = loaded(folder / "run")
    options = vam.Options("dynamic", 4, 1.0, True, 0.0)
    assert network.model == models.create(tiny.NETWORK, num_classes=3, vam=options)
    assert gates_of(network.variables["params"])
    score = single.evaluator(
        config,
        network,
        setup.pixels(config),
        single.environment(config, guard(), print),
    )
    data = device.device_data(tiny.split(45, 2), 0, MESH)
    assert score(network.variables, data).right == result["test_last"]["right"]
    for to in ("safetensors", "torch"):
        with pytest.raises(errors.ExportError, match="use --to=stablehlo"):
            export.run(folder / "run", to, notify=print)
    export.run(folder / "run", "stablehlo", notify=print)
    train_in(folder, "same", student__init=str(folder / "run"), **fields)
    for name, other in {"off": {}, "static": VAM}.items():
        with pytest.raises(errors.TeacherError, match="gate=dynamic, blocks=4, temp"):
            train_in(folder, name, student__init=str(folder / "run"), **other)
    # As a frozen teacher it keeps its gates, with batch norms folded.
    teacher = {"teacher__init": str(folder / "run"), "method": "kd"}
    train_in(folder, "taught", **teacher)


def test_families_without_gates_reject_vam(tmp_path):
    config = tiny.config(tmp_path, student__name="hme", method="none", **VAM)
    faults = check.problems(config, 1)
    assert any("hme has no convolutions to gate" in fault for fault in faults)
    options = vam.Options("static", 4, 1.0, True, 0.0)
    with pytest.raises(ValueError, match="option of hme is 'vam'"):
        models.create("hme", num_classes=3, vam=options)


def test_only_the_student_has_the_vam_block():
    config = config_lib.default()
    assert "vam" in config.student and "vam" not in config.teacher
    fields = {f.name for f in dataclasses.fields(vam.Options)}
    assert set(config.student.vam) == fields | {"enabled", "gamma"}
    assert setup.vam_options(config) is None


def test_evaluation_variables_have_no_intermediates(tmp_path):
    state, _ = run_steps(make(tmp_path, method="none", **VAM), ROWS[:1])
    assert set(state.variables("student")) == {"params", "batch_stats"}
    assert set(state.collections["batch_stats"]) == {"student", "method"}
