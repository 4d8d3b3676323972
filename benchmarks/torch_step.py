"""Implements the same training step in PyTorch, as fast as we know how to write it.

Images stay on the device as padded uint8; one gather crops and mirrors a batch.
Everything is channels-last. The teacher has its batch norms folded into its
convolutions and, in bfloat16, weights of that type; the student computes under
autocast. SGD is fused. Losses are float32. `compile` runs input, both networks and
losses through torch.compile; `cudagraphs` also replays it as CUDA graphs.
"""

import itertools
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import fusion

from benchmarks import timing
from benchmarks import work as work_lib

_MODES = {"compile": None, "cudagraphs": "reduce-overhead"}
_DEPTHS = (8, 14, 20, 32, 44, 56, 110)
WIDTHS = {f"resnet{d}": (16, 16, 32, 64) for d in _DEPTHS}
WIDTHS |= {f"resnet{d}x4": (32, 64, 128, 256) for d in (8, 32)}
_EPS = 1e-8  # in the mask's mean


def device(platform: str) -> torch.device:
    """Returns the device of PyTorch, the one that JAX uses.

    Raises:
      timing.Unusable: JAX has an accelerator that this PyTorch cannot use.
    """
    if platform == "cpu":
        return torch.device("cpu")
    if platform != "gpu" or not torch.cuda.is_available():
        raise timing.Unusable(
            f"JAX computes on {platform} and PyTorch {torch.__version__} cannot: "
            "install a PyTorch for it, or leave out --peer."
        )
    return torch.device("cuda")


def prepare(threads: int, seed: int) -> None:
    """Sets threads and TF32 as in JAX, and selects the fastest convolutions."""
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True


class PadShortcut(nn.Module):
    """Keeps every second row and column, and pads channels with zeros."""

    def __init__(self, old: int, new: int):
        super().__init__()
        before = (new - old) // 2
        self.pads = (0, 0, 0, 0, before, new - old - before)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps (B, old, H, W) to (B, new, H / 2, W / 2)."""
        return F.pad(x[:, :, ::2, ::2], self.pads)


class Block(nn.Module):
    """Two 3x3 convolutions with a shortcut."""

    def __init__(self, old: int, new: int, stride: int, projection: bool):
        super().__init__()
        self.conv1 = nn.Conv2d(old, new, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(new)
        self.conv2 = nn.Conv2d(new, new, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(new)
        self.downsample = nn.Identity()
        if old == new and stride == 1:
            return
        conv = nn.Conv2d(old, new, 1, stride, bias=False)
        projected = nn.Sequential(conv, nn.BatchNorm2d(new))
        self.downsample = projected if projection else PadShortcut(old, new)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps (B, C, H, W) to (B, new, H / stride, W / stride)."""
        h = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(h + self.downsample(x))


