"""Estimates FLOPs and memory of a run from its compiled step."""

from typing import Any

import jax

from lakd_jax.config import resolved
from lakd_jax.models import projector
from lakd_jax.report import summary
from lakd_jax.runs import single
from lakd_jax.training import engine, feeds, setup
from lakd_jax.training import state as state_lib


def one_step(
    config: resolved.Config,
    environment: single.Environment,
    job: single.TrainingJob,
    teacher: single.Teacher | None,
) -> str:
    """Runs a step and an evaluation batch; returns a text block of their costs."""
    fit = single.fit(job, environment)
    state, metrics, costs = fit.one_step()
    size = config.eval_batch_size
    batch = feeds.first(environment.test, size)
    evaluator = single.evaluator(config, job.student, setup.pixels(config), environment)
    score = evaluator(state.variables("student"), batch)
    plan = fit.plan
    lines = {
        "student": _network(config.student.name, state.params["student"])
        + projector.words(job.student.model.projector),
        "method": f"{config.method}, {_count(state.params['method'])} parameters",
        "devices": f"{environment.mesh.size} x {jax.devices()[0].device_kind}",
        "steps": f"{plan.total_steps:,} = {plan.epochs} epochs x "
        f"{plan.steps_per_epoch:,}, batch {plan.batch_size}",
        "per step": _compiled(costs),
        "first loss": f"{metrics['loss']:.4f}",
        "first batch": f"{score.right} of {score.examples} test images right",
    }
    if teacher:
        count = f"{teacher.parameters:,}"
        lines["teacher"] = f"{config.teacher_title}, {count} parameters"
    return summary.describe(lines)


def _network(name: str, params: Any) -> str:
    return f"{name}, {_count(params)} parameters"


def _count(params: Any) -> str:
    return f"{state_lib.parameter_count(params):,}"


def _compiled(costs: engine.Costs) -> str:
    memory = costs.arguments + costs.temporary
    return (
        f"{costs.flops / 1e9:.2f} GFLOP; {memory / 2**20:.0f} MiB on each device, "
        f"{costs.temporary / 2**20:.0f} of them temporary"
    )
