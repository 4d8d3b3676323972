"""Exports the plain student of a finished run in formats other tools can load."""

import contextlib
import functools
import io
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp

from lakd_jax import errors, fields, interop, paths
from lakd_jax.interop import weights as weights_lib
from lakd_jax.report import model_card
from lakd_jax.store import bucket, workdir
from lakd_jax.training import predict
from lakd_jax.training import spec as spec_lib

FOLDER = "export"  # in the run's directory
ENDINGS = {
    "safetensors": ".safetensors",
    "torch": ".pth",
    "stablehlo": ".stablehlo",
    "onnx": ".onnx",
}
WHICH = {"last": workdir.STUDENT, "best": workdir.BEST}
_PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def run(
    directory: str | Path,
    to: str,
    *,
    which: str = "last",
    notify: Callable[[str], None] = print,
) -> Path:
    """Writes the student of a run and its model card to `directory`/export.

    Args:
      directory: directory of a finished run, or of one of its baselines.
      to: "safetensors" or "torch" (PyTorch's names and layout), or "stablehlo" or
        "onnx" (the entire computation, see `program` and `onnx`).
      which: "last", the student of the last epoch, or "best", of the epoch that was
        best on minival.
      notify: receives progress lines for the user.

    Returns:
      The path of the exported file.

    Raises:
      errors.ConfigError: `to` is unknown, or `directory` is neither a local path nor
        in a bucket.
      errors.ExportError: there is no finished run, it is damaged, or `to` needs a
        package that is missing.
      errors.WorkdirError: the files cannot be written.
    """
    faults = {
        "--workdir": paths.place_fault(directory),
        "--to": fields.fault(to, ENDINGS),
        "--which": fields.fault(which, WHICH),
    }
    if found := [f"{flag} {fault}" for flag, fault in faults.items() if fault]:
        raise errors.ConfigError(found)
    directory = paths.place(directory, "--workdir")
    network, card, settings = student(directory, which)
    if network.model.vam is not None and to not in _PROGRAMS:
        raise errors.ExportError(
            f"{directory}: its gates depend on the image (student.vam.gate=dynamic), "
            "so no plain network computes the same; use --to=stablehlo or onnx, or "
            "train with static gates."
        )
    name = card["network"] + ("" if which == "last" else f"-{which}")
    path = directory / FOLDER / (name + ENDINGS[to])
    if to in _PROGRAMS:
        data = _PROGRAMS[to](network, tuple(card["result"]["image_shape"]))
        write = functools.partial(workdir.write_bytes, path, data)
    else:
        variables: Any = network.variables
        weights = interop.to_torch(card["network"], variables)
        write = functools.partial(interop.save_torch_file, path, weights)
    try:
        bucket.make_folder(path.parent)
        write()
        _write_card(directory, path, card, settings, which)
    except OSError as error:
        raise errors.WorkdirError(
            f"{path.parent}: cannot be written: {error.strerror or error}\n"
            "Free space or change rights there."
        ) from error
    notify(f"{path} ({bucket.size(path):,} bytes), described in {path.stem}.md")
    return path


def program(network: weights_lib.Loaded, image_shape: tuple[int, ...]) -> bytes:
    """Serialises the network, from pixels to logits, as a `jax.export` artifact.

    It maps uint8 RGB images (B, H, W, 3), for any B, to float32 logits (B, classes)
    and contains the normalisation and the weights. It runs on CPU, CUDA, ROCm and TPU,
    computes in the network's dtype, and only needs JAX (and flatbuffers) to load.

    Args:
      network: the network with variables, mean and std.
      image_shape: (H, W, 3).
    """
    (batch,) = jax.export.symbolic_shape("b")
    images = jax.ShapeDtypeStruct((batch, *image_shape), jnp.uint8)
    exported = jax.export.export(jax.jit(_logits(network)), platforms=_PLATFORMS)
    return bytes(exported(images).serialize())


def onnx(network: weights_lib.Loaded, image_shape: tuple[int, ...]) -> bytes:
    """Serialises the network, from pixels to logits, as an ONNX model.

    Its only input takes what `program` takes, its only output is the logits.

    Args:
      network: the network with variables, mean and std.
      image_shape: (H, W, 3).

    Raises:
      errors.ExportError: jax2onnx is not installed.
    """
    # It prints what it converts, and warns of plugins that are not needed here.
    for name in ("jax2onnx", "onnx_ir"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        import jax2onnx  # optional, and slow to import
    except ImportError as error:
        raise errors.ExportError(
            "--to=onnx needs jax2onnx, which is not installed: "
            'pip install "lakd-jax[onnx]"'
        ) from error
    images = jax.ShapeDtypeStruct(("B", *image_shape), jnp.uint8)
    with contextlib.redirect_stdout(io.StringIO()):
        model: Any = jax2onnx.to_onnx(_logits(network), inputs=[images])
    # Shapes between its first and last nodes, some of them wrong; readers infer them.
    del model.graph.value_info[:]
    return model.SerializeToString()


_PROGRAMS = {"stablehlo": program, "onnx": onnx}


def _logits(network: weights_lib.Loaded) -> Callable[[jax.Array], jax.Array]:
    to_input = pixels(network)
    variables: Any = network.variables

    def logits(images: jax.Array) -> jax.Array:
        outputs: Any = network.model.apply(variables, to_input(images), train=False)
        return outputs.logits

    return logits


def pixels(network: weights_lib.Loaded) -> spec_lib.Pixels:
    """Returns the conversion of uint8 images to the network's input.

    Raises:
      ValueError: its normalisation is unknown.
    """
    if network.mean is None or network.std is None:
        raise ValueError(f"{network.source}: mean and std of its images are unknown")
    dtype = network.model.dtype
    return spec_lib.Pixels(network.mean, network.std, dtype, network.size)


def predictor(network: weights_lib.Loaded) -> predict.Predictor:
    """Returns the network with all that images pass before it.

    Raises:
      errors.ExportError: its file does not say how images are prepared.
    """
    if network.preparation is None:
        raise errors.ExportError(
            f"{network.source}: does not say how its images are prepared; only a "
            "student of a run does."
        )
    variables = jax.device_put(network.variables)
    return predict.Predictor(
        network.model, variables, pixels(network), network.preparation
    )


def student(
    directory: Path, which: str = "last"
) -> tuple[weights_lib.Loaded, dict[str, Any], dict[str, Any]]:
    """Loads a finished run's student, the card in its file, and the run's settings.

    Args:
      directory: of the run.
      which: as for `run`.

    Raises:
      errors.ExportError: there is no finished run, or it is damaged.
    """
    settings = workdir.settings(directory)
    path = directory / WHICH[which]
    if which == "best" and not path.exists():
        raise errors.ExportError(
            f"{directory}: has no {workdir.BEST}: it was trained without a minival "
            "split, so that no epoch is the best on it; use --which=last."
        )
    try:
        return *weights_lib.student(path, settings["dtype"]), settings
    except errors.TeacherError as error:
        raise errors.ExportError(f"{path}\n{error}") from error


def _write_card(
    directory: Path,
    path: Path,
    card: dict[str, Any],
    settings: dict[str, Any],
    which: str,
) -> None:
    """Writes the model card next to the file; it also covers earlier exports there."""
    environment = {}
    if (directory / workdir.ENVIRONMENT).exists():
        environment = workdir.read_json(directory / workdir.ENVIRONMENT)
    files = [path.with_suffix(ending) for ending in ENDINGS.values()]
    names = [file.name for file in files if file.exists()]
    text = model_card.render(card, settings, environment, names, which)
    workdir.write_bytes(path.with_suffix(".md"), text.encode())
