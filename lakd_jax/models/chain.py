"""A classifier as a chain of units, so that it can be watched and cut anywhere.

The finest pieces are *units*: the stem and every residual (or other) block, in
order. A *joint* is the end of a unit and bears its name ("stem",
"stage2.block3"); "stage2" is short for the end of stage 2's last block. The head
(global average pool and linear classifier) follows the last joint.

A family of networks is a subclass of `Chain` that says how a stem, a block and a
head are made; names, recording, cutting and restarting are all done here.
"""

import collections.abc
import itertools
from typing import Any, ClassVar

import flax.struct
import jax
import jax.numpy as jnp
from flax import linen as nn

from lakd_jax import fields
from lakd_jax.models import layers
from lakd_jax.models import vam as vam_lib

JointFn = collections.abc.Callable[[str, jax.Array], jax.Array]


@flax.struct.dataclass
class Outputs:
    """What one pass through a network yields; unused parts cost nothing under jit.

    Attributes:
        logits: (B, classes) float32.
        stem: the stem's activation; None where the pass started behind it.
        features: the stem's activation (if the family counts it), then one per
            stage; each (B, H, W, C).
        preacts: the same before the next ReLU, but entry 0 repeats the stem. In
            networks that normalise at the entry of a unit: what the next unit's norm
            makes of the stage's output.
        blocks: per stage (without the stem) every block's activation.
        pooled: (B, C) float32, the mean over positions that the classifier reads.
        taps: every `Chain.tap_every`-th block's activation behind its ReLU (of all
            stages, the stem left out), what AFD compares. In networks that normalise
            at the entry of a unit: ReLU of what the next unit's norm makes of the
            block, at the block's own size. Linear bottlenecks (MobileNet 2) are
            tapped as they are, signed: no ReLU ever follows them.
    """

    logits: jax.Array
    stem: jax.Array | None
    features: tuple[jax.Array, ...]
    preacts: tuple[jax.Array, ...]
    blocks: tuple[tuple[jax.Array, ...], ...]
    pooled: jax.Array
    taps: tuple[jax.Array, ...] = ()


