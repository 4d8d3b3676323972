"""Our losses beside torchdistill's classes, where that library is installed.

pip install torch && pip install --no-deps torchdistill
"""

import jax
import numpy as np
import pytest

from lakd_jax.distill import at, dist, kd, pkt, review, rkd

torch = pytest.importorskip("torch")
theirs = pytest.importorskip("torchdistill.losses.mid_level")

T = 3.0
PAIR = {who: {"io": "output", "path": "x"} for who in ("student", "teacher")}
PATHS = {
    f"{who}_module_{what}": value
    for who in ("student", "teacher")
    for what, value in (("path", "x"), ("io", "output"))
}
OUTPUTS = {"student_output_path": "x", "teacher_output_path": "x"}


def drawn(*shape):
    rng = np.random.default_rng(len(shape))
    return [rng.standard_normal(shape).astype(np.float32) for _ in range(2)]


LOGITS, POOLED, MAPS = drawn(8, 10), drawn(8, 24), drawn(8, 8, 8, 6)
# Name -> their class, what it is made with, our loss, student and teacher.
CASES = {
    # Without labels theirs leaves out T^2.
    "kd": (
        theirs.KDLoss,
        {**PATHS, "temperature": T, "alpha": None, "beta": 1.0},
        lambda s, t: kd.kd_loss(s, t, T) / T**2,
        LOGITS,
    ),
    "standardised": (
        theirs.LogitStdKDLoss,
        {**PATHS, "temperature": T, "alpha": None, "beta": 1.0},
        lambda s, t: kd.kd_loss(kd.standardised(s), kd.standardised(t), T) / T**2,
        LOGITS,
    ),
    "dist": (
        theirs.DISTLoss,
        {**PATHS, "beta": 2.0, "gamma": 0.5, "tau": T},
        lambda s, t: dist.dist_loss(s, t, 2.0, 0.5, T),
        LOGITS,
    ),
    "pkt": (theirs.PKTLoss, PATHS, pkt.pkt_loss, POOLED),
    "rkd": (
        theirs.RKDLoss,
        {**OUTPUTS, "dist_factor": 25.0, "angle_factor": 50.0, "reduction": "mean"},
        lambda s, t: rkd.rkd_loss(s, t, 25.0, 50.0),
        POOLED,
    ),
    "at": (
        theirs.ATLoss,
        {"at_pairs": {"one": PAIR}},
        lambda s, t: at.at_loss([s], [t], 2.0),
        MAPS,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_torchdistills(name):
    make, options, ours, (student, teacher) = CASES[name]
    value, grad = jax.jit(jax.value_and_grad(ours))(student, teacher)
    inputs = [
        torch.tensor(x.transpose(0, 3, 1, 2) if x.ndim == 4 else x)
        for x in (student, teacher)
    ]
    inputs[0].requires_grad_()
    loss = make(**options)(*({"x": {"output": x}} for x in inputs))
    loss.backward()
    other = inputs[0].grad.numpy()
    other = other.transpose(0, 2, 3, 1) if other.ndim == 4 else other
    np.testing.assert_allclose(value, loss.item(), rtol=1e-4)
    np.testing.assert_allclose(grad, other, rtol=1e-3, atol=1e-4 * np.abs(other).max())


def test_review_is_torchdistills():
    student, teacher = MAPS
    value = review.hcl_loss([student], [teacher])
    to = lambda x: torch.tensor(x.transpose(0, 3, 1, 2))  # noqa: E731
    loss = theirs.HierarchicalContextLoss(**PATHS)
    other = loss({"x": {"output": (to(student), None)}}, {"x": {"output": to(teacher)}})
    np.testing.assert_allclose(value, other.item(), rtol=1e-5)
