"""Allocation: exact totals, bounds, optimality against a fine grid, and its survey on a tiny model."""

import itertools

import numpy as np
import pytest

from sparseopt.pruning import Recipe, Stopped, audit_pattern, dry_run, prune_layer, prune_model
from sparseopt.pruning.recipe.allocation import (
    ROWS,
    allocate_curves,
    between,
    check_allocation,
    choose_pruned,
    default_bounds,
    exact_shares,
    losses_of_linear,
)
from tests.layers.layers import make_layer
from tests.pruning.whole_runs import stored, tensors_of, write_model

LEVELS = np.linspace(0.3, 0.9, 7)


def convex_curves(rng, count):
    """Rising convex losses at LEVELS, of very different scales."""
    slopes = np.sort(np.exp(rng.standard_normal((count, len(LEVELS)))), axis=1)
    return np.cumsum(slopes, axis=1) * np.exp(2 * rng.standard_normal((count, 1)))


def test_no_point_of_a_fine_grid_costs_less(rng):
    """Three linears, all shares in steps of .01 that meet the total."""
    sizes = np.array([100, 300, 200])
    losses = convex_curves(rng, 3)

    def cost(shares):
        return sum(float(between(LEVELS, losses[i : i + 1], np.array([share]))[0, 0]) for i, share in enumerate(shares))

    for sparsity in (0.45, 0.6, 0.8):
        found = allocate_curves(LEVELS, losses, sizes, sparsity, (0.3, 0.9))
        assert found @ sizes == pytest.approx(sparsity * sizes.sum(), rel=1e-12)
        grid = np.arange(30, 91) / 100
        best = np.inf
        for a, b in itertools.product(grid, grid):
            c = (sparsity * sizes.sum() - a * sizes[0] - b * sizes[1]) / sizes[2]
            if 0.3 <= c <= 0.9:
                best = min(best, cost((a, b, c)))
        # The hull is taken on a grid of its own, of .003.
        assert cost(found) <= best * (1 + 1e-4)
        assert cost(found) < cost([sparsity] * 3)


