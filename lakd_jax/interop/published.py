"""Weights that others publish: their names, addresses, hashes and what comes with them.

Every row was read at its publisher: torchvision's in torchvision/models/*.py and, for
the normalisation, torchvision/transforms/_presets.py; akamaster's in the README, the
names of the files and trainer.py; chenyaofo's in the README and the training logs. A
name is listed only if its hash was read there or computed from the file.
"""

import dataclasses
import difflib
import posixpath
import re
from collections.abc import Iterator, Sequence

from lakd_jax.data import preparation as preparation_lib
from lakd_jax.data.tfds import imagenet

HUB = "hf:"
IMAGENET, CIFAR10, CIFAR100 = "ImageNet", "CIFAR-10", "CIFAR-100"
_PREFIX = re.compile(r"(torchvision|akamaster|chenyaofo|hf):")
_HUB_NAME = re.compile(r"hf:(\w[\w.-]*/\w[\w.-]*)(?:@(\w[\w.-]*))?(?::(.+))?")
_HUB_FILE = re.compile(r"(?:\w[\w.-]*/)*\w[\w.-]*\.safetensors")
_HUB_FORM = "hf:ORG/REPO, hf:ORG/REPO@REVISION or either with :FILE.safetensors"
_LEGEND = f"""\
image: side of the images; of: length of the shorter side before the centre is cut out
(data.test_resize); accuracy: as published, on the test split; bicubic: measured with
images resized so, while ours are resized bilinearly.

Weights on the Hugging Face Hub: {_HUB_FORM};
without FILE it is model.safetensors. Names of timm and torchvision are understood, and
the normalisation is read from config.json: hf:timm/resnet34.a1_in1k."""
_WNID = re.compile(r"n\d{8}")


@dataclasses.dataclass(frozen=True)
class Published:
    """Published weights, and what their publisher says about them.

    Attributes:
      name: as it is given in `teacher.init`.
      network: one of `models.names()`; "" if it is not known.
      address: of the file.
      sha256: the first hex digits of its SHA-256, eight or more; all of them once the
        file is here.
      mean, std: of the pixels in 0..1, per channel; None if not known.
      size: height and width of the images; 0 if not known.
      shorter: length of the shorter side of test images before the centre is cut out; 0
        if they are used whole, or if it is not known.
      accuracy: on the test split, in 0..1; 0 if not known.
      data: the data set they were trained on; "" if not known.
      classes: names of the classes, in the order of the logits; () if not known.
      source: the page that says so.
      interpolation: of the resizing.
    """

    name: str
    network: str
    address: str
    sha256: str
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    size: int = 0
    shorter: int = 0
    accuracy: float = 0.0
    data: str = ""
    classes: tuple[str, ...] = ()
    source: str = ""
    interpolation: str = "bilinear"

    @property
    def file(self) -> str:
        """Returns the name of the file at `address`."""
        return posixpath.basename(self.address)

    @property
    def preparation(self) -> preparation_lib.Preparation | None:
        """Returns how test images are prepared for it; None if not known."""
        if not self.size:
            return None
        return preparation_lib.Preparation(self.size, self.size, self.shorter)

    def class_names(self, ours: Sequence[str]) -> tuple[str, ...]:
        """Returns the names of the classes in the vocabulary of the data's, `ours`.

        Classes of ImageNet have many names in use. Those of tfds and of the archives
        (n01440764) are known; of data with others only their number is compared.
        """
        if self.data == IMAGENET and ours and all(map(_WNID.fullmatch, ours)):
            return imagenet.class_names()
        return self.classes


@dataclasses.dataclass(frozen=True)
class HubFile:
    """A file on the Hugging Face Hub; `revision` is a branch, a tag or a commit."""

    name: str
    repository: str
    revision: str
    file: str


