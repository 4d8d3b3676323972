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
        "dist": _dist(),
        "nkd": _nkd(),
        "ttm": _ttm(45.0, 0.1),
        "wttm": _ttm(4.0, 0.2),
        "ctkd": _ctkd(),
        "mlkd": _mlkd(),
        "sdd": _sdd(),
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
        "crd": _crd(),
        "ofd": _block(0.001),
        "review": _review(),
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


def _dist() -> ConfigDict:
    k = _block(1.0)
    k.beta = 1.0  # of the correlation between classes, in each example
    k.gamma = 1.0  # of the correlation within each class, over the batch
    k.temperature = 4.0
    k.standardise = False  # z-scores of the logits
    return k


def _nkd() -> ConfigDict:
    k = _block(1.0)
    k.gamma = 1.5  # of the classes other than the label
    k.temperature = 1.0  # of the same
    k.standardise = False  # z-scores of the logits
    return k


def _ttm(weight: float, exponent: float) -> ConfigDict:
    # Of the examples that the public code shows: TTM alone for VGG13 to VGG8, and WTTM
    # beside CRD. The paper has other values for each pair.
    k = _block(weight)
    k.exponent = exponent  # of the teacher's probabilities; 1 / its temperature
    k.standardise = False  # z-scores of the logits
    return k


def _ctkd() -> ConfigDict:
    k = _block(0.9, ce=0.1)
    k.temperature_min = 1.0  # the learned temperature is from here
    k.temperature_span = 20.0  # to so much more
    k.lambda_min = 0.0  # share of the temperature's gradient that is reversed, at first
    k.lambda_max = 1.0  # and in the end
    k.lambda_epochs = 10.0  # from the first to the last, along a cosine
    k.standardise = False  # z-scores of the logits; then weight=9
    return k


def _mlkd() -> ConfigDict:
    k = _block(0.9, ce=0.1)
    k.temperatures = (2.0, 3.0, 4.0, 5.0, 6.0)
    k.batch_weight = 1 / 3  # of similarities of examples, as in the public code
    k.class_weight = 1 / 3  # of those of classes; far less for few classes
    # z-scores of the logits; then temperatures=(2, 2, 3, 5, 6), weight=9
    k.standardise = False
    return k


def _sdd() -> ConfigDict:
    # base=dkd: ce_weight=1, weight=1, warmup_epochs=20
    k = _block(0.9, ce=0.1)
    k.base = "kd"  # kd | dkd | nkd: the loss of each part
    k.scales = (1, 2)  # parts by side; (1, 2, 4) for networks of two families
    k.complementary = 2.0  # weight of parts about which the teacher changes its mind
    k.temperature = 4.0
    k.alpha = 1.0  # base=dkd: of the label against all other classes
    k.beta = 8.0  # base=dkd: of the others; 2 and 6 in some of the reference's pairs
    k.gamma = 1.5  # base=nkd: of the classes other than the label
    k.standardise = False  # z-scores of the logits of each part
    return k


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
