"""The teacher's outputs on V augmented views of every training image, kept on disk.

An augmented image follows from (seed, view, example), so a frozen teacher need be asked
once. A folder holds one subfolder a view: a raw file for each array and, written last,
a manifest with their checksums. Views that are missing or damaged are made anew.
"""

import functools
import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from lakd_jax import errors
from lakd_jax.data import device
from lakd_jax.report import summary
from lakd_jax.runtime import backend, interrupt
from lakd_jax.store import manifest, workdir
from lakd_jax.training import spec as spec_lib
from lakd_jax.training import teacher_outputs

PyTree = Any
Notify = Callable[[str], None]

CHECKED = 512  # examples on which stored outputs are held against the teacher
POINTS = 0.1  # of 100 by which the right answers among them may differ
# Share of the largest value by which one may differ, by what is computed in: other
# devices round otherwise.
TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}
_MANIFEST = "manifest.json"
_PATIENCE = 10.0  # seconds between two lines about progress


class OutputsComputer:
    """Asks a teacher about any views of the training images, by one program."""

    def __init__(
        self,
        spec: spec_lib.StepSpec,
        variables: PyTree,
        data: device.DeviceData,
        batch_size: int,
        guard: interrupt.Guard,
    ):
        """`spec.views` is V; `guard` lets an interruption through."""
        self.spec, self._guard = spec, guard
        self._arguments = variables, data
        self._batch_size = batch_size
        self._program: Any = None

    @property
    def examples(self) -> int:
        """N, how many training images there are."""
        return self._arguments[1].images.shape[0]

    def shapes(self) -> teacher_outputs.TeacherOutputs:
        """Shapes (V, N, ...) and types of all answers; nothing is computed."""
        image = self._arguments[1].images.shape[1:]
        return shapes(self.spec, self._arguments[0], image, self.examples)

    def __call__(
        self, views: np.ndarray, rows: np.ndarray
    ) -> teacher_outputs.TeacherOutputs:
        """The answers (n, ...), on the host, on views (n,) of the examples at `rows`.

        `n` is at most `batch_size`. Raises interrupt.Interrupted.
        """
        count, missing = len(rows), (0, self._batch_size - len(rows))
        asked = [np.pad(x.astype(np.int32), missing) for x in (views, rows)]
        if self._program is None:
            function = functools.partial(teacher_outputs.compute_outputs, self.spec)
            lowered = jax.jit(function).lower(*self._arguments, *asked)
            options = backend.compiler_options()
            with self._guard.released():
                self._program = lowered.compile(compiler_options=options)
        cached_outputs = jax.device_get(self._program(*self._arguments, *asked))
        self._guard.check()
        return jax.tree.map(lambda x: x[:count], cached_outputs)

    def batches(self, total: int) -> list[np.ndarray]:
        """The numbers below `total` in pieces that one call takes."""
        return np.split(
            np.arange(total), range(self._batch_size, total, self._batch_size)
        )


def shapes(
    spec: spec_lib.StepSpec,
    variables: PyTree,
    image_shape: Sequence[int],
    examples: int,
) -> teacher_outputs.TeacherOutputs:
    """Shapes (V, N, ...) and types of all answers; nothing is computed.

    Args:
      learner: its `views` is V.
      variables: the teacher's, or their shapes.
      image_shape: (H, W, 3) of the training images.
      examples: N.
    """

    def one(variables: PyTree, image: jax.Array) -> teacher_outputs.TeacherOutputs:
        zero = jnp.zeros(1, jnp.int32)
        key = jax.random.key(0)
        data = device.DeviceData(image, zero, zero, key, key)
        return teacher_outputs.compute_outputs(spec, variables, data, zero, zero)

    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.uint8)
    found = jax.eval_shape(one, variables, image)
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((spec.views, examples, *x.shape[1:]), x.dtype),
        found,
    )


