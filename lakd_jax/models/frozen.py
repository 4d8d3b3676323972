"""Functions of images as frozen teachers, whatever they were written with.

`of` traces a function once and finds the arrays that it closes over, so that these are
variables of a `Frozen` network: arguments of compiled programs instead of constants in
them, and what the weights' digest is made of.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.extend import core

from lakd_jax import errors, fields
from lakd_jax.models import chain

PyTree = Any
_SIDE = 32  # of the images that a function of any size is first traced with
_SHOWN = 300  # characters of an error of the function
_ADVICE = (
    "A teacher computes with JAX alone (no NumPy, no other framework), in evaluation "
    "mode, from normalised images (B, H, W, 3) of `image_size`"
)


class Whole(chain.Chain, kw_only=True):
    """A teacher that only runs as a whole, from images to logits."""

    WHOLE: ClassVar[bool] = True
    RESUMABLE: ClassVar[bool] = False
    GATED: ClassVar[bool] = False

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        *,
        train: bool,
        joint: chain.JointFn | None = None,
        after: str = "",
        until: str = "",
    ) -> chain.Outputs:
        """Applies the network, always in evaluation mode; see `chain.Chain`.

        Raises:
            ValueError: a part of it is to be run, or it is to be cut.
        """
        del train
        if joint or after or until:
            raise ValueError(f"{type(self).__name__} networks run as a whole")
        return self.outputs(x)

    def outputs(self, x: jax.Array) -> chain.Outputs:
        """Returns the outputs for images (B, H, W, 3); a subclass gives this."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, eq=False)
class Function:
    """A function of images that `of` has examined.

    Attributes:
        name: for error messages.
        fn: `(*variables, images) -> logits` or `(logits, {name: map})`.
        variables: (tree,) of its first argument; () if it takes images only.
        arrays: the leaves of `variables`, then the arrays that `fn` closes over.
        maps: names of its feature maps, in order from the image to the head.
        num_classes: width of the logits.
        mean, std, image_size, classes: see `interop.weights.Loaded`.
    """

    name: str
    fn: Callable[..., Any]
    variables: tuple[PyTree, ...] = ()
    arrays: tuple[Any, ...] = ()
    maps: tuple[str, ...] = ()
    num_classes: int = 0
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    image_size: int = 0
    classes: tuple[str, ...] = ()

    def __call__(
        self, arrays: Sequence[jax.Array], images: jax.Array
    ) -> tuple[jax.Array, ...]:
        """Returns logits (B, classes) and the maps (B, h, w, c).

        Args:
            arrays: in place of `self.arrays`.
            images: (B, H, W, 3) float32.

        Raises:
            errors.TeacherError: it closes over other arrays than when it was examined,
                or cannot be traced with images of this size.
        """
        program, _ = traced(self, images.shape, self.maps)
        taken = dict(zip(map(_key, self.arrays), arrays, strict=True))
        used = set(map(_key, program.consts))
        unused = {_kind(x) for x in self.closed_over if _key(x) not in used}
        for const in program.consts:  # others are tables for images of this size
            fresh = _key(const) not in taken
            if fresh and (isinstance(const, jax.Array) or _kind(const) in unused):
                raise errors.TeacherError(
                    f"teacher {self.name}: its weights are not those that it had when "
                    "it was registered; call lakd_jax.teacher_from again."
                )
        consts = [taken.get(_key(const), const) for const in program.consts]
        run = core.jaxpr_as_fun(core.ClosedJaxpr(program.jaxpr, consts))
        return tuple(run(*arrays[: self.given], images))

    @property
    def given(self) -> int:
        """Returns how many of the arrays are leaves of `variables`."""
        return len(jax.tree.leaves(self.variables))

    @property
    def closed_over(self) -> tuple[Any, ...]:
        """Returns the other arrays."""
        return self.arrays[self.given :]


class Frozen(Whole, kw_only=True):
    """A function of images, whose maps are the ends of stages of one block.

    Attributes:
        function: which.
        order: for every class of the logits, its index in those of the function; ()
            leaves them as they are.
    """

    function: Function
    order: tuple[int, ...] = ()

    @property
    def any_side(self) -> int:
        """A size of images that it takes."""
        return self.function.image_size or _SIDE

    def outputs(self, x: jax.Array) -> chain.Outputs:
        """See `Whole`.

        The stem is the image, a tap is a map, and what is pooled is the last map.
        """
        arrays = [
            self.param(f"array{i}", _zeros, array)
            for i, array in enumerate(self.function.arrays)
        ]
        x = x.astype(jnp.float32)
        logits, *found = self.function(arrays, x)
        logits, maps = logits.astype(jnp.float32), tuple(found)
        last = maps[-1] if maps else x
        return chain.Outputs(
            logits=logits[:, jnp.array(self.order)] if self.order else logits,
            stem=x,
            features=maps,
            preacts=(),
            blocks=tuple((map,) for map in maps),
            pooled=jnp.mean(last.astype(jnp.float32), (1, 2)),
            taps=maps,
        )


