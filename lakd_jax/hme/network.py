"""Hierarchical multi-task experts: a lattice of small networks that becomes a tree.

Source: Xue et al., "KDExplainer: A Task-oriented Attention Model for Explaining
Knowledge Distillation" (IJCAI 2021, arXiv 2105.04181) and the network its authors
released ("learning to branch"). Every class is a task with a head of its own. Between
two levels each child (an expert, or a class's head) takes a mixture of all experts
above, with weights that are learnt and the same for every image:

    soft  D = softmax(2 M / t)      M (children, parents) drawn from U[0, 1)
    hard  D = one-hot at the largest entry of M: a tree, whose leaves are the classes

As a chain: a level is a stage of one block, whose activation has the experts' maps side
by side in its channels; the gate belongs to the unit that reads the mixtures. The stem
is counted in no feature. There are no pre-activations of their own and no published
weights, so the names in PyTorch files are ours.

Layout "ltb" is the released one: the image itself goes to 2 experts, then 4, then 8.
Layout "split", our reading of the authors' figure, splits a wide ResNet: its stem is
shared, each stage becomes four experts of a quarter of the width.
"""

import collections.abc
import functools
import math
import re
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from lakd_jax.models import chain, layers, wrn

PyTree = Any

DROPOUT = 0.15  # in front of the second and the last layer of a head
_BINS = 7  # a head of "ltb" reads maps pooled to 7x7
_HIDDEN = 128
_SPLIT = 4  # experts a level of "split"
_LTB = ((2, (64, 64)), (4, (64, 64)), (8, (64, 32)))  # experts, widths by level
_gate_init = nn.initializers.uniform(1.0)


def attention(logits: jax.Array, temperature: jax.Array | float | None) -> jax.Array:
    """D, how much each child takes of each parent; exact.

    The released code has a softmax of the logarithm of softmax(M / 0.5), over t, which
    is softmax(2 M / t).

    Args:
        logits: M (children, parents).
        temperature: t > 0; None for the hard gate, the first of equal entries, through
            which no gradient reaches M.

    Returns:
        (children, parents) float32, rows sum to 1.
    """
    logits = logits.astype(jnp.float32)
    if temperature is None:
        best = jnp.argmax(logits, axis=-1)
        return jax.nn.one_hot(best, logits.shape[-1], dtype=jnp.float32)
    return jax.nn.softmax(2.0 * logits / temperature, axis=-1)


def mix(weights: jax.Array, maps: jax.Array) -> jax.Array:
    """D (children, parents) over maps (B, H, W, parents, C): (B, H, W, children, C)."""
    return jnp.einsum("mn,bhwnc->bhwmc", weights.astype(maps.dtype), maps)


def bins(size: int, count: int) -> np.ndarray:
    """Matrix (count, size) of adaptive average pooling of `size` values to `count`.

    As PyTorch: bin i averages the values from floor(i size / count) up to
    ceil((i + 1) size / count), so that bins overlap where there are more of them.
    """
    matrix = np.zeros((count, size), np.float32)
    for i in range(count):
        first, end = i * size // count, -(-(i + 1) * size // count)
        matrix[i, first:end] = 1 / (end - first)
    return matrix


def is_gate(path: collections.abc.Sequence[str]) -> bool:
    """Whether the parameter at `path` is a gate's M."""
    return tuple(path[-2:]) == ("gate", "logits")


def gates(params: PyTree) -> list[jax.Array]:
    """Every M (children, parents) of a network's parameters, from image to classes.

    Raises KeyError if they are of another family.
    """
    units = (params["stage2"]["block1"], params["stage3"]["block1"], params["head"])
    return [unit["gate"]["logits"] for unit in units]


class _Gate(nn.Module):
    """M of one boundary between levels; called for D."""

    children: int
    parents: int
    temperature: Any

    @nn.compact
    def __call__(self) -> jax.Array:
        shape = (self.children, self.parents)
        logits = self.param("logits", _gate_init, shape, jnp.float32)
        return attention(logits, self.temperature)


class _Start(nn.Module):
    """The images as they are, for layouts in which no unit comes before the experts."""

    dtype: Any

    def __call__(self, x: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array]:
        x = x.astype(self.dtype)
        return x, x


