"""Tests training, saving and exporting students with virtual attention."""

import dataclasses
import functools

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import test_train_step as steps
import tiny

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
from lakd_jax.runtime import interrupt
from lakd_jax.training import optim, phase, setup
from lakd_jax.training import state as state_lib
from lakd_jax.training import vam as vam_lib

LONG = pytest.mark.long
VAM = {"student__vam__enabled": True}
ROWS = steps.rows(5)
# The first stage has two gates, the others have one.
make = functools.partial(
    steps.small, devices=1, network=functools.partial(tiny.SMALL, stage_sizes=(2, 1, 1))
)


def flat(tree):
    return flax.traverse_util.flatten_dict(dict(tree))


def gates_of(params):
    return {path: x for path, x in flat(params).items() if vam.is_gate(path)}


def freeze(optimizer):
    """Returns `optimizer` with zero updates for gates, which are not decayed either."""
    no_gates = optax.stateless(lambda updates, params: optim.decayed(updates))
    return optax.chain(optimizer, no_gates)


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
    after = steps.train((spec, first, teacher, data), ROWS)
    expected = steps.train(plain, ROWS)
    losses = map(steps.losses_of, (after, expected))
    np.testing.assert_allclose(*losses, rtol=1e-5)
    (state, _), (plain_state, _) = after[-1], expected[-1]
    ungated = folding.without_gates(state.params["student"])
    steps.assert_close(ungated, plain_state.params["student"], atol=1e-5)
    assert not any(np.any(g) for g in gates_of(state.params).values())


@pytest.mark.parametrize(
    ("method", "gate"),
    [
        ("none", "static"),
        *(
            pytest.param(*case, marks=LONG)
            for case in (("lakd", "static"), ("none", "dynamic"), ("lakd", "dynamic"))
        ),
    ],
)
def test_gates_learn_and_the_entropy_is_part_of_the_loss(method, gate, tmp_path):
    """At V = 0 attention is uniform, so that H is 1 and its gradient 0."""
    fields = {"student__vam__gate": gate, "student__vam__gamma": 0.5, **VAM}
    # Fast, to see an effect in five steps.
    fields |= {"optim__lr": 1.0, "optim__warmup_epochs": 0.0}
    (without,) = steps.losses_of(steps.train(make(tmp_path, method=method), ROWS[:1]))
    after = steps.train(make(tmp_path, method=method, **fields), ROWS)
    (_, first), (state, last) = after[0], after[-1]
    np.testing.assert_allclose(first["loss"], without + 0.5, rtol=1e-5)
    assert all(np.any(g) for g in gates_of(state.params).values())
    name = "module3/vam_entropy" if method == "lakd" else "module1/vam_entropy"
    assert last[name] < first[name] == pytest.approx(1.0, rel=1e-5)


@LONG
def test_each_module_has_the_entropy_of_its_own_layers(tmp_path):
    fields = {"student__vam__gamma": 0.3, "student__vam__init_std": 1.0, **VAM}
    setting = make(tmp_path, method="lakd", **fields)
    ((_, values),) = steps.train(setting, ROWS[:1])
    student = gates_of(setting[1].params["student"])
    for k, count in ((1, 2), (2, 1), (3, 1)):
        gates = [gate for path, gate in student.items() if path[0] == f"stage{k}"]
        assert len(gates) == count
        entropy = values[f"module{k}/vam_entropy"]
        np.testing.assert_allclose(entropy, entropy_of(gates), rtol=1e-5)
    head = 0.1 * values["module3/head_ce"] + 0.9 * values["module3/head_kd"]
    terms = ("feature", "attention")
    maps = [values[f"module{k}/{t}"] for k in (1, 2, 3) for t in terms]
    total = head + sum(maps) + 0.3 * entropy_of(list(student.values()))
    np.testing.assert_allclose(values["loss"], total, rtol=1e-5)


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
    """Trains for one epoch with `fields`; returns (typed config, result, log lines)."""
    lines = []
    fields = {"method": "none", "epochs": 1, "optim__warmup_epochs": 0.0} | fields
    config = tiny.small(folder, **fields)
    result = command.run(
        config, folder / name, guard=interrupt.Guard(), notify=lines.append
    )
    return resolved.resolve(config), result, lines


def loaded(path):
    options = {"dtype": "float32", "num_classes": 3}
    return weights.load("teacher", tiny.NETWORK, str(path), **options)


def environment_of(config):
    return single.environment(config, interrupt.Guard(), print)


def last_variables(folder, config, run_name):
    """Returns the student and its variables in the last checkpoint of a run."""
    environment = environment_of(config)
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
    model, variables = last_variables(folder, config, "run")
    assert gates_of(variables["params"])
    x = setup.pixels(config)(jnp.asarray(tiny.split(45, 2).images))
    exported, trained = (
        jax.jit(functools.partial(m.apply, train=False))(v, x).logits
        for m, v in ((network.model, network.variables), (model, variables))
    )
    np.testing.assert_allclose(exported, trained, atol=1e-5)
    for to in ("safetensors", "torch", "stablehlo"):
        export.run(folder / "run", to, notify=print)
    # The report also reads checkpoints as the plain network.
    past = list(subject.past(subject.load(folder / "run", interrupt.Guard(), print)))
    steps.assert_close(past[-1][1], network.variables, atol=1e-6)
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
    environment = environment_of(config)
    score = single.evaluator(config, network, setup.pixels(config), environment)
    data = device.device_data(tiny.split(45, 2), 0, environment.mesh)
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
    ((state, _),) = steps.train(make(tmp_path, method="none", **VAM), ROWS[:1])
    assert set(state.variables("student")) == {"params", "batch_stats"}
    assert set(state.collections["batch_stats"]) == {"student", "method"}