def require_room(wanted: teacher_outputs.TeacherOutputs, limit: int) -> None:
    """Raises errors.ConfigError where `wanted` (of `shapes`) exceeds `limit` MiB."""
    views, examples = wanted.logits.shape[:2]
    parts = {
        name: math.prod(x.shape[2:]) * x.dtype.itemsize
        for name, x in manifest.named_leaves(wanted).items()
    }
    image = sum(parts.values())
    total = image * views * examples
    if total <= limit * 2**20:
        return
    fit = limit * 2**20 // (image * examples)
    lower = f"lower teacher.views to at most {fit}" if fit else "set teacher.views to 0"
    listed = ", ".join(f"{name} {size:,}" for name, size in parts.items())
    raise errors.ConfigError(
        [
            f"teacher.views is {views}: {image:,} bytes an image ({listed}) x "
            f"{examples:,} images x {views} views = {total / 2**20:,.0f} MiB, more "
            f"than teacher.views_mib ({limit}): {lower}, or raise teacher.views_mib"
        ]
    )


def blank(
    wanted: teacher_outputs.TeacherOutputs, mesh: jax.sharding.Mesh
) -> teacher_outputs.TeacherOutputs:
    """Zeros in place of answers, on every device: a dry run asks no teacher."""
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), wanted)
    return _placed(zeros, mesh)


def settings(
    spec: spec_lib.StepSpec,
    variables: PyTree,
    wanted: teacher_outputs.TeacherOutputs,
    *,
    teacher: str,
    data: str,
    seed: int,
) -> dict[str, Any]:
    """All that stored answers depend on, as values JSON can hold.

    Args:
      learner: that trains the student.
      variables: of the teacher, as it is run.
      wanted: the shapes of the answers.
      teacher: name of the network.
      data: fingerprint of the data set.
      seed: of the augmentation.
    """
    pixels, leaves = spec.teacher_pixels, manifest.named_leaves(wanted)
    return {
        "teacher": teacher,
        "weights": manifest.digest(variables),
        "mean": list(pixels.mean),
        "std": list(pixels.std),
        "dtype": pixels.dtype.name,
        "size": pixels.size,
        "data": data,
        "seed": seed,
        "pad": spec.pad,
        "flip": spec.flip,
        "views": spec.views,
        "stored": {n: f"{x.dtype.name}{list(x.shape)}" for n, x in leaves.items()},
        "joints": list(spec.partition.teacher_joints if wanted.joints else ()),
        "preact": spec.preact,
    }


def kept(
    cache: Path,
    computer: OutputsComputer,
    key: dict[str, Any],
    labels: np.ndarray,
    notify: Notify,
) -> teacher_outputs.TeacherOutputs:
    """The answers (V, N, ...) of all views, on every device of the learner.

    Read from a folder in `cache`, made there where they are missing, and held against
    the teacher.

    Args:
      cache: where teachers are kept.
      asker: that asks the teacher.
      key: see `settings`; the folder's name follows from it.
      labels: (N,) of the training images.
      notify: receives lines for the person watching.

    Raises:
      errors.TeacherError: what is stored is not what the teacher says.
      errors.WorkdirError: the folder cannot be written, or another process makes it.
      interrupt.Interrupted: a signal came; whole views are kept.
    """
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
    folder = cache / f"{key['teacher']}-views-{digest}"
    cached_outputs = jax.tree.map(
        lambda x: np.empty(x.shape, x.dtype), computer.shapes()
    )
    views = range(computer.spec.views)
    missing = [
        v for v in views if not _read(_place(folder, v), cached_outputs, v, notify)
    ]
    if missing:
        notify(f"the teacher's outputs, {len(missing)} of {len(views)} views, {folder}")
        with workdir.prepare(folder, key):
            _make(folder, computer, cached_outputs, missing, notify)
    _verify(folder, computer, cached_outputs, labels)
    return _placed(cached_outputs, computer.spec.mesh)


def _placed(
    cached_outputs: teacher_outputs.TeacherOutputs, mesh: jax.sharding.Mesh
) -> teacher_outputs.TeacherOutputs:
    # Not `state.replicate`, whose copy is for what a step donates.
    return jax.device_put(cached_outputs, NamedSharding(mesh, PartitionSpec()))


def _place(folder: Path, view: int) -> Path:
    return folder / f"view{view}"


def _file(place: Path, name: str) -> Path:
    return place / f"{name.replace('/', '-')}.bin"


def _of_view(
    cached_outputs: teacher_outputs.TeacherOutputs, view: int
) -> dict[str, np.ndarray]:
    """Its part of the arrays (V, N, ...), by name: views (N, ...) of the memory."""
    return {name: x[view] for name, x in manifest.named_leaves(cached_outputs).items()}


