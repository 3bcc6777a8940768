"""Whole groups of inputs: removal against its plain version and all choices, and flap."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

import sparseopt as so
from sparseopt.layers.problem import scale_layer
from sparseopt.pruning import GroupRemoval, prune_layer
from tests.layers.layers import error_of, make_layer


def ridged(weight, gram, ridge=0.3):
    """The scaled problem in float64: hessian with its ridge, center `[in, out]`, scale."""
    scale = np.sqrt(np.diag(gram).astype(np.float64))
    return gram / np.outer(scale, scale) + ridge * np.eye(len(scale)), (weight * scale).T, scale


def refit(hessian, center, kept):
    """The minimiser of the scaled loss on the kept inputs, and the loss."""
    values = np.zeros_like(center)
    values[kept] = np.linalg.solve(hessian[np.ix_(kept, kept)], hessian[kept] @ center)
    change = values - center
    return values, 0.5 * np.sum(change * (hessian @ change))


def greedy(hessian, center, size, left):
    """Groups removed one by one, each the one without which the refit is best; returns what is kept."""
    groups = np.arange(len(center)) // size
    alive = list(range(len(center) // size))
    while len(alive) > left:
        losses = [refit(hessian, center, np.isin(groups, [g for g in alive if g != gone]))[1] for gone in alive]
        del alive[int(np.argmin(losses))]
    return np.isin(groups, alive)


@pytest.fixture
def layer(rng):
    return make_layer(rng, outputs=12, inputs=32)[:2]


@pytest.mark.parametrize("size", [1, 4])
def test_removal_is_the_greedy_choice_by_refits_and_ends_at_the_refit(layer, size):
    hessian, center, scale = ridged(*layer)
    kept = greedy(hessian, center, size, 16 // size)
    ours = prune_layer(*layer, 0.5, f"group:{size}", "osscar")
    np.testing.assert_array_equal((ours.weight != 0).all(axis=0), kept)
    assert (ours.weight[:, ~kept] == 0).all()
    np.testing.assert_allclose(ours.weight, (refit(hessian, center, kept)[0].T / scale), rtol=1e-4, atol=1e-5)
    assert ours.steps == 16 // size
    assert ours.relative_error == pytest.approx(error_of(ours.weight, *layer), rel=1e-3)


def test_one_group_removed_is_the_best_of_all_and_several_are_near_it(layer):
    hessian, center, _ = ridged(*layer)
    groups = np.arange(32) // 4
    for gone, within in ((1, 1 + 1e-5), (3, 1.05)):
        losses = [
            refit(hessian, center, ~np.isin(groups, chosen))[1] for chosen in itertools.combinations(range(8), gone)
        ]
        kept = (prune_layer(*layer, gone / 8, "group:4", "osscar").weight != 0).all(axis=0)
        assert refit(hessian, center, kept)[1] <= within * min(losses)


def test_several_groups_in_a_step_keep_the_exact_count_and_lose_little_and_nothing_or_all_may_go(layer):
    one = prune_layer(*layer, 0.5, "group:1", "osscar")
    several = prune_layer(*layer, 0.5, "group:1", GroupRemoval(chunk=5))
    assert np.count_nonzero((several.weight != 0).any(axis=0)) == 16
    assert several.steps == 4
    assert one.relative_error <= 1.001 * several.relative_error <= 1.1 * one.relative_error
    np.testing.assert_array_equal(prune_layer(*layer, 0.5, "group:1", "best").weight, one.weight)
    np.testing.assert_array_equal(prune_layer(*layer, 0.0, "group:4", "osscar").weight, layer[0])
    assert not prune_layer(*layer, 0.99, "group:4", "osscar").weight.any()


def test_dead_groups_go_first_the_smallest_of_them_before_the_others(layer):
    weight, gram = layer[0].copy(), layer[1].copy()
    dead = np.isin(np.arange(32) // 4, [2, 5])
    gram[dead], gram[:, dead] = 0, 0
    weight[:, 8:12] *= 10  # group 2
    for sparsity, gone in ((1 / 8, [5]), (2 / 8, [2, 5])):
        result = prune_layer(weight, gram, sparsity, "group:4", "osscar")
        assert result.relative_error < 1e-10
        np.testing.assert_array_equal((result.weight == 0).all(axis=0), np.isin(np.arange(32) // 4, gone))


def test_flap_ranks_groups_by_the_variance_of_their_inputs(rng):
    x = rng.standard_normal((300, 32)) * np.exp(rng.standard_normal(32))
    x[:, :4] += 50  # large, and nearly constant
    weight, gram = rng.standard_normal((12, 32)).astype(np.float32), (x.T @ x).astype(np.float32)
    found = prune_layer(weight, gram, 0.5, "group:4", "flap", input_variances=x.var(axis=0)).weight
    score = (x.var(axis=0) * np.sum(weight.astype(np.float64) ** 2, axis=0)).reshape(8, 4).sum(axis=1)
    kept = np.repeat(np.isin(np.arange(8), np.argsort(score)[4:]), 4)
    np.testing.assert_array_equal(found, np.where(kept, weight, 0))
    assert (prune_layer(weight, gram, 0.5, "group:4", "wanda").weight[:, :4] != 0).all()
    # Without means the variance is the mean square, and the score Wanda's.
    wanda = prune_layer(weight, gram, 0.5, "group:4", "wanda").weight
    np.testing.assert_array_equal(
        prune_layer(weight, gram, 0.5, "group:4", "flap", input_variances=np.diag(gram)).weight, wanda
    )


def test_labelled_groups_are_refused_with_what_to_do(layer):
    with pytest.raises(ValueError, match="consecutive inputs, as many in each, given 32 labels"):
        GroupRemoval()(scale_layer(*map(jnp.asarray, layer)), so.GroupTopK(2, np.arange(32) % 4))
