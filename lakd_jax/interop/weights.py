"""Loads a network with its weights from a run, a safetensors or a PyTorch file."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np

from lakd_jax import errors, interop, models, paths
from lakd_jax.data import preparation as preparation_lib
from lakd_jax.interop import classes as classes_lib
from lakd_jax.interop import published
from lakd_jax.models import chain, folding, heads, vam
from lakd_jax.store import manifest, workdir

PyTree = Any

FUNCTION = "lakd_jax.teacher_from"  # the source of registered functions
# Options of networks that matter to training only.
_WITHOUT_ARRAYS = frozenset({"dropout", "drop_path"})
# Required entries of the card of a student's file.
_CARD = frozenset({"network", "num_classes", "options", "vam"})
_CARD |= {"mean", "std", "image_size"}


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A network, its variables (None: not initialised yet), and their source.

    `mean`, `std` and `size` (height and width of its images, 0 for any) are those it
    was trained with, and `preparation` is that of its test images, if the source has
    them; `remark` describes a change made to the weights when they were read, "" for
    none. `classes` are the names of its classes, in the order of the logits; () if
    unknown. `difference` describes how its classes differ from the data's, "" for the
    same. `digest` is of the variables as the source has them, before anything was
    changed. `origin` is what their publisher says, of weights given by name.
    """

    model: chain.Chain
    variables: PyTree | None
    source: str
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    size: int = 0
    preparation: preparation_lib.Preparation | None = None
    remark: str = ""
    classes: tuple[str, ...] = ()
    difference: str = ""
    digest: str = ""
    origin: published.Published | None = None


def load(
    field: str,
    name: str,
    init: str,
    *,
    dtype: str,
    num_classes: int,
    options: Mapping[str, Any] | None = None,
    image_size: int = 0,
    data_size: int = 0,
    key: str = "",
    classes: Sequence[str] = (),
    new_head: bool = False,
    any_classes: bool = False,
    origin: published.Published | None = None,
) -> Loaded:
    """Loads the network `name` with the weights at `init`.

    If both sides know the names of their classes, the network's are put into the order
    of the data's.

    Args:
      field: "student" or "teacher", for error messages.
      name: one of `models.names()`.
      init: "" (random weights), the directory of a finished run, a `.safetensors`
        file or a PyTorch file, which then say its classes and the shapes of its arrays.
      dtype: compute dtype of the network.
      num_classes: number of classes of the data.
      options: those of `models.create`; of weights from a file only dropout and
        stochastic depth, which have no arrays.
      image_size: height and width of the network's images, 0 for those of `data_size`
        (a teacher from a run: of that run), the data's. They matter to networks that
        take one size; those of a file are interpolated to it.
      data_size: see `image_size`; 0 if unknown.
      key: the entry of a PyTorch file that is read; see `interop.load_torch_file`.
      classes: names of the data's classes, in order; () if unknown.
      new_head: whether to leave out the classifier (see `heads.removed`); the network
        then has the data's classes, and its variables lack those arrays.
      any_classes: whether weights of other classes than the data's are loaded as they
        are, with `Loaded.difference`.
      origin: what the publisher of the file at `init` says about it, if known.

    Raises:
      errors.TeacherError: `init` does not exist, is for another network, or has
        other classes than the data.
    """
    options = {"dtype": jnp.dtype(dtype), **(options or {})}
    if models.family(name).WHOLE:
        loaded = _of_function(name, num_classes, tuple(classes))
        if loaded.difference and not any_classes:
            raise errors.TeacherError(other_classes(field, loaded))
        return loaded
    if not init:
        side = image_size or data_size
        model = _created(field, name, {"num_classes": num_classes, **options}, side)
        return Loaded(model, None, "random weights")
    path = _file(field, init)
    try:
        loaded = _read(field, name, path, dtype, key)
        if origin:
            loaded = _from_publisher(loaded, origin, classes)
        loaded = dataclasses.replace(loaded, digest=manifest.digest(loaded.variables))
        of_run = loaded.size if field == "teacher" else 0
        loaded = _as_wanted(loaded, options, image_size or of_run or data_size)
        if new_head:
            return _without_head(loaded, num_classes, tuple(classes))
        loaded = _in_order(loaded, num_classes, tuple(classes))
    except errors.TeacherError as e:
        raise errors.TeacherError(f"{field}.init: {path}\n{e}") from e
    if loaded.difference and not any_classes:
        raise errors.TeacherError(other_classes(field, loaded))
    return loaded


def _of_function(name: str, num_classes: int, names: tuple[str, ...]) -> Loaded:
    """Returns a registered function, whose weights are the arrays it was made with."""
    model: Any = models.create(name, num_classes=num_classes)
    function = model.function
    model = model.clone(num_classes=function.num_classes)
    arrays = {f"array{i}": array for i, array in enumerate(function.arrays)}
    loaded = Loaded(
        model,
        {"params": arrays},
        FUNCTION,
        function.mean,
        function.std,
        function.image_size,
        classes=function.classes,
        digest=manifest.digest(arrays),
    )
    return _in_order(loaded, num_classes, names)


