"""The comparisons of RESULTS.md by name, for `python -m benchmarks.table --plan=NAME`.

In a recorded command IMAGES, IMAGES_OF_100 and WEIGHTS stand for the folders that
--images, --images100 and --weights name: image folders of CIFAR-10 and CIFAR-100, and
PyTorch checkpoints of CIFAR ResNets under their own names (those of CIFAR-10 by
Y. Idelbayev: option A shortcuts, trained with ImageNet's normalisation). SUBSET is the
folder of links that `link_subset` makes of IMAGES.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks import gate_entropy, plan, records, table_text
from lakd_jax import errors
from lakd_jax.report import table
from lakd_jax.runs import rows

FLAGS = {"IMAGES": "images", "IMAGES_OF_100": "images100", "WEIGHTS": "weights"}
_PLACE = re.compile(r"\b(IMAGES_OF_100|IMAGES|WEIGHTS|SUBSET)\b")

_IMAGENET = ("teacher.mean=(.485,.456,.406)", "teacher.std=(.229,.224,.225)")
_SHORT = ("epochs=12", "optim.lr=0.1", "optim.schedule=cosine", "optim.warmup_epochs=1")
_RESNET20 = "teacher.init=WEIGHTS/resnet20-12fca82f.th"
_RESNET56 = "teacher.init=WEIGHTS/resnet56-4bfd9763.th"


@dataclasses.dataclass(frozen=True)
class Plan:
    """Arms that are trained from one configuration.

    Attributes:
      config: its file.
      arms: title -> "METHOD" or "METHOD:FIELD=VALUE,...".
      seeds: how many, from 0.
      pair: "TEACHER,STUDENT"; "": as in the file.
      overrides: FIELD=VALUE for all arms.
      per_class: of the training images, how many of each class SUBSET has.
      gates: whether the records have the entropies of the gates of an HME.
    """

    config: str
    arms: Mapping[str, str]
    seeds: int
    pair: str = ""
    overrides: Sequence[str] = ()
    per_class: int = 0
    gates: bool = False


def _cifar10(
    arms: Mapping[str, str], seeds: int, *overrides: str, teacher: str = _RESNET20
) -> Plan:
    """A published teacher and 12 epochs, unless overridden."""
    pair = "resnet20,resnet8" if teacher == _RESNET20 else "resnet56,resnet20"
    common = ("data.source=folder:IMAGES", teacher, *_IMAGENET, *_SHORT, *overrides)
    return Plan("configs/cifar10_lakd.py", arms, seeds, pair, common)


_LOCAL = {
    "LAKD cut": "lakd:lakd.head_loss=ce",
    "LAKD uncut": "lakd:lakd.head_loss=ce,local.cut_scale=1",
    "LAKD ce+kd cut": "lakd",
    "LAKD ce+kd uncut": "lakd:local.cut_scale=1",
}
_THREE = {"KD": "kd", "LAKD cut": "lakd", "DKD": "dkd"}
_FEATURES = "lakd:lakd.head_loss=ce,lakd.attention_weight=0,local.cut_scale=1"
_WEIGHTS = "lakd.feature_weight={0},lakd.attention_weight={0}"
_PROGRESSIVE = f"lakd:{_WEIGHTS.format(10)},lakd.feature_floor=0.01,local.cut_end=1"
_SWEEP = (
    *(_WEIGHTS.format(weight) for weight in ("0.3", "3", "10")),
    "local.cut_scale=0.1",
    "local.cut_scale=0.5",
    "lakd.attention_weight=0",
    "lakd.attention=map",
    "lakd.power=1",
    "lakd.normalise=max",
    "lakd.task=teacher_suffix",
    "lakd.task=aux_heads",
    "lakd.adapter=shape",
)

# Networks of today under AdamW, as users train them on small images; a quarter of the
# images, as vit_tiny at patch 4 costs 140 GFLOP a step.
_ADAMW = (
    "epochs=8",
    "data.per_class=320",
    "optim.name=adamw",
    "optim.lr=0.001",
    "optim.weight_decay=0.05",
    "optim.decay_mask=True",
)


def _adamw(student: str, patch: int) -> Plan:
    arms = {"alone": "none", "KD": "kd", "LAKD cut": "lakd"}
    made = _cifar10(arms, 1, *_ADAMW, f"student.patch={patch}")
    return dataclasses.replace(made, pair=f"resnet20,{student}")


# Stage 1's gates are compared after equally many epochs: nothing is kept apart to
# choose an epoch by, and stage 2, which trains no tree, is one epoch.
_EXPERTS = Plan(
    "configs/cifar10_hme.py",
    {"plain": "none", "label smoothing 0.1": "none:label_smoothing=0.1", "KD": "kd"},
    2,
    "resnet20,hme",
    (
        "data.source=folder:SUBSET",
        _RESNET20,
        *_IMAGENET,
        "student.image_size=16",
        "data.minival=0",
        "batch_size=25",
        "epochs=1",
        "hme.stage1_epochs=10",
        "hme.stage1_lr=0.001",
        "hme.temperature=0.333",  # the released 10 of 300 epochs, stretched to 10
    ),
    per_class=200,
    gates=True,
)

PLANS = {
    "digits": Plan(
        "configs/digits_lakd.py", {"alone": "none", "KD": "kd", **_LOCAL}, 5
    ),
    "digits_weights": Plan(
        "configs/digits_lakd.py",
        {f"weights {w}": f"lakd:{_WEIGHTS.format(w)}" for w in (1, 3, 10)},
        3,
    ),
    "resnet8": _cifar10(
        {"alone": "none", "KD": "kd", "features uncut": _FEATURES, **_LOCAL}, 3
    ),
    "resnet20": _cifar10({"KD": "kd", "LAKD ce+kd cut": "lakd"}, 1, teacher=_RESNET56),
    # One change at a time.
    "sweep": _cifar10(
        {"defaults": "lakd"} | {s.replace(",", " "): f"lakd:{s}" for s in _SWEEP},
        1,
        "epochs=6",
    ),
    # The arms of resnet8 at a third of its learning rate.
    "rates": _cifar10(
        {
            "alone": "none:optim.lr=0.03",
            "KD": "kd:optim.lr=0.03",
            "LAKD ce+kd cut": "lakd:optim.lr=0.03",
            "LAKD ce+kd uncut": "lakd:local.cut_scale=1,optim.lr=0.03",
        },
        1,
    ),
    "attention": _cifar10(
        {"AFD": "afd", "RTK none": "rtk:rtk.selection=none", "RTK stage": "rtk"}, 1
    ),
    "vam": _cifar10(
        {"alone": "none", "with VAM": "none:student.vam.enabled=True"}, 1, "epochs=4"
    ),
    "experts": _EXPERTS,
    # Weight decay moves gates by itself.
    "experts_undecayed": dataclasses.replace(
        _EXPERTS,
        arms={"plain, no decay": "none", "KD, no decay": "kd"},
        overrides=(*_EXPERTS.overrides, "optim.weight_decay=0"),
    ),
    "vit_tiny": _adamw("vit_tiny", 4),
    "convnext_atto": _adamw("convnext_atto", 2),
    # As long as the literature trains.
    "converged": _cifar10(
        {
            "KD": "kd",
            "LAKD cut": "lakd",
            "LAKD progressive": _PROGRESSIVE,
            "alone": "none",
            "DKD": "dkd",
        },
        3,
        "epochs=100",
    ),
    # Readings of "progressive", to choose from on minival: few epochs and few views.
    "progressive": _cifar10(
        {
            "LAKD cut": "lakd",
            "weights fall": f"lakd:{_WEIGHTS.format(10)},lakd.feature_floor=0.1",
            "cuts open, weights fall": _PROGRESSIVE,
            "cuts open": "lakd:local.cut_end=1",
            "heads 0.1": "lakd:lakd.task=aux_heads,lakd.aux_weight=0.1",
            "modules start in turn": "lakd:local.module_start_epochs=(0,3,6)",
            "weights 10": f"lakd:{_WEIGHTS.format(10)}",
            "LAKD uncut": "lakd:local.cut_scale=1",
            "KD": "kd",
        },
        1,
        "epochs=30",
        "teacher.views=4",
        "teacher.views_mib=8192",
    ),
    "converged_more": _cifar10(
        {
            "LAKD cut, weights 10": f"lakd:{_WEIGHTS.format(10)}",
            "LAKD uncut": "lakd:local.cut_scale=1",
            "AT+KD": "at+kd",
            "ReviewKD": "review",
        },
        3,
        "epochs=100",
    ),
    "converged_resnet20": _cifar10(_THREE, 2, "epochs=60", teacher=_RESNET56),
    # The teacher has seen all images of the folder.
    "converged_cifar100": Plan(
        "configs/cifar100_lakd.py",
        _THREE,
        2,
        "resnet32,resnet20",
        (
            "data.source=folder:IMAGES_OF_100",
            "teacher.init=WEIGHTS/cifar100_resnet32.safetensors",
            "teacher.mean=(.5071,.4867,.4408)",
            "teacher.std=(.2675,.2565,.2761)",
            *_SHORT,
            "epochs=100",
        ),
    ),
}


def jobs(wanted: Plan, places: Mapping[str, Path], out: Path) -> list[plan.Job]:
    """Returns the plan's runs, seed by seed.

    Args:
      places: the folders that IMAGES and the like stand for, where they are known.
      out: where the runs' directories go.
    """
    known = {name: str(place) for name, place in places.items()}
    known["SUBSET"] = str(_subset(wanted, out))
    arms = [plan.arm_of(title, spec) for title, spec in wanted.arms.items()]
    return [
        _job(wanted, arm, seed, known, out)
        for seed in range(wanted.seeds)
        for arm in arms
    ]


def _job(
    wanted: Plan, arm: plan.Arm, seed: int, known: Mapping[str, str], out: Path
) -> plan.Job:
    value = ",".join(filter(None, (wanted.pair, arm.method)))
    fields = [*wanted.overrides, *arm.overrides, f"seed={seed}", "baselines=()"]
    settings = [f"--config={wanted.config}:{value}", *map(plan.override, fields)]
    argv = [_PLACE.sub(lambda m: known.get(m[0], m[0]), s) for s in settings]
    directory = out / f"{arm.name}-{seed}"
    return plan.Job(
        name=f"{arm.title}, seed {seed}",
        label=arm.title,
        pair=("", ""),
        arm=arm.name,
        method=arm.method,
        seed=seed,
        settings=tuple(settings),
        argv=(*argv, f"--workdir={directory}"),
        directory=directory,
    )


def prepare(
    wanted: Plan, places: Mapping[str, Path], out: Path, waiting: Sequence[plan.Job]
) -> None:
    """Makes what the runs in `waiting` need apart from the folders.

    Raises:
      errors.ConfigError: they need a folder that was not given.
    """
    needed = {n for job in waiting for s in job.settings for n in _PLACE.findall(s)}
    if "SUBSET" in needed:
        needed = needed - {"SUBSET"} | {"IMAGES"}
    missing = [FLAGS[name] for name in sorted(needed - places.keys())]
    if missing:
        raise errors.ConfigError([f"--{flag}: is missing" for flag in missing])
    if wanted.per_class:
        link_subset(places["IMAGES"], wanted.per_class, _subset(wanted, out))


def _subset(wanted: Plan, out: Path) -> Path:
    return out / f"subset-{wanted.per_class}"


def link_subset(images: Path, per_class: int, folder: Path) -> None:
    """Links an image folder's test split and, of each class, some training images.

    Args:
      images: the image folder.
      per_class: the first so many by name.
      folder: where the links go; those that exist stay.
    """
    for role, count in (("train", per_class), ("test", None)):
        for source in sorted((images.resolve() / role).glob("*/")):
            target = folder / role / source.name
            target.mkdir(parents=True, exist_ok=True)
            for file in sorted(source.iterdir())[:count]:
                if not (target / file.name).exists():
                    (target / file.name).symlink_to(file)


def store(wanted: Plan, path: Path) -> records.File:
    """Returns the records of a plan in the file `path`."""
    return records.File(path, gate_entropy.measure if wanted.gates else None)


def render(
    wanted: Plan, runs: Sequence[plan.Job], kept: Mapping[str, records.Record]
) -> str:
    """Returns the table of the runs that are finished.

    Several seeds of arms beside KD get 95 % intervals, also of the difference to it.
    """
    found = [(run.label, kept[run.name]) for run in runs if run.name in kept]
    done = [(label, record) for label, record in found if "result" in record]
    if not done:
        return "no run has ended yet"
    if wanted.gates:
        return gate_entropy.render(done)
    arms = [plan.arm_of(title, spec) for title, spec in wanted.arms.items()]
    if wanted.seeds > 1 and any(arm.method == table_text.BASELINE for arm in arms):
        return table_text.compared(arms, runs, kept)
    return table.render_seeds([rows.row(r["result"], label) for label, r in done])