class Chain(nn.Module, kw_only=True):
    """A stem, stages of blocks and a head, run in order.

    The stem and every block are modules called as `unit(x, train=...)` that return
    the pair (activation, pre-activation). The head returns (logits, pooled).
    The variable tree has one subtree a unit: "stem", "stage1"/"block1", ..., "head".

    Attributes:
        stage_sizes: number of blocks in each stage.
        num_classes: width of the logits.
        dtype: what convolutions and the classifier compute in; parameters, batch
            statistics and logits are float32 whatever it is.
        tap_every: which blocks of a stage are tapped, counted from its first.
        folded: without batch norms, for variables from `folding.fold_batch_norm`.
        vam: attention in the blocks' convolutions (depthwise ones and shortcuts
            apart) and in the head's, see `models.vam`; None for none.
    """

    stage_sizes: tuple[int, ...]
    num_classes: int
    dtype: Any = jnp.float32
    folded: bool = False
    vam: vam_lib.Options | None = None
    tap_every: int = 1

    # Options beside num_classes and dtype that `create` accepts, with their values.
    OPTIONS: ClassVar[dict[str, tuple[str, ...]]] = {}
    # Side of the images that the family's networks are published for.
    IMAGE_SIZE: ClassVar[int] = 32
    # Whether `features` and `preacts` begin with the stem.
    STEM_IN_FEATURES: ClassVar[bool] = True
    # Units, and the head, begin with a batch norm of their input ("entry_bn").
    PREACTIVATION: ClassVar[bool] = False
    # Whether some convolutions take `vam`.
    PHASES: ClassVar[str] = ""
    GATED: ClassVar[bool] = True
    KERNEL_INIT: ClassVar[collections.abc.Callable] = layers.he_normal_fan_out
    # What `layers.Head` takes beside width and style.
    HEAD: ClassVar[collections.abc.Mapping[str, Any]] = {}
    # PyTorch's names of the classifier and, by path, of what else is in no stage.
    CLASSIFIER: ClassVar[str] = "fc"
    TORCH_NAMES: ClassVar[collections.abc.Mapping[tuple[str, ...], str]] = {
        ("stem", "conv"): "conv1",
        ("stem", "bn"): "bn1",
    }
    # (pattern, replacement) pairs that turn other PyTorch spellings into ours.
    TORCH_ALIASES: ClassVar[tuple[tuple[str, str], ...]] = ()

    @property
    def style(self) -> layers.Style:
        """What the layers of all units have in common."""
        init = type(self).KERNEL_INIT
        return layers.Style(self.dtype, self.folded, init, self.vam)

    @nn.nowrap
    def make_stem(self, name: str) -> nn.Module:
        """The unit that turns images into the first feature map."""
        raise NotImplementedError

    @nn.nowrap
    def make_block(self, stage: int, index: int, name: str) -> nn.Module:
        """The unit at place `index` of stage `stage`, both counted from 0."""
        raise NotImplementedError

    @nn.nowrap
    def make_head(self, name: str) -> nn.Module:
        """What maps the last joint to (logits, pooled)."""
        return layers.Head(self.num_classes, self.style, **self.HEAD, name=name)

    @nn.nowrap
    def torch_name(self, path: tuple[str, ...]) -> str:
        """The published PyTorch name of a layer, given its path in our tree."""
        if path == ("head", "dense"):
            return self.CLASSIFIER
        if path in self.TORCH_NAMES:
            return self.TORCH_NAMES[path]
        stage, index = _place(".".join(path[:2]))
        return self.torch_block_name(stage, index, path[2])

    @nn.nowrap
    def torch_block_name(self, stage: int, index: int, layer: str) -> str:
        """The same of a layer in a block; stage and index are counted from 0.

        Ours, unless the family has been published under other names.
        """
        return f"stage{stage + 1}.block{index + 1}.{layer}"

    @classmethod
    def tree_options(cls) -> list[dict[str, str]]:
        """Options (see `OPTIONS`) whose networks together have every array there is."""
        values = itertools.product(*cls.OPTIONS.values())
        return [dict(zip(cls.OPTIONS, chosen, strict=True)) for chosen in values]

    @classmethod
    def options_from_torch(
        cls, shapes: collections.abc.Mapping[str, tuple[int, ...]]
    ) -> dict[str, Any]:
        """Read `num_classes` and the family's options from PyTorch keys and shapes.

        Raises KeyError naming the key that is needed but missing or misshaped.
        """
        key = f"{cls.CLASSIFIER}.weight"
        shape = shapes.get(key, ())
        if len(shape) != 2 or shape[0] < 1:
            raise KeyError(key)
        return {"num_classes": shape[0]}

    @classmethod
    def options_from_variables(cls, variables: Any) -> dict[str, Any]:
        """Read from our own variables what `options_from_torch` reads from keys.

        Raises ValueError where no classifier is found.
        """
        try:
            kernel = variables["params"]["head"]["dense"]["kernel"]
        except (KeyError, TypeError):
            raise ValueError("the variables have no params/head/dense/kernel") from None
        return {"num_classes": kernel.shape[-1]}

    @property
    def unit_names(self) -> tuple[str, ...]:
        """Names of all units (hence joints) in order, known without variables."""
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
        """Run the network, or the part of it after one joint.

        Args:
            x: normalised images (B, H, W, 3) of any size the strides allow; with
                `after`, the activation at that joint.
            train: normalise with the batch's statistics and update the running ones
                (the collection "batch_stats" must then be mutable).
            joint: called at the end of every unit that runs, with the unit's name
                and activation; the next unit receives what it returns. The
                outputs record the activation from before the call, so a loss on
                them trains the unit below even if `joint` stops the gradient.
            after: name of the joint to start from; "" for the whole network.
            until: name of the joint to stop at; "" runs the head as well. Variables
                are needed of the units that run, and of no others.

        Returns:
            The outputs. With `after`, skipped stages are missing at the front of
            `features` and `preacts`, and skipped blocks in `blocks` and `taps`; with
            `until`, those behind it as well, `logits` (0, classes), `pooled` (0, C)
            and `taps` are empty and, where units begin with a norm, `preacts` too,
            since they would need the next unit's.

        Raises:
            ValueError: `after` or `until` names no joint.
        """
        end = joint if joint is not None else lambda name, h: h
        names = self.unit_names
        done = names.index(resolve_joint(self, after)) + 1 if after else 0
        stop = names.index(resolve_joint(self, until)) + 1 if until else len(names)
        stem, features, preacts, blocks = None, [], [], []
        h = x
        if done == 0:
            stem, _ = self.make_stem("stem")(h, train=train)
            if self.STEM_IN_FEATURES:
                features.append(stem)
                preacts.append(stem)
            h = end("stem", stem)
        before = 1  # units in front of the stage
        for stage, size in enumerate(self.stage_sizes):
            first, last = (min(max(n - before, 0), size) for n in (done, stop))
            before += size
            if first >= last:
                blocks.append(())
                continue
            module = _Stage(name=f"stage{stage + 1}")
            h, outs, preact = module(h, self.make_block, stage, first, last, train, end)
            features.append(outs[-1])
            preacts.append(preact)
            blocks.append(outs)
        if until:
            return self._front(h, stem, features, preacts, blocks)
        logits, pooled = self.make_head("head")(h, train=train)
        positive = tuple(blocks)
        if self.PREACTIVATION:
            normed = self._entry_norms(blocks, train, isolated=joint is not None)
            ends = [stage[-1] for stage in normed if stage]
            preacts = preacts[: len(preacts) - len(ends)] + ends
            positive = jax.tree.map(nn.relu, normed)
        return Outputs(
            logits=logits.astype(jnp.float32),
            stem=stem,
            features=tuple(features),
            preacts=tuple(preacts),
            blocks=tuple(blocks),
            pooled=pooled,
            taps=self._taps(positive),
        )

    def _front(
        self,
        h: jax.Array,
        stem: jax.Array | None,
        features: list[jax.Array],
        preacts: list[jax.Array],
        blocks: list[tuple[jax.Array, ...]],
    ) -> Outputs:
        """The outputs of a pass that stops at a joint, where the activation is `h`."""
        return Outputs(
            logits=jnp.zeros((0, self.num_classes), jnp.float32),
            stem=stem,
            features=tuple(features),
            preacts=() if self.PREACTIVATION else tuple(preacts),
            blocks=tuple(blocks),
            pooled=jnp.zeros((0, h.shape[-1]), jnp.float32),
        )

    def _taps(self, blocks: tuple[tuple[jax.Array, ...], ...]) -> tuple[jax.Array, ...]:
        """Every `tap_every`-th of each stage's blocks, of which the first may lack."""
        taps = []
        for size, stage in zip(self.stage_sizes, blocks, strict=True):
            numbers = range(size - len(stage) + 1, size + 1)
            numbered = zip(numbers, stage, strict=True)
            taps += [h for number, h in numbered if number % self.tap_every == 0]
        return tuple(taps)

    def _entry_norms(
        self, blocks: list[tuple[jax.Array, ...]], train: bool, isolated: bool
    ) -> tuple[tuple[jax.Array, ...], ...]:
        """What the next unit's norm makes of every block's output, by stage.

        That norm's statistics are not moved a second time. It belongs to the next
        unit: where units are `isolated` from each other it is taken as it is (no
        gradient into its parameters), so that a loss here trains the unit below the
        joint and nothing above.
        """
        layer = layers.norm(self.style, train=train, name=None)
        follower = dict(
            zip(self.unit_names, (*self.unit_names[1:], "head"), strict=True)
        )

        def normed(stage: int, index: int, h: jax.Array) -> jax.Array:
            unit = follower[f"stage{stage}.block{index}"]
            entry: Any = _subtree(self.variables, tuple(unit.split(".")))
            entry = jax.lax.stop_gradient(entry) if isolated else entry
            return layer.apply(entry, h, mutable=["batch_stats"])[0]

        result = []
        for stage, outputs in enumerate(blocks, 1):
            first = self.stage_sizes[stage - 1] - len(outputs) + 1
            numbered = enumerate(outputs, first)
            result.append(tuple(normed(stage, index, h) for index, h in numbered))
        return tuple(result)


