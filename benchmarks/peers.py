"""Adapts public PyTorch libraries, each measured with its own training loop.

Neither is part of this repository: torchdistill is a package to install, mdistiller a
folder to check out. A loop's other work (it waits for the loss in every step, to log
it) is left in. Batches are those of a data loader (`Work.batches`): normalised floats,
in pinned memory where that matters. bfloat16 is autocast around the loop, as neither
has an option for it.
"""

import contextlib
import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, ClassVar
from unittest import mock

import numpy as np
import torch

from benchmarks import timing, torch_step
from benchmarks import work as work_lib


class Peer:
    """What the adapters share; a `timing.Subject`.

    A subclass implements `loop`, one step of its library.
    """

    name: ClassVar[str]
    methods: ClassVar[tuple[str, ...]] = ("none", "kd")
    _student: torch.nn.Module

    def __init__(self, work: work_lib.Work):
        self._device = torch_step.device(work.platform)
        self._kind = work.dtype
        self._batches = _batches(work, self._device)
        self._step = self.loop(work)
        began = time.perf_counter()
        self.run(1)
        self.facts: dict[str, Any] = {"first_step_s": time.perf_counter() - began}

    def loop(self, work: work_lib.Work) -> Callable[..., None]:
        """Returns a function for one step, of (images, labels, indices) on the host."""
        raise NotImplementedError

    def predict(self, images: np.ndarray) -> np.ndarray:
        """See `timing.Subject`; `loop` sets `_student`, which returns logits."""
        return torch_step.predict(self._student, images, self._device)

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

    def loop(self, work: work_lib.Work) -> Callable[..., None]:
        """See `Peer`.

        Raises:
          timing.Unusable: it or the torchvision that it imports cannot be imported.
        """
        try:
            _declare_operators()
            from torchdistill.core import distillation, training
        except (ImportError, RuntimeError, KeyError) as error:
            raise timing.Unusable(
                f"torchdistill cannot be imported ({error}): pip install --no-deps "
                "torchdistill torchvision, and pyyaml and scipy, which it needs."
            ) from error
        device = self._device
        student = torch_step.network(work.student, work.student_weights).to(device)
        feed = {"forward_proc": "forward_batch_only"}
        recipe = {"model": feed, "student": feed}
        recipe["teacher"] = {"requires_grad": False, **feed}
        recipe |= {"num_epochs": 1, "criterion": _criterion(work), **_sgd(work)}
        common = ({}, recipe, device, None, False, 1)
        if work.teacher_weights is None:
            box = training.get_training_box(student, *common)
        else:
            teacher = torch_step.network(work.teacher, work.teacher_weights).to(device)
            box = distillation.get_distillation_box(teacher.eval(), student, *common)
        box.pre_epoch_process(epoch=0)
        self._student = student

        def step(images: torch.Tensor, labels: torch.Tensor, _: torch.Tensor) -> None:
            images, labels = images.to(device), labels.to(device)
            loss = box.forward_process(images, labels, None)
            box.post_forward_process(loss=loss)
            loss.item()

        return step


def _declare_operators() -> None:
    """Lets a torchvision be imported whose compiled part does not load.

    That of another build of PyTorch (CUDA's beside a CPU's), say. torchdistill imports
    it and nothing here calls its operators, of which it describes two when imported.
    """
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        boxes = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        for operator in ("nms", "qnms"):
            library.define(f"{operator}{boxes}")
        _kept.append(library)


_kept: list[Any] = []  # a library's operators are gone with it


