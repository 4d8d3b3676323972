"""Adapts public PyTorch libraries, each measured with its own training loop.

Neither is part of this repository: torchdistill is a package to install, mdistiller a
folder to check out. A loop's other work (it waits for the loss in every step, to log
it) is left in. Batches are those of a data loader, prepared in advance: normalised
floats in pinned memory, so a peer does not do the augmentation that ours and the
baseline do. bfloat16 is autocast around the loop, as neither has an option for it.
"""

import contextlib
import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import torch

from benchmarks import ours, timing, torch_step


def find(peer: str) -> type["Peer"]:
    """Returns the adapter for the name of a package or the folder of a checkout.

    Raises:
      timing.Unusable: neither is known.
    """
    if peer == "torchdistill":
        return Torchdistill
    if (Path(peer) / "mdistiller" / "engine").is_dir():
        return type("Checkout", (Mdistiller,), {"folder": str(Path(peer).resolve())})
    raise timing.Unusable(
        f"--peer={peer}: give torchdistill (pip install torchdistill), or the folder "
        "of a checkout that has mdistiller/engine in it."
    )


class Peer:
    """What the adapters share; a `timing.Subject`.

    A subclass implements `loop`, one step of its library.
    """

    name: ClassVar[str]
    methods: ClassVar[tuple[str, ...]]

    def __init__(self, made: ours.Setup):
        self._device = torch_step.device()
        self._kind = made.config.dtype
        self._batches = itertools.cycle(_batches(made, self._device))
        self._step = self.loop(made)
        began = time.perf_counter()
        self.run(1)
        self.facts: dict[str, Any] = {"first_step_s": time.perf_counter() - began}

    @classmethod
    def make(cls, made: ours.Setup) -> timing.Subject:
        """Returns the subject."""
        return cls(made)

    def loop(self, made: ours.Setup) -> Callable[..., None]:
        """Returns a function for one step, of (images, labels, indices) on the host."""
        raise NotImplementedError

    def run(self, steps: int) -> None:
        """See `timing.Subject`."""
        half = self._kind == "bfloat16"
        with torch.autocast(self._device.type, torch.bfloat16, half):
            for batch in itertools.islice(self._batches, steps):
                self._step(*batch)
        if self._device.type == "cuda":
            torch.cuda.synchronize()

    def peak_bytes(self) -> int | None:
        """See `timing.Subject`; includes that of other PyTorch subjects."""
        cuda = self._device.type == "cuda"
        return torch.cuda.max_memory_allocated() if cuda else None


class Torchdistill(Peer):
    """`DistillationBox` with the library's KDLoss, or its TrainingBox without teacher.

    The networks are the baseline's, as the library has few of the CIFAR pairs, and
    the step is that of its own example for image classification.
    """

    name = "torchdistill"
    methods = ("none", "kd")

    def loop(self, made: ours.Setup) -> Callable[..., None]:
        """See `Peer`.

        Raises:
          timing.Unusable: it or the torchvision that it imports cannot be imported.
        """
        try:
            from torchdistill.core import distillation, training
        except (ImportError, RuntimeError, KeyError) as error:
            raise timing.Unusable(
                f"torchdistill cannot be imported ({error}). It also needs a "
                f"torchvision that loads with PyTorch {torch.__version__}: `import "
                "torchvision` must work."
            ) from error
        c, device = made.config, self._device
        student = torch_step.network(c.student.name, made.student_torch).to(device)
        feed = {"forward_proc": "forward_batch_only"}
        recipe = {"model": feed, "student": feed}
        recipe["teacher"] = {"requires_grad": False, **feed}
        recipe |= {"num_epochs": 1, "criterion": _criterion(made), **_sgd(made)}
        common = ({}, recipe, device, None, False, 1)
        if made.teacher_torch is None:
            box = training.get_training_box(student, *common)
        else:
            teacher = torch_step.network(c.teacher.name, made.teacher_torch).to(device)
            box = distillation.get_distillation_box(teacher.eval(), student, *common)
        box.pre_epoch_process(epoch=0)

        def step(images: torch.Tensor, labels: torch.Tensor, _: torch.Tensor) -> None:
            images, labels = images.to(device), labels.to(device)
            loss = box.forward_process(images, labels, None)
            box.post_forward_process(loss=loss)
            loss.item()

        return step


