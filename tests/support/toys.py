"""Toy chains, and what methods see of them, for the tests of methods and cuts."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from lakd_jax import distill
from lakd_jax.distill.base import method as method_lib
from lakd_jax.local import cuts
from lakd_jax.models import chain, heads

CLASSES = 3
EXAMPLES = 24  # of the training split that batches are said to be of

LITERAL = {
    "preset": "literal",
    "adapter": "shape",
    "normalise": "none",
    "head_loss": "ce",
    "alpha": 0.3,
    "att_scale": 20.0,
    "beta": 7.0,
}
# Settings of LAKD that change which tensors a loss reads.
READINGS = {
    "default": {},
    "literal": LITERAL,
    "map": {"attention": "map"},
    "logits": {"attention": "logits"},
    "inside": {"attention": "inside"},
    "aux_heads": {"task": "aux_heads"},
    "teacher_suffix": {"task": "teacher_suffix", "head_loss": "ce"},
}


class Unit(nn.Module):
    """3x3 convolution, batch norm, ReLU."""

    features: int
    stride: int

    @nn.compact
    def __call__(self, x, *, train):
        strides = (self.stride, self.stride)
        x = nn.Conv(self.features, (3, 3), strides, use_bias=False, name="conv")(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, name="bn")(x)
        return nn.relu(x), x


class Head(nn.Module):
    """Two heads that agree, for the methods that read both."""

    classes: int

    @nn.compact
    def __call__(self, x, *, train):
        pooled = jnp.mean(x, axis=(1, 2))
        logits = nn.Dense(self.classes, name="dense")(pooled)
        return logits, pooled, (logits, logits)


class Toy(chain.Chain, kw_only=True):
    """Three stages by default; each halves the size but the first."""

    width: int = 4
    growth: int = 1  # channels that each stage adds
    stage_sizes: tuple[int, ...] = (1, 1, 1)
    num_classes: int = CLASSES

    @nn.nowrap
    def make_stem(self, name):
        return Unit(self.width, 1, name=name)

    @nn.nowrap
    def make_block(self, stage, index, name):
        stride = 2 if stage and index == 0 else 1
        return Unit(self.width + self.growth * stage, stride, name=name)

    @nn.nowrap
    def make_head(self, name):
        return Head(self.num_classes, name=name)


class Flat(Toy, kw_only=True):
    """Two stages whose maps have one size, 3x3 of 8x8 images, and are signed."""

    stage_sizes: tuple[int, ...] = (3, 2)

    @nn.nowrap
    def make_stem(self, name):
        return Signed(self.width, 3, name=name)

    @nn.nowrap
    def make_block(self, stage, index, name):
        del stage, index
        return Signed(self.width, 1, name=name)


class Signed(Unit):
    """A `Unit` without a ReLU: what it passes on is its pre-activation."""

    @nn.compact
    def __call__(self, x, *, train):
        _, x = Unit.__call__(self, x, train=train)
        return x, x


def images():
    """Eight random images of 8x8 pixels, and labels."""
    key = jax.random.key(0)
    return jax.random.normal(key, (8, 8, 8, 3)), jnp.arange(8) % CLASSES


def noise(seed, *shape):
    """Standard normal numbers, float32."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def outputs(logits, pooled=None, taps=()):
    """The `Outputs` of a network of which no more than this is known."""
    pooled = np.zeros((len(logits), 1), np.float32) if pooled is None else pooled
    return chain.Outputs(logits, None, (), (), (), pooled, taps)


def signals(student, teacher=None, labels=None, **fields):
    """`Signals` of two `Outputs` in epoch 0; `fields` are the others' that matter."""
    labels = np.arange(len(student.logits)) % CLASSES if labels is None else labels
    given = {"epoch": np.float32(0), "student_joints": (), "teacher_joints": ()}
    return method_lib.Signals(student, teacher, labels, **(given | fields))