def _zeros(_: jax.Array, like: jax.Array) -> jax.Array:
    return jnp.zeros(like.shape, like.dtype)


def of(
    fn: Callable[..., Any],
    *,
    name: str,
    features: Sequence[str] | None,
    variables: PyTree = None,
    image_size: int = 0,
    **card: Any,
) -> Function:
    """Examines a function of images; see `lakd_jax.register.teacher_from`.

    Args:
        fn: see `Function`.
        name: for error messages.
        features: names of its maps, in order; None for all that it returns.
        variables: its first argument; None if it takes images only.
        image_size: height and width of its images; 0 for any.
        **card: `mean`, `std` and `classes` of the `Function`.

    Raises:
        errors.TeacherError: it cannot be traced, does not return logits and maps, or
            hides arrays.
    """
    given = () if variables is None else (variables,)
    draft = Function(name, fn, given, image_size=image_size, **card)
    side = image_size or _SIDE
    program, maps = traced(draft, (1, side, side, 3), features)
    arrays = (*map(jnp.asarray, jax.tree.leaves(given)), *program.consts)
    if hidden := list(_nested(program.jaxpr)):
        raise errors.TeacherError(
            f"teacher {name}: {len(hidden)} of its arrays are within functions that "
            "are jitted themselves, and would be constants of every program; register "
            "it without jax.jit, or give its weights as `variables`: fn(variables, "
            "images)."
        )
    classes = program.out_avals[0].shape[1]
    if draft.classes and len(draft.classes) != classes:
        raise errors.TeacherError(
            f"teacher {name}: `classes` has {len(draft.classes)} names for {classes} "
            "logits."
        )
    return dataclasses.replace(draft, arrays=arrays, maps=maps, num_classes=classes)


def traced(
    function: Function, shape: tuple[int, ...], features: Sequence[str] | None
) -> tuple[Any, tuple[str, ...]]:
    """Returns the program of a function for images of `shape`, and the maps' names.

    Args:
        function: whose `fn` and `variables` are used.
        shape: (B, H, W, 3).
        features: the maps that the program returns after the logits; None for all.

    Raises:
        errors.TeacherError: see `of`.
    """
    names: list[str] = []

    def results(*arguments: Any) -> tuple[jax.Array, ...]:
        logits, maps = _checked(function.name, shape[0], function.fn(*arguments))
        names[:] = maps if features is None else features
        for name in names:
            if found := fields.fault(name, maps):
                raise errors.TeacherError(
                    f"teacher {function.name}: a name in `features` {found}."
                )
        return logits, *(maps[name] for name in names)

    images = jax.ShapeDtypeStruct(shape, jnp.float32)
    try:
        program = jax.make_jaxpr(results)(*function.variables, images)
    except errors.LakdError:
        raise
    except Exception as error:  # whatever the user's function raises
        why = " ".join(f"{type(error).__name__}: {error}".split())[:_SHOWN]
        raise errors.TeacherError(
            f"teacher {function.name} cannot be traced by JAX for images of "
            f"{shape[1]}x{shape[2]} ({why}).\n{_ADVICE}."
        ) from error
    return program, tuple(names)


def _checked(
    name: str, batch: int, result: Any
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns the logits and maps of a result; raises TeacherError if it has none."""
    logits, maps = result if isinstance(result, tuple | list) else (result, {})
    shapes = {"the logits": jnp.shape(logits)}
    shapes |= {f"map {key!r}": jnp.shape(value) for key, value in maps.items()}
    for what, shape in shapes.items():
        wanted = "(B, classes)" if what == "the logits" else "(B, h, w, c)"
        if len(shape) != wanted.count(",") + 1 or shape[0] != batch or 0 in shape:
            raise errors.TeacherError(
                f"teacher {name}: {what} must be {wanted}, not {shape} for {batch} "
                "images; a teacher returns logits, or (logits, {name: map})."
            )
    return logits, dict(maps)


def _kind(array: Any) -> tuple[Any, ...]:
    return tuple(array.shape), str(array.dtype)


def _key(array: Any) -> Any:
    """Returns what identifies an array in every program of a function.

    JAX wraps NumPy's arrays anew in each program, so that their values count.
    """
    if isinstance(array, jax.Array):
        return id(array)
    data = np.ascontiguousarray(array).data
    return *_kind(array), hashlib.blake2b(data, digest_size=16).digest()


def _nested(jaxpr: Any) -> Iterator[Any]:
    """Yields the weights that programs within a program have as constants.

    Tables of NumPy, which JAX's own functions make, are none.
    """
    for equation in jaxpr.eqns:
        for program in jax.tree.leaves(list(equation.params.values())):
            if isinstance(program, core.ClosedJaxpr):
                for const in program.consts:
                    floats = jnp.issubdtype(const.dtype, jnp.floating)
                    if isinstance(const, jax.Array) or (floats and const.ndim > 1):
                        yield const
                program = program.jaxpr
            if isinstance(program, core.Jaxpr):
                yield from _nested(program)
