"""Orders of inputs: what an n:m pattern keeps never falls, planted orders are found, and the pass uses them."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from sparseopt.core.penalties.patterns import NM
from sparseopt.models import block_moves, load_decoder, open_model
from sparseopt.pruning import Recipe, prune_model, prune_models
from sparseopt.pruning.pipeline import Stopped
from sparseopt.pruning.run.permutation import best_order, block_orders
from tests.jitted import run
from tests.models.tiny import VOCAB, random_tensors, tiny_config, write_folder

TWO_OF_FOUR = NM(2, 4)


def kept(score, order, pattern):
    moved = jnp.asarray(score[np.asarray(order)])
    return float(jnp.sum(jnp.where(pattern.mask(moved), moved, 0)))


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8)])
def test_an_order_keeps_more_and_moves_every_input_once(rng, n, m):
    score = rng.gamma(0.5, size=(64, 40)) * rng.gamma(0.5, size=(64, 1))
    pattern = NM(n, m)
    order = best_order(score, pattern)
    np.testing.assert_array_equal(np.sort(order), np.arange(64))
    unmoved = np.arange(64)
    lost = score.sum() - kept(score, unmoved, pattern)
    assert kept(score, order, pattern) > kept(score, unmoved, pattern) + 0.1 * lost
    # Found again: the best order is not left.
    assert kept(score[order], best_order(score[order], pattern), pattern) >= kept(score, order, pattern) * (1 - 1e-6)


def test_heavy_inputs_side_by_side_are_dealt_out_and_all_kept(rng):
    score = rng.uniform(0, 1, (32, 16))
    score[:16] += 10
    assert kept(score, best_order(score, TWO_OF_FOUR), TWO_OF_FOUR) == pytest.approx(score[:16].sum(), rel=1e-5)


def test_of_few_inputs_the_order_is_nearly_the_best_of_all(rng):
    for _ in range(3):
        score = rng.gamma(0.5, size=(8, 6))
        groups = [first for first in itertools.combinations(range(8), 4) if 0 in first]
        best = max(kept(score, [*first, *(set(range(8)) - set(first))], TWO_OF_FOUR) for first in groups)
        assert kept(score, best_order(score, TWO_OF_FOUR), TWO_OF_FOUR) >= 0.98 * best


def test_the_orders_of_a_block_fit_its_heads(tmp_path, rng):
    config = tiny_config(num_hidden_layers=1)
    model = open_model(write_folder(tmp_path / "source", config, random_tensors(config, rng)))
    block = model.block(0)
    losses = {name: rng.gamma(0.5, size=block.weight_shape(name)) for name in block.linears}
    orders = block_orders(model.config, losses, dict.fromkeys(losses, TWO_OF_FOUR))
    assert set(orders) == {"self_attn.o_proj", "mlp.down_proj"}
    # Refused if values left their head, or moved otherwise in a head of the same group.
    block_moves(model.config, orders)
    for name, order in orders.items():
        score = losses[name].T
        assert kept(score, order, TWO_OF_FOUR) > kept(score, np.arange(len(order)), TWO_OF_FOUR)
    # Groups of 16 would reach over two heads of 8.
    assert set(block_orders(model.config, losses, dict.fromkeys(losses, NM(8, 16)))) == {"mlp.down_proj"}


@pytest.fixture
def planted(tmp_path, rng):
    """A model with biases in which 2:4 loses nothing once channels stand in the right order.

    Inputs of the residual stream follow the pattern already; the second half of the MLP's channels and of each head's
    values is not read.
    """
    config = tiny_config(model_type="qwen2", num_hidden_layers=2)
    tensors = random_tensors(config, rng)
    for key, value in tensors.items():
        if "o_proj" in key:
            value.reshape(32, -1, 8)[:, :, 4:] = 0
        elif "down_proj" in key:
            value[:, 32:] = 0
        elif value.ndim == 2 and "layers" in key:
            value.reshape(len(value), -1, 4)[:, :, 2:] = 0
    return write_folder(tmp_path / "source", config, tensors)


def test_a_pruned_model_in_the_right_order_computes_the_dense_function(tmp_path, planted, rng):
    tokens = rng.integers(0, len(VOCAB), (6, 32)).astype(np.int32)
    recipe = Recipe(method="wanda", pattern="2:4", calibration=tokens, permute=True)
    outputs = tmp_path / "ordered", tmp_path / "plain"
    ordered, plain = prune_models(
        planted, list(zip((recipe, recipe.model_copy(update={"permute": False})), outputs, strict=True))
    )
    assert max(layer.relative_error for layer in ordered.layers) < 1e-10
    lossy = {layer.layer.rpartition(".")[2] for layer in plain.layers if layer.relative_error > 0.01}
    assert lossy == {"o_proj", "down_proj"}
    dense, pruned, unordered = (np.asarray(run(load_decoder(folder), tokens)) for folder in (planted, *outputs))
    np.testing.assert_allclose(pruned, dense, rtol=1e-5, atol=1e-5)
    assert np.abs(unordered - dense).max() > 0.01


@pytest.mark.thorough
def test_an_interrupted_run_moves_the_same_channels(tmp_path, planted, rng):
    tokens = rng.integers(0, len(VOCAB), (6, 32)).astype(np.int32)
    recipe = Recipe(pattern="2:4", calibration=tokens, permute=True, dtype="bfloat16", propagate=0.5)
    prune_model(planted, tmp_path / "whole", recipe)
    with pytest.raises(Stopped):
        prune_model(planted, tmp_path / "parts", recipe, stop=lambda: True)
    prune_model(planted, tmp_path / "parts", recipe)
    whole, parts = (
        {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}
        for folder in (tmp_path / "whole", tmp_path / "parts")
    )
    assert whole == parts


def test_an_order_without_a_pattern_that_needs_it_is_refused():
    for pattern in ("unstructured", "4:4"):
        with pytest.raises(ValueError, match=f"permute is for n:m patterns with zeros.*'{pattern}'; leave it out"):
            Recipe(pattern=pattern, permute=True)