def _created(
    field: str, name: str, options: Mapping[str, Any], side: int
) -> chain.Chain:
    """Makes a network, of those that take one size of images the one for `side`."""
    sized = side and "image_size" in models.family(name).OPTIONS
    try:
        return models.create(name, **options, **({"image_size": side} if sized else {}))
    except ValueError as e:
        raise errors.ConfigError([f"{field}.{e}"]) from e


def _file(field: str, init: str) -> Path:
    """Returns the file of weights that `init` names."""
    path = paths.place(init, f"{field}.init")
    if not path.exists():
        raise errors.TeacherError(
            f"{field}.init: {path} does not exist. It must be a finished run's "
            "directory, a .safetensors file, a PyTorch checkpoint, or a name that "
            "--mode=teachers lists."
        )
    return _student_file(field, path) if path.is_dir() else path


def _read(field: str, name: str, path: Path, dtype: str, key: str) -> Loaded:
    """Reads a file of weights, as it is."""
    if not interop.is_variables_file(path):
        return _from_torch(name, path, dtype, key)
    if key:
        raise errors.TeacherError(
            f"is a student of a run, which has no entry {key!r}; leave "
            f"{field}.init_key empty."
        )
    return _from_run(name, path, dtype)


def _from_publisher(
    loaded: Loaded, origin: published.Published, names: Sequence[str]
) -> Loaded:
    """Returns the network with what its publisher says; `names` are the data's classes.

    What the publisher does not say is as the file has it.

    Raises:
      errors.TeacherError: the publisher names another number of classes.
    """
    classes = origin.class_names(names)
    if classes and len(classes) != loaded.model.num_classes:
        raise errors.TeacherError(
            f"has {loaded.model.num_classes} classes, but {origin.source} names "
            f"{len(classes)}."
        )
    return dataclasses.replace(
        loaded,
        mean=origin.mean or loaded.mean,
        std=origin.std or loaded.std,
        size=origin.size or loaded.size,
        preparation=origin.preparation or loaded.preparation,
        classes=classes or loaded.classes,
        origin=origin,
    )


def _as_wanted(loaded: Loaded, options: Mapping[str, Any], side: int) -> Loaded:
    """Returns the network with the options that have no arrays, for images of `side`.

    Raises:
      errors.TeacherError: it cannot take images of that size.
    """
    free = {k: v for k, v in options.items() if k in _WITHOUT_ARRAYS}
    model, variables = loaded.model.clone(**free), loaded.variables
    before = model.fixed_side
    if not before or side in (0, before):
        return dataclasses.replace(loaded, model=model)
    try:
        model, variables = model.resized(variables, side)
    except ValueError as e:
        raise errors.TeacherError(f"cannot take images of {side}x{side}: {e}") from e
    remark = (
        f"position embeddings interpolated from images of {before}x{before} to "
        f"{side}x{side}"
    )
    return dataclasses.replace(
        loaded,
        model=model,
        variables=variables,
        remark="; ".join(filter(None, [loaded.remark, remark])),
    )


def other_classes(field: str, loaded: Loaded) -> str:
    """Returns the message about weights whose classes differ from the data's."""
    remedy = "Use weights trained on the same classes"
    if field == "student":
        remedy += ", or set student.new_head to load all but the classifier"
    return f"{field}.init: {loaded.source} has {loaded.difference}\n{remedy}."


def _in_order(loaded: Loaded, num_classes: int, names: tuple[str, ...]) -> Loaded:
    """Returns the network with its classes in the order of `names`, if it has these."""
    order = classes_lib.order(loaded.classes, names)
    if order is None:
        counts = loaded.model.num_classes, num_classes
        found = classes_lib.difference(loaded.classes, names, *counts)
        return dataclasses.replace(loaded, difference=found)
    if loaded.classes == names:
        return loaded
    remark = f"its {len(names)} classes were put into the order of the data's"
    model, variables = loaded.model, loaded.variables
    if model.WHOLE:
        model = model.clone(order=tuple(order))
    else:
        variables = heads.reordered(model, variables, order)
    return dataclasses.replace(
        loaded,
        model=model,
        variables=variables,
        classes=names,
        remark="; ".join(filter(None, [loaded.remark, remark])),
    )


def _without_head(loaded: Loaded, num_classes: int, names: tuple[str, ...]) -> Loaded:
    """Returns the network without its classifier, for other classes."""
    remark = "its classifier is drawn anew (student.new_head)"
    return dataclasses.replace(
        loaded,
        model=loaded.model.clone(num_classes=num_classes),
        variables=heads.removed(loaded.model, loaded.variables),
        classes=names,
        remark="; ".join(filter(None, [loaded.remark, remark])),
    )


