"""Runs the comparisons of RESULTS.md, one after another, and prints their tables.

    python -m benchmarks.compare digits
    python -m benchmarks.compare resnet8 --images=DIR --weights=DIR
    python -m benchmarks.compare experts --images=DIR --weights=DIR

Each arm is a command line of main.py, printed before it runs. A run that ends is
added to benchmarks/results/PLAN.json with that command, the versions and the device;
runs recorded there are not made again, so that an interrupted comparison goes on
where it stopped (inside a run, too: its directory under --out is kept) and a finished
one only prints its table. `--images` is an image folder of CIFAR-10, `--weights` a
folder with the PyTorch checkpoints of CIFAR-10 ResNets that Y. Idelbayev published
(option A shortcuts, trained with ImageNet's normalisation), under their own names.
SUBSET in a recorded command is the folder of links that `subset` makes of the images.
"""

import argparse
import dataclasses
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import gate_entropy
from lakd_jax import cli, interrupt, train, workdir
from lakd_jax.report import table
from lakd_jax.train import rows

RESULTS = Path(__file__).parent / "results"

LOCAL = {
    "LAKD cut": ["lakd.head_loss=ce"],
    "LAKD uncut": ["lakd.head_loss=ce", "local.cut_scale=1"],
    "LAKD ce+kd cut": [],
    "LAKD ce+kd uncut": ["local.cut_scale=1"],
}
FEATURES = ["lakd.head_loss=ce", "lakd.attention_weight=0", "local.cut_scale=1"]
IMAGENET = ["teacher.mean=(.485,.456,.406)", "teacher.std=(.229,.224,.225)"]
SHORT = ["epochs=12", "optim.lr=0.1", "optim.schedule=cosine", "optim.warmup_epochs=1"]

_WEIGHED = ("feature", "attention")

Record = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Plan:
    """Arms by name: each the config argument and overrides; the seeds of each.

    Attributes:
      per_class: of the training images, what is kept of each class in SUBSET; 0: no
        arm names SUBSET.
      tell: what a record also holds, found in a finished run's directory.
      render: the records as a table.
    """

    config: str
    arms: dict[str, tuple[str, list[str]]]
    seeds: Sequence[int]
    per_class: int = 0
    tell: Callable[[Path], dict[str, Any]] = lambda directory: {}
    render: Callable[[list[tuple[str, Record]]], str] = lambda kept: table.render_seeds(
        [rows.row(record["result"], name) for name, record in kept]
    )


def digits() -> Plan:
    """Five seeds on the built-in digits, one teacher for all."""
    arms = {"alone": ("none", []), "KD": ("kd", [])}
    arms |= {n: ("lakd", o) for n, o in LOCAL.items()}
    return Plan("configs/digits_lakd.py", arms, range(5))


def digits_weights() -> Plan:
    """The default LAKD of `digits` with heavier features, three seeds."""
    arms = {
        f"weights {w}": ("lakd", [f"lakd.{x}_weight={w}" for x in _WEIGHED])
        for w in (1, 3, 10)
    }
    return Plan("configs/digits_lakd.py", arms, range(3))


def resnet8() -> Plan:
    """CIFAR-10, resnet8 from a published resnet20, three seeds, 12 epochs."""
    common = cifar("resnet20-12fca82f.th")
    arms = {"alone": "none", "KD": "kd"}
    plan = {n: (f"resnet20,resnet8,{m}", common) for n, m in arms.items()}
    local = {"features uncut": FEATURES} | LOCAL
    plan |= {n: ("resnet20,resnet8,lakd", common + o) for n, o in local.items()}
    return Plan("configs/cifar10_lakd.py", plan, range(3))


def resnet20() -> Plan:
    """CIFAR-10, resnet20 from a published resnet56, one seed, 12 epochs."""
    common = cifar("resnet56-4bfd9763.th")
    arms = {"KD": "kd", "LAKD ce+kd cut": "lakd"}
    plan = {n: (f"resnet56,resnet20,{m}", common) for n, m in arms.items()}
    return Plan("configs/cifar10_lakd.py", plan, range(1))


