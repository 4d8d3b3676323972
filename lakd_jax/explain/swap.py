"""Measures what a module contributes: accuracy with other features in place of its own.

At the end of module k the teacher's features, mapped to the student's by least squares
(a 1x1 convolution with bias, fitted on training images), take the place of the
student's, and the rest of the student runs on. Where accuracy rises, the student loses
in this module or before it; where it falls, the modules above use what the mapped
features lack. With the means of the student's own features over positions the modules
above know which channels respond, but not where. (Means over images as well would leave
chance alone: all that the modules above know comes through this end.)
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lakd_jax.distill.base import adapter
from lakd_jax.explain import subject
from lakd_jax.local import cuts
from lakd_jax.models import chain

FIT, TEST = 256, 512  # training images of the fit, test images of the accuracies
_ROWS = 20_000  # positions of the fit, at most


@dataclasses.dataclass(frozen=True)
class Swap:
    """What one module contributes, on test images.

    Attributes:
        name, joint: of the module, and the end at which its features are exchanged.
        explained: the share of the variance of the student's features that the mapped
            ones of the teacher have; negative where they are worse than the mean.
        teacher: accuracy with the mapped features of the teacher.
        mean: accuracy with each channel's mean over the positions of the image.
        plain: accuracy with the student's own features.
    """

    name: str
    joint: str
    explained: float
    teacher: float
    mean: float
    plain: float


def measure(s: subject.Subject, parts: cuts.Partition) -> list[Swap]:
    """Returns what each module of `parts` contributes to a run with a teacher.

    Networks whose units pass on more than a map cannot be run on from one.
    """
    assert s.teacher is not None
    preview = s.environment.dataset.preview
    rng = np.random.default_rng(0)
    splits = [(preview.train, FIT), (preview.test, TEST)]
    chosen = [(split, rng.permutation(len(split))[:n]) for split, n in splits]
    images = [split.images[rows] for split, rows in chosen]
    test, rows = chosen[1]
    labels = test.labels[rows]
    ours = [_features(s, True, parts.student_joints, x) for x in images]
    theirs = [_features(s, False, parts.teacher_joints, x)[1] for x in images]
    plain = _accuracy(ours[1][0], labels)
    found = []
    for k, (name, joint) in enumerate(
        zip(parts.names, parts.student_joints, strict=True)
    ):
        (fit_u, fit_z), (u, z) = (
            (own[1][k], _sized(other[k], own[1][k]))
            for own, other in zip(ours, theirs, strict=True)
        )
        mapped = predicted(least_squares(fit_z, fit_u), z)
        mean = np.broadcast_to(u.mean((1, 2), keepdims=True), u.shape)
        teacher, means = (
            _accuracy(answers, labels) for answers in resumed(s, joint, (mapped, mean))
        )
        found.append(Swap(name, joint, explained(mapped, u), teacher, means, plain))
    return found


def least_squares(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Returns the matrix (C + 1, D) that maps x (N, H, W, C) to y (N, H, W, D) best.

    Its last row is the bias. Of many positions a fixed random part is taken.
    """
    x, y = (v.reshape(-1, v.shape[-1]).astype(np.float64) for v in (x, y))
    rows = np.random.default_rng(0).permutation(len(x))[:_ROWS]
    x = np.concatenate([x[rows], np.ones((len(rows), 1))], 1)
    return np.linalg.lstsq(x, y[rows], rcond=None)[0]


def predicted(matrix: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Returns x (N, H, W, C) mapped by what `least_squares` returns, float32."""
    mapped = x.astype(np.float64) @ matrix[:-1] + matrix[-1].reshape(1, 1, 1, -1)
    return mapped.astype(np.float32)


def explained(found: np.ndarray, wanted: np.ndarray) -> float:
    """Returns the share of the variance of `wanted` (N, H, W, C) that `found` has."""
    wanted = wanted.astype(np.float64)
    rest = np.sum((wanted - found) ** 2)
    total = np.sum((wanted - wanted.mean((0, 1, 2), keepdims=True)) ** 2)
    return float(1 - rest / total) if total else 0.0


def _features(
    s: subject.Subject, student: bool, joints: tuple[str, ...], images: np.ndarray
) -> tuple[np.ndarray, list[np.ndarray]]:
    network, pixels = s.student, s.pixels
    if not student:
        assert s.teacher is not None
        network, pixels = s.teacher.network, s.teacher.pixels
    args = (network.model, network.variables, pixels, images, joints)
    logits, features = subject.observe(*args)
    return logits, [f.astype(np.float32) for f in features]


def _sized(z: np.ndarray, u: np.ndarray) -> np.ndarray:
    """Returns z (N, H', W', C) at the height and width of u."""
    if z.shape[1:3] == u.shape[1:3]:
        return z
    return np.asarray(adapter.resize_like(jnp.asarray(z), jnp.asarray(u)))


def resumed(
    s: subject.Subject, joint: str, features: tuple[np.ndarray, ...]
) -> list[np.ndarray]:
    """Returns the student's logits for each of several features (N, H, W, C) there."""
    model, variables, dtype = s.student.model, s.student.variables, s.pixels.dtype

    @jax.jit
    def run(variables: Any, h: jax.Array) -> jax.Array:
        outputs: Any = model.apply(variables, h, train=False, after=joint)
        return outputs.logits

    def logits(h: np.ndarray) -> np.ndarray:
        size = min(subject.BATCH, len(h))
        starts = range(0, len(h), size)
        padded = np.concatenate([h, h[: -len(h) % size]])
        parts = [
            run(variables, jnp.asarray(padded[i : i + size], dtype)) for i in starts
        ]
        return np.concatenate(jax.device_get(parts))[: len(h)]

    return [logits(h) for h in features]


def _accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    return float(np.mean(logits.argmax(-1) == labels))


def possible(student: chain.Chain) -> bool:
    """Returns whether the student can be run on from a feature map."""
    return student.RESUMABLE and not student.WHOLE
