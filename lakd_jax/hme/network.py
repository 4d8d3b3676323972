"""Hierarchical multi-task experts (HME): a lattice of experts that becomes a tree.

Source: Xue et al., "KDExplainer: A Task-oriented Attention Model for Explaining
Knowledge Distillation" (IJCAI 2021, arXiv 2105.04181) and the network its authors
released ("learning to branch"). Every class is a task with a separate head. Between two
levels, each child (an expert, or the head of a class) receives a mixture of all experts
of the level above. The mixture weights are learnt and do not depend on the image:

    soft  D = softmax(2 M / t)      M (children, parents) drawn from U[0, 1)
    hard  D = one-hot at the largest entry of M: a tree, whose leaves are the classes

As a chain, a level is a stage with one block; its activation concatenates the experts'
maps along the channels, and the gate belongs to the unit that reads the mixtures. The
stem is not among the features. Pre-activations equal activations. No weights have been
published, so the names in PyTorch files are our own.

Layout "ltb" is the released one: the image goes to 2 experts, then to 4, then to 8.
Layout "split", our interpretation of the authors' figure, splits a wide ResNet: the
stem is shared, and each stage becomes four experts of a quarter of the width.
"""

import collections.abc
import functools
from typing import Any, ClassVar

import einops
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from lakd_jax.models import chain, layers, vgg, wrn

PyTree = Any

DROPOUT = 0.15  # before the second and the last layer of a head
_BINS = 7  # side of the pooled maps that a head of "ltb" reads
_HIDDEN = 128
_SPLIT = 4  # experts per level of "split"
_LTB = ((2, (64, 64)), (4, (64, 64)), (8, (64, 32)))  # experts, widths by level
_EXPERTS = "b h w (n c) -> b h w n c"  # channels, as a level returns them
_gate_init = nn.initializers.uniform(1.0)


def attention(logits: jax.Array, temperature: jax.Array | float | None) -> jax.Array:
    """Computes D, the weight of each parent in each child's mixture.

    Equals the released code, which computes softmax(log(softmax(M / 0.5)) / t), that
    is, softmax(2 M / t).

    Args:
        logits: M (children, parents).
        temperature: t > 0; None selects the hard gate, which takes the first of equal
            entries and passes no gradient to M.

    Returns:
        (children, parents) float32; rows sum to 1.
    """
    logits = logits.astype(jnp.float32)
    if temperature is None:
        best = jnp.argmax(logits, axis=-1)
        return jax.nn.one_hot(best, logits.shape[-1], dtype=jnp.float32)
    return jax.nn.softmax(2.0 * logits / temperature, axis=-1)


def mix(weights: jax.Array, maps: jax.Array) -> jax.Array:
    """Mixes maps (B, H, W, parents, C) by D (children, parents).

    Returns:
        (B, H, W, children, C).
    """
    return jnp.einsum("mn,bhwnc->bhwmc", weights.astype(maps.dtype), maps)


def bins(size: int, count: int) -> np.ndarray:
    """Returns the matrix (count, size) that pools `size` values to `count` averages.

    Like PyTorch's adaptive pooling, bin i averages the values from
    floor(i size / count) up to ceil((i + 1) size / count); bins overlap if `count` does
    not divide `size`.
    """
    matrix = np.zeros((count, size), np.float32)
    for i in range(count):
        first, end = i * size // count, -(-(i + 1) * size // count)
        matrix[i, first:end] = 1 / (end - first)
    return matrix


def is_gate(path: collections.abc.Sequence[str]) -> bool:
    """Returns whether the parameter at `path` is the M of a gate."""
    return tuple(path[-2:]) == ("gate", "logits")


def gates(params: PyTree) -> list[jax.Array]:
    """Returns every M (children, parents) in `params`, from the image to the classes.

    Raises:
        KeyError: the parameters are not those of an HME.
    """
    units = (params["stage2"]["block1"], params["stage3"]["block1"], params["head"])
    return [unit["gate"]["logits"] for unit in units]


class _Gate(nn.Module):
    """Holds the M between two levels; calling it computes D."""

    children: int
    parents: int
    temperature: Any

    @nn.compact
    def __call__(self) -> jax.Array:
        shape = (self.children, self.parents)
        logits = self.param("logits", _gate_init, shape, jnp.float32)
        return attention(logits, self.temperature)


class _Start(nn.Module):
    """Passes the images through, for layouts without a unit before the experts."""

    dtype: Any

    def __call__(self, x: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array]:
        x = x.astype(self.dtype)
        return x, x


class _Plain(vgg.Stem):
    """Expert of "ltb": two of 3x3 convolution, norm and ReLU, then 2x2 max pooling."""

    def __call__(self, x: jax.Array, *, train: bool) -> Any:
        """Maps (B, H, W, C) to (B, H / 2, W / 2, widths[-1])."""
        x, _ = super().__call__(x, train=train)
        return layers.max_pool(x, 2, 2, 0)


