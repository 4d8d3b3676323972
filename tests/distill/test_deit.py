"""Token distillation against the public code's numbers."""

import json

import golden_weights
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import toys

from lakd_jax import distill
from lakd_jax.config import check
from lakd_jax.distill import deit, kd

FILE = golden_weights.FOLDER / "recipes/deit_loss.json"
CASES = json.loads(FILE.read_text())["cases"]


@pytest.fixture(scope="module")
def golden():
    with np.load(FILE.with_suffix(".npz")) as file:
        return dict(file)


@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients_are_the_public_codes(name, golden):
    case, labels = CASES[name], golden["labels"]
    kind = {"smoothed": {"label_smoothing": 0.1}}.get(case["base"], {})
    if case["base"] == "soft_targets":
        kind = {"soft_labels": golden["soft_targets"]}
    alpha = case["alpha"] if case["type"] != "none" else 0.0
    given = {"ce_weight": 1 - alpha, "weight": alpha}
    given |= {"hard": case["type"] == "hard", "temperature": case["tau"]}
    method = distill.create("deit", given)

    def loss(of_class, of_token):
        student = toys.outputs((of_class + of_token) / 2)
        student = student.replace(head_logits=(of_class, of_token))
        teacher = toys.outputs(golden["teacher"])
        signals = toys.signals(student, teacher, labels, **kind)
        (found,) = method.apply({}, signals, train=True)
        return found.total()

    both = golden["logits"], golden["logits_dist"]
    value, grads = jax.value_and_grad(loss, (0, 1))(*both)
    assert golden_weights.distance(value, golden[name]) < 1e-6
    for found, key in zip(grads, ("grad_logits", "grad_logits_dist"), strict=True):
        expected = golden[f"{name}/{key}"]
        if np.any(expected):
            assert golden_weights.distance(found, expected) < 1e-5
        else:
            assert not np.any(found)


def test_the_soft_loss_is_a_part_of_kds(golden):
    logits = golden["logits_dist"], golden["teacher"]
    soft = deit.token_loss(*map(jnp.asarray, logits), hard=False, temperature=3.0)
    np.testing.assert_allclose(soft, kd.kd_loss(*logits, 3.0) / 10, rtol=1e-6)


def test_students_with_one_head_are_refused(tmp_path):
    fields = {"method": "deit", "student__name": "vit_tiny", "student__patch": 4}
    faults = check.problems(tiny.config(tmp_path, **fields), 1)
    assert any(
        "a distillation token, which vit_tiny does not have" in f for f in faults
    )
    fields["student__name"] = "deit_tiny_distilled"
    assert not check.problems(tiny.config(tmp_path, **fields), 1)