_COLOURS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # of ImageNet
_TORCHVISION_PAGE = "https://docs.pytorch.org/vision/stable/models.html"
# network, version, hash, image size, shorter side before the crop, accuracy in %
_OF_TORCHVISION = """
convnext_small   V1  0c510722  224  230  83.616
convnext_tiny    V1  983f1562  224  236  82.520
efficientnet_b0  V1  3dd342df  224  256  77.692
efficientnet_b1  V1  533bc792  240  256  78.642
efficientnet_b1  V2  c27df63c  240  255  79.838
efficientnet_b2  V1  bcdf34b7  288  288  80.608
efficientnet_b3  V1  cf984f9c  300  320  82.008
efficientnet_b4  V1  7eb33cd5  380  384  83.384
mobilenet_v2     V1  b0353104  224  256  71.878
mobilenet_v2     V2  7ebf99e0  224  232  72.154
resnet18         V1  f37072fd  224  256  69.758
resnet34         V1  b627a593  224  256  73.314
resnet50         V1  0676ba61  224  256  76.130
resnet50         V2  11ad3fa6  224  232  80.858
resnet101        V1  63fe2227  224  256  77.374
resnet101        V2  cd907fc2  224  232  81.886
resnet152        V1  394f9c45  224  256  78.312
resnet152        V2  f82ba261  224  232  82.284
vit_b_16         V1  c867db91  224  256  81.072
"""
_OUR_NAMES = {"mobilenet_v2": "mobilenet_v2_imagenet", "vit_b_16": "vit_base"}

_AKAMASTER_PAGE = "https://github.com/akamaster/pytorch_resnet_cifar10"
# network, SHA-256, accuracy in %. That of resnet110 was read in the name of the file,
# the others were computed.
_OF_AKAMASTER = """
resnet20   12fca82f0bebc4135bf1f32f6e3710e61d5108578464b84fd6d7f5c1b04036c8  91.73
resnet32   d509ac1820d7f25398913559d7e81a13229b1e7adc5648e3bfa5e22dc137f850  92.63
resnet44   014dd6541728a1c700b1642ab640e211dc6eb8ed507d70697458dc8f8a0ae2e4  93.10
resnet56   4bfd97631478d6b638d2764fd2baff3edb1d7d82252d54439343b6596b9b5367  93.39
resnet110  1d1ed7c2  93.68
"""
_CIFAR10_CLASSES = tuple(
    "airplane automobile bird cat deer dog frog horse ship truck".split()
)

_CHENYAOFO_PAGE = "https://github.com/chenyaofo/pytorch-cifar-models"
# network, hash and accuracy in % on CIFAR-10, the same on CIFAR-100
_OF_CHENYAOFO = """
resnet20  4118986f  92.60  23dac2f1  68.83
resnet32  ef93fc4d  93.53  84213ce6  70.16
resnet44  2a3cabcb  94.01  ffe32858  71.63
resnet56  187c023a  94.37  f2eff4c8  72.63
"""
_CHENYAOFO_COLOURS = {
    CIFAR10: ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    CIFAR100: ((0.5070, 0.4865, 0.4409), (0.2673, 0.2564, 0.2761)),
}


def _rows(text: str) -> Iterator[list[str]]:
    return (line.split() for line in text.strip().splitlines())


def _torchvision() -> Iterator[Published]:
    for name, version, digits, size, shorter, accuracy in _rows(_OF_TORCHVISION):
        # The first EfficientNets are ports of timm's, measured as there.
        ported = name.startswith("efficientnet") and version == "V1"
        file = f"{name}_rwightman-{digits}" if ported else f"{name}-{digits}"
        yield Published(
            name=f"torchvision:{name}.IMAGENET1K_{version}",
            network=_OUR_NAMES.get(name, name),
            address=f"https://download.pytorch.org/models/{file}.pth",
            sha256=digits,
            mean=_COLOURS[0],
            std=_COLOURS[1],
            size=int(size),
            shorter=int(shorter),
            accuracy=float(accuracy) / 100,
            data=IMAGENET,
            source=_TORCHVISION_PAGE,
            interpolation="bicubic" if ported else "bilinear",
        )


