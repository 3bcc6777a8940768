"""Orders of inputs: what an n:m pattern keeps never falls, planted orders are found, and the pass uses them."""

import itertools

import numpy as np
import pytest

from sparseopt.core.penalties.patterns import NM
from sparseopt.models import block_moves, load_decoder, open_model
from sparseopt.pruning import Recipe, prune_model
from sparseopt.pruning.run.permutation import best_order, block_orders
from tests.jitted import run

TINY = "llama"  # whose heads share keys and values
TWO_OF_FOUR = NM(2, 4)


def kept(score, order, pattern):
    """The sum of what an n:m pattern keeps of scores `[in, out]`, counted here."""
    groups = score[np.asarray(order)].reshape(-1, pattern.m, score.shape[1])
    return np.sort(groups, axis=1)[:, -pattern.n :].sum()


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


def test_of_few_inputs_the_order_is_nearly_the_best_of_all(rng):
    for _ in range(3):
        score = rng.gamma(0.5, size=(8, 6))
        groups = [first for first in itertools.combinations(range(8), 4) if 0 in first]
        best = max(kept(score, [*first, *(set(range(8)) - set(first))], TWO_OF_FOUR) for first in groups)
        assert kept(score, best_order(score, TWO_OF_FOUR), TWO_OF_FOUR) >= 0.98 * best


def test_the_orders_of_a_block_fit_its_heads(source, rng):
    model = open_model(source)
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


def test_a_pruned_model_in_the_right_order_computes_the_dense_function(tmp_path, models, tokens):
    source, outputs = models("planted"), (tmp_path / "ordered", tmp_path / "plain")
    recipes = [Recipe(method="wanda", pattern="2:4", calibration=tokens, permute=permute) for permute in (True, False)]
    ordered, plain = (prune_model(source, *pair) for pair in zip(outputs, recipes, strict=True))
    assert max(layer.relative_error for layer in ordered.layers) < 1e-10
    lossy = {layer.layer.rpartition(".")[2] for layer in plain.layers if layer.relative_error > 0.01}
    assert lossy == {"o_proj", "down_proj"}
    dense, pruned, unordered = (np.asarray(run(load_decoder(folder), tokens)) for folder in (source, *outputs))
    np.testing.assert_allclose(pruned, dense, rtol=1e-5, atol=1e-5)
    assert np.abs(unordered - dense).max() > 0.01
