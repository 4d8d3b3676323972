"""Checks relations between config fields about how a run is executed.

They concern engines, seeds, streams, processes and stored outputs of the teacher.
"""

from lakd_jax import distill, models, paths
from lakd_jax.config import rules
from lakd_jax.data import sources
from lakd_jax.distill import lakd
from lakd_jax.distill.base import method
from lakd_jax.interop import published
from lakd_jax.runtime import hosts


@rules.reads("local.engine", only_lakd=True)
def _processes(c: rules.Config, _: int) -> str | None:
    if c.local.engine == "pipeline" and hosts.count() > 1:
        return (
            "local.engine=pipeline puts modules on the devices of one process, but "
            f"there are {hosts.count()} processes; use fused or dispatch, or one "
            "process"
        )


@rules.reads(*rules.METHODS, "local.engine")
def _engine_method(c: rules.Config, _: int) -> str | None:
    if c.local.engine != "fused" and not distill.facts(c.method).local:
        return (
            f"local.engine={c.local.engine} runs the modules of a student that is cut, "
            f"but method {c.method} has one loss for all of it: use local.engine=fused"
        )


@rules.reads("local.engine", "steps_per_dispatch")
def _engine_dispatch(c: rules.Config, _: int) -> str | None:
    if c.local.engine != "fused" and c.steps_per_dispatch > 1:
        return (
            f"local.engine={c.local.engine} dispatches each module of each step; set "
            "steps_per_dispatch to 0, or use local.engine=fused"
        )


_LAKD_FIELDS = ("lakd.att_global", "lakd.task", "lakd.head_loss", "lakd.preact")


@rules.reads(
    "local.engine",
    "local.cut_scale",
    "local.cut_end",
    "student.vam.enabled",
    "student.name",
    "teacher.name",
    *_LAKD_FIELDS,
    only_lakd=True,
)
def _engine_isolated(c: rules.Config, _: int) -> str | None:
    if c.local.engine == "fused":
        return None
    entry = any(models.family(n.name).PREACTIVATION for n in (c.student, c.teacher))
    logits = lakd.needs_logits(c.lakd.task, c.lakd.head_loss)
    obstacles = {
        "local.cut_scale above 0": c.local.cut_scale > 0,
        "local.cut_end above 0": c.local.cut_end > 0,
        "lakd.att_global": c.lakd.att_global,
        "student.vam.enabled": c.student.vam.enabled,
        f"lakd.task={c.lakd.task} with lakd.head_loss=ce+kd": logits,
        "lakd.preact in networks that normalise first": c.lakd.preact and entry,
    }
    found = [name for name, holds in obstacles.items() if holds]
    if found:
        return (
            f"local.engine={c.local.engine} runs modules separately, which {found[0]} "
            "does not allow: use local.engine=fused"
        )


@rules.reads(
    "data.streaming",
    "data.source",
    "data.image_size",
    "data.pad",
    "data.test_resize",
    "data.max_bad",
    "data.per_class",
)
def _streaming(c: rules.Config, _: int) -> str | None:
    d = c.data
    if not d.streaming:
        return None
    in_memory = d.source == "digits" or d.source.startswith("npz:")
    if in_memory or sources.is_added(d.source):
        return (
            "data.streaming is for image files: set it to False for "
            f"data.source={d.source}"
        )
    if not d.image_size:
        return "data.streaming crops images to one size: set data.image_size, e.g. 224"
    if d.pad:
        return f"data.streaming crops images at random: set data.pad to 0, not {d.pad}"
    if d.per_class:
        return (
            "data.per_class needs the labels of all images, which are read with them "
            "from a stream: set it to 0, or data.streaming to False"
        )
    if d.max_bad:
        return "data.max_bad is for data in memory: set it to 0 with data.streaming"
    if d.test_resize < d.image_size:
        return (
            f"data.test_resize is {d.test_resize}, less than data.image_size "
            f"({d.image_size}), which is cropped from it"
        )


@rules.reads("data.streaming", "teacher.views")
def _streaming_views(c: rules.Config, _: int) -> str | None:
    if c.data.streaming and c.teacher.views:
        return (
            "teacher.views is for data in memory: set it to 0, or data.streaming to "
            "False"
        )


@rules.reads("teacher.cache", "teacher.init", "student.init")
def _downloads(c: rules.Config, _: int) -> str | None:
    blocks = {"teacher.init": c.teacher, "student.init": c.student}
    named = [name for name, b in blocks.items() if published.is_name(b.init)]
    if named and paths.is_bucket(c.teacher.cache):
        return (
            f"teacher.cache is in a bucket, but it also keeps the weights that "
            f"{named[0]} downloads, which takes a local folder: set it to one"
        )


@rules.reads("seeds")
def _seeds(c: rules.Config, _: int) -> str | None:
    repeated = [seed for i, seed in enumerate(c.seeds) if seed in c.seeds[:i]]
    return f"seeds has {repeated[0]} twice" if repeated else None


@rules.reads(*rules.METHODS, "teacher.views", "epochs")
def _views_epochs(c: rules.Config, _: int) -> str | None:
    if rules.needs_teacher(c) and c.teacher.views > c.epochs:
        return (
            f"teacher.views is {c.teacher.views}, more than epochs ({c.epochs}): the "
            "remaining views would never be used"
        )


@rules.reads(*rules.METHODS, "teacher.views")
def _views_reads(c: rules.Config, _: int) -> str | None:
    for name in rules.methods(c) if c.teacher.views else ():
        reads = distill.facts(name).teacher_reads
        if missing := [part for part in reads if part not in method.STORABLE]:
            return (
                f"teacher.views stores {' and '.join(method.STORABLE)}, but method "
                f"{name} reads the teacher's {', '.join(missing)}: set teacher.views "
                "to 0"
            )


@rules.reads("teacher.views", "lakd.task", "lakd.attention", only_lakd=True)
def _views_suffix(c: rules.Config, _: int) -> str | None:
    if c.teacher.views and lakd.needs_suffix(c.lakd.task, c.lakd.attention):
        return (
            "lakd.task=teacher_suffix and lakd.attention=logits run the teacher's "
            "layers on the student's features, which teacher.views cannot store: set "
            "it to 0"
        )


@rules.reads("teacher.views")
def _views_processes(c: rules.Config, _: int) -> str | None:
    if c.teacher.views and hosts.count() > 1:
        return (
            f"teacher.views is for one process, but there are {hosts.count()}: set it "
            "to 0"
        )


@rules.reads("teacher.views", "local.engine")
def _views_engine(c: rules.Config, _: int) -> str | None:
    if c.teacher.views and c.local.engine != "fused":
        return (
            f"local.engine={c.local.engine} runs the teacher alongside the modules: "
            "set teacher.views to 0, or use local.engine=fused"
        )


@rules.reads("teacher.views", "lakd.preact", "local.module_input", only_lakd=True)
def _views_preact(c: rules.Config, _: int) -> str | None:
    if c.teacher.views and c.lakd.preact and c.local.module_input == "teacher":
        return (
            "teacher.views stores the features that are compared, and with lakd.preact "
            "these are not what local.module_input=teacher feeds: set teacher.views "
            "to 0"
        )