class ResNet(nn.Module):
    """A CIFAR ResNet of three stages; shortcuts are projections, or pad with zeros.

    Raises:
      timing.Unusable: the network is not one of these.
    """

    def __init__(self, name: str, classes: int, projection: bool):
        super().__init__()
        if name not in WIDTHS:
            known = ", ".join(WIDTHS)
            raise timing.Unusable(f"PyTorch networks here: {known}; {name} is none")
        widths = self.widths = WIDTHS[name]
        blocks = (int(name.removeprefix("resnet").removesuffix("x4")) - 2) // 6
        self.conv1 = nn.Conv2d(3, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        for stage in (1, 2, 3):
            new, stride = widths[stage], 1 if stage == 1 else 2
            first = Block(widths[stage - 1], new, stride, projection)
            rest = (Block(new, new, 1, projection) for _ in range(blocks - 1))
            setattr(self, f"layer{stage}", nn.Sequential(first, *rest))
        self.fc = nn.Linear(widths[-1], classes)

    def joints(
        self, x: torch.Tensor, cut: bool
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Maps images (B, 3, H, W) to logits and the outputs of the stages.

        `cut` stops the gradient between stages.
        """
        h, ends = F.relu(self.bn1(self.conv1(x))), []
        for stage in (self.layer1, self.layer2, self.layer3):
            h = stage(h.detach() if cut and ends else h)
            ends.append(h)
        pooled = h.mean((2, 3), dtype=torch.float32)
        return self.fc(pooled.to(self.fc.weight.dtype)), ends

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps images (B, 3, H, W) to logits (B, classes)."""
        return self.joints(x, False)[0]


def network(name: str, weights: work_lib.Weights) -> ResNet:
    """Returns `name` with weights in PyTorch's names (`interop.to_torch`)."""
    projection = any(".downsample." in key for key in weights)
    net = ResNet(name, len(weights["fc.bias"]), projection)
    load(net, weights)
    return net


def load(net: nn.Module, weights: work_lib.Weights) -> None:
    """Loads weights into a network; each must have all that the other has."""
    state = {key: torch.tensor(value) for key, value in weights.items()}
    missing, surplus = net.load_state_dict(state, strict=False)
    lost = [key for key in missing if not key.endswith("num_batches_tracked")]
    assert not lost and not surplus, (lost, surplus)


def fold(net: nn.Module) -> nn.Module:
    """Folds the batch norms of a network in evaluation mode into its convolutions."""
    pairs = (("conv1", "bn1"), ("conv2", "bn2"), ("0", "1"))
    for module in list(net.modules()):
        for conv, norm in pairs:
            if isinstance(getattr(module, norm, None), nn.BatchNorm2d):
                old = getattr(module, conv), getattr(module, norm)
                setattr(module, conv, fusion.fuse_conv_bn_eval(*old))
                setattr(module, norm, nn.Identity())
    return net


def kd_loss(student: torch.Tensor, teacher: torch.Tensor, t: float) -> torch.Tensor:
    """Computes t^2 KL(teacher || student) of logits (B, classes), softened by t."""
    log_s, log_t = (F.log_softmax(x.float() / t, 1) for x in (student, teacher))
    return t * t * F.kl_div(log_s, log_t, reduction="batchmean", log_target=True)


def mask(z: torch.Tensor, a: float, b: float, window: int) -> torch.Tensor:
    """Computes LAKD's mask (B, 1, H, W), mean 1, of a teacher's map z (B, C, H, W)."""
    s, pad = z.abs().sum(1, keepdim=True), window // 2
    average = F.avg_pool2d(s, window, 1, pad, count_include_pad=False)
    w = a * average + b * F.max_pool2d(s, window, 1, pad)
    return w / (w.mean((2, 3), keepdim=True) + _EPS)


class Torch:
    """The training step of the baseline; a `timing.Subject`.

    Covers the defaults of methods none, kd and lakd: LAKD with stages as modules,
    isolated, masks of mean 1 and adapters everywhere.
    """

    def __init__(self, work: work_lib.Work, kind: str):
        self.name, self._work = f"torch {kind}", work
        self._device = device(work.platform)
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
        self._bfloat16 = work.dtype == "bfloat16"
        self._load()
        self._data()
        modules = [self.student, *self.adapters]
        parameters = [p for m in modules for p in m.parameters()]
        self._optimizer = torch.optim.SGD(
            parameters,
            work.lr,
            work.momentum,
            weight_decay=work.weight_decay,
            fused=True,
        )
        self._loss, self._graphs = self._whole, kind == "cudagraphs"
        if kind != "eager":
            self._loss = torch.compile(self._whole, mode=_MODES[kind], dynamic=False)
        began = time.perf_counter()
        self.run(1)
        self.facts = {"first_step_s": time.perf_counter() - began}

    def run(self, steps: int) -> None:
        """See `timing.Subject`."""
        for _ in range(steps):
            self.step(next(self._batches))
        self._wait()

    def step(self, indices: torch.Tensor) -> torch.Tensor:
        """Updates from the examples at `indices` (B,); returns the loss before."""
        if self._graphs:  # the last step's tensors may be overwritten
            torch.compiler.cudagraph_mark_step_begin()
        loss = self._loss(indices)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self._optimizer.step()
        return loss.detach()

    def peak_bytes(self) -> int | None:
        """See `timing.Subject`."""
        return torch.cuda.max_memory_allocated() if self._cuda else None

    @property
    def _cuda(self) -> bool:
        return self._device.type == "cuda"

    def _wait(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()

    def predict(self, images: np.ndarray) -> np.ndarray:
        """See `timing.Subject`."""
        return predict(self.student, images, self._device)

    def _load(self) -> None:
        """Puts networks and adapters with our weights on the device."""
        work, last = self._work, torch.channels_last
        student = network(work.student, work.student_weights).train()
        self.student = student.to(self._device, memory_format=last)
        self.teacher = None
        self.adapters = [
            _adapter(parameters).train().to(self._device, memory_format=last)
            for parameters in work.adapters
        ]
        if work.teacher_weights is None:
            return
        teacher = fold(network(work.teacher, work.teacher_weights).eval())
        kind = torch.bfloat16 if self._bfloat16 else torch.float32
        self.teacher = teacher.to(self._device, kind, memory_format=last)
        self.teacher.requires_grad_(False)

    def _data(self) -> None:
        """Puts padded images (N, H + 2 pad, W + 2 pad, 3) and labels on the device."""
        work, images = self._work, torch.tensor(self._work.images)
        self._side = images.shape[1]
        padded = F.pad(images, (0, 0, work.pad, work.pad, work.pad, work.pad))
        self._images = padded.to(self._device)
        self._labels = torch.tensor(work.labels).long().to(self._device)
        mean, std = (
            torch.tensor(x, device=self._device) for x in (work.mean, work.std)
        )
        self._scale, self._shift = 1 / (255 * std), -mean / std
        rows = torch.tensor(work.order).long().to(self._device)
        self._batches = itertools.cycle(rows)

    def _pixels(self, indices: torch.Tensor) -> torch.Tensor:
        """Returns cropped, mirrored, normalised images (B, 3, H, W), channels last."""
        d, where = self._work, self._device
        count, line = len(indices), torch.arange(self._side, device=where)
        top, left = torch.randint(0, 2 * d.pad + 1, (2, count, 1), device=where)
        columns = line.expand(count, -1)
        if d.flip:
            mirrored = torch.rand(count, 1, device=where) < 0.5
            columns = torch.where(mirrored, self._side - 1 - line, columns)
        rows, columns = (line + top)[:, :, None], (columns + left)[:, None, :]
        images = self._images[indices[:, None, None], rows, columns]
        return (images * self._scale + self._shift).permute(0, 3, 1, 2)

    def _whole(self, indices: torch.Tensor) -> torch.Tensor:
        """Computes the loss of the examples at `indices` (B,), a float32 scalar."""
        work, labels = self._work, self._labels[indices]
        x = self._pixels(indices)
        with torch.autocast(self._device.type, torch.bfloat16, self._bfloat16):
            logits, ends = self.student.joints(x, cut=work.method == "lakd")
        hard = F.cross_entropy(logits.float(), labels)
        if self.teacher is None:
            return hard
        with torch.no_grad():
            inputs = x.to(torch.bfloat16) if self._bfloat16 else x
            theirs, targets = self.teacher.joints(inputs, cut=False)
        kd = work.methods["kd"]
        soft = kd_loss(logits, theirs, kd["temperature"])
        loss = kd["ce_weight"] * hard + kd["kd_weight"] * soft
        for adapter, h, z in zip(self.adapters, ends, targets, strict=False):
            loss = loss + self._local(adapter(h.float()), z.float())
        return loss

    def _local(self, u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Computes L_lf + L_att from (B, C, H, W): adapted map u, teacher's map v."""
        k, errors = self._work.methods["lakd"], u - v
        with torch.no_grad():
            w = mask(v, k["a"], k["b"], k["window"])
        attention = (w * errors).square().mean()
        return k["feature_weight"] * errors.square().mean() + (
            k["attention_weight"] * attention
        )


def predict(net: nn.Module, images: np.ndarray, where: torch.device) -> np.ndarray:
    """Computes logits (N, classes) of normalised images (N, H, W, 3)."""
    net.eval()
    with torch.no_grad():
        found = [
            net(torch.tensor(part).permute(0, 3, 1, 2).to(where)).float().cpu().numpy()
            for part in np.array_split(images, -(-len(images) // 256))
        ]
    net.train()
    return np.concatenate(found)


def _adapter(params: dict) -> nn.Module:
    """Returns a 1x1 convolution and batch norm with our parameters."""
    kernel = torch.tensor(np.ascontiguousarray(params["conv"]["kernel"][0, 0].T))
    conv = nn.Conv2d(kernel.shape[1], kernel.shape[0], 1, bias=False)
    norm = nn.BatchNorm2d(kernel.shape[0])
    with torch.no_grad():
        conv.weight.copy_(kernel[:, :, None, None])
        norm.weight.copy_(torch.tensor(params["bn"]["scale"]))
        norm.bias.copy_(torch.tensor(params["bn"]["bias"]))
    return nn.Sequential(conv, norm)
