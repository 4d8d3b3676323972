"""Operations of augmentation policies on one image, with the results of Pillow.

An operation is chosen by a traced number, `OPERATIONS.index(name)`, so that each image
of a batch has another one under `vmap`. There are three passes, of which all but one
are the identity: a movement of pixels, a blend with a degenerate image, a change of
tones. A `switch` of sixteen functions would compute all sixteen for every image.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

_MOVES = ("identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate")
_BLENDS = ("brightness", "colour", "contrast", "sharpness")
_TONES = (
    "posterize",
    "solarize",
    "solarize_add",
    "invert",
    "autocontrast",
    "equalize",
)
OPERATIONS = (*_MOVES, *_BLENDS, *_TONES)


def apply(
    image: jax.Array,
    operation: jax.Array | int,
    value: ArrayLike,
    *,
    fill: tuple[int, int, int] = (0, 0, 0),
    bicubic: bool = False,
) -> jax.Array:
    """Applies one of `OPERATIONS` to an image (H, W, 3) uint8.

    Args:
      image: the image.
      operation: the index of the operation.
      value: of shears the slope; of translations pixels; of `rotate` degrees; of
        blends the factor, 1 for no change; of `posterize` the bits that are kept; of
        `solarize` the first tone that is inverted; of `solarize_add` what is added to
        tones below 128.
      fill: the colour of pixels from outside of the image.
      bicubic: whether moves interpolate; else they take the nearest pixel.

    Returns:
      (H, W, 3) uint8.
    """
    value = jnp.asarray(value, jnp.float32)
    coefficients = _matrix(operation, value, image.shape)
    move = _bicubic if bicubic else _nearest
    image = move(image, coefficients, jnp.array([[fill]], jnp.uint8))
    # Or XLA would fuse the move into the blur, and compute it nine times.
    image = jax.lax.optimization_barrier(image)
    blend = operation - len(_MOVES)
    blended = blend_with(_degenerate(image, blend), image, value)
    is_blend = (blend >= 0) & (blend < len(_BLENDS))
    image = jnp.where(is_blend, blended, image)
    return _toned(image, operation - len(_MOVES) - len(_BLENDS), value)


# ---------------------------------------------------------------------------- moves


def _matrix(
    operation: jax.Array | int, value: jax.Array, shape: tuple[int, ...]
) -> jax.Array:
    """Returns (6,) float32: a, b, c, d, e, f of Pillow's affine transform.

    The pixel (x, y) of the result comes from (ax + by + c, dx + ey + f).
    """
    height, width, _ = shape
    one, zero = jnp.ones_like(value), jnp.zeros_like(value)
    cos, sin = jnp.cos(jnp.deg2rad(value)), -jnp.sin(jnp.deg2rad(value))
    x, y = width / 2, height / 2
    rows = [  # as `_MOVES`
        (one, zero, zero, zero, one, zero),
        (one, value, zero, zero, one, zero),
        (one, zero, zero, value, one, zero),
        (one, zero, value, zero, one, zero),
        (one, zero, zero, zero, one, value),
        (cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y),
    ]
    table = jnp.stack([jnp.stack(row) for row in rows])
    return table[jnp.where(operation < len(_MOVES), operation, 0)]


def _sources(shape: tuple[int, ...], matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the coordinates (x, y), (H, W) each, that pixels come from."""
    x = jnp.arange(shape[1], dtype=jnp.float32)[None, :] + 0.5
    y = jnp.arange(shape[0], dtype=jnp.float32)[:, None] + 0.5
    a, b, c, d, e, f = matrix
    return a * x + b * y + c, d * x + e * y + f


def _inside(shape: tuple[int, ...], x: jax.Array, y: jax.Array) -> jax.Array:
    """Returns (H, W, 1) bool: which coordinates are inside the image."""
    inside = (x >= 0) & (x < shape[1]) & (y >= 0) & (y < shape[0])
    return inside[..., None]


