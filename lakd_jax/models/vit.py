"""Vision transformers: ViT (arXiv 2010.11929) and DeiT (arXiv 2012.12877).

Pre-norm blocks with exact GELU, biases everywhere and heads of 64 channels, in four
stages of a quarter of the depth each. Units pass on the tokens: the class token, in
distilled DeiTs the distillation token, then the patches, row by row.
"""

import collections.abc
import functools
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from lakd_jax import fields
from lakd_jax.models import chain, layers, torch_names

_HEAD_WIDTH = 64
_EXPANSION = 4  # of the widths in an MLP


class Stem(nn.Module):
    """Patches as tokens, with class token and position embeddings.

    Attributes:
        width: channels of a token.
        patch: side of a patch in pixels.
        extra: names of the tokens before the patches.
        style: settings shared by the network's layers.
    """

    width: int
    patch: int
    extra: tuple[str, ...]
    style: layers.Style

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array]:
        """Maps images (B, H, W, 3) to two equal arrays (B, N, width)."""
        del train
        embed = layers.patches(self.width, self.patch, self.style, name="patch_embed")
        patches = embed(x)
        patches = patches.reshape(x.shape[0], -1, self.width)
        tokens = [
            self.param(name, nn.initializers.normal(1e-6), (1, 1, self.width))
            for name in self.extra
        ]
        shape = (1, patches.shape[1] + len(tokens), self.width)
        positions = self.param("pos_embed", layers.token_normal, shape)
        rows = (x.shape[0], 1, self.width)
        tokens = [jnp.broadcast_to(t.astype(patches.dtype), rows) for t in tokens]
        joined = jnp.concatenate([*tokens, patches], 1)
        joined = joined + positions.astype(joined.dtype)
        return joined, joined


class Block(nn.Module):
    """Attention and MLP, each after a norm and added to its input.

    Attributes:
        drop_path: rate of stochastic depth.
        layer_scale: first value of the factors per channel; 0 for none.
        style: settings shared by the network's layers.
    """

    drop_path: float
    layer_scale: float
    style: layers.Style

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array]:
        """Maps tokens (B, N, C) to two equal arrays of the same shape."""
        for branch, number in ((self._attention, 1), (self._mlp, 2)):
            h = layers.layer_norm(self.style, name=f"norm{number}")(x)
            h = branch(h)
            if self.layer_scale:
                start = nn.initializers.constant(self.layer_scale)
                gamma = self.param(f"gamma{number}", start, x.shape[-1:])
                h = h * jnp.expand_dims(gamma, (0, 1)).astype(h.dtype)
            x = x + layers.drop_path(h, self.drop_path, train=train)
        return x, x

    def _attention(self, x: jax.Array) -> jax.Array:
        """Multi-head self-attention; scores and softmax are float32."""
        batch, count, width = x.shape
        parts = self._dense(3 * width, "qkv")(x)
        # The channels are those of q, k and v, and in each head by head.
        parts = parts.reshape(batch, count, 3, -1, _HEAD_WIDTH)
        q, k, v = (parts[:, :, i] for i in range(3))
        h = jax.nn.dot_product_attention(q, k, v)
        return self._dense(width, "proj")(h.reshape(x.shape))

    def _mlp(self, x: jax.Array) -> jax.Array:
        h = layers.gelu(self._dense(_EXPANSION * x.shape[-1], "fc1")(x))
        return self._dense(x.shape[-1], "fc2")(h)

    def _dense(self, features: int, name: str) -> nn.Dense:
        dtype = self.style.dtype
        return nn.Dense(
            features, dtype=dtype, kernel_init=layers.token_normal, name=name
        )


class Head(nn.Module):
    """A norm, and for each of the first tokens a linear classifier of it.

    Attributes:
        num_classes: width of the logits.
        names: of the classifiers.
        dropout: rate before the classifiers.
        style: settings shared by the network's layers.
    """

    num_classes: int
    names: tuple[str, ...]
    dropout: float
    style: layers.Style

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> tuple[Any, ...]:
        """Maps tokens (B, N, C) to the mean of the heads' logits and the class token.

        With several heads a third entry has the logits of each.
        """
        tokens = layers.layer_norm(self.style, name="norm")(x)
        pooled = tokens[:, 0].astype(jnp.promote_types(x.dtype, jnp.float32))
        logits = []
        for index, name in enumerate(self.names):
            h = tokens[:, index]
            h = nn.Dropout(self.dropout, deterministic=not train)(h)
            options = {"dtype": self.style.dtype, "kernel_init": layers.token_normal}
            h = nn.Dense(self.num_classes, **options, name=name)(h)
            logits.append(h.astype(jnp.promote_types(h.dtype, jnp.float32)))
        if len(logits) == 1:
            return logits[0], pooled
        return sum(logits) / len(logits), pooled, tuple(logits)


