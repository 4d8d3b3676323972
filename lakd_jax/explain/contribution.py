"""The part of the report on what LAKD's modules and masks contribute."""

from collections.abc import Callable
from pathlib import Path

from lakd_jax import distill
from lakd_jax.explain import deletion, subject, swap
from lakd_jax.report import page, panels
from lakd_jax.runs import pictures


def section(
    s: subject.Subject, scratch: Path, notify: Callable[[str], None]
) -> list[str]:
    """Returns tables and a figure; empty for other methods than LAKD's."""
    if "lakd" not in distill.parts(s.config.method) or s.teacher is None:
        return []
    if not s.teacher.network.model.stage_sizes:  # a function that gives no maps
        return []
    parts = pictures.partition(s.config, s.student.model, s.teacher.network.model)
    result = []
    if swap.possible(s.student.model):
        notify("modules with the teacher's features")
        result += _swaps(swap.measure(s, parts))
    notify("deletion and insertion by the masks")
    return result + _curves(deletion.measure(s, parts), scratch / "deletion.png")


def _swaps(found: list[swap.Swap]) -> list[str]:
    rows = [
        [
            m.name,
            m.joint,
            f"{m.explained:.3f}",
            f"{100 * m.plain:.2f} %",
            f"{100 * (m.teacher - m.plain):+.2f}",
            f"{100 * (m.mean - m.plain):+.2f}",
        ]
        for m in found
    ]
    header = ["module", "ends at", "explained", "accuracy"]
    header += ["with the teacher's", "with means"]
    words = (
        f"Module by module, on up to {swap.TEST} test images: how accuracy changes, in "
        "percentage points, if the modules above get the teacher's features, mapped to "
        "the student's by least squares (explained: the share of the student's "
        "variance that these have), or the means of the student's own over positions. "
        "A rise with the teacher's features shows where the student loses; a large "
        "fall with means shows that the modules above need to know where things are."
    )
    return [page.table(header, rows), page.text(words)]


def _curves(curves: list[deletion.Curve], path: Path) -> list[str]:
    panels.curves(path, _panels(curves), deletion.SHARES)
    areas = {(c.network, c.kind, c.module, c.random): f"{c.area:.3f}" for c in curves}
    rows = [
        [
            network,
            module,
            *(
                areas[network, kind, module, random]
                for kind in deletion.KINDS
                for random in (False, True)
            ),
        ]
        for network in ("student", "teacher")
        for module in dict.fromkeys(c.module for c in curves)
    ]
    header = ["answers of", "mask of", "deletion", "at random", "insertion"]
    words = (
        f"Areas under the curves, on {deletion.IMAGES} test images at most: the "
        "probability of the network's own answer while pixels are replaced by the mean "
        "colour (deletion) or brought back (insertion), those first to which the "
        "teacher's mask (NDAM) of the module gives most weight, or in the order of a "
        "random mask of the same size (dashed). If a mask names what answers rest on, "
        "its deletion is below the random one and its insertion above."
    )
    picture = page.picture(path, "Deletion and insertion curves of both networks.")
    return [picture, page.table([*header, "at random"], rows), page.text(words)]


def _panels(
    curves: list[deletion.Curve],
) -> dict[tuple[str, str], list[deletion.Curve]]:
    """Returns the curves of each panel, by network and kind."""
    found: dict[tuple[str, str], list[deletion.Curve]] = {}
    for curve in curves:
        found.setdefault((curve.network, curve.kind), []).append(curve)
    return found
