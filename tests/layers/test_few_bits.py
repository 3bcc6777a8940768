"""Layers on a grid of few bits: zeros stay, every group has a scale, and the errors told are those of the weights."""

import jax.numpy as jnp
import numpy as np
import pytest

from sparseopt.layers.bits import multiples_of, parse_bits
from sparseopt.layers.methods.few_bits import FewBits
from sparseopt.layers.patterns import parse_pattern
from sparseopt.layers.problem import LayerJob, layer_solver, scaled_gram
from sparseopt.pruning import AdmmPruning, Wanda, prune_layer
from tests.layers.layers import error_of, make_layer

CASES = [
    *[("wanda", "per-row", bits) for bits in ("q5_0", "q4_0", "int8", "int4:16")],
    *[("wanda", "2:4", "q8_0"), ("wanda", "dense", "q4_0")],
]


@pytest.fixture(scope="module")
def layer():
    """Weight, Gram and held-out Gram; three inputs are dead, and one output has small weights only."""
    weight, gram, test_gram = make_layer(np.random.default_rng(5), outputs=24)
    gram[:, 7:10], gram[7:10], weight[3] = 0, 0, 1e-3 * weight[3]
    return weight, gram, test_gram


def prune(layer, method, pattern, bits=None):
    sparsity = {"2:4": None, "dense": 0.0}.get(pattern, 0.5)
    name = "per-row" if pattern == "dense" else pattern
    return prune_layer(*layer[:2], sparsity, name, method, bits=bits, test_gram=layer[2])


def grouped(weight, bits):
    """The weights of each group, `[groups, group]`, in float64."""
    return weight.astype(np.float64).reshape(-1, bits.group or weight.shape[1])


def multiples_of_a_half(group, bits):
    """Whether the weights of a group are whole multiples, in the grid's range, of one number of float16."""
    if not group.any():
        return True
    top = group[np.argmax(np.abs(group))]
    for multiple in (*range(bits.low, 0), *range(1, bits.high + 1)):
        scale = top / multiple
        if scale == np.float64(np.float16(scale)) and np.all((group / scale) % 1 == 0):
            return bits.low <= np.min(group / scale) and np.max(group / scale) <= bits.high
    return False


@pytest.mark.parametrize(("method", "pattern", "bits"), CASES)
def test_of_every_grid_every_fact_holds(layer, method, pattern, bits):
    found, floats, grid = prune(layer, method, pattern, bits), prune(layer, method, pattern), parse_bits(bits)
    assert found.weight.dtype == np.float32
    multiples, scales = multiples_of(found.weight, grid)
    apart = scales.astype(np.float32)[..., None] * multiples.reshape(*scales.shape, -1)
    assert np.array_equal(apart.reshape(found.weight.shape), found.weight)
    assert all(multiples_of_a_half(group, grid) for group in grouped(found.weight, grid))
    # Zeros stay, and the errors are those of the weights.
    assert not found.weight[floats.weight == 0].any()
    assert found.sparsity == np.mean(found.weight == 0)
    for gram, error in ((layer[1], found.relative_error), (layer[2], found.test_error)):
        assert error == pytest.approx(error_of(found.weight, layer[0], gram), rel=1e-3)
    assert found.pruned_error == pytest.approx(floats.relative_error, rel=1e-4, abs=1e-9)
    # Plain rounding, written out.
    groups = grouped(floats.weight, grid)
    scale = np.take_along_axis(groups, np.argmax(np.abs(groups), 1)[:, None], 1) / grid.low
    scale = scale.astype(np.float16).astype(np.float64)
    rounded = scale * np.clip(np.round(groups / np.where(scale == 0, 1, scale)), grid.low, grid.high)
    told = error_of(rounded.reshape(floats.weight.shape), *layer[:2])
    assert found.rounded_error == pytest.approx(told, rel=1e-2)
    assert found.relative_error < (0.8 if grid.high < 127 else 1.02) * found.rounded_error


def test_a_sweep_never_raises_the_loss(layer):
    weight, gram, _ = layer
    job = LayerJob(weight, gram, None, parse_pattern("per-row", 0.5, weight.shape))
    ridge, (hessian, scale, _) = 0.3, map(np.float64, scaled_gram(jnp.asarray(gram)))
    start = np.asarray(layer_solver(job, Wanda()).weight)
    losses = []
    for sweeps in range(4):
        found = np.asarray(layer_solver(job, FewBits(Wanda(), parse_bits("q4_0"), ridge, sweeps)).weight)
        change, moved = (found - weight) * scale, (found - start) * scale
        losses.append(np.sum((change @ hessian) * change) + ridge * np.sum(moved**2))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.95 * losses[0]


# What is done to the weight and to the inputs.
HARD = {
    "strong inputs": (1, lambda x: x * np.exp(2.5 * np.random.default_rng(3).standard_normal(64))),
    "outliers in every group": (1, lambda x: x * np.where(np.arange(64) % 8 == 0, 1000, 1)),
    "half a group dead, with larger weights": (np.where(np.arange(64) < 16, 5, 1), lambda x: x * (np.arange(64) >= 16)),
    "no input": (1, lambda x: 0 * x),
    "scales at the end of float16": (1e-6, lambda x: 1e13 * x),
    "no weight": (0, lambda x: x),
}


@pytest.mark.parametrize("name", HARD)
def test_where_it_is_hard_it_is_no_worse_than_plain_rounding_and_no_input_is_lost(rng, name):
    factor, inputs = HARD[name]
    weight, x = (factor * rng.standard_normal((24, 64))).astype(np.float32), rng.standard_normal((200, 64))
    gram, fresh = inputs(x), rng.standard_normal((200, 64))
    gram = (gram.T @ gram).astype(np.float32)
    for bits in ("q8_0", "q4_0", "int8"):
        found = prune_layer(weight, gram, 0.0, "per-row", "magnitude", bits=bits)
        assert found.relative_error <= 1.001 * found.rounded_error, bits
        # On tokens in which all inputs are alive.
        lost = np.linalg.norm(fresh @ (found.weight - weight).T) / max(np.linalg.norm(fresh @ weight.T), 1e-30)
        if name not in ("strong inputs", "outliers in every group"):
            assert lost < (0.4 if bits == "q4_0" else 0.05), bits


def test_an_exact_answer_of_ones_own_stays_as_exact_as_the_grid_allows(rng):
    weight, x = rng.standard_normal((24, 64)).astype(np.float32), rng.standard_normal((40, 64))
    found = prune_layer(weight, (x.T @ x).astype(np.float32), 0.5, "per-row", AdmmPruning(ridge=1e-4), bits="q8_0")
    assert found.relative_error < 1.05 * found.rounded_error


def test_floats_lie_on_no_grid(layer):
    with pytest.raises(ValueError, match="lie on no grid of 'q4_0'"):
        multiples_of(layer[0], parse_bits("q4_0"))