class _Wide(nn.Module):
    """Expert of "split": a stage of a wide ResNet with fewer filters."""

    blocks: int
    features: int
    stride: int
    style: layers.Style

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps (B, H, W, C) to (B, H / stride, W / stride, features)."""
        for index in range(1, self.blocks + 1):
            stride = self.stride if index == 1 else 1
            block = wrn.Block(self.features, stride, self.style, name=f"block{index}")
            x, _ = block(x, train=train)
        return x


class _Level(nn.Module):
    """The experts of one level, each applied to its mixture of the level above.

    Experts are called one by one: `vmap` turns them into grouped convolutions, which
    XLA runs eleven times slower on CPU.

    Attributes:
        experts: number of experts.
        parents: number of experts in the level above; 0: each receives the input.
        temperature: temperature of the gate.
        make: makes the expert called `name`.
    """

    experts: int
    parents: int
    temperature: Any
    make: collections.abc.Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array]:
        """Maps (B, H, W, parents * C) to (B, H', W', experts * C').

        The result is returned twice, as activation and as pre-activation.
        """
        inputs = [x] * self.experts
        if self.parents:
            gate = _Gate(self.experts, self.parents, self.temperature, name="gate")
            mixed = mix(gate(), einops.rearrange(x, _EXPERTS, n=self.parents))
            inputs = [mixed[..., i, :] for i in range(self.experts)]
        outs = [
            self.make(name=f"expert{i}")(inputs[i - 1], train=train)
            for i in range(1, self.experts + 1)
        ]
        x = jnp.concatenate(outs, axis=-1)
        return x, x


class _Tasks(nn.Module):
    """A dense layer with separate weights for every class.

    One array holds all classes: a hundred small ones are slow to compile and to save.
    """

    features: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (B, classes, C) to (B, classes, features)."""
        _, tasks, inputs = x.shape
        shape = (tasks, inputs, self.features)
        kernel = self.param("kernel", layers.small_normal, shape, jnp.float32)
        zeros = nn.initializers.zeros
        bias = self.param("bias", zeros, (tasks, self.features), jnp.float32)
        x, kernel, bias = (v.astype(self.dtype) for v in (x, kernel, bias))
        return jnp.einsum("bki,kio->bko", x, kernel) + bias[None]


class _Head(nn.Module):
    """The heads of all classes, each on its mixture of the last level's maps.

    Attributes:
        num_classes: number of classes.
        parents: number of experts in the last level.
        output: see `HME`.
        temperature: temperature of the gate.
        style: the network's style.
    """

    num_classes: int
    parents: int
    output: str
    temperature: Any
    style: layers.Style

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array]:
        """Returns logits (B, classes) and pooled features (B, parents * C)."""
        pooled = jnp.mean(x, (1, 2), dtype=jnp.promote_types(x.dtype, jnp.float32))
        gate = _Gate(self.num_classes, self.parents, self.temperature, name="gate")
        h = self.read(einops.rearrange(x, _EXPERTS, n=self.parents), gate(), train)
        units = 1 if self.output == "ce" else 2
        scores = _Tasks(units, self.style.dtype, name="fc3")(h)
        return score(scores, self.output), pooled

    def read(self, maps: jax.Array, weights: jax.Array, train: bool) -> jax.Array:
        """Computes the input of each class's last layer, (B, classes, features)."""
        raise NotImplementedError


class _PlainHead(_Head):
    """Head of "ltb": pooling to 7x7, then two hidden layers."""

    def read(self, maps: jax.Array, weights: jax.Array, train: bool) -> jax.Array:
        """Maps (B, H, W, parents, C) to (B, classes, 128)."""
        rows, columns = (
            jnp.asarray(bins(side, _BINS), maps.dtype) for side in maps.shape[1:3]
        )
        # Pooling before mixing gives the same result, since both are linear, and is
        # cheaper if there are more classes than experts.
        small = jnp.einsum("ih,bhwpc,jw->bijpc", rows, maps, columns)
        # Channels first, the order in which the released code flattens.
        h = einops.rearrange(mix(weights, small), "b i j k c -> b k (c i j)")
        for name in ("fc1", "fc2"):
            h = nn.relu(_Tasks(_HIDDEN, self.style.dtype, name=name)(h))
            h = nn.Dropout(DROPOUT, deterministic=not train)(h)
        return h


class _WideHead(_Head):
    """Head of "split": norm, ReLU and the mean over positions."""

    def read(self, maps: jax.Array, weights: jax.Array, train: bool) -> jax.Array:
        """Maps (B, H, W, parents, C) to (B, classes, C)."""
        # A norm treats channels separately.
        h = einops.rearrange(mix(weights, maps), "b h w k c -> b h w (k c)")
        h = nn.relu(layers.norm(self.style, train=train, name="entry_bn")(h))
        return einops.rearrange(jnp.mean(h, (1, 2)), "b (k c) -> b k c", k=len(weights))


