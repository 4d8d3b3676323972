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
        "rkd": _rkd(),
        "pkt": _block(30000.0),
        "nst": _block(50.0),
        "cc": _cc(),
        "vid": _vid(),
        "fitnet": _fitnet(),
        "kdsvd": _kdsvd(),
        "ab": _ab(),
        "fsp": _fsp(),
        "ft": _ft(),
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


def _rkd() -> ConfigDict:
    k = _block(1.0)
    k.distance_weight = 25.0  # of the distances between two examples
    k.angle_weight = 50.0  # of the angles among three
    return k


def _cc() -> ConfigDict:
    k = _block(0.02)
    k.dim = 128  # of the embeddings
    return k


def _vid() -> ConfigDict:
    k = _block(1.0)
    k.init_variance = 5.0  # of every channel at first; trained
    return k


def _fitnet() -> ConfigDict:
    k = _block(100.0)
    k.hint_layer = 2  # number of the stage (the module) that is compared
    return k


def _kdsvd() -> ConfigDict:
    k = _block(1.0)
    k.k = 1  # singular vectors
    return k


def _ab() -> ConfigDict:
    k = _block(0.003)
    k.margin = 1.0  # distance from zero at which a response costs nothing
    k.init_epochs = 30.0  # the first ones, in which it counts and the labels do not
    return k


def _fsp() -> ConfigDict:
    k = _block(50.0)
    k.init_epochs = 30.0  # the first ones, in which it counts and the labels do not
    return k


def _ft() -> ConfigDict:
    k = _block(200.0)
    k.rate = 0.5  # channels of a factor for each of the teacher's
    k.init_epochs = 30.0  # the first ones, in which the paraphraser is trained
    k.init_weight = 0.2  # of its loss then: the share of optim.lr that it has
    return k
