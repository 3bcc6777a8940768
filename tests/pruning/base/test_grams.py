"""Gram matrices: sums over the inputs of linears, token weights, the drift of a stream, and the tokens of experts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparseopt.layers.compiled import Compiled
from sparseopt.models import open_model
from sparseopt.pruning import METHODS, Recipe, find_method
from sparseopt.pruning.base.activations import Batches, make_batches
from sparseopt.pruning.base.grams import BlockRunner, gather_grams, tapped
from tests.pruning.test_experts import EXPERTS, mixture_inputs, routed_inputs


@pytest.fixture(scope="module")
def model(source):
    return open_model(source)


@pytest.fixture(scope="module")
def embedded(model, tokens):
    return model.embedding()(jnp.asarray(tokens))


def rows_of(x):
    return np.asarray(x, np.float64).reshape(-1, x.shape[-1])


def test_every_block_has_the_same_programs(model, embedded):
    runner, batches = BlockRunner(), make_batches(embedded)
    for work, others in ((runner.grams, (1,)), (runner.forward, (1, 2))):
        work(model.block(0), batches)
        seconds = Compiled.seconds
        for index in others:
            work(model.block(index), batches)
        assert Compiled.seconds == seconds
    assert runner.seconds > 0


def test_grams_of_many_batches_keep_their_precision(model):
    """Blocked sums in float32: relative to the inputs' norms an entry is off by some 1e-7 after 64 batches."""
    rng, block = np.random.default_rng(3), model.block(0)
    batches = [jnp.asarray(rng.normal(0.5, 1.0, (4, 32, 32)), jnp.float32) for _ in range(64)]
    found = np.asarray(BlockRunner().grams(block, Batches(batches))["attention_input"].gram, np.float64)
    x = np.concatenate([rows_of(block.attention_norm(b)) for b in batches])
    norms = np.linalg.norm(x, axis=0)
    assert np.max(np.abs(found - x.T @ x) / np.outer(norms, norms)) < 1e-6


computed = jax.jit(gather_grams, static_argnames="weighting")
inside = jax.jit(tapped)


@pytest.fixture(scope="module")
def residual(model, embedded):
    """Grams of the first block, each token weighted by its residual."""
    return computed(model.block(0), embedded, weighting="residual")


def test_residual_weights_are_those_of_the_stream_behind_the_block(model, embedded, residual):
    block = model.block(0)
    inputs, stream = inside(block, embedded)
    weights = 1 / np.mean(rows_of(stream) ** 2, axis=-1)
    for name, found in residual.items():
        rows = rows_of(inputs[name])
        own = weights[:, None] if name in block.residual_taps else 1
        np.testing.assert_allclose(found.gram, rows.T @ (own * rows), rtol=1e-4, atol=1e-4)
    assert 0 < len(block.residual_taps) < len(residual)


def test_a_silent_token_weighs_nothing_and_batches_do_not_matter(model, embedded, residual):
    batches = Batches([embedded[:4], embedded[4:], jnp.zeros_like(embedded[:3])])
    found = BlockRunner().grams(model.block(0), batches, "residual")
    for name, whole in residual.items():
        np.testing.assert_allclose(found[name].gram, whole.gram, rtol=1e-4, atol=1e-4)


def test_a_token_whose_stream_overflows_cannot_drop_out_with_weight_0(model, embedded):
    """The last linear's weights are finite and its inputs too: only the stream behind the block is not."""
    block = model.block(0)
    block.write({"mlp.down_proj.weight": block.read("mlp.down_proj.weight") * 1e38})
    found = computed(block, embedded, weighting="residual")
    assert not any(np.isfinite(found[name].gram).all() for name in block.residual_taps)


