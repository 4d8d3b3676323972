"""Reports the attention between student taps and teacher taps (AFD and RTK)."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lakd_jax import distill
from lakd_jax.distill.base import method as method_lib
from lakd_jax.explain import subject
from lakd_jax.report import grids, page
from lakd_jax.store import checkpoint, workdir

METHODS = ("afd", "rtk")
IMAGES = 256  # test images


def section(s: subject.Subject, scratch: Path) -> list[str]:
    """Returns the parts of the report's section on attention between taps.

    Empty if no checkpoint is left, since the exported student has no attention.
    """
    found = over_training(s)
    if not found:
        return []
    panels = [(f"after epoch {epoch:g}", a.mean(0)) for epoch, a in found]
    _, student_taps, teacher_taps = found[0][1].shape
    path = scratch / "taps.png"
    grids.matrices(
        path,
        panels,
        rows=[str(i) for i in range(1, student_taps + 1)],
        columns=[str(i) for i in range(1, teacher_taps + 1)],
        row_title="student tap",
        column_title="teacher tap",
    )
    over = "student taps" if s.config.method == "afd" else "teacher taps"
    words = (
        f"Mean attention over up to {IMAGES} test images, for every remaining "
        f"checkpoint. Under {s.config.method.upper()}, weights sum to 1 over {over}. "
        "Entropy is that of these weights, relative to its maximum: 1 if all taps "
        "have equal weight."
    )
    rows = [[f"{epoch:g}", f"{_entropy(s, a):.4f}"] for epoch, a in found]
    description = "Matrices of attention between student taps and teacher taps."
    parts = [page.picture(path, description), page.table(["epoch", "entropy"], rows)]
    parts.append(page.text(words))
    return parts + (_chosen(found[-1][1]) if s.config.method == "rtk" else [])


def _chosen(attention: np.ndarray) -> list[str]:
    """Returns how often each teacher tap is a representative, as parts of the page."""
    shares = (attention > 0).mean((0, 1))
    rows = [[f"teacher {i}", f"{100 * x:.1f} %"] for i, x in enumerate(shares, 1)]
    words = (
        "How often each teacher tap passes the filter, over images and student taps, "
        "at the last checkpoint. RTK is our interpretation of a method whose details "
        "are not public."
    )
    return [page.table(["tap", "representative"], rows), page.text(words)]


def _entropy(s: subject.Subject, attention: np.ndarray) -> float:
    axis = 1 if s.config.method == "afd" else 2
    logs = np.log(attention, out=np.zeros_like(attention), where=attention > 0)
    largest = np.log(attention.shape[axis])
    value = -(attention * logs).sum(axis).mean()
    return float(value / largest) if largest else 0.0


def over_training(s: subject.Subject) -> list[tuple[float, np.ndarray]]:
    """Returns (epoch, attention (n, student taps, teacher taps)) per checkpoint."""
    method = distill.create(s.config.method, s.config.method_options(s.config.method))
    test = s.environment.dataset.preview.test
    images, labels = (jnp.asarray(x[:IMAGES]) for x in (test.images, test.labels))
    assert s.teacher is not None
    teacher, pixels = s.teacher.network, s.teacher.pixels

    @jax.jit
    def attend(student: Any, method_variables: Any, frozen: Any) -> jax.Array:
        signals = method_lib.Signals(
            student=s.student.model.apply(student, s.pixels(images), train=False),
            teacher=teacher.model.apply(frozen, pixels(images), train=False),
            labels=labels,
            epoch=jnp.float32(0),
            student_joints=(),
            teacher_joints=(),
        )
        _, state = method.apply(
            method_variables, signals, train=False, mutable=["intermediates"]
        )
        (found,) = jax.tree.leaves(state["intermediates"])
        return found

    out, folder = [], s.directory / workdir.CHECKPOINTS
    for step in checkpoint.list_steps(folder):
        _, arrays, _ = checkpoint.read_arrays(folder, step)
        averaged = s.config.optim.ema_used
        parts = [
            subject.part(arrays, name, averaged=averaged)
            for name in ("student", "method")
        ]
        found = np.asarray(attend(*parts, teacher.variables))
        if s.config.method == "afd":  # (n, teacher, student)
            found = found.swapaxes(1, 2)
        out.append((step / s.steps_per_epoch, found))
    return out