def sweep() -> Plan:
    """CIFAR-10, resnet8 from resnet20, 6 epochs, one seed: one change at a time."""
    common = [*cifar("resnet20-12fca82f.th"), "epochs=6"]
    changes = [
        [],
        ["lakd.feature_weight=0.3", "lakd.attention_weight=0.3"],
        ["lakd.feature_weight=3", "lakd.attention_weight=3"],
        ["lakd.feature_weight=10", "lakd.attention_weight=10"],
        ["local.cut_scale=0.1"],
        ["local.cut_scale=0.5"],
        ["lakd.attention_weight=0"],
        ["lakd.attention=map"],
        ["lakd.power=1"],
        ["lakd.normalise=max"],
        ["lakd.task=teacher_suffix"],
        ["lakd.task=aux_heads"],
        ["lakd.adapter=shape"],
    ]
    arms = {
        " ".join(c) or "defaults": ("resnet20,resnet8,lakd", common + c)
        for c in changes
    }
    return Plan("configs/cifar10_lakd.py", arms, range(1))


def attention() -> Plan:
    """CIFAR-10, resnet8 from resnet20 by AFD and RTK, one seed."""
    common = cifar("resnet20-12fca82f.th")
    arms = {
        "AFD": ("resnet20,resnet8,afd", common),
        "RTK none": ("resnet20,resnet8,rtk", [*common, "rtk.selection=none"]),
        "RTK stage": ("resnet20,resnet8,rtk", common),
    }
    return Plan("configs/cifar10_lakd.py", arms, range(1))


def vam() -> Plan:
    """CIFAR-10, resnet8 alone, with and without virtual attention, four epochs."""
    common = [*cifar("resnet20-12fca82f.th"), "epochs=4"]
    arms = {
        "alone": ("resnet20,resnet8,none", common),
        "with VAM": ("resnet20,resnet8,none", [*common, "student.vam.enabled=True"]),
    }
    return Plan("configs/cifar10_lakd.py", arms, range(1))


def rates() -> Plan:
    """The arms of `resnet8` at a third of its learning rate, one seed."""
    plan = resnet8()
    names = ("alone", "KD", "LAKD ce+kd cut", "LAKD ce+kd uncut")
    arms = {n: (plan.arms[n][0], [*plan.arms[n][1], "optim.lr=0.03"]) for n in names}
    return Plan(plan.config, arms, range(1))


def experts() -> Plan:
    """The gates of an HME on a part of CIFAR-10 at 16x16: plain, smoothed, distilled.

    The question is stage 1's gates after equally many epochs, so nothing is kept apart
    to choose an epoch by, and stage 2 is one epoch, which trains no tree.
    """
    common = [
        "data.source=folder:SUBSET",
        "teacher.init=WEIGHTS/resnet20-12fca82f.th",
        *IMAGENET,
        "student.image_size=16",
        "data.minival=0",
        "batch_size=25",
        "epochs=1",
        "hme.stage1_epochs=10",
        "hme.stage1_lr=0.001",
        "hme.temperature=0.333",  # the released 10 of 300 epochs, stretched to 10
    ]
    smooth = [*common, "label_smoothing=0.1"]
    arms = {
        "plain": ("resnet20,hme,none", common),
        "label smoothing 0.1": ("resnet20,hme,none", smooth),
        "KD": ("resnet20,hme,kd", common),
    }
    return Plan(
        "configs/cifar10_hme.py",
        arms,
        range(2),
        per_class=200,
        tell=gate_entropy.tell,
        render=gate_entropy.render,
    )


def experts_undecayed() -> Plan:
    """The arms of `experts` without weight decay, which moves gates by itself."""
    plan = experts()
    arms = {
        f"{name}, no decay": (arg, [*overrides, "optim.weight_decay=0"])
        for name, (arg, overrides) in plan.arms.items()
        if name in ("plain", "KD")
    }
    return dataclasses.replace(plan, arms=arms)


