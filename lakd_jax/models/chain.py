"""A classifier as a chain of units that can be observed and cut at any joint.

The smallest parts are *units*: the stem and every residual (or other) block, in
order. A *joint* is the end of a unit and has the unit's name ("stem",
"stage2.block3"); "stage2" is short for the end of stage 2's last block. The head
(global average pool and linear classifier) follows the last joint.

A family of networks is a subclass of `Chain` that defines how a stem, a block and a
head are made; naming, recording, cutting and restarting are all implemented here.
"""

import collections.abc
import dataclasses
import functools
import itertools
import operator
from typing import Any, ClassVar

import flax.struct
import jax
import jax.numpy as jnp
from flax import linen as nn

from lakd_jax import fields
from lakd_jax.models import layers, smallest, torch_names
from lakd_jax.models import projector as projector_lib
from lakd_jax.models import vam as vam_lib

JointFn = collections.abc.Callable[[str, jax.Array], jax.Array]
Mapping = collections.abc.Mapping


@flax.struct.dataclass
class Outputs:
    """The result of one pass through a network; unused parts cost nothing under jit.

    Attributes:
        logits: (B, classes) float32.
        stem: the stem's activation, as it is passed on to the first block; None if the
            pass started after it.
        features: the stem's activation (if the family includes it), then one per
            stage; each (B, H, W, C).
        preacts: the same before the ReLU, except that the stem's entry repeats its
            activation. In networks with a norm at the entry of a unit: the stage's
            output after the next unit's norm.
        blocks: for each stage (without the stem), every block's activation, as it is
            passed on to the next; `Chain.as_map` makes it a feature map.
        pooled: (B, C) float32, the mean over positions that the classifier receives.
        taps: the activation after the ReLU of every `Chain.tap_every`-th block of all
            stages (without the stem), which AFD compares. In networks with a norm at
            the entry of a unit: ReLU of the next unit's norm of the block's output, at
            the block's resolution. Linear bottlenecks (MobileNet 2) are recorded as
            they are, signed, since no ReLU follows them.
        tokens: of transformers, for each entry of `features` the tokens beside its map,
            (B, n, C): class and distillation token; else ().
        head_logits: of networks with several heads, the logits (B, classes) float32 of
            each, of which `logits` is the mean; else ().
        block_preacts: what `preacts` has for the ends of stages, for every block of
            `blocks`; () where `preacts` is.
        last_map: (B, H, W, C), the map that `pooled` is the mean of; None where it is
            the mean of none, as behind a norm of the pooled features.
    """

    logits: jax.Array
    stem: jax.Array | None
    features: tuple[jax.Array, ...]
    preacts: tuple[jax.Array, ...]
    blocks: tuple[tuple[jax.Array, ...], ...]
    pooled: jax.Array
    taps: tuple[jax.Array, ...] = ()
    tokens: tuple[jax.Array, ...] = ()
    head_logits: tuple[jax.Array, ...] = ()
    block_preacts: tuple[tuple[jax.Array, ...], ...] = ()
    last_map: jax.Array | None = None


