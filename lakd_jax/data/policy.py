"""Policies of augmentation: which operations an image gets, and how strongly.

`trivial`: TrivialAugmentWide of torchvision (arXiv 2103.10158), one operation.
`rand-N-M`: timm's RandAugment (arXiv 1909.13719) as DeiT uses it, `rand-mM-nN-mstd0.5-
  inc1` there: N operations, each with probability 1/2, at a level from Normal(M, 1/2).
`fixmatch`: that of MLKD and CRLD on CIFAR, after FixMatch (arXiv 2001.07685): two
  operations at random levels, then a grey square.
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np

from lakd_jax import fields
from lakd_jax.data import operations

NAMES = ("trivial", "rand-N-M", "fixmatch")
_BINS = 31  # levels of TrivialAugment
_SQUARE = 0.5  # longest side of FixMatch's square, of the image's
_GREY = (125, 123, 114)


@dataclasses.dataclass(frozen=True)
class _Row:
    """An operation, and its values: base + sign * (low to high, by level 0 to 1).

    Attributes:
      operation: a name of `operations.OPERATIONS`.
      low, high, base: see above.
      sign: 1, -1, or 0 for one of them at random.
      whole: "floor" or "round" makes the second summand whole; "" does not.
      relative: whether values are shares of the image's side.
    """

    operation: str
    low: float = 0.0
    high: float = 0.0
    base: float = 0.0
    sign: int = 1
    whole: str = ""
    relative: bool = False


def _each(names: str, row: _Row) -> list[_Row]:
    """Returns copies of a row for several operations."""
    return [dataclasses.replace(row, operation=name) for name in names.split()]


_BLENDS = "brightness colour contrast sharpness"
_SHEARS, _TRANSLATIONS = "shear_x shear_y", "translate_x translate_y"
_TRIVIAL = (
    _Row("identity"),
    *_each(_SHEARS, _Row("", high=0.99, sign=0)),
    *_each(_TRANSLATIONS, _Row("", high=32.0, sign=0, whole="floor")),
    _Row("rotate", high=135.0, sign=0),
    *_each(_BLENDS, _Row("", high=0.99, base=1.0, sign=0)),
    _Row("posterize", 0.0, 6.0, base=8.0, sign=-1, whole="round"),
    _Row("solarize", 0.0, 255.0, base=255.0, sign=-1),
    _Row("autocontrast"),
    _Row("equalize"),
)
_RAND = (
    _Row("autocontrast"),
    _Row("equalize"),
    _Row("invert"),
    _Row("rotate", high=30.0, sign=0),
    _Row("posterize", 0.0, 4.0, base=4.0, sign=-1, whole="floor"),
    _Row("solarize", 0.0, 256.0, base=256.0, sign=-1, whole="floor"),
    _Row("solarize_add", 0.0, 110.0, whole="floor"),
    *_each(_BLENDS, _Row("", high=0.9, base=1.0, sign=0)),
    *_each(_SHEARS, _Row("", high=0.3, sign=0)),
    *_each(_TRANSLATIONS, _Row("", high=0.45, sign=0, relative=True)),
)
_FIXMATCH = (
    _Row("autocontrast"),
    *_each(_BLENDS, _Row("", 0.05, 0.95)),
    _Row("equalize"),
    _Row("identity"),
    _Row("posterize", 4.0, 8.0, whole="floor"),
    _Row("rotate", -30.0, 30.0),
    *_each(_SHEARS, _Row("", -0.3, 0.3)),
    _Row("solarize", 0.0, 256.0),
    *_each(_TRANSLATIONS, _Row("", -0.3, 0.3, relative=True)),
)


@dataclasses.dataclass(frozen=True)
class Policy:
    """A policy, made by `create`.

    Attributes:
      rows: what each operation is drawn from.
      count: how many operations an image gets.
      levels: "bins" (31 of them), "uniform" or "normal".
      level: the mean of normal levels, in 0..10.
      chance: the probability of each operation.
      bicubic: whether moves interpolate.
      fill: the colour of pixels from outside of the image.
      square: whether a grey square follows.
    """

    rows: tuple[_Row, ...]
    count: int
    levels: str
    level: float = 0.0
    chance: float = 1.0
    bicubic: bool = False
    fill: tuple[int, int, int] = (0, 0, 0)
    square: bool = False

    def __call__(self, key: jax.Array, image: jax.Array) -> jax.Array:
        """Augments an image (H, W, 3) uint8 as `key` decides; the result is alike."""
        keys = jax.random.split(key, self.count + 1)
        # A loop, so that no operation is fused into the next one and computed again.
        image, _ = jax.lax.scan(
            lambda image, key: (self._operate(key, image), None), image, keys[:-1]
        )
        return _with_square(keys[-1], image) if self.square else image

    def _operate(self, key: jax.Array, image: jax.Array) -> jax.Array:
        which, level, sign, chance = jax.random.split(key, 4)
        row = jax.random.randint(which, (), 0, len(self.rows))
        sides = image.shape[1], image.shape[0]
        value = self.value(row, self._level(level), jax.random.bernoulli(sign), sides)
        operation = _column(self.rows, "operation")[row]
        changed = operations.apply(
            image, operation, value, fill=self.fill, bicubic=self.bicubic
        )
        if self.chance == 1:
            return changed
        return jnp.where(jax.random.bernoulli(chance, self.chance), changed, image)

    def _level(self, key: jax.Array) -> jax.Array:
        """Draws a level in 0..1."""
        if self.levels == "bins":
            return jax.random.randint(key, (), 0, _BINS) / (_BINS - 1)
        if self.levels == "uniform":
            return jax.random.uniform(key)
        return jnp.clip(self.level + jax.random.normal(key) / 2, 0, 10) / 10

    def value(
        self,
        row: jax.Array | int,
        level: jax.Array | float,
        negative: jax.Array | bool,
        sides: tuple[int, int],
    ) -> jax.Array:
        """Returns the value of the operation of a row, see `operations.apply`.

        Args:
          row: its number.
          level: 0 to 1.
          negative: the sign of values on either side.
          sides: width and height of the image.
        """

        def of(name: str) -> jax.Array:
            return _column(self.rows, name)[row]

        value = of("low") + (of("high") - of("low")) * level
        # A level such as 0.9 may be a rounding below what makes the value whole.
        floored = jnp.floor(value + 1e-4)
        value = jnp.where(of("whole") == 1, floored, value)
        value = jnp.where(of("whole") == 2, jnp.round(value), value)
        side = jnp.where(of("vertical"), sides[1], sides[0])
        value = value * jnp.where(of("relative"), side, 1)
        sign = jnp.where(of("sign") == 0, jnp.where(negative, -1, 1), of("sign"))
        return of("base") + sign * value


def _column(rows: tuple[_Row, ...], name: str) -> jax.Array:
    """Returns an attribute of all rows as an array; names as numbers."""
    if name == "operation":
        column = [operations.OPERATIONS.index(row.operation) for row in rows]
    elif name == "vertical":
        column = [row.operation == "translate_y" for row in rows]
    elif name == "whole":
        column = [("", "floor", "round").index(row.whole) for row in rows]
    else:
        column = [getattr(row, name) for row in rows]
    return jnp.asarray(np.array(column))


def _with_square(key: jax.Array, image: jax.Array) -> jax.Array:
    """Returns the image with a grey square of a random size at a random place."""
    height, width, _ = image.shape
    size, *places = jax.random.uniform(key, (3,))
    side = size * _SQUARE * width
    inside = jnp.ones((height, width), bool)
    for axis, (length, place) in enumerate(zip((height, width), places, strict=True)):
        first = jnp.floor(jnp.maximum(place * length - side / 2, 0))
        last = jnp.floor(jnp.minimum(first + side, length))
        at = jax.lax.broadcasted_iota(jnp.float32, (height, width), axis)
        inside &= (at >= first) & (at <= last)
    return jnp.where(inside[..., None], jnp.array([[_GREY]], jnp.uint8), image)


def fault(name: str) -> str:
    """A policy: trivial, rand-N-M or fixmatch; "" for none."""
    if name in ("", "trivial", "fixmatch") or _numbers(name):
        return ""
    if name.startswith("rand"):
        return (
            f"is {name!r}; it must be rand-N-M with N operations, from 1 to 9, at "
            "level M, from 0 to 10, such as rand-2-9"
        )
    return fields.fault(name, NAMES)


def create(name: str, mean: tuple[float, ...]) -> Policy:
    """Returns the policy of a name that `fault` accepts, other than "".

    Args:
      name: see the module.
      mean: of the pixels in 0..1, the colour that `rand` fills with.
    """
    if name == "trivial":
        return Policy(_TRIVIAL, 1, "bins")
    if name == "fixmatch":
        return Policy(_FIXMATCH, 2, "uniform", square=True)
    if not (numbers := _numbers(name)):
        raise ValueError(f"policy {fault(name)}")
    count, level = numbers
    red, green, blue = (round(255 * x) for x in mean)
    return Policy(
        *(_RAND, count, "normal", level),
        chance=0.5,
        bicubic=True,
        fill=(red, green, blue),
    )


def _numbers(name: str) -> tuple[int, int] | None:
    """Returns N and M of "rand-N-M"; None for other names, and numbers out of range."""
    if not (found := re.fullmatch(r"rand-([1-9])-(\d|10)", name)):
        return None
    return int(found[1]), int(found[2])