def score(units: jax.Array, output: str) -> jax.Array:
    """Reduces the units of each head, (B, classes, 1 or 2), to logits (B, classes).

    See `HME.output`; under "nce", only the larger unit gets a gradient.
    """
    if output == "ce":
        return units[..., 0]
    if output == "nce":
        return jnp.max(units, axis=-1)
    return units[..., 1] - units[..., 0]


class HME(chain.Chain, kw_only=True):
    """Three levels of experts and a head for every class.

    Attributes:
        layout: "ltb" or "split", see the module's docstring.
        base: the wide ResNet of "split".
        output: "ce": a head has one unit, the logit. "nce": it has two, and the larger
            is the logit. "odds": the logit is the second minus the first, the log-odds
            of "this is class k", as trained by `hme.losses`, where only differences
            matter.
        temperature: temperature of soft gates, a number or scalar array; None: hard
            gates.
    """

    layout: str = "ltb"
    base: str = "wrn_40_1"
    output: str = "nce"
    temperature: Any = None

    OPTIONS: ClassVar[dict[str, tuple[str, ...]]] = {
        "layout": ("ltb", "split"),
        "base": ("wrn_40_1", "wrn_40_2", "wrn_16_1", "wrn_16_2", "wrn_10_1"),
        "output": ("nce", "ce", "odds"),
    }
    STEM_IN_FEATURES: ClassVar[bool] = False
    GATED: ClassVar[bool] = False  # by `vam`
    TORCH_NAMES: ClassVar[collections.abc.Mapping[tuple[str, ...], str]] = {}
    PHASES: ClassVar[str] = "lakd_jax.hme.phases"

    @nn.nowrap
    def make_stem(self, name: str) -> nn.Module:
        """See `chain.Chain`."""
        if self.layout == "ltb":
            return _Start(self.dtype, name=name)
        return wrn.Stem(16, self.style, name=name)

    @nn.nowrap
    def make_block(self, stage: int, index: int, name: str) -> nn.Module:
        """See `chain.Chain`."""
        del index  # one block per level
        if self.layout == "ltb":
            make = functools.partial(_Plain, _LTB[stage][1], self.style)
        else:
            base: Any = wrn.from_name(self.base)
            blocks, widen = base.keywords["stage_sizes"][stage], base.keywords["widen"]
            size = (blocks, 16 * widen * 2**stage // _SPLIT, 2 if stage else 1)
            make = functools.partial(_Wide, *size, self.style)
        experts = self._experts
        parents = experts[stage - 1] if stage else 0
        return _Level(experts[stage], parents, self.temperature, make, name=name)

    @nn.nowrap
    def make_head(self, name: str) -> nn.Module:
        """See `chain.Chain`."""
        head = _PlainHead if self.layout == "ltb" else _WideHead
        parents = self._experts[-1]
        args = (self.num_classes, parents, self.output, self.temperature)
        return head(*args, self.style, name=name)

    @property
    def _experts(self) -> tuple[int, ...]:
        if self.layout == "ltb":
            return tuple(count for count, _ in _LTB)
        return (_SPLIT,) * len(_LTB)

    @classmethod
    def tree_options(cls) -> list[dict[str, str]]:
        """See `chain.Chain`; the deepest network has all arrays of the others."""
        layouts = cls.OPTIONS["layout"]
        return [{"layout": layout, "base": "wrn_40_1"} for layout in layouts]

    @classmethod
    def options_from_torch(
        cls, shapes: collections.abc.Mapping[str, tuple[int, ...]]
    ) -> dict[str, Any]:
        """See `chain.Chain`; returns "nce" for "odds", the first base for "ltb"."""
        key = "head.fc3.weight"
        if len(shapes.get(key, ())) != 3:
            raise KeyError(key)
        units, _, classes = shapes[key]
        options = {"num_classes": classes, "output": "ce" if units == 1 else "nce"}
        if "stem.conv.weight" not in shapes:
            return options | {"layout": "ltb", "base": cls.OPTIONS["base"][0]}
        experts = "stage1.block1.expert1.block{}.conv2.weight"
        blocks = sum(experts.format(i) in shapes for i in range(1, len(shapes)))
        width = shapes.get(experts.format(1), (0,))[0]
        base = f"wrn_{6 * blocks + 4}_{width * _SPLIT // 16}"
        if base not in cls.OPTIONS["base"]:
            raise KeyError(experts.format(1))
        return options | {"layout": "split", "base": base}


NETWORKS = {"hme": functools.partial(HME, stage_sizes=(1, 1, 1))}