class Chain(torch_names.TorchNames, nn.Module, kw_only=True):
    """A stem, stages of blocks and a head, applied in order.

    The stem and every block are modules called as `unit(x, train=...)` that return
    the pair (activation, pre-activation). The head returns (logits, pooled), and, if it
    has several classifiers, a third entry with the logits of each.
    The variable tree has one subtree per unit: "stem", "stage1"/"block1", ..., "head".

    Attributes:
        stage_sizes: number of blocks in each stage.
        num_classes: width of the logits.
        dtype: compute dtype of convolutions and the classifier; parameters, batch
            statistics and logits are always float32.
        tap_every: period of the blocks recorded in `Outputs.taps`, per stage.
        folded: whether the network has no batch norms, for variables from
            `folding.fold`.
        vam: attention in the convolutions of the blocks (except depthwise ones and
            shortcuts) and of the head, see `models.vam`; None for none.
        one_pass: whether batch norms take the statistics of a batch in one pass.
        projector: what precedes the classifier of another network in the head, see
            `models.projector`; None for a head of its own.
    """

    stage_sizes: tuple[int, ...]
    num_classes: int
    dtype: Any = jnp.float32
    folded: bool = False
    vam: vam_lib.Options | None = None
    projector: projector_lib.Options | None = None
    one_pass: bool = False
    tap_every: int = 1

    # Image size (height and width) that the family's networks are published for.
    IMAGE_SIZE: ClassVar[int] = 32
    # Whether `features` and `preacts` start with the stem.
    STEM_IN_FEATURES: ClassVar[bool] = True
    # Whether units, and the head, start with a batch norm of their input ("entry_bn").
    PREACTIVATION: ClassVar[bool] = False
    # Whether the network can be applied to the map at a joint, `after` it: those with
    # tokens beside the map need these as well.
    RESUMABLE: ClassVar[bool] = True
    # Whether it only runs from the images to the logits, never from joint to joint.
    WHOLE: ClassVar[bool] = False
    # Module with the phases of its training; "" for the usual one.
    PHASES: ClassVar[str] = ""
    # Whether the family supports `vam`.
    GATED: ClassVar[bool] = True
    KERNEL_INIT: ClassVar[collections.abc.Callable] = layers.he_normal_fan_out
    # Arguments of `layers.Head` besides the number of classes and the style.
    HEAD: ClassVar[Mapping[str, Any]] = {}

    @property
    def style(self) -> layers.Style:
        """The settings shared by the layers of all units."""
        init = type(self).KERNEL_INIT
        return layers.Style(
            *(self.dtype, self.folded, init, self.vam, self.projector, self.one_pass)
        )

    @nn.nowrap
    def make_stem(self, name: str) -> nn.Module:
        """Makes the unit that turns images into the first feature map."""
        raise NotImplementedError

    @nn.nowrap
    def make_block(self, stage: int, index: int, name: str) -> nn.Module:
        """Makes block `index` of stage `stage`, both counted from 0."""
        raise NotImplementedError

    @nn.nowrap
    def make_head(self, name: str) -> nn.Module:
        """Makes the module that maps the last joint to (logits, pooled)."""
        return layers.Head(self.num_classes, self.style, **self.HEAD, name=name)

    @property
    def takes_projector(self) -> bool:
        """Whether its head may have a `projector`."""
        return type(self.make_head("head")) is layers.Head

    @property
    def fixed_side(self) -> int:
        """The only size (height and width) of images that it takes; 0 for any."""
        return 0

    @property
    def any_side(self) -> int:
        """A size of images that it takes, for what does not depend on the size."""
        return self.fixed_side or 32

    @nn.nowrap
    def resized(self, variables: Any, side: int) -> "tuple[Chain, Any]":
        """Returns the network for images of another size, and its variables.

        Raises ValueError if it cannot take images of height and width `side`.
        """
        del side
        return self, variables

    @nn.nowrap
    def as_map(self, h: jax.Array) -> jax.Array:
        """Returns the feature map (B, H, W, C) of what a unit passes on."""
        return h

    @nn.nowrap
    def tokens_of(self, h: jax.Array) -> tuple[jax.Array, ...]:
        """Returns a unit's tokens (B, n, C) beside its map; () if it has none."""
        del h
        return ()

    @property
    def unit_names(self) -> tuple[str, ...]:
        """Names of all units (hence joints) in order; needs no variables."""
        blocks = [
            f"stage{stage}.block{index}"
            for stage, size in enumerate(self.stage_sizes, 1)
            for index in range(1, size + 1)
        ]
        return ("stem", *blocks)

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        *,
        train: bool,
        joint: JointFn | None = None,
        after: str = "",
        until: str = "",
    ) -> Outputs:
        """Applies the network, or the part of it between two joints.

        Args:
            x: normalised images (B, H, W, 3) of any size the strides allow, or of
                `fixed_side`; with `after`, what the unit there passes on.
            train: whether to normalise with the batch's statistics and update the
                running ones (the collection "batch_stats" must then be mutable).
            joint: called at the end of every unit that runs, with the unit's name
                and activation; the next unit receives its return value. The outputs
                record the activation before the call, so a loss on them trains the
                unit below even if `joint` stops the gradient.
            after: name of the joint to start from; "" starts at the images.
            until: name of the joint to stop at; "" runs the head as well. Only the
                variables of the units that run are needed.

        Returns:
            The outputs. With `after`, the stages before it are missing from `features`
            and `preacts`, and the blocks before it from `blocks` and `taps`. With
            `until`, those after it are missing as well; `logits` (0, classes), `pooled`
            (0, C) and `taps` are empty, and so is `preacts` if units start with a norm,
            since it would need that of the next unit.

        Raises:
            ValueError: `after` or `until` is not the name of a joint.
            errors.DataError: the network shrinks images as small as these to nothing,
                or takes only those of another size.
        """
        if self.fixed_side and not after:
            smallest.require_side(self, x.shape)
        on_joint = joint if joint is not None else lambda name, h: h
        names = self.unit_names
        done = names.index(resolve_joint(self, after)) + 1 if after else 0
        stop = names.index(resolve_joint(self, until)) + 1 if until else len(names)
        stem, blocks, preacts, h = None, [], [], x
        if done == 0:
            stem, _ = self.make_stem("stem")(h, train=train)
            h = on_joint("stem", stem)
        before = 1  # units before the stage
        for stage, size in enumerate(self.stage_sizes):
            first, last = (min(max(n - before, 0), size) for n in (done, stop))
            before += size
            outs, before_relu = (), ()
            if first < last:
                module = _Stage(name=f"stage{stage + 1}")
                h, outs, before_relu = module(
                    h, self.make_block, stage, first, last, train, on_joint
                )
            blocks.append(outs)
            preacts.append(before_relu)
        recorded = (stem,) if stem is not None and self.STEM_IN_FEATURES else ()
        ends = (*recorded, *(stage[-1] for stage in blocks if stage))
        preact_ends = (*recorded, *(stage[-1] for stage in preacts if stage))
        unknown = bool(until) and self.PREACTIVATION  # without the next unit's norm
        outputs = Outputs(
            logits=jnp.zeros((0, self.num_classes), jnp.float32),
            stem=stem,
            features=tuple(map(self.as_map, ends)),
            preacts=() if unknown else tuple(map(self.as_map, preact_ends)),
            blocks=tuple(blocks),
            pooled=jnp.zeros((0, h.shape[-1]), jnp.float32),
            tokens=tuple(itertools.chain(*map(self.tokens_of, ends))),
            block_preacts=() if unknown else jax.tree.map(self.as_map, tuple(preacts)),
        )
        if until:
            return outputs
        if done == 0 and 0 in h.shape[1:]:
            raise smallest.too_small(self, x.shape)
        return self._with_head(outputs, h, train, isolated=joint is not None)

    def _with_head(
        self, outputs: Outputs, h: jax.Array, train: bool, *, isolated: bool
    ) -> Outputs:
        """Completes the outputs of a pass that ran all stages, of which `h` came."""
        head, last_map, head_logits = self.make_head("head"), None, []
        if type(head) is layers.Head:  # a subclass may have another `__call__`
            logits, pooled, last_map = head.with_map(h, train=train)
        else:
            logits, pooled, *head_logits = head(h, train=train)
        positive, preacts = outputs.blocks, outputs.preacts
        block_preacts = outputs.block_preacts
        if self.PREACTIVATION:
            block_preacts = self._entry_norms(outputs.blocks, train, isolated=isolated)
            ends = tuple(stage[-1] for stage in block_preacts if stage)
            preacts = preacts[: len(preacts) - len(ends)] + ends
            positive = jax.tree.map(nn.relu, block_preacts)
        positive = jax.tree.map(self.as_map, positive)
        return dataclasses.replace(
            outputs,
            logits=logits.astype(jnp.float32),
            preacts=preacts,
            pooled=pooled,
            taps=self._taps(positive),
            head_logits=tuple(*head_logits),
            block_preacts=block_preacts,
            last_map=last_map,
        )

    def _taps(self, blocks: tuple[tuple[jax.Array, ...], ...]) -> tuple[jax.Array, ...]:
        """Selects every `tap_every`-th block per stage; leading ones may be missing."""
        taps = []
        for size, stage in zip(self.stage_sizes, blocks, strict=True):
            numbers = range(size - len(stage) + 1, size + 1)
            numbered = zip(numbers, stage, strict=True)
            taps += [h for number, h in numbered if number % self.tap_every == 0]
        return tuple(taps)

    def _entry_norms(
        self, blocks: tuple[tuple[jax.Array, ...], ...], train: bool, isolated: bool
    ) -> tuple[tuple[jax.Array, ...], ...]:
        """Applies the next unit's entry norm to every block's output, by stage.

        The norm's running statistics are not updated a second time. It belongs to the
        next unit: if units are `isolated` from each other, its parameters receive no
        gradient, so that a loss on the result trains the unit below the joint and
        nothing above.
        """
        layer = layers.norm(self.style, train=train, name=None)
        next_unit = dict(
            zip(self.unit_names, (*self.unit_names[1:], "head"), strict=True)
        )

        def normed(stage: int, index: int, h: jax.Array) -> jax.Array:
            path = tuple(next_unit[f"stage{stage}.block{index}"].split("."))
            entry: Any = {
                kind: functools.reduce(operator.getitem, (*path, "entry_bn"), tree)
                for kind, tree in self.variables.items()
                if kind != "intermediates"  # values that units sow for the caller
            }
            entry = jax.lax.stop_gradient(entry) if isolated else entry
            return layer.apply(entry, h, mutable=["batch_stats"])[0]

        result = []
        for stage, outputs in enumerate(blocks, 1):
            first = self.stage_sizes[stage - 1] - len(outputs) + 1
            numbered = enumerate(outputs, first)
            result.append(tuple(normed(stage, index, h) for index, h in numbered))
        return tuple(result)


