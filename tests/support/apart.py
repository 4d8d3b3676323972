"""A student's pass and a method's losses as two programs, joined by the chain rule.

XLA needs longer for the networks than for most losses. Compiled apart, the networks
serve every method and every option, and a method is one small program.
"""

import functools
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import toys

from lakd_jax.distill.base import method


@functools.cache
def batch():
    """Images and labels of all that is here."""
    return tuple(np.asarray(x) for x in toys.images())


def zeros(tree):
    return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), tree)


def add(*trees):
    return jax.tree.map(lambda *x: sum(map(np.asarray, x)), *trees)


def dot(*trees):
    """The inner product of two trees, in float64."""
    leaves = zip(*map(jax.tree.leaves, trees), strict=True)
    return sum(np.vdot(np.float64(a), np.float64(b)) for a, b in leaves)


def moved(tree, way, length):
    return jax.tree.map(lambda x, w: np.float32(x - length * np.asarray(w)), tree, way)


def nonzero(tree):
    return any(np.any(np.asarray(x)) for x in jax.tree.leaves(tree))


def finite(tree):
    return all(np.all(np.isfinite(x)) for x in jax.tree.leaves(tree))


class Passes:
    """What a lesson's method sees, and how gradients go back from there.

    Attributes:
      lesson: the networks and their cuts; its method is not used.
      params, stats: of the student, at first.
    """

    def __init__(self, lesson, uncut=False):
        self.lesson = lesson
        student = toys.network(lesson.student, 1)
        self.params, self.stats = student["params"], student["batch_stats"]

        # Arguments: of constants XLA would work out the passes while it compiles.
        self._given = (batch()[0], lesson.teacher_variables)
        see = functools.partial(lesson.see, uncut=uncut)

        @jax.jit
        def run(params, stats, given, cotangents):
            def ours(params):
                ours, *rest = see(params, stats, *given)
                return ours, rest

            ours, pull, (theirs, new) = jax.vjp(ours, params, has_aux=True)
            return ours, theirs, new, pull(cotangents)[0]

        self._run = run
        shapes = jax.eval_shape(see, self.params, self.stats, *self._given)
        self._none = zeros(shapes[0])

    def see(self, params=None, stats=None):
        """What the student and the teacher show, and the student's new statistics."""
        params, stats = params or self.params, stats or self.stats
        return self._run(params, stats, self._given, self._none)[:3]

    def pull(self, cotangents, params=None, stats=None):
        """The gradient to the student's parameters of one to what it shows.

        Entries that `cotangents` lacks, as `student_uncut`, count as zeros.
        """
        params, stats = params or self.params, stats or self.stats
        whole = {name: cotangents.get(name, none) for name, none in self._none.items()}
        return self._run(params, stats, self._given, whole)[3]


@functools.cache
def passes(uncut=False, **fields):
    """The passes of toys in stages; `fields` as `toys.lesson` takes them."""
    return Passes(toys.lesson({}, name="none", **fields), uncut)


@flax.struct.dataclass
class Read:
    """All that a method's losses are functions of, or the gradient to it."""

    own: Any  # the method's parameters
    ours: Any  # what the student shows
    head: Any  # the student's parameters, of which a method may run the head
    theirs: Any  # what the teacher shows
    teacher: Any  # the teacher's parameters, of which a method may run the end


class Losses:
    """A method on what networks show: one compiled function of all it may read.

    Attributes:
      lesson: with the method.
      params, stats: of the method, at first; head: the student's parameters.
    """

    def __init__(self, lesson, passes, joints=3, skip=()):
        """`joints`: how many it gets, the last; `skip`: terms that do not count."""
        self.lesson, self.head, self._joints = lesson, passes.params, joints
        self._rest = {
            name: tree
            for name, tree in lesson.teacher_variables.items()
            if name != "params"
        }
        self._student_stats = passes.stats
        ours, theirs, _ = passes.see()
        shapes = jax.eval_shape(self._init, ours, theirs)
        drawn = toys.drawn(shapes, 2)
        self.params = drawn.get("params", {})
        self.stats = drawn.get("batch_stats", {})

        @jax.jit
        def run(stats, weights, epoch, args):
            def total(args):
                losses, new = self.losses(stats, epoch, args)
                kept = [_without(loss, skip).total() for loss in losses]
                return jnp.vdot(weights, jnp.stack(kept)), (losses, new)

            return jax.value_and_grad(total, has_aux=True)(args)

        self._run = run

    def _signals(self, ours, theirs, head, teacher, epoch):
        """With the joints that the method gets."""
        ours, theirs = (
            {n: x[-self._joints :] if isinstance(x, tuple) else x for n, x in t.items()}
            for t in (ours, theirs)
        )
        variables = {"params": teacher, **self._rest}
        given = (head, self._student_stats, batch()[1], epoch, variables)
        return self.lesson.assemble(ours, theirs, *given)

    def _init(self, ours, theirs):
        teacher = self.lesson.teacher_variables["params"]
        signals = self._signals(ours, theirs, self.head, teacher, 0.0)
        return self.lesson.method.init(jax.random.key(0), signals, train=True)

    def args(self, ours, theirs, own=None, head=None):
        """What the value is differentiated by: `Gradients` holds the same."""
        own = self.params if own is None else own
        head = self.head if head is None else head
        return Read(own, ours, head, theirs, self.lesson.teacher_variables["params"])

    def losses(self, stats, epoch, args):
        """The module losses and the method's new statistics, not compiled."""
        parts = (args.ours, args.theirs, args.head, args.teacher)
        return self.lesson.assess(args.own, stats, self._signals(*parts, epoch))

    def __call__(self, args, *, stats=None, epoch=40.0, weights=None):
        """(value, module losses, new statistics, gradients: a `Read`).

        `weights`: of the modules' losses in the value.
        """
        stats = self.stats if stats is None else stats
        weights = np.ones(self._joints) if weights is None else weights
        numbers = np.float32(weights), np.float32(epoch)
        (value, (losses, new)), grads = self._run(stats, *numbers, args)
        return float(value), losses, new, grads


def _without(loss, names):
    terms = {n: t for n, t in loss.terms.items() if n not in names}
    return method.ModuleLoss(terms, loss.weights, {})