class ViT(chain.Chain, kw_only=True):
    """A vision transformer for images of one size.

    Attributes:
        width: channels of a token, a multiple of 64.
        patch: side of a patch in pixels, which divides `image_size`.
        image_size: height and width of the images.
        dropout: rate before the classifier.
        drop_path: rate of stochastic depth in the last block; it grows linearly from 0.
        layer_scale: first value of the factors on each branch; 0 for none.
    """

    width: int
    stage_sizes: tuple[int, ...] = (3, 3, 3, 3)
    patch: int = 16
    image_size: int = 224
    dropout: float = 0.0
    drop_path: float = 0.0
    layer_scale: float = 0.0

    OPTIONS: ClassVar[collections.abc.Mapping[str, Any]] = {
        "patch": fields.whole(1),
        "image_size": fields.whole(1),
        "dropout": fields.below(1),
        "drop_path": fields.below(1),
        "layer_scale": fields.at_least(0),
    }
    IMAGE_SIZE: ClassVar[int] = 224
    GATED: ClassVar[bool] = False
    KERNEL_INIT: ClassVar[collections.abc.Callable] = layers.uniform_fan_in
    RESUMABLE: ClassVar[bool] = False
    EXTRA: ClassVar[tuple[str, ...]] = ("cls_token",)
    HEADS: ClassVar[tuple[str, ...]] = ("head",)
    NAMINGS: ClassVar[tuple[str, ...]] = ("timm", "torchvision")
    CLASSIFIER: ClassVar[str] = "head"
    OTHER_CLASSIFIERS: ClassVar[tuple[str, ...]] = ("heads.head",)
    # Of torchvision's first published files.
    TORCH_ALIASES: ClassVar[tuple[tuple[str, str], ...]] = (
        (r"\.mlp\.linear_1\.", ".mlp.0."),
        (r"\.mlp\.linear_2\.", ".mlp.3."),
    )

    def __post_init__(self) -> None:
        """Raises ValueError if the patches do not fill the image."""
        if self.image_size % self.patch:
            more = -(-self.image_size // self.patch) * self.patch
            raise ValueError(
                f"patch is {self.patch}, which does not divide the image_size "
                f"{self.image_size}: choose a divisor, or another image_size, such as "
                f"{more}"
            )
        super().__post_init__()

    @property
    def fixed_side(self) -> int:
        """See `chain.Chain`: the position embeddings are of one size."""
        return self.image_size

    @nn.nowrap
    def resized(self, variables: Any, side: int) -> "tuple[ViT, Any]":
        """See `chain.Chain`.

        The position embeddings of the patches are interpolated (cubic, with
        antialiasing, as timm does it); those of the other tokens stay.
        """
        new = self.clone(image_size=side)
        extra, counts = len(self.EXTRA), [m.image_size // m.patch for m in (self, new)]
        stem = variables["params"]["stem"]
        old = jnp.asarray(stem["pos_embed"], jnp.float32)
        grid = old[:, extra:].reshape(counts[0], counts[0], -1)
        grid = jax.image.resize(grid, (counts[1], counts[1], grid.shape[-1]), "cubic")
        grid = grid.reshape(1, -1, grid.shape[-1])
        stem = {**stem, "pos_embed": jnp.concatenate([old[:, :extra], grid], 1)}
        return new, {**variables, "params": {**variables["params"], "stem": stem}}

    @nn.nowrap
    def as_map(self, h: jax.Array) -> jax.Array:
        """See `chain.Chain`; maps (B, N, C) to the patches (B, h, w, C)."""
        side = self.image_size // self.patch
        patches = h[:, len(self.EXTRA) :]
        return patches.reshape(h.shape[0], side, side, h.shape[-1])

    @nn.nowrap
    def tokens_of(self, h: jax.Array) -> tuple[jax.Array, ...]:
        """See `chain.Chain`; one entry (B, 1 or 2, C)."""
        return (h[:, : len(self.EXTRA)],)

    @nn.nowrap
    def make_stem(self, name: str) -> Stem:
        """See `chain.Chain`."""
        return Stem(self.width, self.patch, self.EXTRA, self.style, name=name)

    @nn.nowrap
    def make_block(self, stage: int, index: int, name: str) -> Block:
        """See `chain.Chain`."""
        depth, number = sum(self.stage_sizes), sum(self.stage_sizes[:stage]) + index
        rate = layers.share_of_depth(self.drop_path, number, depth - 1)
        return Block(rate, self.layer_scale, self.style, name=name)

    @nn.nowrap
    def make_head(self, name: str) -> Head:
        """See `chain.Chain`."""
        args = (self.num_classes, self.HEADS, self.dropout, self.style)
        return Head(*args, name=name)

    @nn.nowrap
    def torch_key(self, path: tuple[str, ...], naming: str) -> str:
        """See `chain.Chain`."""
        return _torch_key(self.stage_sizes, path, naming)

    @classmethod
    def tree_options(cls) -> list[dict[str, Any]]:
        """See `chain.Chain`."""
        return [{"layer_scale": 1.0}]

    @classmethod
    def options_from_torch(
        cls, shapes: collections.abc.Mapping[str, tuple[int, ...]]
    ) -> dict[str, Any]:
        """See `chain.Chain`; patch and image size follow from the embeddings."""
        options = super().options_from_torch(shapes)
        patches = _found(shapes, 4, "patch_embed.proj.weight", "conv_proj.weight")
        positions = _found(shapes, 3, "pos_embed", "encoder.pos_embedding")
        patch, count = patches[-1], positions[1] - len(cls.EXTRA)
        if math.isqrt(max(count, 0)) ** 2 != count or count < 1:
            raise KeyError("pos_embed")
        return options | {
            "patch": patch,
            "image_size": math.isqrt(count) * patch,
            # Its value is in the weights; only that there is one matters.
            "layer_scale": 1.0 if "blocks.0.ls1.gamma" in shapes else 0.0,
        }


class DistilledViT(ViT, kw_only=True):
    """A DeiT with a distillation token and a second classifier, of that token.

    Its logits are the mean of both classifiers'; `Outputs.head_logits` has each.
    """

    EXTRA: ClassVar[tuple[str, ...]] = ("cls_token", "dist_token")
    HEADS: ClassVar[tuple[str, ...]] = ("head", "head_dist")
    NAMINGS: ClassVar[tuple[str, ...]] = ("timm",)


def _found(
    shapes: collections.abc.Mapping[str, tuple[int, ...]], axes: int, *keys: str
) -> tuple[int, ...]:
    """Returns the shape of the first of `keys` that there is; KeyError if none."""
    for key in keys:
        if len(shapes.get(key, ())) == axes:
            return shapes[key]
    raise KeyError(keys[0])


_TIMM = {
    "qkv": "attn.qkv",
    "proj": "attn.proj",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
}
_TORCHVISION = {
    "norm1": "ln_1",
    "norm2": "ln_2",
    "qkv": "self_attention.in_proj",
    "proj": "self_attention.out_proj",
    "fc1": "mlp.0",
    "fc2": "mlp.3",
}


def _torch_key(sizes: tuple[int, ...], path: tuple[str, ...], naming: str) -> str:
    """Returns the key of an array in timm's or torchvision's network."""
    timm, layer = naming == "timm", path[-2]
    leaf = torch_names.LEAVES.get(path[-1], path[-1])
    if path[0] == "stem":
        if len(path) == 3:
            return f"{'patch_embed.proj' if timm else 'conv_proj'}.{leaf}"
        others = {"cls_token": "class_token", "pos_embed": "encoder.pos_embedding"}
        return leaf if timm else others[leaf]
    if path[0] == "head":
        others = {"norm": "encoder.ln", "head": "heads.head"}
        return f"{layer if timm else others[layer]}.{leaf}"
    stage, index = torch_names.stage_and_index(".".join(path[:2]))
    number = sum(sizes[:stage]) + index
    if leaf.startswith("gamma"):
        return f"blocks.{number}.ls{leaf[-1]}.gamma"
    if timm:
        return f"blocks.{number}.{_TIMM.get(layer, layer)}.{leaf}"
    joint = "_" if layer == "qkv" else "."
    inner = f"{_TORCHVISION[layer]}{joint}{leaf}"
    return f"encoder.layers.encoder_layer_{number}.{inner}"


_WIDTHS = {"tiny": 192, "small": 384, "base": 768}

NETWORKS = {
    name: functools.partial(family, width=width)
    for pattern, family in (
        ("vit_{}", ViT),
        ("deit_{}", ViT),
        ("deit_{}_distilled", DistilledViT),
    )
    for size, width in _WIDTHS.items()
    for name in (pattern.format(size),)
}
