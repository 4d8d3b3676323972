"""Reports how much was learnt: knowledge points of teacher and students, side by side.

See `entropy` for the measurement and `points` for what is counted.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lakd_jax.explain import entropy, points, regions, subject
from lakd_jax.models import chain, vgg
from lakd_jax.report import entropies, metrics, page, pictures
from lakd_jax.store import checkpoint, workdir
from lakd_jax.training import spec as spec_lib
from lakd_jax.training import updates

PyTree = Any

ADVISED = 10  # checkpoints
_MOST = 15  # checkpoints, as many as the authors took
_SHOWN = 8  # images with maps
_ALONE = "none"  # the baseline that learns without a teacher


@dataclasses.dataclass(frozen=True)
class Extent:
    """How much is measured: the number of images, and how each is."""

    images: int
    settings: entropy.Settings


EXTENTS = {
    "short": Extent(20, entropy.Settings(rounds=40, draws=24, check_after=30)),
    "official": Extent(50, entropy.Settings()),
}


@dataclasses.dataclass(frozen=True)
class Network:
    """A network over its training.

    Attributes:
        title: of the table's row.
        steps: of the checkpoints, oldest first; (0,) for a network without any.
        epochs: the same in epochs.
        variables: yields those of each checkpoint.
        distance: that the last stage's kernel had travelled at each of them; None if
            it was not logged.
    """

    title: str
    model: chain.Chain
    pixels: spec_lib.Pixels
    steps: tuple[int, ...]
    epochs: tuple[float, ...]
    variables: Callable[[], Iterator[PyTree]]
    distance: list[float] | None = None


@dataclasses.dataclass(frozen=True)
class Learnt:
    """What a network had learnt at its checkpoints, on the images that are compared."""

    network: Network
    points: points.Points


def section(
    s: subject.Subject,
    extent: Extent,
    masks: Path | None,
    scratch: Path,
    notify: Callable[[str], None],
) -> list[str]:
    """Returns the parts of the report's section on knowledge points.

    Args:
        s: the run.
        extent: how much is measured.
        masks: a folder with the foreground of test images, see `regions.of_masks`;
            None for the central box.
        scratch: a folder for pictures.
        notify: receives progress lines.

    Raises:
        errors.DataError: there is no usable mask.
    """
    test = s.environment.dataset.preview.test
    compared = networks(s)
    objects = regions.central(len(test), extent.images)
    if masks:
        sides = [n.pixels.size or min(test.shape[:2]) for n in compared]
        sizes = {entropy.cells(side) for side in sides}
        objects = regions.of_masks(masks, test, extent.images, sizes)
    passes = len(objects.chosen) * extent.settings.rounds * extent.settings.draws
    passes *= sum(len(n.steps) for n in compared)
    notify(f"knowledge points: {passes:,} forward and backward passes")
    grids = [
        _grids(s, n, test.images[objects.chosen], extent, notify) for n in compared
    ]
    foregrounds = [objects.foreground(g.shape[-1]) for g in grids]
    kept = np.ones(len(objects.chosen), bool)
    for grid, foreground in zip(grids, foregrounds, strict=True):
        kept &= _usable(grid, foreground)
    if not kept.any():
        return [page.text(f"None of {len(kept)} images can be compared. {_DROPPED}")]
    learnt = [
        Learnt(n, points.count(g[kept], f[kept]))
        for n, g, f in zip(compared, grids, foregrounds, strict=True)
    ]
    names = [test.name(i) for i in objects.chosen[kept]]
    shown = test.images[objects.chosen[kept][:_SHOWN]]
    return [
        page.table(_HEADER, [_row(one) for one in learnt]),
        page.text(_EXPLAINED),
        *_pictures(learnt, shown, scratch),
        _per_image(learnt, names),
        page.text(_sample(kept, extent, masks), note=True),
        *(page.text(note, note=True) for note in _notes(s, learnt)),
    ]


# ------------------------------------------------------------ the networks


def networks(s: subject.Subject) -> list[Network]:
    """Returns teacher, student alone and student, as far as the run has them.

    A teacher that is no chain of blocks (a function, an ensemble) is left out.
    """
    found = []
    if s.teacher and not s.teacher.network.model.WHOLE:
        pixels = s.teacher.pixels
        if run := _teacher_run(s.teacher.network.source):
            history = of_run(subject.other(s, run), "teacher")
            found.append(dataclasses.replace(history, pixels=pixels))
        else:
            model, variables = s.teacher.network.model, s.teacher.network.variables
            final = ((0,), (0.0,), lambda: iter([variables]))
            found.append(Network("teacher", model, pixels, *final))
    alone = s.directory / _ALONE
    if (alone / workdir.RESULT).exists() and s.config.method != _ALONE:
        found.append(of_run(subject.other(s, alone), "student alone"))
    title = "student" if s.config.method == _ALONE else f"student, {s.config.method}"
    return [*found, of_run(s, title)]


def _teacher_run(source: str) -> Path | None:
    """Returns the finished run that a teacher's weights are from; None if none is."""
    path = Path(source)
    directory = path if path.is_dir() else path.parent
    names = (workdir.CONFIG, workdir.RESULT, workdir.STUDENT)
    is_last = path.is_dir() or path.name == workdir.STUDENT
    there = all((directory / name).exists() for name in names)
    return directory if is_last and there else None


