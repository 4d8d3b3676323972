"""Trains one phase of a run, tests its student, and writes the files of the run."""

import dataclasses
from pathlib import Path
from typing import Any

import jax

from lakd_jax.interop import weights
from lakd_jax.report import evaluation
from lakd_jax.runs import single
from lakd_jax.runtime import hosts
from lakd_jax.store import workdir
from lakd_jax.training import evaluate, setup, vam
from lakd_jax.training import phase as phase_lib
from lakd_jax.training import record as record_lib
from lakd_jax.training import state as state_lib


def train_one(
    phase: phase_lib.Phase,
    directory: Path,
    environment: single.Environment,
    teacher: single.Teacher | None,
) -> dict[str, Any]:
    """Trains a phase's student in `directory`, or resumes; returns its result.

    A finished run is not trained again: its stored result is returned.

    `directory` must have been prepared for this config (`prepare`). The run writes
    `metrics.jsonl`, `checkpoints/`, `student.safetensors` (the plain student of the
    last epoch, or of the epoch that the phase keeps) and `result.json` there.
    """
    done = directory / workdir.RESULT
    if hosts.first(done.exists):
        return hosts.first(lambda: workdir.read_json(done))
    job = single.training_job(phase, directory, environment, teacher)
    trained = single.fit(job, environment).run()
    return conclude(job, environment, teacher, trained)


def conclude(
    job: single.TrainingJob,
    environment: single.Environment,
    teacher: single.Teacher | None,
    trained: record_lib.Trained,
) -> dict[str, Any]:
    """Tests the trained student, writes its weights and result; returns the result."""
    directory = job.record.directory
    student, trained = _deployed(job.student, trained)
    result = _result(job, environment, teacher, student, trained)
    kept = trained.last
    result |= job.phase.facts
    if job.phase.keeps_best:
        result["kept_step"] = job.record.plan.total_steps
        if trained.best is not None:
            kept, result["kept_step"] = trained.best, result["best_step"]
    pixels = setup.pixels(job.config)
    height, width, _ = environment.dataset.train.shape
    network = dataclasses.replace(
        student,
        mean=pixels.mean,
        std=pixels.std,
        size=pixels.size or (height if height == width else 0),
        preparation=setup.preparation(job.config, environment.dataset.train.shape),
    )

    def write() -> dict[str, Any]:
        weights.save(directory / workdir.STUDENT, kept, network, result)
        if trained.best is not None:
            weights.save(directory / workdir.BEST, trained.best, network, result)
        if trained.average is not None:
            path = directory / workdir.AVERAGE
            weights.save(path, trained.average, network, result)
        workdir.write_json(directory / workdir.RESULT, result)
        return result

    return hosts.first(write)


def _deployed(
    student: weights.Loaded, trained: record_lib.Trained
) -> tuple[weights.Loaded, record_lib.Trained]:
    """Returns both as `vam.deployed` does: the tested network is the exported one."""
    model, last = vam.deployed(student.model, trained.last)
    best = trained.best and vam.deployed(student.model, trained.best)[1]
    average = trained.average and vam.deployed(student.model, trained.average)[1]
    student = dataclasses.replace(student, model=model)
    trained = dataclasses.replace(trained, last=last, best=best, average=average)
    return student, trained


def _result(
    job: single.TrainingJob,
    environment: single.Environment,
    teacher: single.Teacher | None,
    student: weights.Loaded,
    trained: record_lib.Trained,
) -> dict[str, Any]:
    """Returns the content of result.json; only this function uses the test split."""
    config, progress = job.config, trained.progress
    score = single.evaluator(
        config, student, setup.pixels(config), environment, job.spec.student_at
    )
    last = score.predict(
        trained.last, environment.test, job.record.plan.total_steps - 1
    )
    answers = teacher.answers if teacher else None
    names = environment.dataset.classes
    best = None
    if trained.best:
        best = score(trained.best, environment.test, progress.best_step - 1)
    averaged = {}
    if trained.average is not None:
        tested = score(trained.average, environment.test, job.record.plan.total_steps)
        averaged["test_average"] = _counts(tested)
    return averaged | {
        "method": config.method,
        "student": config.student.name,
        "teacher": config.teacher_title if teacher else None,
        "classes": len(names),
        "class_names": list(names),
        "image_shape": list(environment.dataset.train.shape),
        "data": environment.dataset.fingerprint(),
        "seed": config.seed,
        "epochs": config.epochs,
        "test_last": _counts(last.score)
        | evaluation.summary(last.logits, last.labels, answers),
        "confused": evaluation.confused_names(
            evaluation.confusion(last.logits, last.labels), names
        ),
        "test_best_on_minival": _counts(best) if best else None,
        "best_step": progress.best_step,
        "teacher_test": _counts(teacher.score) if teacher and teacher.score else None,
        "parameters": state_lib.parameter_count(trained.last["params"]),
        "seconds": progress.seconds,
        "step_seconds": progress.step_seconds,
        "images_per_second": trained.images_per_second,
        "device": jax.devices()[0].device_kind,
    }


def _counts(score: evaluate.Score) -> dict[str, Any]:
    return {
        "right": score.right,
        "examples": score.examples,
        "accuracy": score.accuracy,
        "loss": score.loss,
    }
