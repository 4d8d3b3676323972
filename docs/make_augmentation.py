"""Draws docs/augmentation.png: what each operation makes of one image.

    python -m docs.make_augmentation

The photos are scikit-learn's flower.jpg and china.jpg, see docs/augmentation.md.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageDraw
from sklearn import datasets

from lakd_jax.data import distortion, mixing, operations

PAGE = pathlib.Path(__file__).with_name("augmentation.png")
_SIDE, _TITLE, _COLUMNS = 96, 14, 7
_VALUES = {
    **dict.fromkeys(("shear_x", "shear_y"), 0.3),
    **dict.fromkeys(("translate_x", "translate_y"), 24.0),
    "rotate": 30.0,
    **dict.fromkeys(("brightness", "colour", "contrast"), 0.4),
    "sharpness": 1.9,
    "posterize": 3.0,
    "solarize": 128.0,
    "solarize_add": 80.0,
}
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def main() -> None:
    """Writes the picture."""
    _write(_panels(*map(_square, ("flower.jpg", "china.jpg"))))


@jax.jit
def _panels(flower: jax.Array, china: jax.Array) -> dict[str, jax.Array]:
    """Returns (side, side, 3) per title."""
    names = operations.OPERATIONS
    values = jnp.array([_VALUES.get(name, 0.0) for name in names])
    every = jax.vmap(operations.apply, (None, 0, 0))
    panels = dict(
        zip(names, every(flower, jnp.arange(len(names)), values), strict=True)
    )
    panels["erase"] = distortion.erased(jax.random.key(4), flower, 1.0, _MEAN, _STD)
    both = jnp.stack([flower, china])
    panels["mixup"] = mixing.mixed(both, 0.6)[0]
    box = mixing.outside_box(_SIDE, _SIDE, 0.7, (40, 60))
    panels["cutmix"] = mixing.mixed(both, box)[0]
    return panels


def _square(name: str) -> jax.Array:
    """Returns the centre of one of scikit-learn's photos, (side, side, 3) uint8."""
    photo = Image.fromarray(datasets.load_sample_image(name)[:, 100:527])
    return jnp.asarray(np.array(photo.resize((_SIDE, _SIDE), Image.Resampling.BOX)))


def _write(panels: dict[str, jax.Array]) -> None:
    rows = -(-len(panels) // _COLUMNS)
    width, height = _SIDE + 4, _SIDE + _TITLE + 4
    page = Image.new("RGB", (_COLUMNS * width, rows * height), "white")
    draw = ImageDraw.Draw(page)
    order = (*operations.OPERATIONS, "erase", "mixup", "cutmix")  # jit sorts them
    for number, name in enumerate(order):
        image = panels[name]
        x, y = number % _COLUMNS * width, number // _COLUMNS * height
        pixels = np.clip(np.asarray(image), 0, 255).astype(np.uint8)
        page.paste(Image.fromarray(pixels), (x, y + _TITLE))
        draw.text((x, y), name, fill="black")
    page.quantize(128).save(PAGE, optimize=True)


if __name__ == "__main__":
    main()
