"""Token weights of the Gram matrices, and the ridge: values, defaults, refused settings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparseopt.models import open_model
from sparseopt.pruning import METHODS, Recipe, find_method, prune_model
from sparseopt.pruning.base.activations import Batches, make_batches
from sparseopt.pruning.base.grams import BlockRunner, gather_grams, tapped
from tests.models.tiny import VOCAB, random_tensors, tiny_config, write_folder


@pytest.fixture
def source(tmp_path, rng):
    return write_folder(tmp_path / "source", tiny_config(), random_tensors(tiny_config(), rng))


@pytest.fixture
def tokens(rng):
    return rng.integers(0, len(VOCAB), (6, 16)).astype(np.int32)


def test_residual_weights_are_those_of_the_stream_behind_the_block(source, tokens):
    model = open_model(source)
    block, x = model.block(0), model.embedding()(jnp.asarray(tokens))
    inputs, stream = jax.jit(tapped)(block, x)
    stream = np.asarray(stream, np.float64)
    weights = 1 / np.mean(stream**2, axis=-1).reshape(-1)
    uniform, weighted = gather_grams(block, x), gather_grams(block, x, "residual")
    for name in set(block.linears.values()) - set(block.residual_taps):
        np.testing.assert_array_equal(uniform[name].gram, weighted[name].gram)
    for name in block.residual_taps:
        rows = np.asarray(inputs[name], np.float64).reshape(len(weights), -1)
        np.testing.assert_allclose(weighted[name].gram, rows.T @ (weights[:, None] * rows), rtol=1e-4, atol=1e-5)
        assert not np.allclose(weighted[name].gram, uniform[name].gram, rtol=1e-2)


def test_a_silent_token_weighs_nothing_and_batches_do_not_matter(source, tokens):
    model = open_model(source)
    block, x = model.block(0), model.embedding()(jnp.asarray(tokens))
    silent = jnp.concatenate([x, jnp.zeros_like(x)])
    for name, found in gather_grams(block, silent, "residual").items():
        np.testing.assert_allclose(found.gram, gather_grams(block, x, "residual")[name].gram, rtol=1e-4, atol=1e-4)
    one, many = BlockRunner(), BlockRunner()
    whole, parts = (
        runner.grams(block, Batches(parts), "residual") for runner, parts in ((one, [x]), (many, [x[:3], x[3:]]))
    )
    for name in whole:
        np.testing.assert_allclose(whole[name].gram, parts[name].gram, rtol=1e-4, atol=1e-4)
    assert len(make_batches(x)) == 1


def test_a_token_whose_stream_overflows_cannot_drop_out_with_weight_0(source, tokens):
    """The last linear's weights are finite and its inputs too: only the stream behind the block is not."""
    model = open_model(source)
    block, x = model.block(0), model.embedding()(jnp.asarray(tokens))
    block.write({"mlp.down_proj.weight": block.read("mlp.down_proj.weight") * 1e38})
    found = gather_grams(block, x, "residual")
    for name in block.residual_taps:
        assert not np.isfinite(found[name].gram).all()
        assert np.isfinite(gather_grams(block, x)[name].gram).all()


def test_best_takes_the_ridge_and_the_propagation_of_whole_models_and_the_others_their_own():
    assert Recipe(method="best").propagate == 0.25
    assert Recipe(method="best", propagate=0).propagate == 0
    assert Recipe(method="best").layer_method.ridge == 0.1
    assert Recipe(method="best", ridge=0.02).layer_method.ridge == 0.02
    for name in METHODS:
        # A layer alone and a layer of a model are pruned by the same method.
        assert Recipe(method=name).layer_method == find_method(name)
        assert Recipe(method=name).propagate == (0.25 if name == "best" else 0)
    assert Recipe(method="maiht", ridge=0.5).layer_method.ridge == 0.5


def test_what_cannot_be_is_listed_before_any_work():
    with pytest.raises(ValueError, match=r"unknown weighting 'heavy'; known are uniform, residual"):
        Recipe().model_copy(update={"weighting": "heavy"})
    with pytest.raises(ValueError, match="ridge must be at least 0, given -1"):
        Recipe(ridge=-1)
    with pytest.raises(ValueError, match=r"Wanda has no ridge, given 0.1; leave the ridge out"):
        Recipe(method="wanda", ridge=0.1)


def test_the_reported_error_is_in_the_same_weights(tmp_path, source, tokens):
    recipe = Recipe(calibration=tokens, heldout_windows=0, method="wanda", weighting="residual")
    report = prune_model(source, tmp_path / "out", recipe)
    model, pruned = open_model(source), open_model(tmp_path / "out")
    dense, after = model.block(0), pruned.block(0)
    grams = gather_grams(dense, model.embedding()(jnp.asarray(tokens)), "residual")
    gram = np.asarray(grams["mlp_hidden"].gram, np.float64)
    weight = np.asarray(dense.read("mlp.down_proj.weight"), np.float64)
    change = np.asarray(after.read("mlp.down_proj.weight"), np.float64) - weight
    expected = np.sum(change @ gram * change) / np.sum(weight @ gram * weight)
    record = next(r for r in report.layers if r.layer == "model.layers.0.mlp.down_proj")
    assert record.relative_error == pytest.approx(expected, rel=1e-3)
