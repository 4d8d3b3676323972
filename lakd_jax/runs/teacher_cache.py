"""Stores the teacher's outputs on V augmented views of every training image.

An augmented image is a function of (seed, view, example), so a frozen teacher need be
run only once. A folder holds one subfolder per view: one raw file per array and,
written last, a manifest with their checksums. Views that are missing or damaged are
computed again.
"""

import dataclasses
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
from lakd_jax.models import ensemble
from lakd_jax.report import summary
from lakd_jax.runtime import backend, interrupt
from lakd_jax.store import bucket, manifest, workdir
from lakd_jax.training import spec as spec_lib
from lakd_jax.training import teacher_outputs

PyTree = Any
Notify = Callable[[str], None]

CHECKED = 512  # examples on which stored outputs are compared with the teacher's
POINTS = 0.1  # percentage points by which the accuracies on them may differ
# The largest difference allowed, relative to the largest value, by the dtype that the
# teacher computes in: devices round differently.
TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}
_MANIFEST = "manifest.json"
_LOG_SECONDS = 10.0  # time between two lines about progress


class OutputsComputer:
    """Computes a teacher's outputs on any views of the training images."""

    def __init__(
        self,
        spec: spec_lib.StepSpec,
        variables: PyTree,
        data: device.DeviceData,
        batch_size: int,
        guard: interrupt.Guard,
    ):
        """`spec.views` is V; `guard` is checked for interruptions."""
        self.spec, self._guard = spec, guard
        self._arguments = variables, data
        self._batch_size = batch_size
        self._program: Any = None

    @property
    def examples(self) -> int:
        """Returns N, the number of training images."""
        return self._arguments[1].images.shape[0]

    def shapes(self) -> teacher_outputs.TeacherOutputs:
        """Returns shapes (V, N, ...) and types of all outputs; computes nothing."""
        image = self._arguments[1].shape
        return shapes(self.spec, self._arguments[0], image, self.examples)

    def __call__(
        self, views: np.ndarray, rows: np.ndarray
    ) -> teacher_outputs.TeacherOutputs:
        """Computes the outputs (n, ...) on views (n,) of the examples at `rows` (n,).

        `n` is at most `batch_size`. The outputs are on the host.

        Raises:
          interrupt.Interrupted: the guard received a signal.
        """
        count, missing = len(rows), (0, self._batch_size - len(rows))
        padded = [np.pad(x.astype(np.int32), missing) for x in (views, rows)]
        if self._program is None:
            function = functools.partial(teacher_outputs.compute_outputs, self.spec)
            lowered = jax.jit(function).lower(*self._arguments, *padded)
            options = backend.compiler_options()
            with self._guard.released():
                self._program = lowered.compile(compiler_options=options)
        outputs = jax.device_get(self._program(*self._arguments, *padded))
        self._guard.check()
        return jax.tree.map(lambda x: x[:count], outputs)

    def batches(self, total: int) -> list[np.ndarray]:
        """Splits the numbers below `total` into pieces of at most `batch_size`."""
        return np.split(
            np.arange(total), range(self._batch_size, total, self._batch_size)
        )


def shapes(
    spec: spec_lib.StepSpec,
    variables: PyTree,
    image_shape: Sequence[int],
    examples: int,
) -> teacher_outputs.TeacherOutputs:
    """Returns shapes (V, N, ...) and types of all outputs, without computing them.

    Args:
      spec: its `views` is V.
      variables: the teacher's, or their shapes.
      image_shape: (H, W, 3) of the training images.
      examples: N.
    """

    shape = tuple(image_shape)

    def one(variables: PyTree, image: jax.Array) -> teacher_outputs.TeacherOutputs:
        zero = jnp.zeros(1, jnp.int32)
        key = jax.random.key(0)
        data = device.DeviceData(image, zero, zero, key, key, shape, whole=True)
        return teacher_outputs.compute_outputs(spec, variables, data, zero, zero)

    image = jax.ShapeDtypeStruct((1, *shape), jnp.uint8)
    single = jax.eval_shape(one, variables, image)
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((spec.views, examples, *x.shape[1:]), x.dtype),
        single,
    )