def test_grams_and_drift_are_those_of_the_linears_inputs_in_the_two_streams(model, embedded, rng):
    block = model.block(0)
    pruned = embedded + 0.3 * jnp.asarray(rng.standard_normal(embedded.shape), jnp.float32)
    (ours, _), (theirs, _) = inside(block, pruned), inside(block, embedded)
    found = computed(block, pruned, dense_x=embedded)
    assert set(found) == set(block.linears.values())
    for name, grams in found.items():
        x, y = rows_of(ours[name]), rows_of(theirs[name])
        assert grams.tokens == float(grams.mass) == len(x)
        np.testing.assert_allclose(grams.gram, x.T @ x, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(grams.drift, x.T @ (x - y), rtol=1e-4, atol=1e-4)


def test_the_gram_of_an_expert_is_that_of_its_tokens(models, tokens):
    model = open_model(models("experts"))
    block, x = model.block(0), model.embedding()(jnp.asarray(tokens))
    grams = BlockRunner().grams(block, make_batches(x), "residual")
    taps = set(block.linears.values())
    assert len(taps) == 2 + 2 * EXPERTS
    assert all(grams[tap].gram.ndim == 2 for tap in taps)
    for e, rows in enumerate(routed_inputs(model, tokens)):
        found = grams[f"mlp.experts.{e}.input"]
        assert int(found.tokens) == len(rows)
        np.testing.assert_allclose(found.gram, rows.T @ rows, rtol=1e-4, atol=1e-3)
        np.testing.assert_allclose(found.total, rows.sum(axis=0), rtol=1e-4, atol=1e-3)
    hidden = [grams[f"mlp.experts.{e}.hidden"] for e in range(EXPERTS)]
    assert sum(int(found.tokens) for found in hidden) == 2 * tokens.size
    _, stream = inside(block, x)
    masses = sum(float(found.mass) for found in hidden)
    assert masses == pytest.approx(2 * float(jnp.sum(1 / jnp.mean(stream**2, axis=-1))), rel=1e-4)


def test_with_all_tokens_the_grams_of_an_expert_are_those_of_every_token(models, tokens):
    model = open_model(models("experts"))
    block, x = model.block(0), model.embedding()(jnp.asarray(tokens))
    dense_x = 1.1 * x + 0.1  # another stream, so that there is a drift
    grams = BlockRunner().grams(block, make_batches(x), "uniform", make_batches(dense_x), "all")

    def hidden(inputs, e):
        gate, up = (np.asarray(block.read(f"mlp.experts.{e}.{n}_proj.weight"), np.float64) for n in ("gate", "up"))
        return inputs @ gate.T / (1 + np.exp(-(inputs @ gate.T))) * (inputs @ up.T)

    own, dense = mixture_inputs(model, x), mixture_inputs(model, dense_x)
    for e in range(EXPERTS):
        for tap, rows, dense_rows in (("input", own, dense), ("hidden", hidden(own, e), hidden(dense, e))):
            found = grams[f"mlp.experts.{e}.{tap}"]
            assert grams.tokens(f"mlp.experts.{e}.{tap}") == int(found.tokens) == float(found.mass) == tokens.size
            np.testing.assert_allclose(found.gram, rows.T @ rows, rtol=1e-4, atol=2e-3)
            np.testing.assert_allclose(found.total, rows.sum(axis=0), rtol=1e-4, atol=2e-3)
            np.testing.assert_allclose(found.drift, rows.T @ (rows - dense_rows), rtol=1e-4, atol=2e-3)
    # Gate and up of all experts share one Gram.
    assert grams.stacked["mlp.experts.input"].gram.shape == (32, 32)


def test_best_takes_the_ridge_and_the_propagation_of_whole_models_and_the_others_their_own():
    assert Recipe(method="best", propagate=0).propagate == 0
    for given, ridge in (({}, 0.1), ({"ridge": 0.02}, 0.02)):
        assert Recipe(method="best", **given).layer_method.ridge == ridge
    for name in METHODS:
        # A layer alone and a layer of a model are pruned by the same method.
        assert Recipe(method=name).layer_method == find_method(name)
        assert Recipe(method=name).propagate == (0.25 if name == "best" else 0)
    assert Recipe(method="maiht", ridge=0.5).layer_method.ridge == 0.5