_PLANS = (digits, digits_weights, resnet8, resnet20, sweep, rates, attention)
_PLANS += (vam, experts, experts_undecayed)
PLANS = {plan.__name__: plan for plan in _PLANS}


def cifar(file: str) -> list[str]:
    """What the CIFAR-10 arms share: the data, a published teacher, a short recipe."""
    paths = ["data.source=folder:IMAGES", f"teacher.init=WEIGHTS/{file}"]
    return [*paths, *IMAGENET, *SHORT]


def subset(images: Path, per_class: int, folder: Path) -> Path:
    """Links to an image folder's test split and, of each class, some training images.

    Args:
      images: the image folder.
      per_class: the first so many by name.
      folder: where the links go; those that are there already stay.
    """
    for role, count in (("train", per_class), ("test", None)):
        for source in sorted((images.resolve() / role).glob("*/")):
            target = folder / role / source.name
            target.mkdir(parents=True, exist_ok=True)
            for file in sorted(source.iterdir())[:count]:
                if not (target / file.name).exists():
                    (target / file.name).symlink_to(file)
    return folder


def run(
    plan: Plan,
    places: dict[str, str],
    out: Path,
    record: Path,
    guard: interrupt.Guard,
) -> str:
    """Runs what is not recorded yet, seed by seed, and renders the table.

    Args:
      places: what IMAGES and WEIGHTS stand for on this machine.
      out: where the runs' directories go.
      record: JSON file of the finished runs, kept up to date.
    """
    kept = workdir.read_json(record) if record.exists() else {}
    keys = {
        f"{name}, seed {seed}": (name, seed)
        for seed in plan.seeds
        for name in plan.arms
    }
    if plan.per_class and keys.keys() - kept.keys():
        folder = out / f"subset-{plan.per_class}"
        links = subset(Path(places["IMAGES"]), plan.per_class, folder)
        places = places | {"SUBSET": str(links)}
    for key, (name, seed) in keys.items():
        if key in kept:
            continue
        arg, overrides = plan.arms[name]
        fields = [*overrides, f"seed={seed}", "baselines=()"]
        command = [f"--config={plan.config}:{arg}"]
        command += [f"--config.{field}" for field in fields]
        directory = out / f"{name.replace(' ', '_')}-{seed}"
        kept[key] = _run_one(command, places, directory, guard) | plan.tell(directory)
        record.parent.mkdir(parents=True, exist_ok=True)
        workdir.write_json(record, kept)
    return plan.render([(name, kept[key]) for key, (name, _) in keys.items()])


def _run_one(
    command: list[str], places: dict[str, str], directory: Path, guard: interrupt.Guard
) -> dict[str, Any]:
    """Runs one arm; its command is recorded without this machine's paths."""
    text = "python main.py " + shlex.join(command)
    print(text, flush=True)
    for name, place in places.items():
        command = [argument.replace(name, place) for argument in command]
    config, _, _ = cli.parse(command)
    result = train.run(config, directory, guard=guard)
    environment = workdir.read_json(directory / "environment.json")
    return {"command": text, "result": result, "versions": environment["versions"]}


def main() -> None:
    """Reads the command line and runs one plan."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("plan", choices=PLANS)
    parser.add_argument("--images", default="", help="image folder of CIFAR-10")
    parser.add_argument("--weights", default="", help="folder of PyTorch checkpoints")
    parser.add_argument("--out", default="runs/compare", type=Path)
    parser.add_argument("--record", default=RESULTS, type=Path, help="results folder")
    chosen = parser.parse_args()
    places = {"IMAGES": chosen.images, "WEIGHTS": chosen.weights}
    record = chosen.record / f"{chosen.plan}.json"
    plan, out = PLANS[chosen.plan](), chosen.out / chosen.plan
    cli.end_with(lambda guard: print(run(plan, places, out, record, guard)))


if __name__ == "__main__":
    main()
