"""Vision transformers: parity with timm, sizes, tokens, randomness, names."""

import functools

import flax
import golden_weights
import jax
import jax.numpy as jnp
import marks
import numpy as np
import pytest
import tiny

from lakd_jax import errors, interop, models
from lakd_jax.models import chain, folding, vit

TINY, DISTILLED = "vit_tiny_patch4_32", "deit_tiny_distilled_patch16_224"
NAMES = {TINY: "vit_tiny", DISTILLED: "deit_tiny_distilled"}
SMALL = functools.partial(vit.ViT, width=64, stage_sizes=(1, 1, 1, 1), num_classes=3)


@functools.cache
def network(golden):
    """Returns the model with golden weights, and the images (B, H, W, 3)."""
    weights = golden_weights.state_dict(golden)
    options = interop.options_from_torch(NAMES[golden], weights)
    model = models.create(NAMES[golden], **options)
    side = options["image_size"]
    batch = len(golden_weights.outputs(golden)["logits"])
    nchw = np.random.default_rng(7).standard_normal((batch, 3, side, side))
    images = nchw.astype(np.float32).transpose(0, 2, 3, 1)
    return model, interop.from_torch(NAMES[golden], weights), images


def passed(golden, train=False):
    model, variables, images = network(golden)
    with jax.default_matmul_precision("highest"):
        return jax.jit(functools.partial(model.apply, train=train))(variables, images)


@pytest.mark.parametrize("golden", marks.others_long([TINY, DISTILLED], [TINY]))
def test_evaluation_is_timms(golden):
    """Logits (the mean of both heads if there are two), features and tokens."""
    expected, out = golden_weights.outputs(golden), passed(golden)
    pairs = [(out.logits, expected["logits"]), (out.pooled, expected["pooled_feat"])]
    assert len(out.features) == 5 and len(out.tokens) == 5
    for i, (feature, tokens) in enumerate(zip(out.features, out.tokens, strict=True)):
        value = np.asarray(feature)
        pairs.append((value.mean(3), expected[f"feats_{i}_spatial_mean"]))
        pairs.append((value.mean((1, 2)), expected[f"feats_{i}_channel_mean"]))
        for k, name in enumerate(("class", "dist")[: tokens.shape[1]]):
            pairs.append((tokens[:, k], expected[f"feats_{i}_{name}_token"]))
    assert max(golden_weights.distance(*pair) for pair in pairs) < 2e-5
    leaves = jax.tree.leaves(network(golden)[1])
    assert sum(leaf.size for leaf in leaves) == expected["param_count"]


@pytest.mark.long
def test_input_gradient_is_timms():
    """Of 224x224 pixels this takes minutes without the compiler's optimisations."""
    model, variables, images = network(TINY)

    # Both are arguments: XLA would fold constants, which takes long.
    def loss(images, variables):
        return jnp.mean(model.apply(variables, images, train=True).logits ** 2)

    with jax.default_matmul_precision("highest"):
        found = jax.jit(jax.grad(loss))(images, variables)
    found = np.asarray(found).transpose(0, 3, 1, 2)
    expected = golden_weights.outputs(TINY)["train_input_grad"]
    assert golden_weights.distance(found, expected) < 1e-4


@pytest.mark.long
def test_both_heads_in_training():
    expected, out = golden_weights.outputs(DISTILLED), passed(DISTILLED, train=True)
    of_class, of_token = out.head_logits
    assert golden_weights.distance(of_class, expected["train_logits"]) < 2e-5
    assert golden_weights.distance(of_token, expected["train_logits_dist"]) < 2e-5
    np.testing.assert_allclose(out.logits, (of_class + of_token) / 2, rtol=1e-6)


# ------------------------------------------------------------------- a small one


@functools.cache
def small(**options):
    """Returns a small network for 8x8 images, its variables, and two images."""
    model = SMALL(patch=2, image_size=8, **options)
    images = np.random.default_rng(1).standard_normal((2, 8, 8, 3))
    return model, tiny.variables(model), images.astype(np.float32)


def test_a_part_goes_on_from_what_a_unit_passes_on():
    model, variables, images = small()
    whole = model.apply(variables, images, train=False)
    below = model.apply(variables, images, train=False, until="stage2")
    tokens = chain.passed_on(below, "stage2.block1")
    assert tokens.shape == (2, 17, 64)
    rest = model.apply(variables, tokens, train=False, after="stage2")
    np.testing.assert_allclose(rest.logits, whole.logits, rtol=1e-5)
    assert rest.stem is None and len(rest.features) == 2 and len(rest.tokens) == 2
    np.testing.assert_array_equal(below.features[-1], model.as_map(tokens))
    assert chain.joint_shapes(model, ["stem", "stage4"]) == [(1, 4, 4, 64)] * 2