def of_run(s: subject.Subject, title: str) -> Network:
    """Returns a run's student at up to `_MOST` of its checkpoints, evenly spread."""
    folder, model = s.directory / workdir.CHECKPOINTS, s.student.model
    steps = checkpoint.list_steps(folder)
    if not steps:
        final = ((0,), (float(s.config.epochs),), lambda: iter([s.student.variables]))
        return Network(title, model, s.pixels, *final)
    places = np.linspace(0, len(steps) - 1, min(len(steps), _MOST)).round().astype(int)
    chosen = tuple(steps[i] for i in places)
    name = updates.metric(len(model.stage_sizes))
    return Network(
        title,
        model,
        s.pixels,
        chosen,
        # The last checkpoint is that of the last step.
        tuple(step / steps[-1] * s.config.epochs for step in chosen),
        lambda: (variables for _, variables in subject.past(s, chosen)),
        updates.distances(metrics.read(s.directory), name, chosen),
    )


# ------------------------------------------------------------ the measurement


def _grids(
    s: subject.Subject,
    network: Network,
    images: np.ndarray,
    extent: Extent,
    notify: Callable[[str], None],
) -> np.ndarray:
    """Returns entropies (N, checkpoints, cells, cells); NaN of images without effect.

    Of the feature at the end of the last stage, in float32.
    """
    model: Any = network.model.clone(dtype=jnp.float32)
    pixels = dataclasses.replace(network.pixels, dtype=jnp.float32)

    def features(variables: PyTree, x: jax.Array) -> jax.Array:
        outputs: Any = model.apply(variables, x, train=False)
        return chain.feature_at(outputs, model, model.unit_names[-1])

    weight = 7.0 if isinstance(model, vgg.VGG) else 6.0
    settings = dataclasses.replace(extent.settings, weight=weight)
    fitter = entropy.Fitter(features, np.asarray(pixels(jnp.asarray(images))), settings)
    grids = []
    for i, variables in enumerate(network.variables(), 1):
        notify(f"knowledge points: {network.title}, {i} of {len(network.steps)}")
        fit = fitter(variables, s.environment.guard.check)
        grids.append(np.where(fit.scale[:, None, None] > 0, fit.grids, np.nan))
    return np.stack(grids, 1)


