"""Tests the mask of LAKD (NDAM) on the networks: which pixels do answers need?

Deletion (Petsiuk et al., "RISE", arXiv 1806.07421): pixels are replaced by the mean
colour, those with the largest mask first, and the probability of the class that the
network answers for the whole image is followed. Insertion begins with the mean colour
and brings pixels back in the same order. If the mask names what an answer rests on,
deletion falls and insertion rises faster than in a random order. Random orders are
those of random masks of the same size as a module's, enlarged like it: patches that are
deleted at once weigh less than as many single pixels.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lakd_jax.distill import lakd
from lakd_jax.explain import subject
from lakd_jax.local import cuts
from lakd_jax.training import spec as spec_lib

IMAGES = 96  # of the test split
SHARES = (0.0, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 1.0)  # of the pixels that are deleted
KINDS = ("deletion", "insertion")


@dataclasses.dataclass(frozen=True)
class Curve:
    """The mean probability of a network's own answer, by the share of the pixels.

    `network` is "student" or "teacher", `kind` one of `KINDS`, and `values` has one
    for each of `SHARES`: of the pixels that are deleted, or inserted.
    """

    network: str
    module: str
    kind: str
    random: bool
    values: tuple[float, ...]

    @property
    def area(self) -> float:
        """Returns the area under the curve, between 0 and 1."""
        heights = (np.array(self.values[:-1]) + self.values[1:]) / 2
        return float(np.diff(SHARES) @ heights)


def measure(s: subject.Subject, parts: cuts.Partition) -> list[Curve]:
    """Returns the curves of both networks, for every module's mask of the teacher."""
    assert s.teacher is not None
    preview = s.environment.dataset.preview
    rng = np.random.default_rng(0)
    images = preview.test.images[rng.permutation(len(preview.test))[:IMAGES]]
    teacher = s.teacher.network
    _, features = subject.observe(
        teacher.model, teacher.variables, s.teacher.pixels, images, parts.teacher_joints
    )
    options = lakd.Options(**s.config.method_options("lakd"))
    networks = {
        "student": _Answers(s.student.model, s.student.variables, s.pixels, images),
        "teacher": _Answers(teacher.model, teacher.variables, s.teacher.pixels, images),
    }
    colour = 255 * np.asarray(s.config.data.mean)
    curves = []
    for name, z in zip(parts.names, features, strict=True):
        masks = np.asarray(options.mask(jnp.asarray(z)))
        for random in (False, True):
            values = rng.random(masks.shape, np.float32) if random else masks
            places = ranks(enlarged(values, images.shape[1:3]), rng)
            for kind in KINDS:
                changed = [changed_at(images, places, x, kind, colour) for x in SHARES]
                curves += [
                    Curve(network, name, kind, random, tuple(map(answers, changed)))
                    for network, answers in networks.items()
                ]
    return curves


def enlarged(masks: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """Returns masks (N, h, w, 1) as (N, H, W), bilinearly."""
    shape = (len(masks), *size, 1)
    return np.asarray(jax.image.resize(masks.astype(np.float32), shape, "linear"))[
        ..., 0
    ]


def ranks(masks: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Returns every pixel's place (N, H, W) in its image's order, from 0 to below 1.

    The largest mask comes first; equal ones come in a random order.
    """
    flat = masks.reshape(len(masks), -1)
    order = np.lexsort((rng.random(flat.shape), -flat))
    places = np.empty(flat.shape)
    np.put_along_axis(places, order, np.arange(flat.shape[1])[None] / flat.shape[1], 1)
    return places.reshape(masks.shape)


def changed_at(
    images: np.ndarray, places: np.ndarray, share: float, kind: str, colour: np.ndarray
) -> np.ndarray:
    """Returns images (N, H, W, 3) uint8, a share of the pixels deleted, or alone."""
    first = places < share
    kept = ~first if kind == "deletion" else first
    return np.where(kept[..., None], images, colour.round()).astype(np.uint8)


class _Answers:
    """A network's mean probability of what it answers for the whole images."""

    def __init__(
        self, model: Any, variables: Any, pixels: spec_lib.Pixels, images: np.ndarray
    ):
        @jax.jit
        def run(variables: Any, images: jax.Array) -> jax.Array:
            outputs: Any = model.apply(variables, pixels(images), train=False)
            return jax.nn.softmax(outputs.logits)

        self._run = lambda images: np.asarray(run(variables, images))
        self._classes = self._run(images).argmax(-1)

    def __call__(self, images: np.ndarray) -> float:
        """Returns it for changed images."""
        shares = self._run(images)
        return float(shares[np.arange(len(shares)), self._classes].mean())