def test_patches_are_ordered_row_by_row():
    """The map's pixels lie where the patches of the image do."""
    model, variables, images = small()
    stem = variables["params"]["stem"]
    stem = {**stem, "pos_embed": 0 * stem["pos_embed"]}
    variables = {"params": {**variables["params"], "stem": stem}}
    changed = images.copy()
    changed[:, 2:4, 6:8] += 1
    one, other = (
        model.apply(variables, x, train=False, until="stem").features[0]
        for x in (images, changed)
    )
    moved = np.any(np.asarray(one != other), axis=(0, 3))
    assert np.argwhere(moved).tolist() == [[1, 3]]


def test_other_sizes_are_refused_by_name():
    model, variables, images = small()
    with pytest.raises(errors.DataError, match="8x8 pixels, these are 6x6"):
        model.apply(variables, images[:, :6, :6], train=False)
    with pytest.raises(ValueError, match="patch is 3, .*divide the image_size 8"):
        SMALL(patch=3, image_size=8)
    with pytest.raises(ValueError, match="patch of vit_tiny must be at least 1"):
        models.create("vit_tiny", num_classes=3, patch=0)


@pytest.mark.parametrize(("side", "patches"), [(16, 8), (4, 2)])
def test_position_embeddings_are_interpolated(side, patches):
    """A plane stays a plane, but for the border; other tokens keep theirs."""
    model, variables, _ = small()
    rows, columns = np.mgrid[:4, :4] + 0.5
    plane = (0.3 * rows - 0.2 * columns)[..., None] * np.ones(64)
    before = np.array(variables["params"]["stem"]["pos_embed"])
    before[:, 1:] = plane.reshape(1, 16, 64)
    params = variables["params"]
    stem = {**params["stem"], "pos_embed": before}
    new, found = model.resized({"params": {**params, "stem": stem}}, side)
    after = np.asarray(found["params"]["stem"]["pos_embed"])
    assert new.image_size == side and after.shape == (1, patches**2 + 1, 64)
    np.testing.assert_array_equal(after[:, 0], before[:, 0])
    rows, columns = (np.mgrid[:patches, :patches] + 0.5) * 4 / patches
    expected = 0.3 * rows - 0.2 * columns
    inner = slice(3, -3) if patches > 4 else slice(None)
    grid = after[0, 1:, 0].reshape(patches, patches)
    atol = 1e-5 if patches > 4 else 0.1  # of so few patches all are at the border
    np.testing.assert_allclose(grid[inner, inner], expected[inner, inner], atol=atol)


def test_stochastic_depth_and_dropout_follow_their_key():
    model, variables, images = small(drop_path=0.9, dropout=0.5)
    images = np.repeat(images, 32, 0)

    @jax.jit
    def logits(key):
        rngs = {"dropout": key}
        return model.apply(variables, images, train=True, rngs=rngs).logits

    one, again, other = (logits(jax.random.key(k)) for k in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert np.any(one != other)
    plain = small()[0].apply(variables, images, train=False).logits
    evaluated = model.apply(variables, images, train=False).logits
    np.testing.assert_array_equal(evaluated, plain)


def test_the_rate_of_a_block_grows_with_its_depth():
    model = SMALL(patch=2, image_size=8, drop_path=0.3)
    rates = [model.make_block(stage, 0, "block").drop_path for stage in range(4)]
    np.testing.assert_allclose(rates, [0, 0.1, 0.2, 0.3])


def test_layer_scale_multiplies_the_branches():
    model, variables, images = small(layer_scale=0.5)
    flat = flax.traverse_util.flatten_dict(variables["params"])
    gammas = [path for path in flat if path[-1].startswith("gamma")]
    assert len(gammas) == 8
    params = flax.traverse_util.unflatten_dict(
        {p: x if p not in gammas else 0 * x for p, x in flat.items()}
    )
    out = model.apply({"params": params}, images, train=False)
    for feature in out.features:  # no branch adds anything
        np.testing.assert_array_equal(feature, out.features[0])


def test_bfloat16_keeps_logits_and_statistics_in_float32():
    model, variables, images = small()
    exact = model.apply(variables, images, train=False).logits
    half = model.clone(dtype=jnp.bfloat16).apply(variables, images, train=False)
    assert half.logits.dtype == jnp.float32 and half.features[1].dtype == jnp.bfloat16
    np.testing.assert_allclose(half.logits, exact, atol=0.2)


def test_folding_changes_nothing():
    model, variables, images = small()
    folded, params = folding.fold(model, variables)
    one = folded.apply(params, images, train=False).logits
    np.testing.assert_array_equal(
        one, model.apply(variables, images, train=False).logits
    )


def test_deit_is_a_vit_of_the_same_size():
    one, other = (models.create(f"{n}_tiny", num_classes=3) for n in ("vit", "deit"))
    assert one == other
