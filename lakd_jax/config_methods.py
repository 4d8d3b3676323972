"""Of the configuration, the blocks of the methods people compare with.

Weights are those of the reference recipes for CIFAR-100. In every block `ce_weight` is
that of the cross-entropy with the labels, `weight` that of the method's own loss, and
`warmup_epochs` how long the latter grows to what it is, epoch by epoch. In a sum such
as dkd+at the cross-entropy has the first one's weight.
"""

import ml_collections

ConfigDict = ml_collections.ConfigDict


def blocks() -> dict[str, ConfigDict]:
    """The block of each method, by its name."""
    return {
        "dkd": _dkd(),
        "at": _at(),
        "sp": _sp(),
        "crd": _crd(),
        "ofd": _block(0.001),
        "review": _review(),
    }


def _block(weight: float, *, ce: float = 1.0, warmup: float = 0.0) -> ConfigDict:
    k = ConfigDict()
    k.ce_weight = ce
    k.weight = weight
    k.warmup_epochs = warmup
    return k


def _dkd() -> ConfigDict:
    k = _block(1.0, warmup=20.0)
    k.alpha = 1.0  # of the label against all other classes
    k.beta = 8.0  # of the others among themselves; 6 for VGG
    k.temperature = 4.0
    k.standardise = False  # z-scores of the logits; then temperature=2, weight=9
    return k


def _at() -> ConfigDict:
    k = _block(1000.0)
    k.p = 2.0  # power of the activations
    return k


def _sp() -> ConfigDict:
    return _block(3000.0)


def _crd() -> ConfigDict:
    k = _block(0.8)
    k.dim = 128  # of the embeddings; a memory of twice that many numbers an example
    k.negatives = 16384  # for each example, with repetitions
    k.temperature = 0.07  # of the scores
    k.momentum = 0.5  # of the memories
    return k


def _review() -> ConfigDict:
    k = _block(1.0, warmup=20.0)  # the weight is 5 for resnet32x4 -> resnet8x4
    k.student_preact = False  # the student's maps before the ReLU; True on ImageNet
    return k