def _akamaster() -> Iterator[Published]:
    folder = f"{_AKAMASTER_PAGE}/raw/master/pretrained_models"
    for network, sha256, accuracy in _rows(_OF_AKAMASTER):
        yield Published(
            name=f"akamaster:{network}.CIFAR10",
            network=network,
            address=f"{folder}/{network}-{sha256[:8]}.th",
            sha256=sha256,
            mean=_COLOURS[0],  # it was trained with ImageNet's
            std=_COLOURS[1],
            size=32,
            accuracy=float(accuracy) / 100,
            data=CIFAR10,
            classes=_CIFAR10_CLASSES,
            source=_AKAMASTER_PAGE,
        )


def _chenyaofo() -> Iterator[Published]:
    folder = f"{_CHENYAOFO_PAGE}/releases/download/resnet"
    for network, *values in _rows(_OF_CHENYAOFO):
        for k, data in enumerate((CIFAR10, CIFAR100)):
            digits, accuracy = values[2 * k : 2 * k + 2]
            mean, std = _CHENYAOFO_COLOURS[data]
            short = data.replace("-", "")
            yield Published(
                name=f"chenyaofo:{network}.{short}",
                network=network,
                address=f"{folder}/{short.lower()}_{network}-{digits}.pt",
                sha256=digits,
                mean=mean,
                std=std,
                size=32,
                accuracy=float(accuracy) / 100,
                data=data,
                classes=_CIFAR10_CLASSES if data == CIFAR10 else (),
                source=_CHENYAOFO_PAGE,
            )


TABLE: dict[str, Published] = {
    entry.name: entry for entry in (*_torchvision(), *_akamaster(), *_chenyaofo())
}


def is_name(init: str) -> bool:
    """Returns whether `init` is the name of published weights, rather than a path."""
    return bool(_PREFIX.match(init))


def fault(name: str) -> str:
    """Describes what is wrong with a name; "" for one that is listed, or on the Hub."""
    if name.startswith(HUB):
        return _hub_fault(name)
    if name in TABLE:
        return ""
    near = difflib.get_close_matches(name, TABLE, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"is {name!r}, which is not listed{hint} (--mode=teachers lists them all)"


def _hub_fault(name: str) -> str:
    match = _HUB_NAME.fullmatch(name)
    if not match:
        return f"is {name!r}: a name on the Hugging Face Hub is {_HUB_FORM}"
    if match[3] and not _HUB_FILE.fullmatch(match[3]):
        return f"is {name!r}: its file must be a .safetensors file of the repository"
    return ""


def hub_file(name: str) -> HubFile:
    """Returns the file that a valid name on the Hub stands for."""
    match = _HUB_NAME.fullmatch(name)
    assert match  # `fault` has been called
    file = match[3] or "model.safetensors"
    return HubFile(name, match[1], match[2] or "main", file)


def other_network(field: str, name: str, init: str) -> str:
    """Describes a mismatch of a network with the published weights; "" for none.

    Args:
      field: "student" or "teacher".
      name: of the network in the config.
      init: its weights, a name or a path.
    """
    entry = TABLE.get(init)
    if entry is None or entry.network == name:
        return ""
    return (
        f"{field}.init is {init!r}, weights of the network {entry.network}, but "
        f"{field}.name is {name!r}: make the two agree"
    )


def first_of(publisher: str, network: str) -> str:
    """Returns the name of the first weights of a network that are listed; "" if none.

    Args:
      publisher: such as "torchvision".
      network: one of `models.names()`.
    """
    found = (
        entry.name
        for entry in TABLE.values()
        if entry.network == network and entry.name.startswith(f"{publisher}:")
    )
    return next(found, "")


def table() -> Iterator[str]:
    """Yields the lines of `--mode=teachers`."""
    yield (
        f"{'teacher.init':<46}{'teacher.name':<23}{'data':<11}{'image':>5}"
        f"{'of':>5}{'accuracy':>10}"
    )
    for entry in TABLE.values():
        shorter = str(entry.shorter) if entry.shorter else ""
        resized = (
            "" if entry.interpolation == "bilinear" else f"  {entry.interpolation}"
        )
        yield (
            f"{entry.name:<46}{entry.network:<23}{entry.data:<11}{entry.size:>5}"
            f"{shorter:>5}{100 * entry.accuracy:>8.2f} %{resized}"
        )
    yield "\n" + _LEGEND
