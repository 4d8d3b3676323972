"""Makes the rows of the final table from the results of runs."""

from typing import Any

from lakd_jax.config import resolved
from lakd_jax.report import table
from lakd_jax.runs import single


def row(result: dict[str, Any], name: str) -> table.Row:
    """Returns the row of a finished run."""
    best = result["test_best_on_minival"]
    return table.Row(
        name=name,
        test_last=result["test_last"]["accuracy"],
        test_best=best["accuracy"] if best else None,
        examples=result["test_last"]["examples"],
        parameters=result["parameters"],
        seconds=result["seconds"] + result.get("stage1", {"seconds": 0})["seconds"],
        images_per_second=result["images_per_second"],
    )


def teacher_row(config: resolved.Config, teacher: single.Teacher) -> table.Row:
    """Returns the row of the teacher; without accuracy if it has other classes."""
    score = teacher.score
    return table.Row(
        name=f"{config.teacher_title}, teacher",
        test_last=score.accuracy if score else None,
        test_best=None,
        examples=score.examples if score else 0,
        parameters=teacher.parameters,
        seconds=None,
        images_per_second=None,
    )
