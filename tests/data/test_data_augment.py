"""Crop, flip and normalisation against plain NumPy, and their statistics."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lakd_jax.data import augment

KEY = jax.random.key(5)
run = jax.jit(augment.augment, static_argnames=("pad", "flip"))


def random_images(count: int, size: int = 8) -> np.ndarray:
    shape = (count, size, size, 3)
    return np.random.default_rng(0).integers(1, 256, shape, dtype=np.uint8)


def numpy_window(image: np.ndarray, top: int, left: int, pad: int) -> np.ndarray:
    out = np.zeros_like(image)
    for i in range(image.shape[0]):
        for j in range(image.shape[1]):
            y, x = i + top - pad, j + left - pad
            if 0 <= y < image.shape[0] and 0 <= x < image.shape[1]:
                out[i, j] = image[y, x]
    return out


def offsets_of(images: np.ndarray, crops: np.ndarray, pad: int) -> list[tuple]:
    """Finds each crop's (top, left, mirrored) by trying all of them."""
    found = []
    for image, crop in zip(images, crops, strict=True):
        matches = [
            (top, left, mirrored)
            for top in range(2 * pad + 1)
            for left in range(2 * pad + 1)
            for mirrored in (False, True)
            if (
                numpy_window(image, top, left, pad)[:, :: -1 if mirrored else 1] == crop
            ).all()
        ]
        assert len(matches) == 1
        found.append(matches[0])
    return found


def test_resize_by_hand():
    images = np.zeros((1, 2, 2, 3), np.uint8)
    images[0, :, 1] = 100  # dark on the left, bright on the right
    large = augment.resize(images, 4)
    assert large.dtype == jnp.float32
    # The centres of the new pixels are at 1/8, 3/8, 5/8, 7/8 of the width.
    row = [0.0, 25.0, 75.0, 100.0]
    np.testing.assert_allclose(large[0, :, :, 1], [row] * 4, atol=1e-4)
    small = augment.resize(random_images(3, size=8), 4)
    assert small.shape == (3, 4, 4, 3)
    # Triangles twice as wide as the stride: every pixel contributes.
    flat = augment.resize(np.full((1, 8, 8, 3), 7, np.uint8), 4)
    np.testing.assert_allclose(flat, 7.0, rtol=1e-6)


def test_resize_averages_what_it_shrinks():
    images = random_images(2, size=8)
    lone = images.copy()
    lone[:, 3, 3] = 255 - lone[:, 3, 3]
    changed = augment.resize(lone, 4) != augment.resize(images, 4)
    assert changed.any()


@pytest.mark.parametrize("size", [0, 8])
def test_resize_leaves_the_right_size_alone(size):
    images = random_images(2, size=8)
    assert augment.resize(images, size) is images


def test_every_result_is_one_window_of_the_padded_image():
    images = random_images(40, size=5)
    crops = run(KEY, images, jnp.arange(40), 0, pad=2, flip=True)
    assert crops.dtype == jnp.uint8
    found = offsets_of(images, np.asarray(crops), pad=2)
    assert len(set(found)) > 20