def test_a_curve_that_is_not_convex_is_taken_by_its_hull(rng):
    """Two equal linears whose loss jumps: one takes the jump, which a point between would pay without gain."""
    curve = np.array([0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    sizes = np.array([100, 100])
    found = allocate_curves(LEVELS, np.stack([curve, curve]), sizes, 0.65, (0.3, 0.9))
    assert found.min() < 0.43
    assert found.max() > 0.87
    falling = np.array([0.2, 0.1, 0.3, 0.2, 0.6, 0.8, 1.0])
    found = allocate_curves(LEVELS, np.stack([falling, falling]), sizes, 0.6, (0.3, 0.9))
    assert found.sum() == pytest.approx(1.2)


def test_more_zeros_in_all_are_never_fewer_in_one(rng):
    sizes, losses = rng.integers(50, 500, 20), convex_curves(rng, 20)
    shares = [allocate_curves(LEVELS, losses, sizes, s, (0.3, 0.9)) for s in (0.4, 0.5, 0.6, 0.7, 0.8)]
    assert all((after >= before - 1e-12).all() for before, after in itertools.pairwise(shares))


def test_bounds_hold_and_force_the_share_where_they_meet_it(rng):
    sizes, losses = rng.integers(50, 500, 20), convex_curves(rng, 20)
    for low, high in ((0.55, 0.62), (0.6, 0.9), (0.3, 0.6)):
        found = allocate_curves(LEVELS, losses, sizes, 0.6, (low, high))
        assert low - 1e-12 <= found.min() <= found.max() <= high + 1e-12
        assert found @ sizes == pytest.approx(0.6 * sizes.sum(), rel=1e-12)


def test_counts_are_exact_to_the_weight(rng):
    sizes, ones = rng.integers(500, 5000, 50), np.ones(50, int)
    shares = np.clip(0.6 + 0.1 * rng.standard_normal(50), 0.4, 0.8)
    shares += 0.6 - shares @ sizes / sizes.sum()
    # Also with a bound at the sparsity itself.
    cases = [(shares, 0.6, (0.2, 0.95))]
    cases += [(np.full(50, 0.5), 0.5, bounds) for bounds in ((0.5, 0.9), (0.2, 0.5), (0.5, 0.5))]
    for wanted, sparsity, bounds in cases:
        exact = exact_shares(wanted, sizes, ones, sparsity, bounds) * sizes
        np.testing.assert_allclose(exact, np.round(exact), atol=1e-6)
        assert round(exact.sum()) == round(sparsity * sizes.sum())
        assert np.abs(exact - wanted * sizes).max() <= 1


def test_counts_in_units_come_as_near_as_half_a_unit(rng):
    units = rng.choice([16, 24, 64], 30)
    sizes = units * rng.integers(50, 500, 30)
    exact = exact_shares(np.full(30, 0.55), sizes, units, 0.55, (0.3, 0.8)) * sizes / units
    np.testing.assert_allclose(exact, np.round(exact), atol=1e-6)
    assert abs((exact * units).sum() - 0.55 * sizes.sum()) <= 8


def test_losses_between_levels_are_cubic_where_the_truth_is():
    cubes = np.stack([LEVELS**3, 5 * LEVELS**3])
    grid = np.linspace(0.3, 0.9, 50)
    np.testing.assert_allclose(between(LEVELS, cubes, grid), [grid**3, 5 * grid**3])


def test_the_linears_that_are_pruned_alike_cost_least_a_weight(rng):
    losses, sizes = rng.random(12), rng.integers(50, 500, 12)
    for sparsity in (0.01, 0.2, 0.37, 0.499):
        pruned = choose_pruned(losses, sizes, 0.5, sparsity)
        zeros = 0.5 * sizes[pruned]
        assert zeros.sum() - zeros[np.argmax((losses / sizes)[pruned])] < sparsity * sizes.sum() <= zeros.sum()
        assert (losses / sizes)[pruned].max() < (losses / sizes)[~pruned].min(initial=np.inf)
    assert choose_pruned(losses, np.full(12, 8), 0.5, 0.25).sum() == 6


def test_default_bounds_can_meet_every_total():
    for sparsity in (0.0, 0.1, 0.5, 0.7, 0.9, 0.97):
        low, high = default_bounds(sparsity)
        assert low <= sparsity <= high < 1
        check_allocation("curves", "unstructured", sparsity, (low, high))


def test_estimated_losses_follow_those_of_full_solves(rng):
    weight, gram, _ = make_layer(rng, outputs=96, inputs=64)
    gram = gram / 256
    sensitivity = np.exp(rng.standard_normal(96)).astype(np.float32)
    root, levels = np.sqrt(sensitivity), np.array([0.3, 0.4, 0.5, 0.6, 0.7, 0.8], np.float32)
    cheap = np.asarray(losses_of_linear(weight, gram, sensitivity, root, levels), np.float64)
    full = []
    for level in levels:
        pruned = prune_layer(weight, gram, float(level), method="admm_splice", output_weights=root).weight
        change = np.asarray(pruned, np.float64) - weight
        full.append(0.5 * np.sum(np.einsum("oi,ij,oj->o", change, gram, change) * sensitivity))
    assert (np.diff(cheap) > 0).all()
    # Never far below what a full solve reaches, and of its order over a range of a hundred.
    assert (cheap > 0.95 * np.array(full)).all()
    assert (cheap < 2.5 * np.array(full)).all()
    assert full[-1] > 100 * full[0]


def test_some_rows_stand_for_all(rng):
    """Four copies of the same rows: a path on every fourth gives the loss of all."""
    weight, gram, _ = make_layer(rng, outputs=ROWS, inputs=32)
    once, levels = np.ones(ROWS, np.float32), np.array([0.4, 0.6], np.float32)
    many = [np.repeat(weight, 4, axis=0), gram, *[np.repeat(once, 4)] * 2]
    np.testing.assert_allclose(
        losses_of_linear(*many, levels), 4 * losses_of_linear(weight, gram, once, once, levels), rtol=1e-5
    )


def test_curves_take_from_linears_that_the_loss_does_not_see(tmp_path, tokens):
    """Without an output projection a block's queries, keys and values change nothing: they lose all they may."""
    tensors = tensors_of("square")
    tensors["model.layers.1.self_attn.o_proj.weight"][:] = 0
    source = write_model(tmp_path / "source", "square", tensors)
    common = {"allocation": "curves", "method": "wanda", "calibration": tokens}
    report = prune_model(source, tmp_path / "out", Recipe(sparsity=0.6, bounds=(0.3, 0.8), **common))
    shares = {record.layer: record.sparsity for record in report.layers}
    unseen = {f"model.layers.1.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj")}
    for layer in unseen:
        assert shares[layer] == pytest.approx(0.8, abs=2e-3)
        assert all(shares[layer.replace("1", index)] < 0.8 for index in "02")
    # With a pattern that fixes the share, they are pruned and what costs more stays dense, to the byte.
    recipe = Recipe(sparsity=0.2, pattern="2:4", **common)
    with pytest.raises(Stopped):
        prune_model(source, tmp_path / "pattern", recipe, stop=lambda: True)
    # What the run chose is known from its records: it goes on, and it is finished.
    report = prune_model(source, tmp_path / "pattern", recipe)
    pruned = {record.layer for record in report.layers}
    assert (report.resumed_blocks, unseen <= pruned) == (1, True)
    assert {record.layer for record in prune_model(source, tmp_path / "pattern", recipe).layers} == pruned
    sizes = [record.size for record in report.layers]
    assert 0 <= 0.5 * sum(sizes) - 0.2 * report.prunable_size < 0.5 * max(sizes)
    found = dry_run(source, tmp_path / "dry", recipe)
    assert found.zeros == pytest.approx(0.2 * found.weights, abs=1)
    before, after = stored(source), stored(tmp_path / "pattern")
    for key in before.keys() - {f"{layer}.weight" for layer in pruned}:
        assert before[key].tobytes() == after[key].tobytes()
    assert all(audit.fits for audit in audit_pattern(tmp_path / "pattern", "2:4") if audit.layer in pruned)
