"""Contrastive representation distillation: golden values, memories, negatives."""

import functools

import golden_weights
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from lakd_jax.distill import crd

INPUTS = golden_weights.arrays("losses_inputs")
LOSSES = golden_weights.arrays("losses")
COUNT = 50  # examples of the golden split
MEMORIES = {
    "student_memory": INPUTS["crd_memory_v1"],
    "teacher_memory": INPUTS["crd_memory_v2"],
}


def embedding(side, width):
    kernel, bias = (
        golden_weights.tensor(f"crd.embed_{side}.linear.{kind}", shape)
        for kind, shape in (("weight", (128, width)), ("bias", (128,)))
    )
    return {"dense": {"kernel": kernel.T, "bias": bias}}


PARAMS = {"head": {"student": embedding("s", 64), "teacher": embedding("t", 96)}}
STATE = {
    "head": {
        **MEMORIES,
        "student_constant": np.zeros((), np.float32),
        "teacher_constant": np.zeros((), np.float32),
        "classes": np.full((COUNT,), -1, np.int32),
    }
}
POOLED = INPUTS["pooled_student"], INPUTS["pooled_teacher"]


def signals(student, teacher, key, rows):
    logits = np.zeros((8, 3), np.float32)
    return toys.signals(
        toys.outputs(logits, student),
        toys.outputs(logits, teacher),
        INPUTS["labels"].astype(np.int32) % 3,
        examples=rows,
        count=COUNT,
        key=key,
    )


METHOD = crd.CRD(
    ce_weight=1.0,
    weight=0.8,
    warmup_epochs=0.0,
    dim=128,
    negatives=16,
    temperature=0.07,
    momentum=0.5,
)


def losses(student, teacher, params, state, seen, train):
    variables = {"params": params, "batch_stats": state}
    seen = signals(student, teacher, *seen)
    losses, new = METHOD.apply(variables, seen, train=train, mutable=["batch_stats"])
    return losses[0].terms["crd"], new["batch_stats"]


_losses = jax.jit(losses, static_argnums=5)


def run(student, teacher, state=STATE, params=PARAMS, key=0, rows=None, train=True):
    """(value, state)"""
    rows = INPUTS["crd_index"] if rows is None else rows
    seen = jax.random.key(key), rows.astype(np.int32)
    return _losses(student, teacher, params, state, seen, train)


@pytest.fixture
def published_draw(monkeypatch):
    """The negatives of the golden run."""
    picked = jnp.asarray(INPUTS["crd_contrast_index"][:, 1:], jnp.int32)
    monkeypatch.setattr(crd, "others", lambda *_: picked)


def test_loss_gradient_and_memories_are_the_public_ones(published_draw):
    seen = jax.random.key(0), INPUTS["crd_index"].astype(np.int32)
    run = functools.partial(losses, seen=seen, train=True)  # with that draw
    both = jax.jit(jax.value_and_grad(run, has_aux=True))
    (value, state), grad = both(*POOLED, PARAMS, STATE)
    own, distance = state["head"], golden_weights.distance
    constants = np.stack([own["teacher_constant"], own["student_constant"]])
    assert value.dtype == jnp.float32 and value.shape == ()
    assert distance(value, LOSSES["crd"]) < 1e-4
    assert distance(grad, LOSSES["crd/grad_s"]) < 1e-4
    assert distance(constants, LOSSES["crd/Z"]) < 1e-4
    assert distance(own["student_memory"], LOSSES["crd/new_memory_v1"]) < 1e-4
    assert distance(own["teacher_memory"], LOSSES["crd/new_memory_v2"]) < 1e-4


def test_loss_by_hand():
    """Equation 17 by loops, with p = score and noise K / N."""
    scores = np.random.default_rng(0).uniform(0.1, 2, (3, 5))
    wanted = 0.0
    for row in scores:
        for i, p in enumerate(row):
            h = p / (p + 4 / 7)
            wanted -= np.log(h if i == 0 else 1 - h) / 3
    got = jax.jit(crd.nce_loss)(scores.astype(np.float32), 7)
    np.testing.assert_allclose(got, wanted, rtol=1e-5)


def test_negatives_are_uniform_over_the_other_classes():
    """A hundred times more of them than there are examples."""
    bank = np.array([2, 0, 1, 0, 2, 1, 1, -1, 2, 0], np.int32)
    labels = np.array([0, 1, 2], np.int32)
    draw = jax.jit(crd.others, static_argnums=3)
    drawn = np.asarray(draw(jax.random.key(0), bank, labels, 70_000))
    for row, label in zip(drawn, labels, strict=True):
        counts = np.bincount(row, minlength=len(bank))
        allowed = bank != label
        np.testing.assert_array_equal(counts > 0, allowed)
        np.testing.assert_allclose(counts[allowed], 10_000, rtol=0.05)


def test_classes_are_learnt_as_examples_are_seen():
    _, state = run(*POOLED)
    wanted = np.full(COUNT, -1)
    wanted[INPUTS["crd_index"]] = INPUTS["labels"] % 3
    np.testing.assert_array_equal(state["head"]["classes"], wanted)


def test_constants_stay_after_the_first_batch_and_nothing_moves_in_evaluation():
    _, first = run(*POOLED)
    _, second = run(POOLED[0][::-1], POOLED[1], first, key=1)
    for name in ("student_constant", "teacher_constant"):
        assert first["head"][name] > 0
        assert first["head"][name] == second["head"][name]
    _, still = run(*POOLED, second, train=False)
    jax.tree.map(np.testing.assert_array_equal, still, second)
    one, two = (np.asarray(x["head"]["student_memory"]) for x in (first, second))
    assert not np.array_equal(one, two)


def test_memories_of_others_stay():
    _, state = run(*POOLED)
    others = np.setdiff1d(np.arange(COUNT), INPUTS["crd_index"])
    for name, before in MEMORIES.items():
        after = np.asarray(state["head"][name])
        np.testing.assert_array_equal(after[others], before[others])
        norms = np.linalg.norm(after[INPUTS["crd_index"]], axis=1)
        np.testing.assert_allclose(norms, 1.0, rtol=1e-5)


def test_embeddings_that_agree_with_the_memories_cost_less():
    """Least where a student has the example's memory and no other example has it."""
    own = np.eye(8, 128, dtype=np.float32)
    rest = -np.ones((COUNT - 8, 128), np.float32) / np.float32(128**0.5)
    memory = np.concatenate([own, rest])
    state = {"head": {**STATE["head"], "student_memory": memory}}
    state["head"]["teacher_memory"] = memory
    identity = {"dense": {"kernel": np.eye(128), "bias": np.zeros(128)}}
    params = {"head": {"student": identity, "teacher": identity}}
    rows = np.arange(8)
    good, _ = run(own, own, state, params, rows=rows)
    bad, _ = run(own[::-1], own, state, params, rows=rows)
    assert 0 <= good < bad


def test_first_memories_have_lengths_near_one():
    @jax.jit
    def start(key):
        rows = jnp.asarray(INPUTS["crd_index"], jnp.int32)
        seen = signals(*map(jnp.asarray, POOLED), jax.random.key(0), rows)
        return METHOD.init(key, seen, train=True)["batch_stats"]["head"]

    own = jax.device_get(start(jax.random.key(0)))
    for name in MEMORIES:
        lengths = np.linalg.norm(own[name], axis=1)
        np.testing.assert_allclose(np.mean(lengths**2), 1.0, rtol=0.05)
    assert not np.array_equal(own["student_memory"], own["teacher_memory"])
    assert own["student_constant"] == 0 and np.all(own["classes"] == -1)