def require_room(shapes: teacher_outputs.TeacherOutputs, limit: int) -> None:
    """Raises errors.ConfigError if outputs of `shapes` would exceed `limit` MiB."""
    views, examples = shapes.logits.shape[:2]
    sizes = {
        name: math.prod(x.shape[2:]) * x.dtype.itemsize
        for name, x in manifest.named_leaves(shapes).items()
    }
    image = sum(sizes.values())
    total = image * views * examples
    if total <= limit * 2**20:
        return
    fit = limit * 2**20 // (image * examples)
    lower = f"lower teacher.views to at most {fit}" if fit else "set teacher.views to 0"
    listed = ", ".join(f"{name} {size:,}" for name, size in sizes.items())
    fault = (
        f"teacher.views is {views}: {image:,} bytes per image ({listed}) x "
        f"{examples:,} images x {views} views = {total / 2**20:,.0f} MiB, more than "
        f"teacher.views_mib ({limit}): {lower}, or raise teacher.views_mib"
    )
    raise errors.ConfigError([fault])


def blank(
    shapes: teacher_outputs.TeacherOutputs, mesh: jax.sharding.Mesh
) -> teacher_outputs.TeacherOutputs:
    """Returns zeros of these shapes on every device, for a dry run."""
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    return _placed(zeros, mesh)


def settings(
    spec: spec_lib.StepSpec,
    variables: PyTree,
    shapes: teacher_outputs.TeacherOutputs,
    *,
    teacher: str,
    data: str,
    seed: int,
) -> dict[str, Any]:
    """Returns everything that stored outputs depend on, as JSON values.

    Args:
      spec: of the student's training steps.
      variables: of the teacher, as it is run.
      shapes: of the outputs, see `shapes`.
      teacher: name of the network.
      data: fingerprint of the data set.
      seed: of the augmentation.
    """
    pixels, leaves = spec.teacher_pixels, manifest.named_leaves(shapes)
    more: dict[str, Any] = {}
    if spec.distortion.active:
        more["distortion"] = dataclasses.asdict(spec.distortion)
    if isinstance(spec.teacher, ensemble.Ensemble):
        inputs = [str(member.prepare) for member in spec.teacher.members]
        more["teachers"] = [spec.teacher.combine, *inputs]
    return more | {
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
        "joints": list(spec.partition.teacher_joints if shapes.joints else ()),
        "preact": spec.preact,
    }


def kept(
    cache: Path,
    computer: OutputsComputer,
    key: dict[str, Any],
    labels: np.ndarray,
    notify: Notify,
) -> teacher_outputs.TeacherOutputs:
    """Returns the outputs (V, N, ...) of all views, on every device of the mesh.

    Reads them from a folder in `cache`, computes those that are missing, and compares
    some with the teacher's.

    Args:
      cache: where teachers are stored.
      computer: computes the outputs of the teacher.
      key: see `settings`; the folder's name is derived from it.
      labels: (N,) of the training images.
      notify: receives lines of console output.

    Raises:
      errors.TeacherError: cached teacher outputs do not match the teacher.
      errors.WorkdirError: the folder cannot be written, or another process uses it.
      interrupt.Interrupted: a signal arrived; finished views are kept.
    """
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
    folder = cache / f"{key['teacher']}-views-{digest}"
    cached_outputs = jax.tree.map(
        lambda x: np.empty(x.shape, x.dtype), computer.shapes()
    )
    views = range(computer.spec.views)
    missing = [v for v in views if not _read(folder, cached_outputs, v, notify)]
    if missing:
        notify(f"the teacher's outputs, {len(missing)} of {len(views)} views, {folder}")
        with workdir.prepare(folder, key):
            _compute(folder, computer, cached_outputs, missing, notify)
    _verify(folder, computer, cached_outputs, labels)
    return _placed(cached_outputs, computer.spec.mesh)


def _placed(
    cached_outputs: teacher_outputs.TeacherOutputs, mesh: jax.sharding.Mesh
) -> teacher_outputs.TeacherOutputs:
    # Not `mesh.replicate`, which copies: no step donates these arrays.
    return jax.device_put(cached_outputs, NamedSharding(mesh, PartitionSpec()))


def _view_folder(folder: Path, view: int) -> Path:
    return folder / f"view{view}"


def _file(view_folder: Path, name: str) -> Path:
    return view_folder / f"{name.replace('/', '-')}.bin"


def _of_view(
    cached_outputs: teacher_outputs.TeacherOutputs, view: int
) -> dict[str, np.ndarray]:
    """Returns the arrays (N, ...) of a view by name, without copying them."""
    return {name: x[view] for name, x in manifest.named_leaves(cached_outputs).items()}


