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


def windows(image: np.ndarray, pad: int) -> dict[tuple[int, int], np.ndarray]:
    """Returns (top, left) -> what a crop of the padded image shows."""
    height, width, _ = image.shape
    padded = np.pad(image, ((pad, pad), (pad, pad), (0, 0)))
    return {
        (top, left): padded[top : top + height, left : left + width]
        for top in range(2 * pad + 1)
        for left in range(2 * pad + 1)
    }


def test_resize_by_hand():
    images = np.zeros((1, 2, 2, 3), np.uint8)
    images[0, :, 1] = 100  # dark on the left, bright on the right
    large = augment.resize(images, 4)
    assert large.dtype == jnp.float32
    # The centres of the new pixels are at 1/8, 3/8, 5/8, 7/8 of the width.
    row = [0.0, 25.0, 75.0, 100.0]
    np.testing.assert_allclose(large[0, :, :, 1], [row] * 4, atol=1e-4)
    # Triangles twice as wide as the stride: every pixel contributes.
    flat = augment.resize(np.full((1, 8, 8, 3), 7, np.uint8), 4)
    assert flat.shape == (1, 4, 4, 3)
    np.testing.assert_allclose(flat, 7.0, rtol=1e-6)
    images = random_images(2)
    lone = images.copy()
    lone[:, 3, 3] = 255 - lone[:, 3, 3]
    assert (augment.resize(lone, 4) != augment.resize(images, 4)).any()


@pytest.mark.parametrize("size", [0, 8])
def test_resize_leaves_the_right_size_alone(size):
    images = random_images(2)
    assert augment.resize(images, size) is images


@pytest.mark.parametrize(("pad", "flip"), [(0, False), (0, True), (1, True)])
def test_results_are_all_windows_of_the_padded_image_and_their_mirrors(pad, flip):
    image = np.random.default_rng(0).integers(1, 256, (5, 7, 3), np.uint8)
    crops = run(KEY, np.stack([image] * 400), jnp.arange(400), 0, pad=pad, flip=flip)
    assert crops.dtype == jnp.uint8
    expected = list(windows(image, pad).values())
    expected += [window[:, ::-1] for window in expected] if flip else []
    found = {crop.tobytes() for crop in np.asarray(crops)}
    assert found == {window.tobytes() for window in expected}


def test_crop_takes_both_offsets_from_its_word():
    images = random_images(25, size=6)
    words = jnp.arange(25, dtype=jnp.uint32)  # word = top + 5 * left
    crops = augment._crop(jnp.asarray(images), words, 2)
    for n in range(25):
        expected = windows(images[n], 2)[n % 5, n // 5]
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
    images.flat[:2] = 0, 255  # black, as the padding is
    result = jax.jit(augment.normalise, static_argnums=3)(images, mean, std, dtype)
    assert result.dtype == dtype
    expected = (images / 255.0 - np.array(mean)) / np.array(std)
    tolerance = 1e-6 if dtype == jnp.float32 else 2**-8
    np.testing.assert_allclose(
        np.asarray(result, np.float64), expected, rtol=tolerance, atol=tolerance
    )