class _Stage(nn.Module):
    """The scope of one stage's blocks; has no parameters of its own."""

    @nn.compact
    def __call__(
        self,
        h: jax.Array,
        make_block: collections.abc.Callable[[int, int, str], nn.Module],
        stage: int,
        first: int,
        last: int,
        train: bool,
        on_joint: JointFn,
    ) -> tuple[jax.Array, tuple[jax.Array, ...], tuple[jax.Array, ...]]:
        """Runs blocks first..last-1; returns (h, activations, pre-activations)."""
        outputs, preacts = [], []
        for index in range(first, last):
            # make_block is not wrapped by Linen, so the block lands in this scope.
            name = f"block{index + 1}"
            activation, preact = make_block(stage, index, name)(h, train=train)
            outputs.append(activation)
            preacts.append(preact)
            h = on_joint(f"{self.name}.{name}", activation)
        return h, tuple(outputs), tuple(preacts)


def resolve_joint(model: Chain, joint: str) -> str:
    """Returns the unit that ends at `joint`: "stage2" -> "stage2.block3".

    Raises ValueError for an unknown name, with the nearest and a list of all joints.
    """
    names = model.unit_names
    if joint in names:
        return joint
    ends = {f"stage{s}": size for s, size in enumerate(model.stage_sizes, 1)}
    if joint in ends:
        return f"{joint}.block{ends[joint]}"
    raise ValueError(f"joint {fields.fault(joint, [*ends, *names])}")