def _criterion(made: ours.Setup) -> dict[str, Any]:
    """Returns a weighted sum of one term, in torchdistill's configuration."""
    logits = {"io": "output", "module_path": "."}
    if made.teacher_torch is None:
        wrapper = {"input": {"is_from_teacher": False, **logits}}
        wrapper["target"] = {"uses_label": True}
        term = {"criterion": {"key": "CrossEntropyLoss", "kwargs": {}}}
        term["criterion_wrapper"] = {"key": "SimpleLossWrapper", "kwargs": wrapper}
    else:
        paths = {f"{w}_module_path": "." for w in ("student", "teacher")}
        paths |= {f"{w}_module_io": "output" for w in ("student", "teacher")}
        kd = made.config.methods["kd"]
        weights = {"alpha": kd["ce_weight"], "beta": kd["kd_weight"]}
        options = paths | weights | {"temperature": kd["temperature"]}
        term = {"criterion": {"key": "KDLoss", "kwargs": options}}
    terms = {"term": term | {"weight": 1.0}}
    return {"key": "WeightedSumLoss", "kwargs": {"sub_terms": terms}}


def _sgd(made: ours.Setup) -> dict[str, Any]:
    o = made.config.optim
    options = {"lr": o.lr, "momentum": o.momentum, "weight_decay": o.weight_decay}
    return {"optimizer": {"key": "SGD", "kwargs": options}}


class Mdistiller(Peer):
    """A checkout's own networks, distiller and `BaseTrainer.train_iter`."""

    name = "mdistiller"
    methods = ("none", "kd")
    folder: ClassVar[str]

    def loop(self, made: ours.Setup) -> Callable[..., None]:
        """See `Peer`.

        Raises:
          timing.Unusable: the checkout needs a package that is not installed.
        """
        sys.path.append(self.folder)
        try:
            from mdistiller import distillers, models
            from mdistiller.engine import cfg, trainer, utils
        except ImportError as error:
            raise timing.Unusable(f"mdistiller cannot be imported: {error}") from error

        c, settings = made.config, cfg.CFG.clone()
        o = c.optim
        settings.SOLVER.LR, settings.SOLVER.MOMENTUM = o.lr, o.momentum
        settings.SOLVER.WEIGHT_DECAY = o.weight_decay
        kd = c.methods["kd"]
        settings.KD.TEMPERATURE = kd["temperature"]
        settings.KD.LOSS.CE_WEIGHT = kd["ce_weight"]
        settings.KD.LOSS.KD_WEIGHT = kd["kd_weight"]
        self._logs = tempfile.TemporaryDirectory()  # gone with this object
        settings.LOG.WANDB, settings.LOG.PREFIX = False, self._logs.name

        def network(name: str) -> torch.nn.Module:
            return models.cifar_model_dict[name][0](num_classes=ours.CLASSES)

        parts: list[Any] = [network(c.student.name)]
        if c.method == "kd":
            parts += [network(c.teacher.name), settings]
        kind = {"none": "NONE", "kd": "KD"}[c.method]
        distiller = distillers.distiller_dict[kind](*parts).to(self._device)
        loop = trainer.BaseTrainer(
            "throughput", torch.nn.DataParallel(distiller), None, None, settings
        )
        loop.distiller.train()
        names = ("training_time", "data_time", "losses", "top1", "top5")
        meters = {name: utils.AverageMeter() for name in names}

        def step(*batch: torch.Tensor) -> None:
            with _cuda_or_stay(self._device):
                loop.train_iter(batch, 1, meters)

        return step


@contextlib.contextmanager
def _cuda_or_stay(device: torch.device) -> Iterator[None]:
    """Makes `.cuda()`, which the trainer calls, do nothing on CPUs."""
    if device.type == "cuda":
        yield
        return
    with mock.patch.object(torch.Tensor, "cuda", lambda self, **_: self):
        yield


def _batches(
    made: ours.Setup, device: torch.device
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Returns a few (images (B, 3, 32, 32), labels (B,), indices (B,)) on the host."""
    d, found = made.config.data, []
    mean, std = torch.tensor(d.mean), torch.tensor(d.std)
    for row in made.rows(4, 1):
        pixels = torch.tensor(made.split.images[row]).float() / 255
        images = ((pixels - mean) / std).permute(0, 3, 1, 2).contiguous()
        labels = torch.tensor(made.split.labels[row]).long()
        batch = (images, labels, torch.tensor(row).long())
        if device.type == "cuda":
            batch = tuple(x.pin_memory() for x in batch)
        found.append(batch)
    return found