def _subtree(variables: Any, path: tuple[str, ...]) -> dict[str, Any]:
    """The variables of the entry norm of the unit at `path`."""
    result = {}
    for kind, tree in variables.items():
        if kind == "intermediates":  # what units left for the caller
            continue
        for key in (*path, "entry_bn"):
            tree = tree[key]
        result[kind] = tree
    return result


class _Stage(nn.Module):
    """Scope of one stage's blocks; owns no parameters of its own."""

    @nn.compact
    def __call__(
        self,
        h: jax.Array,
        make_block: collections.abc.Callable[[int, int, str], nn.Module],
        stage: int,
        first: int,
        last: int,
        train: bool,
        end: JointFn,
    ) -> tuple[jax.Array, tuple[jax.Array, ...], jax.Array]:
        """Run blocks first..last-1; gives (h, every activation, last preact)."""
        outputs, preact = [], h  # at least one block runs and replaces it
        for index in range(first, last):
            # make_block is not wrapped by Linen, so the block lands in this scope.
            name = f"block{index + 1}"
            activation, preact = make_block(stage, index, name)(h, train=train)
            outputs.append(activation)
            h = end(f"{self.name}.{name}", activation)
        return h, tuple(outputs), preact


def resolve_joint(model: Chain, joint: str) -> str:
    """The unit whose end `joint` names: "stage2" -> "stage2.block3".

    Raises ValueError listing the joints (and the nearest) for an unknown name.
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
    """The activation (B, H, W, C) recorded at a joint of a whole pass.

    Args:
        outputs: of a whole pass (without `after`).
        model: the network they come from.
        joint: as `resolve_joint` takes it.
        preact: give the value before the last ReLU instead; only the stem and the
            ends of stages have one on record.

    Raises:
        ValueError: unknown joint, or `preact` inside a stage.
    """
    name = resolve_joint(model, joint)
    if name == "stem":
        if preact and not model.STEM_IN_FEATURES:
            raise ValueError(_no_preact("stem"))
        assert outputs.stem is not None  # of a whole pass
        return outputs.preacts[0] if preact else outputs.stem
    stage, index = _place(name)
    if not preact:
        return outputs.blocks[stage][index]
    if index + 1 != model.stage_sizes[stage]:
        raise ValueError(_no_preact(name))
    return outputs.preacts[stage + 1 if model.STEM_IN_FEATURES else stage]


def _place(unit: str) -> tuple[int, int]:
    """Stage and index in it, from 0: "stage2.block1" -> (1, 0)."""
    stage, block = unit.split(".")
    return int(stage.removeprefix("stage")) - 1, int(block.removeprefix("block")) - 1


def _no_preact(name: str) -> str:
    return (
        f"no pre-activation is recorded at {name!r}: only at the ends of stages, such "
        "as 'stage1', and at most networks' stem"
    )


def variable_shapes(model: Chain, side: int = 32) -> Any:
    """The tree of the network's variables as `jax.ShapeDtypeStruct`s; nothing is run.

    Args:
        model: the network.
        side: of the images, which is of no matter to most; 32 survives five halvings.
    """
    images = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    return jax.eval_shape(
        lambda x: model.init(jax.random.key(0), x, train=False), images
    )


def joint_shapes(
    model: Chain, joints: collections.abc.Sequence[str], side: int = 32
) -> list[tuple[int, ...]]:
    """(1, H, W, C) at each of `joints` for images of `side`; nothing is computed."""

    def run(images: jax.Array) -> list[jax.Array]:
        outputs, _ = model.init_with_output(jax.random.key(0), images, train=False)
        return [feature_at(outputs, model, joint) for joint in joints]

    images = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    return [x.shape for x in jax.eval_shape(run, images)]