def save(path: Path, variables: PyTree, network: Loaded, result: dict) -> None:
    """Writes a student as one file that `load` can read without its config.

    Args:
      path: the file to write.
      variables: of the student.
      network: the student's network and normalisation.
      result: the result of its run, stored unchanged.
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
        "preparation": dataclasses.asdict(network.preparation)
        if network.preparation
        else None,
        "result": result,
    }
    if model.projector:  # for readers; the names of the arrays say it, too
        card["projector"] = dataclasses.asdict(model.projector)
    interop.save_variables(path, variables, card)


def _student_file(field: str, directory: Path) -> Path:
    if not (directory / workdir.RESULT).exists():
        raise errors.TeacherError(
            f"{field}.init: {directory} is not a finished run (it has no "
            f"{workdir.RESULT}); finish it by running its command again, or give "
            f"another.{workdir.seeds_hint(directory)}"
        )
    return directory / workdir.STUDENT


def student(path: Path, dtype: str) -> tuple[Loaded, dict[str, Any]]:
    """Loads a student written by `save`, and its card.

    Args:
      path: the file.
      dtype: compute dtype of the network; its variables become float32.

    Raises:
      errors.TeacherError: the file is missing, damaged, or not written by `save`.
    """
    variables, card = interop.load_variables(path)
    missing = _CARD - card.keys()
    if missing:
        raise errors.TeacherError(
            f"is not a student of a run: its card lacks {', '.join(sorted(missing))}."
        )
    name = card["network"]
    try:
        model = models.create(
            name,
            num_classes=card["num_classes"],
            dtype=jnp.dtype(dtype),
            **card["options"],
        )
        # Called to check every key and shape; PyTorch's networks have no gates.
        weights = interop.to_torch(name, folding.without_gates(variables))
        found = interop.options_from_torch(name, weights)
        if found["num_classes"] != model.num_classes:
            raise ValueError(
                f"it has {found['num_classes']} classes, its card {model.num_classes}"
            )
        model = model.clone(projector=found.get("projector"))
        if card["vam"]:  # dynamic gates, which are not folded
            model = model.clone(vam=vam.Options(**card["vam"]))
        mean, std = (_channels(card[name]) for name in ("mean", "std"))
        steps = card.get("preparation")  # files of others have none
        preparation = preparation_lib.Preparation(**steps) if steps else None
        names = _class_names(card)
    except (ValueError, TypeError, AttributeError) as error:  # an invalid card
        raise errors.TeacherError(f"is not a student of a run: {error}") from error
    remark = _remark(flax.traverse_util.flatten_dict(variables, sep="/"))
    variables = jax.tree.map(lambda x: x.astype(np.float32), variables)
    return Loaded(
        model,
        variables,
        str(path),
        mean,
        std,
        card["image_size"],
        preparation,
        remark,
        names,
    ), card


def _channels(values: list[float]) -> tuple[float, ...]:
    red, green, blue = map(float, values)
    return red, green, blue


def _class_names(card: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the names in a card; () if it has none, or the same one twice."""
    names = tuple(map(str, card.get("result", {}).get("class_names", ())))
    return names if len(set(names)) == card["num_classes"] else ()


def _from_run(name: str, path: Path, dtype: str) -> Loaded:
    """Loads a student written by `save`, which must be the network `name`."""
    loaded, card = student(path, dtype)
    if card["network"] != name:
        raise errors.TeacherError(
            f"holds a {card['network']}, not the {name} that the config names; "
            "make the two agree."
        )
    return loaded


def _from_torch(name: str, path: Path, dtype: str, key: str) -> Loaded:
    """Loads a PyTorch state dictionary into the network `name`."""
    state = interop.load_torch_file(path, key=key)
    options = interop.options_from_torch(name, state)
    model = models.create(name, dtype=jnp.dtype(dtype), **options)
    variables = interop.from_torch(name, state)
    return Loaded(model, variables, str(path), remark=_remark(state))


def _remark(tensors: dict[str, Any]) -> str:
    """Describes the cast of weights that are not float32; "" if all are."""
    dtypes = " and ".join(interop.other_types(tensors))
    return f"{dtypes} weights cast to float32" if dtypes else ""


def gated(loaded: Loaded, options: vam.Options | None) -> Loaded:
    """Returns a student, from a file or not, with the gates that are requested.

    Raises:
      errors.TeacherError: the file holds gates that are not requested.
    """
    found = loaded.model.vam
    if found is not None and found != options:
        raise errors.TeacherError(
            f"student.init: {loaded.source} has gates that depend on the image, with "
            f"{_fields(found)}; set student.vam.enabled and give student.vam these "
            "values, or start from other weights."
        )
    return dataclasses.replace(loaded, model=loaded.model.clone(vam=options))


def _fields(options: vam.Options) -> str:
    return ", ".join(f"{k}={v}" for k, v in dataclasses.asdict(options).items())
