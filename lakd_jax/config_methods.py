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
        "catkd": _catkd(),
        "kdpp": _kdpp(),
        "fam": _fam(),
        "cd": _cd(),
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


def _catkd() -> ConfigDict:
    # Of pairs 56-20; 1.8 for 110-32, 15 for 32x4-8x4, 12 for WRN, 4.5 for VGG. To other
    # families normalise=True and weight=40 or more, with resolution=4 to ShuffleNets.
    k = _block(0.7)
    k.resolution = 2  # side of the class activation maps that are compared
    k.normalise = False  # the map of each class has L2 norm 1
    k.binarise = False  # the teacher's map is 1 above its mean magnitude, else 0
    return k


def _kdpp() -> ConfigDict:
    k = _block(2.0)  # of norm and direction; 1.5 or 0.5 for some pairs
    k.kd_weight = 1.0  # of KD; 3.5 for 32x4-8x4, 2.5 to 4 to other families
    k.temperature = 4.0
    k.kd_warmup_epochs = 20.0  # of kd_weight
    k.dropout = 0.5  # in front of the layer to a teacher of another width
    return k


def _fam() -> ConfigDict:
    k = _block(0.8, warmup=20.0)  # 1 for 110-20 and 110-32, 5 for WRN
    k.cutoff = 0.1  # share of the frequencies that counts as low and is dropped
    return k


def _cd() -> ConfigDict:
    k = _block(6.0)
    k.gkd_weight = 0.1  # of KD where the teacher is right; 1 on ImageNet
    k.temperature = 1.0  # of the same
    # Early decay is off. As published for 200 epochs: decay_epochs=(60,160),
    # alone_epochs=60.
    k.decay = 0.9  # of weight, at each of decay_epochs
    k.decay_epochs = ()  # counted from 1
    k.alone_epochs = 0.0  # before labels and logits count
    return k