def _read(
    place: Path,
    cached_outputs: teacher_outputs.TeacherOutputs,
    view: int,
    notify: Notify,
) -> bool:
    """Fills in a view from its subfolder; False if it is missing or damaged."""
    if not (place / _MANIFEST).exists():
        return False
    try:
        stored = workdir.read_json(place / _MANIFEST)
        manifest.check_manifest(stored, view)
        parts = _of_view(cached_outputs, view)
        for name, part in parts.items():
            raw = np.fromfile(_file(place, name), np.uint8)
            part[...] = raw.view(part.dtype).reshape(part.shape)
        manifest.check_leaves(stored, parts)
    except (OSError, ValueError, manifest.DamagedError) as error:
        notify(f"{place}: damaged ({error}); it is made anew")
        return False
    return True


def _make(
    folder: Path,
    computer: OutputsComputer,
    cached_outputs: teacher_outputs.TeacherOutputs,
    missing: Sequence[int],
    notify: Notify,
) -> None:
    """Asks about the views `missing` and writes each when it is whole."""
    batches = computer.batches(computer.examples)
    total, done = len(missing) * computer.examples, 0
    began = said = time.monotonic()
    for view in missing:
        for rows in batches:
            told = computer(np.full(len(rows), view), rows)
            for name, part in _of_view(cached_outputs, view).items():
                part[rows] = manifest.named_leaves(told)[name]
            done, now = done + len(rows), time.monotonic()
            if now - said > _PATIENCE and done < total:
                said, left = now, (now - began) * (total - done) / done
                share = f"{done:,} of {total:,} images asked about"
                notify(f"{share}, {summary.duration(left)} to go")
        _write(_place(folder, view), _of_view(cached_outputs, view), view)


def _write(place: Path, parts: dict[str, np.ndarray], view: int) -> None:
    place.mkdir(exist_ok=True)
    for name, part in parts.items():
        workdir.write_bytes(_file(place, name), part.reshape(-1).view(np.uint8).data)
    workdir.write_json(place / _MANIFEST, manifest.describe(view, parts, {}))


def _verify(
    folder: Path,
    computer: OutputsComputer,
    cached_outputs: teacher_outputs.TeacherOutputs,
    labels: np.ndarray,
) -> None:
    """Raises errors.TeacherError unless the teacher says what is stored.

    It is asked about `CHECKED` examples, evenly spread over all views.
    """
    total = computer.spec.views * computer.examples
    chosen = np.linspace(0, total - 1, min(CHECKED, total)).astype(np.int64)
    views, rows = np.divmod(chosen, computer.examples)
    told = [computer(views[b], rows[b]) for b in computer.batches(len(chosen))]
    live = jax.tree.map(lambda *parts: np.concatenate(parts), *told)
    stored = jax.tree.map(lambda x: x[views, rows], cached_outputs)
    share = TOLERANCE[computer.spec.teacher_pixels.dtype.name]
    found = _differences(stored, live, share)
    right = [
        int(np.sum(np.argmax(x.logits, -1) == labels[rows])) for x in (stored, live)
    ]
    if 100 * abs(right[0] - right[1]) > POINTS * len(chosen):
        found.append(f"{right[0]} right answers, not {right[1]}, of {len(chosen)}")
    if found:
        raise errors.TeacherError(
            f"{folder}: what is stored is not what the teacher says:\n"
            + "\n".join(found)
            + "\nDelete that folder; the next start makes it anew."
        )


def _differences(
    stored: teacher_outputs.TeacherOutputs,
    live: teacher_outputs.TeacherOutputs,
    share: float,
) -> list[str]:
    """A line for each array that differs by more than this share of the largest."""
    found = []
    theirs = manifest.named_leaves(live)
    for name, ours in manifest.named_leaves(stored).items():
        a, b = (x.astype(np.float32) for x in (ours, theirs[name]))
        largest, difference = np.max(np.abs(b)), np.max(np.abs(a - b))
        if not difference <= share * largest:  # also where one is not a number
            found.append(
                f"{name} differs by {difference:.3g}, more than {share:g} of the "
                f"largest value ({largest:.3g})"
            )
    return found