def feature_at(
    outputs: Outputs, model: Chain, joint: str, preact: bool = False
) -> jax.Array:
    """Returns the activation (B, H, W, C) recorded at a joint.

    Args:
        outputs: of a full pass (without `after`).
        model: the network that computed them.
        joint: a name that `resolve_joint` accepts.
        preact: whether to return the value before the last ReLU instead.

    Raises:
        ValueError: unknown joint, or `preact` at the stem of a network that does not
            have it in `features`.
    """
    name = resolve_joint(model, joint)
    if not preact:
        return model.as_map(passed_on(outputs, name))
    if name == "stem":
        if not model.STEM_IN_FEATURES:
            raise ValueError(f"no pre-activation is recorded at {name!r}")
        return outputs.preacts[0]
    stage, index = torch_names.stage_and_index(name)
    return outputs.block_preacts[stage][index]


def passed_on(outputs: Outputs, unit: str) -> jax.Array:
    """Returns what `unit` passes on to the next, of a full pass."""
    if unit == "stem":
        assert outputs.stem is not None  # recorded in every full pass
        return outputs.stem
    stage, index = torch_names.stage_and_index(unit)
    return outputs.blocks[stage][index]


def variable_shapes(model: Chain, side: int = 0) -> Any:
    """Returns the network's variables as `jax.ShapeDtypeStruct`s; computes nothing.

    Args:
        model: the network.
        side: image size, which does not matter to most networks; 0 for
            `Chain.any_side`.
    """
    side = side or model.any_side
    images = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    return jax.eval_shape(
        lambda x: model.init(jax.random.key(0), x, train=False), images
    )


def joint_shapes(
    model: Chain, joints: collections.abc.Sequence[str], side: int = 0
) -> list[tuple[int, ...]]:
    """Returns the shape (1, H, W, C) at each joint for images of size `side`.

    0 stands for `Chain.any_side`.
    """
    side = side or model.any_side

    def run(images: jax.Array) -> list[jax.Array]:
        outputs, _ = model.init_with_output(jax.random.key(0), images, train=False)
        return [feature_at(outputs, model, joint) for joint in joints]

    images = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    return [x.shape for x in jax.eval_shape(run, images)]
