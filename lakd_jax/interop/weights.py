"""Brings a network with its weights from wherever the user keeps them."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np

from lakd_jax import errors, interop, models, paths
from lakd_jax.models import chain, folding, vam
from lakd_jax.store import workdir

PyTree = Any

# What a student's file must say of it.
_CARD = frozenset({"network", "num_classes", "options", "vam"})
_CARD |= {"mean", "std", "image_size"}


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A network, its variables (None: to be initialised), and where from.

    `mean`, `std` and `size` (side of the images it was fed, 0: any) are those of its
    own training where the source knows them; `remark` says what reading changed in
    the weights, "" for nothing.
    """

    model: chain.Chain
    variables: PyTree | None
    source: str
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    size: int = 0
    remark: str = ""


def load(
    field: str,
    name: str,
    init: str,
    *,
    shortcut: str,
    dtype: str,
    num_classes: int,
    options: Mapping[str, str] | None = None,
) -> Loaded:
    """The network `name` with the weights that `init` points at.

    Args:
      field: "student" or "teacher", for error messages.
      init: empty (random), a finished run's directory, a `.safetensors` file or a
        PyTorch file. Class count and shortcut type are then read from it.
      options: others of the network, if it is made of random weights.

    Raises:
      errors.TeacherError: nothing is there, it is another network's, or it has
        another number of classes than the data.
    """
    if not init:
        own: dict[str, Any] = {"dtype": jnp.dtype(dtype), **(options or {})}
        if "shortcut" in models.family(name).OPTIONS:  # else it has one kind only
            own["shortcut"] = shortcut
        model = models.create(name, num_classes=num_classes, **own)
        return Loaded(model, None, "random weights")
    path = paths.local(init, f"{field}.init")
    if not path.exists():
        raise errors.TeacherError(
            f"{field}.init: {path} does not exist. It must be a finished run's "
            "directory, a .safetensors file or a PyTorch checkpoint."
        )
    if path.is_dir():
        path = _student_of(field, path)
    try:
        read = _own if interop.is_variables_file(path) else _foreign
        loaded = read(name, path, dtype)
    except errors.TeacherError as e:
        raise errors.TeacherError(f"{field}.init: {path}\n{e}") from e
    if loaded.model.num_classes != num_classes:
        raise errors.TeacherError(
            f"{field}.init: {path} tells {loaded.model.num_classes} classes apart, "
            f"the data has {num_classes}; use weights trained on the same classes."
        )
    return loaded


def save(path: Path, variables: PyTree, network: Loaded, result: dict) -> None:
    """Writes a student so that `load` finds all it needs in the one file.

    Args:
      variables: of the student; `network` names it and its normalisation.
      result: what is known of its quality, kept as it is.
    """
    model = network.model
    card = {
        "network": result["student"],
        "num_classes": model.num_classes,
        "options": {name: getattr(model, name) for name in model.OPTIONS},
        "vam": dataclasses.asdict(model.vam) if model.vam else None,
        "mean": network.mean,
        "std": network.std,
        "image_size": network.size,
        "result": result,
    }
    interop.save_variables(path, variables, card)


def _student_of(field: str, directory: Path) -> Path:
    if not (directory / workdir.RESULT).exists():
        raise errors.TeacherError(
            f"{field}.init: {directory} is not a finished run (it has no "
            f"{workdir.RESULT}); finish it by giving its own command again, or name "
            f"another.{workdir.seeds_hint(directory)}"
        )
    return directory / workdir.STUDENT


def student(path: Path, dtype: str) -> tuple[Loaded, dict[str, Any]]:
    """A student that `save` wrote, and the card it wrote with it.

    Args:
      path: the file.
      dtype: what the network shall compute in; its variables become float32.

    Raises:
      errors.TeacherError: no such file, damaged, or not written by `save`.
    """
    variables, card = interop.load_variables(path)
    missing = _CARD - card.keys()
    if missing:
        raise errors.TeacherError(
            f"is no student of a run: its card lacks {', '.join(sorted(missing))}."
        )
    name = card["network"]
    try:
        model = models.create(
            name,
            num_classes=card["num_classes"],
            dtype=jnp.dtype(dtype),
            **card["options"],
        )
        # For its check of every key and shape; gates are none of PyTorch's.
        weights = interop.to_torch(name, folding.without_gates(variables))
        classes = interop.options_from_torch(name, weights)["num_classes"]
        if classes != model.num_classes:
            raise ValueError(f"it has {classes} classes, its card {model.num_classes}")
        if card["vam"]:  # dynamic gates, which stay
            model = model.clone(vam=vam.Options(**card["vam"]))
        mean, std = (_channels(card[name]) for name in ("mean", "std"))
    except (ValueError, TypeError, AttributeError) as error:  # a card made up or torn
        raise errors.TeacherError(f"is no student of a run: {error}") from error
    remark = _remark(flax.traverse_util.flatten_dict(variables, sep="/"))
    variables = jax.tree.map(lambda x: x.astype(np.float32), variables)
    size = card["image_size"]
    return Loaded(model, variables, str(path), mean, std, size, remark), card


def _channels(values: list[float]) -> tuple[float, ...]:
    red, green, blue = map(float, values)
    return red, green, blue


def _own(name: str, path: Path, dtype: str) -> Loaded:
    """A student that `save` wrote, which must be the network `name`."""
    loaded, card = student(path, dtype)
    if card["network"] != name:
        raise errors.TeacherError(
            f"holds a {card['network']}, not the {name} that the config names; "
            "make the two agree."
        )
    return loaded


def _foreign(name: str, path: Path, dtype: str) -> Loaded:
    """A PyTorch state dictionary."""
    state = interop.load_torch_file(path)
    options = interop.options_from_torch(name, state)
    model = models.create(name, dtype=jnp.dtype(dtype), **options)
    variables = interop.from_torch(name, state)
    return Loaded(model, variables, str(path), remark=_remark(state))


def _remark(tensors: dict[str, Any]) -> str:
    """What becomes of weights that are not float32."""
    types = " and ".join(interop.other_types(tensors))
    return f"{types} weights cast to float32" if types else ""


def gated(loaded: Loaded, options: vam.Options | None) -> Loaded:
    """A student that came from a file (or nowhere) as it is to be trained.

    Raises errors.TeacherError where the file holds gates that are not asked for.
    """
    has = loaded.model.vam
    if has is not None and has != options:
        raise errors.TeacherError(
            f"student.init: {loaded.source} has gates that depend on the image, with "
            f"{_fields(has)}; set student.vam.enabled and give student.vam these "
            "values, or start from other weights."
        )
    return dataclasses.replace(loaded, model=loaded.model.clone(vam=options))


def _fields(options: vam.Options) -> str:
    return ", ".join(f"{k}={v}" for k, v in dataclasses.asdict(options).items())