def _usable(grids: np.ndarray, foreground: np.ndarray) -> np.ndarray:
    """Returns which images (N,) can be compared, see `points.usable`.

    The order of the two means is looked at in the later half of the checkpoints: the
    authors look at it from epoch 40 on.
    """
    finite = np.isfinite(grids).all((1, 2, 3))
    later = grids[:, grids.shape[1] // 2 :]
    return finite & points.usable(later, foreground)


# ------------------------------------------------------------ the page

_HEADER = ("", "checkpoints", "foreground", "background", "ratio")
_HEADER += ("D mean", "D std", "rho")
_EXPLAINED = (
    "Knowledge points (Cheng et al., arXiv 2003.03622) are regions of an image whose "
    "pixels the feature at the end of the last stage depends on: noise there that "
    f"leaves the feature nearly the same has an entropy more than {points.MARGIN} "
    "nats below that of the background. Foreground, background: points per image at "
    "the last checkpoint; ratio: the foreground's share. D: how far the last stage's "
    "kernel had moved, in units of its first norm, when an image had most points on "
    "the foreground; a small mean is early learning, a small deviation learning of "
    "all images at the same time. rho: of the points on the foreground at any "
    "checkpoint, the share that the last one still has: 1 if nothing was learnt and "
    "discarded."
)
_DROPPED = (
    "Left out are images with a larger mean entropy on the foreground than on the "
    "background, for any of the networks, in the later half of the checkpoints."
)


def _row(one: Learnt) -> list[str]:
    found, several = one.points, len(one.network.steps) > 1
    cells = [one.network.title, str(len(one.network.steps))]
    cells.append(f"{found.on_foreground[:, -1].mean():.1f}")
    cells.append(f"{found.on_background[:, -1].mean():.1f}")
    cells.append(f"{found.ratio[:, -1].mean():.3f}")
    if one.network.distance is None or not several:
        cells += ["-", "-"]
    else:
        when = found.when(np.array(one.network.distance))
        cells += [f"{when.mean():.3f}", f"{when.std():.3f}"]
    return [*cells, f"{found.stability:.3f}" if several else "-"]


def _pictures(
    learnt: Sequence[Learnt], images: np.ndarray, scratch: Path
) -> Iterator[str]:
    path = scratch / "entropies.png"
    maps = {one.network.title: one.points.grids[: len(images), -1] for one in learnt}
    entropies.entropies(path, images, maps)
    description = "Entropy per region of test images, for each network."
    yield page.picture(path, description)
    yield page.text(
        "Entropy per region at the last checkpoint: dark where the network uses the "
        "pixels, bright where it discards them."
    )
    curves = {
        one.network.title: list(
            zip(one.network.epochs, one.points.on_foreground.mean(0), strict=True)
        )
        for one in learnt
        if len(one.network.steps) > 1
    }
    if curves:
        path = scratch / "points.png"
        label = "points on the foreground"
        pictures.lines(path, curves, label=label, logarithmic=False)
        yield page.picture(
            path, "Points on the foreground of each network over epochs."
        )


def _per_image(learnt: Sequence[Learnt], names: Sequence[str]) -> str:
    header = ["image", *(one.network.title for one in learnt)]
    rows = [
        [
            name,
            *(
                f"{p.on_foreground[i, -1]} + {p.on_background[i, -1]}"
                for p in (one.points for one in learnt)
            ),
        ]
        for i, name in enumerate(names)
    ]
    title = "points per image: on the foreground + on the background"
    return page.unfolding(title, page.table(header, rows))


def _sample(kept: np.ndarray, extent: Extent, masks: Path | None) -> str:
    where = f"the masks of {masks}" if masks else "the central three quarters"
    settings = extent.settings
    return (
        f"{kept.sum()} of {len(kept)} test images, {settings.rounds} rounds of "
        f"{settings.draws} noisy images; the foreground is {where}. {_DROPPED}"
    )


def _notes(s: subject.Subject, learnt: Sequence[Learnt]) -> Iterator[str]:
    if s.teacher and s.teacher.network.model.WHOLE:
        yield "The teacher is left out: it is a function, or several networks."
    if any(len(one.network.steps) < ADVISED for one in learnt):
        yield (
            f"D and rho say little with fewer than {ADVISED} checkpoints: "
            "checkpoint.keep sets how many are kept, the last ones, and "
            "checkpoint.every_steps how far apart they are."
        )
    if any(one.network.distance is None for one in learnt):
        yield "D needs a run with log_updates=true, which logs how far weights move."