def _read(
    folder: Path,
    cached_outputs: teacher_outputs.TeacherOutputs,
    view: int,
    notify: Notify,
) -> bool:
    """Reads a view from its folder; returns False if it is missing or damaged."""
    view_folder = _view_folder(folder, view)
    if not (view_folder / _MANIFEST).exists():
        return False
    try:
        stored = workdir.read_json(view_folder / _MANIFEST)
        manifest.check_manifest(stored, view)
        parts = _of_view(cached_outputs, view)
        for name, part in parts.items():
            raw = np.frombuffer(_file(view_folder, name).read_bytes(), np.uint8)
            part[...] = raw.view(part.dtype).reshape(part.shape)
        manifest.check_leaves(stored, parts)
    except (OSError, ValueError, manifest.DamagedError) as error:
        notify(f"{view_folder}: damaged ({error}); computing it again")
        return False
    return True


def _compute(
    folder: Path,
    computer: OutputsComputer,
    cached_outputs: teacher_outputs.TeacherOutputs,
    missing: Sequence[int],
    notify: Notify,
) -> None:
    """Computes the views `missing` and writes each when it is complete."""
    batches = computer.batches(computer.examples)
    total, done = len(missing) * computer.examples, 0
    began = logged = time.monotonic()
    for view in missing:
        for rows in batches:
            outputs = computer(np.full(len(rows), view), rows)
            for name, part in _of_view(cached_outputs, view).items():
                part[rows] = manifest.named_leaves(outputs)[name]
            done, now = done + len(rows), time.monotonic()
            if now - logged > _LOG_SECONDS and done < total:
                logged, left = now, (now - began) * (total - done) / done
                share = f"{done:,} of {total:,} images done"
                notify(f"{share}, {summary.duration(left)} to go")
        _write(folder, view, _of_view(cached_outputs, view))


def _write(folder: Path, view: int, parts: dict[str, np.ndarray]) -> None:
    view_folder = _view_folder(folder, view)
    bucket.make_folder(view_folder)
    for name, part in parts.items():
        raw = part.reshape(-1).view(np.uint8).data
        workdir.write_bytes(_file(view_folder, name), raw)
    workdir.write_json(view_folder / _MANIFEST, manifest.describe(view, parts, {}))


def _verify(
    folder: Path,
    computer: OutputsComputer,
    cached_outputs: teacher_outputs.TeacherOutputs,
    labels: np.ndarray,
) -> None:
    """Raises errors.TeacherError if cached outputs do not match the teacher.

    Compares `CHECKED` examples, evenly spread over all views.
    """
    total = computer.spec.views * computer.examples
    chosen = np.linspace(0, total - 1, min(CHECKED, total)).astype(np.int64)
    views, rows = np.divmod(chosen, computer.examples)
    batches = [computer(views[b], rows[b]) for b in computer.batches(len(chosen))]
    live = jax.tree.map(lambda *parts: np.concatenate(parts), *batches)
    stored = jax.tree.map(lambda x: x[views, rows], cached_outputs)
    # That of the config; several teachers take float32 images whatever they compute in.
    tolerance = TOLERANCE[computer.spec.student_pixels.dtype.name]
    differences = _differences(stored, live, tolerance)
    right = [int(np.sum(x.logits.argmax(-1) == labels[rows])) for x in (stored, live)]
    if 100 * abs(right[0] - right[1]) > POINTS * len(chosen):
        differences.append(
            f"{right[0]} right answers, not {right[1]}, of {len(chosen)}"
        )
    if differences:
        raise errors.TeacherError(
            f"{folder}: cached teacher outputs do not match the teacher:\n"
            + "\n".join(differences)
            + "\nDelete that folder; the next run computes it again."
        )


def _differences(
    stored: teacher_outputs.TeacherOutputs,
    live: teacher_outputs.TeacherOutputs,
    tolerance: float,
) -> list[str]:
    """Returns a line per array that differs by more than `tolerance` x the largest."""
    lines = []
    of_teacher = manifest.named_leaves(live)
    for name, array in manifest.named_leaves(stored).items():
        a, b = (x.astype(np.float32) for x in (array, of_teacher[name]))
        largest, difference = np.max(np.abs(b)), np.max(np.abs(a - b))
        if not difference <= tolerance * largest:  # so that NaN differs, too
            lines.append(
                f"{name} differs by {difference:.3g}, more than {tolerance:g} of the "
                f"largest value ({largest:.3g})"
            )
    return lines