def drawn(shapes, seed):
    """Variables of these shapes, by NumPy: XLA compiles random numbers slowly."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            return np.full(leaf.shape, -1, leaf.dtype)
        if leaf.ndim > 1:
            fan = max(math.prod(leaf.shape[:-1]), leaf.shape[-1])
            noise = rng.standard_normal(leaf.shape) * math.sqrt(2 / fan)
            return noise.astype(np.float32)
        kind, name = path[0].key, path[-1].key
        one = name != "bias" if kind == "params" else name == "var"
        return np.full(leaf.shape, one, np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


@functools.cache
def network(model, seed):
    """Weights of a network, always the same of a seed."""
    return drawn(chain.variable_shapes(model, 8), seed)


@dataclasses.dataclass(frozen=True)
class Lesson:
    """A student, its teacher, a method and how they are cut."""

    student: chain.Chain
    teacher: chain.Chain
    teacher_variables: Any
    method: nn.Module
    partition: cuts.Partition
    cut_scale: float | None = 0.0  # None: no function at the joints at all
    module_input: str = "student"

    def see(self, params, stats, x, variables=None, uncut=False):
        """What a method sees: of the student, of the teacher; and new statistics.

        The first two are by the names of `method.Signals`; with `uncut` they have
        `student_uncut`, too.
        """
        variables = variables or self.teacher_variables
        teacher = self.teacher.apply(variables, x, train=False)
        theirs = self._joints(self.teacher, teacher, "teacher_joints")
        replace = None
        if self.module_input == "teacher":
            replace = dict(zip(self.partition.student_joints, theirs, strict=True))

        def run(scale):
            joint = None
            if scale is not None:
                joint = cuts.joint_function(self.partition, scale, replace)
            return self.student.apply(
                {"params": params, "batch_stats": stats},
                x,
                train=True,
                joint=joint,
                mutable=["batch_stats"],
            )

        out, new = run(self.cut_scale)
        whole = run(1.0)[0] if uncut else None
        ours = {
            "student": out,
            "student_joints": self._joints(self.student, out, "student_joints"),
            "student_preacts": self._preacts(self.student, out, "student_joints"),
            "student_uncut": self._joints(self.student, whole, "student_joints"),
        }
        seen = {
            "teacher": teacher,
            "teacher_joints": theirs,
            "teacher_preacts": self._preacts(self.teacher, teacher, "teacher_joints"),
        }
        return ours, seen, new["batch_stats"]

    def _joints(self, model, outputs, joints):
        names = getattr(self.partition, joints) if outputs is not None else ()
        return tuple(chain.feature_at(outputs, model, name) for name in names)

    def _preacts(self, model, outputs, joints):
        names = getattr(self.partition, joints)
        if any(not name.endswith(f"block{model.stage_sizes[0]}") for name in names):
            return ()  # only the ends of stages have them
        at = functools.partial(chain.feature_at, outputs, model, preact=True)
        return tuple(at(name) for name in names)

    def assemble(self, ours, theirs, params, stats, y, epoch=0.0, variables=None):
        """`Signals` of what `see` gives; the networks' ends are run from here on."""
        variables = variables or self.teacher_variables

        def suffix(k, h):
            after = self.partition.teacher_joints[k]
            return self.teacher.apply(variables, h, train=False, after=after).logits

        def student_head(h):
            after = self.partition.student_joints[-1]
            variables = {"params": params, "batch_stats": stats}
            apply = functools.partial(self.student.apply, mutable=["batch_stats"])
            return apply(variables, h, train=True, after=after)[0].logits

        return method_lib.Signals(
            **ours,
            **theirs,
            labels=y,
            epoch=jnp.float32(epoch),
            teacher_suffix=suffix if self.method.needs_suffix else None,
            student_head=student_head,
            teacher_head=lambda h: suffix(-1, h),
            teacher_classifier=lambda: heads.classifier(self.teacher, variables),
            examples=jnp.arange(len(y)),
            count=EXAMPLES,
            key=jax.random.key(3),
        )

    def signals(self, params, stats, x, y):
        """Signals in training mode."""
        ours, theirs, _ = self.see(params, stats, x, uncut=self.method.needs_uncut)
        return self.assemble(ours, theirs, params, stats, y)

    def assess(self, own, stats, signals):
        """The K module losses, and the new statistics of the method."""
        variables = {"params": own, "batch_stats": stats}
        losses, mutated = self.method.apply(
            variables, signals, train=True, mutable=["batch_stats"]
        )
        return losses, mutated.get("batch_stats", {})

    def init(self, x, y):
        """`{"student": ..., "method": ...}` parameters and batch statistics."""
        student = network(self.student, 1)
        params, stats = student["params"], student["batch_stats"]
        signals = self.signals(params, stats, x, y)
        ours = self.method.init(jax.random.key(1), signals, train=True)
        return (
            {"student": params, "method": ours.get("params", {})},
            {"student": stats, "method": ours.get("batch_stats", {})},
        )

    def labels(self, tree):
        return cuts.label_tree(tree, self.partition, self.student)


def lesson(
    options,
    *,
    name="lakd",
    student=None,
    teacher=None,
    granularity="stage",
    cut_points=(),
    **fields,
):
    """A `Lesson` of toys (4 channels from 6) with a method made from `options`."""
    student = student or Toy()
    teacher = teacher or Toy(width=6)
    return Lesson(
        student=student,
        teacher=teacher,
        teacher_variables=network(teacher, 7),
        method=distill.create(name, options),
        partition=cuts.modules(student, teacher, granularity, cut_points),
        **fields,
    )


def by_module(tree, labels, count):
    """Per module the list of its leaves."""
    leaves, owners = jax.tree.leaves(tree), jax.tree.leaves(labels)
    return [
        [x for x, o in zip(leaves, owners, strict=True) if o == k] for k in range(count)
    ]