def test_crop_equals_the_numpy_loop_for_every_offset():
    pad, images = 2, random_images(25, size=6)
    words = jnp.arange(25, dtype=jnp.uint32)  # word = top + 5 * left
    crops = augment._crop(jnp.asarray(images), words, pad)
    for n in range(25):
        expected = numpy_window(images[n], n % 5, n // 5, pad)
        np.testing.assert_array_equal(crops[n], expected)


def test_augmentation_does_not_depend_on_the_batch():
    images = random_images(3)
    ids = jnp.array([4, 900_000, 31])
    together = run(KEY, images, ids, 6, pad=4, flip=True)
    alone = run(KEY, images[2:], ids[2:], 6, pad=4, flip=True)
    np.testing.assert_array_equal(together[2:], alone)
    turned = run(KEY, images[::-1], ids[::-1], 6, pad=4, flip=True)
    np.testing.assert_array_equal(together[::-1], turned)


def test_key_epoch_and_id_all_matter():
    image = np.repeat(random_images(1), 64, axis=0)
    ids = jnp.arange(64)
    base = run(KEY, image, ids, 0, pad=4, flip=True)
    for other in (
        run(jax.random.key(6), image, ids, 0, pad=4, flip=True),
        run(KEY, image, ids, 1, pad=4, flip=True),
        run(KEY, image, ids + 64, 0, pad=4, flip=True),
    ):
        same = (np.asarray(base) == np.asarray(other)).all(axis=(1, 2, 3))
        assert same.mean() < 0.2
    again = run(KEY, image, ids, jnp.int32(0), pad=4, flip=True)
    np.testing.assert_array_equal(base, again)


def test_offsets_and_flips_are_uniform_and_independent():
    count, pad = 20_000, 1
    # A single lit pixel in 5x5 reveals the offset.
    images = np.zeros((count, 5, 5, 1), np.uint8)
    images[:, 2, 2] = 1
    crops = np.asarray(run(KEY, images, jnp.arange(count), 0, pad=pad, flip=False))
    _, rows, columns, _ = np.nonzero(crops)
    table = np.zeros((3, 3))
    np.add.at(table, (rows - 1, columns - 1), 1)
    expected = count / 9
    assert ((table - expected) ** 2 / expected).sum() < 26.1  # chi2, 8 df, 0.999
    ramp = np.zeros((count, 1, 2, 1), np.uint8)
    ramp[:, 0, 1] = 1
    mirrored = np.asarray(run(KEY, ramp, jnp.arange(count), 0, pad=0, flip=True))
    flips = mirrored[:, 0, 0, 0]
    assert abs(flips.mean() - 0.5) < 4 * 0.5 / np.sqrt(count)
    for axis in (rows, columns):
        assert abs(np.corrcoef(axis, flips)[0, 1]) < 4 / np.sqrt(count)


def test_nothing_to_do_is_the_identity():
    images = random_images(4)
    same = run(KEY, images, jnp.arange(4), 0, pad=0, flip=False)
    np.testing.assert_array_equal(same, images)


def test_flip_alone_mirrors_width_not_height():
    images = random_images(32)
    out = np.asarray(run(KEY, images, jnp.arange(32), 0, pad=0, flip=True))
    mirrored = [(o == i[:, ::-1]).all() for o, i in zip(out, images, strict=True)]
    kept = [(o == i).all() for o, i in zip(out, images, strict=True)]
    assert all(a != b for a, b in zip(mirrored, kept, strict=True))
    assert 4 < sum(mirrored) < 28


def test_rectangles_keep_their_shape():
    images = np.ones((2, 6, 10, 3), np.uint8)
    assert run(KEY, images, jnp.arange(2), 0, pad=3, flip=True).shape == images.shape


def test_sharded_batches_give_the_same_without_communication():
    mesh = jax.sharding.Mesh(jax.devices(), ("data",))
    split = jax.NamedSharding(mesh, jax.P("data"))
    images, ids = random_images(16), np.arange(16)
    on_mesh = [jax.device_put(x, split) for x in (images, ids)]
    function = functools.partial(augment.augment, pad=4, flip=True)
    compiled = jax.jit(function, out_shardings=split).lower(KEY, *on_mesh, 2).compile()
    expected = run(KEY, images, ids, 2, pad=4, flip=True)
    np.testing.assert_array_equal(compiled(KEY, *on_mesh, 2), expected)
    for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
        assert collective not in compiled.as_text()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_normalise(dtype):
    images, mean, std = random_images(2), (0.49, 0.48, 0.45), (0.2, 0.19, 0.25)
    result = jax.jit(augment.normalise, static_argnums=3)(images, mean, std, dtype)
    assert result.dtype == dtype
    expected = (images / 255.0 - np.array(mean)) / np.array(std)
    tolerance = 1e-6 if dtype == jnp.float32 else 2**-8
    np.testing.assert_allclose(
        np.asarray(result, np.float64), expected, rtol=tolerance, atol=tolerance
    )


def test_black_padding_normalises_like_a_black_pixel():
    images = np.full((8, 4, 4, 3), 255, np.uint8)
    crops = run(KEY, images, jnp.arange(8), 0, pad=4, flip=False)
    result = augment.normalise(crops, (0.5,) * 3, (0.25,) * 3, jnp.float32)
    assert set(np.unique(result)) == {-2.0, 2.0}