class _Plain(nn.Module):
    """Expert of "ltb": twice 3x3 convolution, norm and ReLU; then 2x2 max pooling."""

    widths: tuple[int, ...]
    style: layers.Style

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Map (B, H, W, C) to (B, H / 2, W / 2, widths[-1])."""
        for index, width in enumerate(self.widths, 1):
            size, name = (width, 3, 1, self.style), f"conv{index}"
            x = layers.conv_norm(x, *size, train=train, name=name, bias=True)
            x = nn.relu(x)
        return layers.max_pool(x, 2, 2, 0)


class _Wide(nn.Module):
    """Expert of "split": a wide ResNet's stage of fewer filters."""

    blocks: int
    features: int
    stride: int
    style: layers.Style

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Map (B, H, W, C) to (B, H / stride, W / stride, features)."""
        for index in range(1, self.blocks + 1):
            stride = self.stride if index == 1 else 1
            block = wrn.Block(self.features, stride, self.style, name=f"block{index}")
            x, _ = block(x, train=train)
        return x


class _Level(nn.Module):
    """The experts of one level, each fed a mixture of the maps of the level above.

    Experts are called one by one: XLA runs the grouped convolution that `vmap` makes of
    them eleven times slower on CPU.

    Attributes:
        experts: how many.
        parents: experts of the level above; 0: all are given the input unchanged.
        temperature: of the gate.
        make: makes the expert called `name`.
    """

    experts: int
    parents: int
    temperature: Any
    make: collections.abc.Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array]:
        """(B, H, W, parents * C) to (B, H', W', experts * C'), twice the same."""
        inputs = [x] * self.experts
        if self.parents:
            gate = _Gate(self.experts, self.parents, self.temperature, name="gate")
            mixed = mix(gate(), _side_by_side(x, self.parents))
            inputs = [mixed[..., i, :] for i in range(self.experts)]
        outs = [
            self.make(name=f"expert{i}")(inputs[i - 1], train=train)
            for i in range(1, self.experts + 1)
        ]
        x = jnp.concatenate(outs, axis=-1)
        return x, x


def _side_by_side(x: jax.Array, experts: int) -> jax.Array:
    """(B, H, W, experts * C) to (B, H, W, experts, C)."""
    *front, channels = x.shape
    return x.reshape(*front, experts, channels // experts)


class _Tasks(nn.Module):
    """A dense layer with weights of its own for every class.

    One array of all classes: a hundred small ones are slow to compile and to save.
    """

    features: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, classes, C) to (B, classes, features)."""
        _, tasks, inputs = x.shape
        shape = (tasks, inputs, self.features)
        kernel = self.param("kernel", layers.small_normal, shape, jnp.float32)
        zeros = nn.initializers.zeros
        bias = self.param("bias", zeros, (tasks, self.features), jnp.float32)
        x, kernel, bias = (v.astype(self.dtype) for v in (x, kernel, bias))
        return jnp.einsum("bki,kio->bko", x, kernel) + bias[None]


class _Head(nn.Module):
    """A head for every class, on its own mixture of the last level's maps.

    Attributes:
        num_classes: how many.
        parents: experts of the last level.
        output: see `HME`.
        temperature: of the gate.
        style: of the network.
    """

    num_classes: int
    parents: int
    output: str
    temperature: Any
    style: layers.Style

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array]:
        """(B, H, W, parents * C) to logits (B, classes) and pooled (B, parents * C)."""
        pooled = jnp.mean(x, (1, 2), dtype=jnp.promote_types(x.dtype, jnp.float32))
        gate = _Gate(self.num_classes, self.parents, self.temperature, name="gate")
        h = self.read(_side_by_side(x, self.parents), gate(), train)
        units = 1 if self.output == "ce" else 2
        scores = _Tasks(units, self.style.dtype, name="fc3")(h)
        return score(scores, self.output), pooled

    def read(self, maps: jax.Array, weights: jax.Array, train: bool) -> jax.Array:
        """What each class's last layer reads, (B, classes, features)."""
        raise NotImplementedError


class _PlainHead(_Head):
    """Head of "ltb": pooled to 7x7, then two hidden layers."""

    def read(self, maps: jax.Array, weights: jax.Array, train: bool) -> jax.Array:
        """(B, H, W, parents, C) to (B, classes, 128)."""
        rows, columns = (
            jnp.asarray(bins(side, _BINS), maps.dtype) for side in maps.shape[1:3]
        )
        # Pooled before they are mixed: the same, as both are linear, and cheaper where
        # there are more classes than experts.
        small = jnp.einsum("ih,bhwpc,jw->bijpc", rows, maps, columns)
        h = mix(weights, small).transpose(0, 3, 4, 1, 2)
        # Channels first, as the released code flattens.
        h = h.reshape(*h.shape[:2], math.prod(h.shape[2:]))
        for name in ("fc1", "fc2"):
            h = nn.relu(_Tasks(_HIDDEN, self.style.dtype, name=name)(h))
            h = nn.Dropout(DROPOUT, deterministic=not train)(h)
        return h


class _WideHead(_Head):
    """Head of "split": norm, ReLU and mean over positions."""

    def read(self, maps: jax.Array, weights: jax.Array, train: bool) -> jax.Array:
        """(B, H, W, parents, C) to (B, classes, C)."""
        mixed = mix(weights, maps)
        *front, tasks, channels = mixed.shape
        h = mixed.reshape(*front, tasks * channels)  # a norm's channels are apart
        h = nn.relu(layers.norm(self.style, train=train, name="entry_bn")(h))
        return jnp.mean(h, (1, 2)).reshape(-1, tasks, channels)


def score(units: jax.Array, output: str) -> jax.Array:
    """A class's one number from its head's units, (B, classes, 1 or 2) to (B, classes).

    See `HME.output`; of "nce", only the larger unit gets a gradient.
    """
    if output == "ce":
        return units[..., 0]
    if output == "nce":
        return jnp.max(units, axis=-1)
    return units[..., 1] - units[..., 0]


class HME(chain.Chain, kw_only=True):
    """Three levels of experts and a head for every class.

    Attributes:
        layout: "ltb" or "split", see the top of the file.
        base: the wide ResNet of "split".
        output: "ce", a head has one unit and that is the logit; "nce", it has two and
            the larger is; "odds", the second minus the first is: the log-odds of "this
            is class k", as `distill.binary` trains it (only differences matter there).
        temperature: of soft gates, a number or scalar array; None: hard gates.
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
        del index  # one block a level
        if self.layout == "ltb":
            make = functools.partial(_Plain, _LTB[stage][1], self.style)
        else:
            blocks, widen = _size(self.base)
            width, stride = 16 * widen * 2**stage // _SPLIT, 2 if stage else 1
            make = functools.partial(_Wide, blocks, width, stride, self.style)
        experts = self._experts
        parents = experts[stage - 1] if stage else 0
        return _Level(experts[stage], parents, self.temperature, make, name=name)

    @nn.nowrap
    def make_head(self, name: str) -> nn.Module:
        """See `chain.Chain`."""
        head = _PlainHead if self.layout == "ltb" else _WideHead
        parents = self._experts[-1]
        own = (self.num_classes, parents, self.output, self.temperature)
        return head(*own, self.style, name=name)

    @property
    def _experts(self) -> tuple[int, ...]:
        if self.layout == "ltb":
            return tuple(count for count, _ in _LTB)
        return (_SPLIT,) * len(_LTB)

    @nn.nowrap
    def torch_name(self, path: tuple[str, ...]) -> str:
        """("stage2", "block1", "gate") -> "stage2.block1.gate": our own names."""
        return ".".join(path)

    @classmethod
    def tree_options(cls) -> list[dict[str, str]]:
        """See `chain.Chain`: the deepest network has all the arrays of the others."""
        layouts = cls.OPTIONS["layout"]
        return [{"layout": layout, "base": "wrn_40_1"} for layout in layouts]

    @classmethod
    def options_from_torch(
        cls, shapes: collections.abc.Mapping[str, tuple[int, ...]]
    ) -> dict[str, Any]:
        """See `chain.Chain`; by its arrays "odds" is "nce", and "ltb" has any base."""
        units, _, classes = _cube(shapes, "head.fc3.weight")
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

    @classmethod
    def options_from_variables(cls, variables: Any) -> dict[str, Any]:
        """See `chain.Chain`."""
        shapes = {
            _torch_key(path): x.shape[::-1]
            for path, x in jax.tree_util.tree_leaves_with_path(variables.get("params"))
        }
        try:
            return cls.options_from_torch(shapes)
        except KeyError as error:
            raise ValueError(
                f"the variables are no HME's: no {error.args[0]}"
            ) from None


def _torch_key(path: tuple[Any, ...]) -> str:
    keys = [str(key.key) for key in path]
    return ".".join(["weight" if k == "kernel" else k for k in keys])


def _cube(
    shapes: collections.abc.Mapping[str, tuple[int, ...]], key: str
) -> tuple[int, ...]:
    """The three sides of an array; KeyError(key) if it has not three."""
    shape = shapes.get(key, ())
    if len(shape) != 3:
        raise KeyError(key)
    return shape


def _size(base: str) -> tuple[int, int]:
    """Blocks a stage and width factor of a wide ResNet "wrn_D_K"."""
    depth, widen = map(int, re.findall(r"\d+", base))
    return (depth - 4) // 6, widen


def soften(model: chain.Chain, temperature: jax.Array | float) -> chain.Chain:
    """Returns the network with soft gates."""
    return model.clone(temperature=temperature)


NETWORKS = {"hme": functools.partial(HME, stage_sizes=(1, 1, 1))}
