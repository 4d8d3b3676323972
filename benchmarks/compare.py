"""Runs the comparisons of RESULTS.md, one after another, and prints their tables.

    python -m benchmarks.compare digits
    python -m benchmarks.compare resnet8 --images=DIR --weights=DIR
    python -m benchmarks.compare experts --images=DIR --weights=DIR
    python -m benchmarks.compare converged converged_more converged_resnet20 \\
        converged_cifar100 --images=DIR --images100=DIR --weights=DIR

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
import contextlib
import dataclasses
import fcntl
import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import flag_types, gate_entropy
from lakd_jax import cli, paths
from lakd_jax.config import command_line
from lakd_jax.report import table
from lakd_jax.runs import command as command_lib
from lakd_jax.runs import rows
from lakd_jax.runtime import interrupt
from lakd_jax.store import workdir

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


def converged() -> Plan:
    """CIFAR-10, resnet8 from a published resnet20 as long as the literature trains."""
    arms = {"KD": ("kd", []), "LAKD cut": ("lakd", [])}
    arms |= {"alone": ("none", []), "DKD": ("dkd", [])}
    return _resnet8_at_length(arms)


def converged_more() -> Plan:
    """More arms of `converged`."""
    heavy = [f"lakd.{x}_weight=10" for x in _WEIGHED]
    arms = {
        "LAKD cut, weights 10": ("lakd", heavy),
        "LAKD uncut": ("lakd", ["local.cut_scale=1"]),
        "AT+KD": ("at+kd", []),
        "ReviewKD": ("review", []),
    }
    return _resnet8_at_length(arms)


def _resnet8_at_length(arms: dict[str, tuple[str, list[str]]]) -> Plan:
    common = [*cifar("resnet20-12fca82f.th"), "epochs=100"]
    plan = {n: (f"resnet20,resnet8,{m}", common + o) for n, (m, o) in arms.items()}
    return Plan("configs/cifar10_lakd.py", plan, range(3))


def converged_resnet20() -> Plan:
    """CIFAR-10, resnet20 from a published resnet56, 60 epochs."""
    common = [*cifar("resnet56-4bfd9763.th"), "epochs=60"]
    methods = {"KD": "kd", "LAKD cut": "lakd", "DKD": "dkd"}
    arms = {n: (f"resnet56,resnet20,{m}", common) for n, m in methods.items()}
    return Plan("configs/cifar10_lakd.py", arms, range(2))


def converged_cifar100() -> Plan:
    """CIFAR-100, resnet20 from a published resnet32, which has seen all its images."""
    common = [
        "data.source=folder:IMAGES_OF_100",
        "teacher.init=WEIGHTS/cifar100_resnet32.safetensors",
        "teacher.mean=(.5071,.4867,.4408)",
        "teacher.std=(.2675,.2565,.2761)",
        *SHORT,
        "epochs=100",
    ]
    methods = {"KD": "kd", "LAKD cut": "lakd", "DKD": "dkd"}
    arms = {n: (f"resnet32,resnet20,{m}", common) for n, m in methods.items()}
    return Plan("configs/cifar100_lakd.py", arms, range(2))


_PLANS = (digits, digits_weights, resnet8, resnet20, sweep, rates, attention)
_PLANS += (vam, experts, experts_undecayed)
_PLANS += (converged, converged_more, converged_resnet20, converged_cifar100)
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

    Returns:
      The table; before the last run has ended, of those that have.
    """
    keys = {
        f"{name}, seed {seed}": (name, seed)
        for seed in plan.seeds
        for name in plan.arms
    }
    if plan.per_class and keys.keys() - _recorded(record).keys():
        folder = out / f"subset-{plan.per_class}"
        links = subset(
            paths.local(places["IMAGES"], "--images"), plan.per_class, folder
        )
        places = places | {"SUBSET": str(links)}
    for key, (name, seed) in keys.items():
        if key in _recorded(record):
            continue
        arg, overrides = plan.arms[name]
        fields = [*overrides, f"seed={seed}", "baselines=()"]
        command = [f"--config={plan.config}:{arg}"]
        command += [f"--config.{field}" for field in fields]
        directory = out / f"{name.replace(' ', '_')}-{seed}"
        with _claimed(directory) as is_free:
            if is_free and key not in _recorded(record):
                made = _run_one(command, places, directory, guard)
                _add(record, {key: made | plan.tell(directory)})
    kept = _recorded(record)
    pairs = [(name, kept[key]) for key, (name, _) in keys.items() if key in kept]
    return plan.render(pairs) if pairs else "no run has ended yet"


def _recorded(record: Path) -> dict[str, Record]:
    return workdir.read_json(record) if record.exists() else {}


def _add(record: Path, made: dict[str, Record]) -> None:
    """Adds a run to the records, between which another process may have added one."""
    record.parent.mkdir(parents=True, exist_ok=True)
    with _lock(record.with_name(f".{record.name}.lock"), fcntl.LOCK_EX):
        workdir.write_json(record, _recorded(record) | made)


@contextlib.contextmanager
def _claimed(directory: Path) -> Iterator[bool]:
    """Yields whether no other process is at the run of this directory; then none is."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    path = directory.with_name(f".{directory.name}.lock")
    with contextlib.ExitStack() as stack:
        is_free = True
        try:
            stack.enter_context(_lock(path, fcntl.LOCK_EX | fcntl.LOCK_NB))
        except BlockingIOError:
            is_free = False
        yield is_free


@contextlib.contextmanager
def _lock(path: Path, how: int) -> Iterator[None]:
    with open(path, "w") as file:
        fcntl.flock(file, how)
        yield


def _run_one(
    command: list[str], places: dict[str, str], directory: Path, guard: interrupt.Guard
) -> dict[str, Any]:
    """Runs one arm; its command is recorded without this machine's paths."""
    text = "python main.py " + shlex.join(command)
    print(text, flush=True)
    for name, place in places.items():
        command = [argument.replace(name, place) for argument in command]
    config, _, _ = command_line.parse(command)
    result = command_lib.run(config, directory, guard=guard)
    environment = workdir.read_json(directory / "environment.json")
    return {"command": text, "result": result, "versions": environment["versions"]}


def main() -> None:
    """Reads the command line and runs one plan."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("plans", choices=PLANS, nargs="+", metavar="PLAN")
    parser.add_argument("--images", default="", help="image folder of CIFAR-10")
    parser.add_argument("--images100", default="", help="image folder of CIFAR-100")
    parser.add_argument("--weights", default="", help="folder of PyTorch checkpoints")
    parser.add_argument("--out", default="runs/compare", type=flag_types.path)
    parser.add_argument(
        "--record", default=RESULTS, type=flag_types.path, help="results folder"
    )
    chosen = parser.parse_args()
    places = {"IMAGES_OF_100": chosen.images100, "IMAGES": chosen.images}
    places["WEIGHTS"] = chosen.weights

    def work(guard: interrupt.Guard) -> None:
        for name in chosen.plans:
            out, record = chosen.out / name, chosen.record / f"{name}.json"
            print(run(PLANS[name](), places, out, record, guard), flush=True)

    cli.end_with(work)


if __name__ == "__main__":
    main()