def _criterion(work: work_lib.Work) -> dict[str, Any]:
    """Returns a weighted sum of one term, in torchdistill's configuration."""
    logits = {"io": "output", "module_path": "."}
    if work.teacher_weights is None:
        wrapper = {"input": {"is_from_teacher": False, **logits}}
        wrapper["target"] = {"uses_label": True}
        term = {"criterion": {"key": "CrossEntropyLoss", "kwargs": {}}}
        term["criterion_wrapper"] = {"key": "SimpleLossWrapper", "kwargs": wrapper}
    else:
        paths = {f"{w}_module_path": "." for w in ("student", "teacher")}
        paths |= {f"{w}_module_io": "output" for w in ("student", "teacher")}
        kd = work.methods["kd"]
        weights = {"alpha": kd["ce_weight"], "beta": kd["kd_weight"]}
        options = paths | weights | {"temperature": kd["temperature"]}
        term = {"criterion": {"key": "KDLoss", "kwargs": options}}
    terms = {"term": term | {"weight": 1.0}}
    return {"key": "WeightedSumLoss", "kwargs": {"sub_terms": terms}}


def _sgd(work: work_lib.Work) -> dict[str, Any]:
    options = {"lr": work.lr, "momentum": work.momentum}
    options["weight_decay"] = work.weight_decay
    return {"optimizer": {"key": "SGD", "kwargs": options}}


class Mdistiller(Peer):
    """A checkout's own networks, distiller and `BaseTrainer.train_iter`."""

    name = "mdistiller"

    def __init__(self, work: work_lib.Work, folder: str):
        self._folder = folder
        super().__init__(work)

    def loop(self, work: work_lib.Work) -> Callable[..., None]:
        """See `Peer`.

        Raises:
          timing.Unusable: the checkout needs a package that is not installed.
        """
        sys.path.append(self._folder)
        try:
            from mdistiller import distillers, models
            from mdistiller.engine import cfg, trainer, utils
        except ImportError as error:
            raise timing.Unusable(
                f"mdistiller cannot be imported ({error}): --mdistiller=DIR is a "
                "checkout of it, which also needs yacs, tqdm and tensorboardX."
            ) from error

        settings = cfg.CFG.clone()
        settings.SOLVER.LR, settings.SOLVER.MOMENTUM = work.lr, work.momentum
        settings.SOLVER.WEIGHT_DECAY = work.weight_decay
        kd = work.methods["kd"]
        settings.KD.TEMPERATURE = kd["temperature"]
        settings.KD.LOSS.CE_WEIGHT = kd["ce_weight"]
        settings.KD.LOSS.KD_WEIGHT = kd["kd_weight"]
        self._logs = tempfile.TemporaryDirectory()  # gone with this object
        settings.LOG.WANDB, settings.LOG.PREFIX = False, self._logs.name

        def network(name: str, weights: work_lib.Weights) -> torch.nn.Module:
            net = models.cifar_model_dict[name][0](num_classes=work.classes)
            torch_step.load(net, work_lib.projected(weights, torch_step.WIDTHS[name]))
            return net

        student = network(work.student, work.student_weights)
        self._student = _Logits(student)
        parts: list[Any] = [student]
        if work.teacher_weights is not None:
            parts += [network(work.teacher, work.teacher_weights), settings]
        kind = {"none": "NONE", "kd": "KD"}[work.method]
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


class _Logits(torch.nn.Module):
    """Leaves out the features that a checkout's networks return, too."""

    def __init__(self, net: torch.nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps images (B, 3, H, W) to logits (B, classes)."""
        return self.net(x)[0]


@contextlib.contextmanager
def _cuda_or_stay(device: torch.device) -> Iterator[None]:
    """Makes `.cuda()`, which the trainer calls, do nothing on CPUs."""
    if device.type == "cuda":
        yield
        return
    with mock.patch.object(torch.Tensor, "cuda", lambda self, **_: self):
        yield


def _batches(
    work: work_lib.Work, device: torch.device
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yields (images (B, 3, 32, 32), labels (B,), indices (B,)) on the host."""
    for images, labels, row in work.batches():
        batch = (
            torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(),
            torch.from_numpy(labels).long(),
            torch.from_numpy(row).long(),
        )
        pinned = device.type == "cuda"
        yield tuple(x.pin_memory() for x in batch) if pinned else batch