def _at(image: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    """Returns the pixels at whole coordinates, clipped to those of the image."""
    height, width, _ = image.shape
    x = jnp.clip(x.astype(jnp.int32), 0, width - 1)
    y = jnp.clip(y.astype(jnp.int32), 0, height - 1)
    return image[y, x]


def _nearest(image: jax.Array, matrix: jax.Array, fill: jax.Array) -> jax.Array:
    x, y = _sources(image.shape, matrix)
    found = _at(image, jnp.floor(x), jnp.floor(y))
    return jnp.where(_inside(image.shape, x, y), found, fill)


def _bicubic(image: jax.Array, matrix: jax.Array, fill: jax.Array) -> jax.Array:
    x, y = _sources(image.shape, matrix)
    left, top = jnp.floor(x - 0.5), jnp.floor(y - 0.5)
    across = _weights(x - 0.5 - left)
    rows = [
        sum(
            across[k] * _at(image, left + k - 1, top + row - 1).astype(jnp.float32)
            for k in range(4)
        )
        for row in range(4)
    ]
    down = _weights(y - 0.5 - top)
    found = sum(down[k] * rows[k] for k in range(4))
    # Without the small number, what is whole up to rounding would lose 1.
    found = jnp.clip(jnp.floor(found + 1e-3), 0, 255).astype(jnp.uint8)
    return jnp.where(_inside(image.shape, x, y), found, fill)


def _weights(distance: jax.Array) -> tuple[jax.Array, ...]:
    """Returns the weights of four neighbours, for the distance from the second one.

    Pillow's transforms have the parameter -1, its resizing -1/2.
    """
    d = distance[..., None]
    d2, d3 = d**2, d**3
    return -d + 2 * d2 - d3, 1 - 2 * d2 + d3, d + d2 - d3, d3 - d2


# --------------------------------------------------------------------------- blends


def blend_with(degenerate: jax.Array, image: jax.Array, factor: ArrayLike) -> jax.Array:
    """Returns degenerate + factor * (image - degenerate), (H, W, 3) uint8."""
    low, high = degenerate.astype(jnp.float32), image.astype(jnp.float32)
    return jnp.clip(low + factor * (high - low), 0, 255).astype(jnp.uint8)


def black(image: jax.Array) -> jax.Array:
    """Returns the image that a change of brightness blends with."""
    return jnp.zeros_like(image)


def grey(image: jax.Array) -> jax.Array:
    """Returns the image (H, W, 3) uint8 without colour: ITU-R 601-2 luma."""
    red, green, blue = jnp.moveaxis(image.astype(jnp.int32), -1, 0)
    luma = (19595 * red + 38470 * green + 7471 * blue + 2**15) >> 16
    return jnp.broadcast_to(luma[..., None], image.shape).astype(jnp.uint8)


def mean_grey(image: jax.Array) -> jax.Array:
    """Returns an image (H, W, 3) uint8 of one grey, the mean of `grey`."""
    count = image.shape[0] * image.shape[1]
    total = jnp.sum(grey(image)[..., 0], dtype=jnp.uint32)
    mean = (2 * total + count) // (2 * count)
    return jnp.broadcast_to(mean.astype(jnp.uint8), image.shape)


def smooth(image: jax.Array) -> jax.Array:
    """Returns the image (H, W, 3) uint8 blurred by 3x3 pixels, but for its border."""
    x = image.astype(jnp.int32)
    height, width, _ = x.shape
    total = 4 * x[1:-1, 1:-1]
    for i in range(3):
        for j in range(3):
            total += x[i : height - 2 + i, j : width - 2 + j]
    blurred = (2 * total + 13) // 26  # total / 13, rounded
    return image.at[1:-1, 1:-1].set(blurred.astype(jnp.uint8))


DEGENERATE = (black, grey, mean_grey, smooth)  # as `_BLENDS`


def _degenerate(image: jax.Array, blend: jax.Array | int) -> jax.Array:
    """Returns what the blend of this number blends with; black for other numbers."""
    found = black(image)
    for number, function in enumerate(DEGENERATE[1:], 1):
        found = jnp.where(blend == number, function(image), found)
    return found


# ---------------------------------------------------------------------------- tones


def _toned(image: jax.Array, tone: jax.Array | int, value: jax.Array) -> jax.Array:
    """Returns the image with one of `_TONES` applied; other numbers change nothing."""
    x = image.astype(jnp.int32)
    shift = jnp.clip(8 - value.astype(jnp.int32), 0, 8)
    results = (
        (x >> shift) << shift,
        jnp.where(x < value, x, 255 - x),
        jnp.where(x < 128, jnp.minimum(x + value.astype(jnp.int32), 255), x),
        255 - x,
        _autocontrast(x),
        jax.vmap(_equalize, -1, -1)(x),
    )
    for number, result in enumerate(results):
        x = jnp.where(tone == number, result, x)
    return x.astype(jnp.uint8)


def _autocontrast(x: jax.Array) -> jax.Array:
    """Stretches the tones (H, W, 3) int32 of each channel to 0..255."""
    low, high = (f(x, (0, 1), keepdims=True) for f in (jnp.min, jnp.max))
    stretched = (x - low) * 255 // jnp.maximum(high - low, 1)
    return jnp.where(high > low, stretched, x)


def _equalize(x: jax.Array) -> jax.Array:
    """Equalises the histogram of a channel (H, W) int32."""
    counts = jnp.zeros(256, jnp.int32).at[x].add(1)
    last = counts[jnp.max(x)]
    step = (x.size - last) // 255
    before = jnp.cumsum(counts) - counts
    table = jnp.minimum((step // 2 + before) // jnp.maximum(step, 1), 255)
    return jnp.where(step > 0, table[x], x)
