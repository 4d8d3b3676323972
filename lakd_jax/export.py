"""Gives out the plain student of a finished run, in forms that others can load."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp

from lakd_jax import errors, fields, interop, paths
from lakd_jax.interop import weights as weights_lib
from lakd_jax.report import model_card
from lakd_jax.store import workdir
from lakd_jax.training import spec

FOLDER = "export"  # in the run's directory
ENDINGS = {"safetensors": ".safetensors", "torch": ".pth", "stablehlo": ".stablehlo"}
_PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def run(
    directory: str | Path, to: str, *, notify: Callable[[str], None] = print
) -> Path:
    """Writes the student of a run and its model card to `directory`/export.

    Args:
      directory: of a finished run, or of one of its baselines.
      to: "safetensors" or "torch" (PyTorch's names and layout), or "stablehlo" (the
        whole computation, see `program`).
      notify: receives the lines meant for the person watching.

    Returns:
      The file with the student.

    Raises:
      errors.ConfigError: unknown `to`, or `directory` is no local path.
      errors.ExportError: no finished run, damaged, or `to` needs a package that is
        missing.
      errors.WorkdirError: the files cannot be written.
    """
    faults = {"--workdir": paths.fault(directory), "--to": fields.fault(to, ENDINGS)}
    if found := [f"{flag} {fault}" for flag, fault in faults.items() if fault]:
        raise errors.ConfigError(found)
    directory = paths.local(directory, "--workdir")
    network, card, settings = student(directory)
    if network.model.vam is not None and to != "stablehlo":
        raise errors.ExportError(
            f"{directory}: its gates depend on the image (student.vam.gate=dynamic), "
            "so no plain network computes the same; use --to=stablehlo, or train with "
            "static gates."
        )
    path = directory / FOLDER / (card["network"] + ENDINGS[to])
    if to == "stablehlo":
        data = program(network, tuple(card["result"]["image_shape"]))
        write = functools.partial(workdir.write_bytes, path, data)
    else:
        variables: Any = network.variables
        weights = interop.to_torch(card["network"], variables)
        write = functools.partial(interop.save_torch_file, path, weights)
    try:
        path.parent.mkdir(exist_ok=True)
        write()
        _write_card(directory, path, card, settings)
    except OSError as error:
        raise errors.WorkdirError(
            f"{path.parent}: cannot be written: {error.strerror or error}\n"
            "Free space or change rights there."
        ) from error
    notify(f"{path} ({path.stat().st_size:,} bytes), told of in {path.stem}.md")
    return path


def program(network: weights_lib.Loaded, image_shape: tuple[int, ...]) -> bytes:
    """The network from pixels to logits as one serialised `jax.export` artifact.

    It maps uint8 RGB images (B, H, W, 3), for any B, to float32 logits (B, classes):
    normalisation and weights are inside. It runs on CPU, CUDA, ROCm and TPU, computes
    in the network's own dtype, and needs nothing but JAX (and flatbuffers) to load.

    Args:
      network: with variables, mean and std.
      image_shape: (H, W, 3).
    """
    see = pixels(network)
    variables: Any = network.variables

    def logits(images: jax.Array) -> jax.Array:
        outputs: Any = network.model.apply(variables, see(images), train=False)
        return outputs.logits

    (batch,) = jax.export.symbolic_shape("b")
    images = jax.ShapeDtypeStruct((batch, *image_shape), jnp.uint8)
    exported = jax.export.export(jax.jit(logits), platforms=_PLATFORMS)(images)
    return bytes(exported.serialize())


def pixels(network: weights_lib.Loaded) -> spec.Pixels:
    """How uint8 images become its input; ValueError where that is not known."""
    if network.mean is None or network.std is None:
        raise ValueError(f"{network.source}: mean and std of its images are not known")
    dtype = network.model.dtype
    return spec.Pixels(network.mean, network.std, dtype, network.size)


def student(
    directory: Path,
) -> tuple[weights_lib.Loaded, dict[str, Any], dict[str, Any]]:
    """A finished run's student, the card in its file, and the run's settings.

    Raises:
      errors.ExportError: no finished run, or damaged.
    """
    settings = workdir.settings(directory)
    path = directory / workdir.STUDENT
    try:
        return *weights_lib.student(path, settings["dtype"]), settings
    except errors.TeacherError as error:
        raise errors.ExportError(f"{path}\n{error}") from error


def _write_card(
    directory: Path, path: Path, card: dict[str, Any], settings: dict[str, Any]
) -> None:
    """A model card beside the file, which also tells of earlier exports there."""
    environment = {}
    if (directory / workdir.ENVIRONMENT).exists():
        environment = workdir.read_json(directory / workdir.ENVIRONMENT)
    files = [path.with_suffix(ending) for ending in ENDINGS.values()]
    names = [file.name for file in files if file.exists()]
    text = model_card.render(card, settings, environment, names)
    workdir.write_bytes(path.with_suffix(".md"), text.encode())
