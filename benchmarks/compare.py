"""Runs the comparisons of RESULTS.md, one after another, and prints their tables.

    python -m benchmarks.compare digits
    python -m benchmarks.compare resnet8 --images=DIR --weights=DIR

Each arm is a command line of main.py, printed before it runs; each run keeps its
directory under --out, so an interrupted comparison goes on where it stopped and a
finished one only prints. `--images` is an image folder of CIFAR-10, `--weights` a
folder with PyTorch checkpoints of CIFAR-10 ResNets (option A shortcuts, trained
with ImageNet's normalisation), as published by Y. Idelbayev.
"""

import argparse
import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path

from lakd_jax import cli, interrupt, train
from lakd_jax.report import table
from lakd_jax.train import runs

LOCAL = {
    "LAKD cut": ["lakd.head_loss=ce"],
    "LAKD uncut": ["lakd.head_loss=ce", "local.cut_scale=1"],
    "LAKD ce+kd cut": [],
    "LAKD ce+kd uncut": ["local.cut_scale=1"],
}
FEATURES = ["lakd.head_loss=ce", "lakd.attention_weight=0", "local.cut_scale=1"]
IMAGENET = ["teacher.mean=(.485,.456,.406)", "teacher.std=(.229,.224,.225)"]
SHORT = ["epochs=12", "optim.lr=0.1", "optim.schedule=cosine", "optim.warmup_epochs=1"]


@dataclasses.dataclass(frozen=True)
class Plan:
    """Arms by name: each the config argument and overrides; the seeds of each."""

    config: str
    arms: dict[str, tuple[str, list[str]]]
    seeds: Sequence[int]


def digits() -> Plan:
    """Five seeds on the built-in digits, one teacher for all."""
    arms = {"alone": ("none", []), "KD": ("kd", [])}
    arms |= {n: ("lakd", o) for n, o in LOCAL.items()}
    return Plan("configs/digits_lakd.py", arms, range(5))


def resnet8(images: str, weights: str) -> Plan:
    """CIFAR-10, resnet8 from a published resnet20, three seeds, 12 epochs."""
    common = cifar(images, weights, "resnet20-12fca82f.th")
    arms = {"alone": "none", "KD": "kd"}
    plan = {n: (f"resnet20,resnet8,{m}", common) for n, m in arms.items()}
    local = {"features uncut": FEATURES} | LOCAL
    plan |= {n: ("resnet20,resnet8,lakd", common + o) for n, o in local.items()}
    return Plan("configs/cifar10_lakd.py", plan, range(3))


def resnet20(images: str, weights: str) -> Plan:
    """CIFAR-10, resnet20 from a published resnet56, one seed, 12 epochs."""
    common = cifar(images, weights, "resnet56-4bfd9763.th")
    arms = {"KD": "kd", "LAKD ce+kd cut": "lakd"}
    plan = {n: (f"resnet56,resnet20,{m}", common) for n, m in arms.items()}
    return Plan("configs/cifar10_lakd.py", plan, range(1))


def sweep(images: str, weights: str) -> Plan:
    """CIFAR-10, resnet8 from resnet20, one seed: one field changed at a time."""
    common = cifar(images, weights, "resnet20-12fca82f.th")
    changes = [
        [],
        ["lakd.feature_weight=0.3", "lakd.attention_weight=0.3"],
        ["lakd.feature_weight=3", "lakd.attention_weight=3"],
        ["lakd.feature_weight=10", "lakd.attention_weight=10"],
        ["local.cut_scale=0.1"],
        ["local.cut_scale=0.5"],
        ["lakd.attention_weight=0"],
        ["lakd.attention=map"],
        ["lakd.attention=map", "lakd.attention_weight=100"],
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


def cifar(images: str, weights: str, file: str) -> list[str]:
    """What the CIFAR-10 arms share: the data, a published teacher, a short recipe."""
    (path,) = Path(weights).glob(f"*{file}")
    return [f"data.source=folder:{images}", f"teacher.init={path}", *IMAGENET, *SHORT]


def run(plan: Plan, out: Path) -> str:
    """Runs what is not finished yet, seed by seed, and renders the table."""
    rows = []
    with interrupt.Guard() as guard:
        for seed in plan.seeds:
            for name, (arg, overrides) in plan.arms.items():
                fields = [*overrides, f"seed={seed}", "baselines=()"]
                workdir = out / f"{name.replace(' ', '_')}-{seed}"
                argv = [f"--config={plan.config}:{arg}", f"--workdir={workdir}"]
                argv += [f"--config.{field}" for field in fields]
                print("python main.py", shlex.join(argv), flush=True)
                config, _, _ = cli.parse(argv)
                result = train.run(config, workdir, guard=guard)
                rows.append(runs.row(result, name))
    return table.render_seeds(rows)


def main() -> None:
    """Reads the command line and runs one plan."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("plan", choices=("digits", "resnet8", "resnet20", "sweep"))
    parser.add_argument("--images", default="", help="image folder of CIFAR-10")
    parser.add_argument("--weights", default="", help="folder of PyTorch checkpoints")
    parser.add_argument("--out", default="runs/compare", type=Path)
    chosen = parser.parse_args()
    if chosen.plan == "digits":
        plan = digits()
    else:
        make = {"resnet8": resnet8, "resnet20": resnet20, "sweep": sweep}[chosen.plan]
        plan = make(chosen.images, chosen.weights)
    print(run(plan, chosen.out / chosen.plan))


if __name__ == "__main__":
    main()
