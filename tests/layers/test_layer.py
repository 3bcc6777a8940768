"""One layer: exact counts, agreement with the paper's procedure, patterns, dead inputs, dtypes, bad input."""

import dataclasses
import itertools
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import sparseopt as so
from sparseopt.layers.compiled import Compiled
from sparseopt.layers.patterns import parse_pattern
from sparseopt.pruning import LayerJob, MaihtPruning, Pruned, SparseGpt, prune_layer, solve_layer
from tests.experiments.toy import CappedL1
from tests.layers.layers import error_of, make_layer, paper_procedure
from tests.tiers import often

METHODS = [("maiht", "paper"), ("maiht", "tuned"), ("wanda", None), ("magnitude", None)]


@pytest.mark.parametrize(("method", "preset"), METHODS)
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.25, 0.5, 0.77, 0.99])
def test_the_count_is_exact_to_the_weight(rng, method, preset, sparsity):
    weight, gram, _ = make_layer(rng, outputs=23)
    result = prune_layer(weight, gram, sparsity, method=method, preset=preset)
    kept = round((1 - sparsity) * weight.size)
    assert np.count_nonzero(result.weight) == kept
    assert result.sparsity == (weight.size - kept) / weight.size
    assert result.status is so.Status.CONVERGED


@pytest.mark.parametrize(("method", "preset"), METHODS)
def test_reported_errors_are_those_of_the_returned_weight(rng, method, preset):
    weight, gram, test_gram = make_layer(rng, outputs=23)
    result = prune_layer(weight, gram, 0.5, method=method, preset=preset, test_gram=test_gram)
    assert result.relative_error == pytest.approx(error_of(result.weight, weight, gram), rel=1e-3)
    assert result.test_error == pytest.approx(error_of(result.weight, weight, test_gram), rel=1e-3)


@pytest.mark.parametrize("sparsity", [0.1, 0.3, 0.5, 0.7])
def test_preset_paper_agrees_with_the_papers_procedure(rng, sparsity):
    weight, gram, _ = make_layer(rng, outputs=96, inputs=96)
    ours = prune_layer(weight, gram, sparsity, preset="paper")
    theirs = paper_procedure(weight, gram, sparsity)
    assert ours.steps == 20
    assert ours.relative_error == pytest.approx(error_of(theirs, weight, gram), rel=0.01)
    same = np.mean((ours.weight != 0) == (theirs != 0))
    assert same > 0.995


@pytest.mark.thorough
def test_methods_rank_as_the_literature_says(rng):
    weight, gram, _ = make_layer(rng, outputs=96, inputs=96)
    errors = [prune_layer(weight, gram, 0.5, method=m, preset=p).relative_error for m, p in METHODS]
    best, paper, wanda, magnitude = errors[1], errors[0], errors[2], errors[3]
    assert best < 0.9 * paper
    assert paper < 0.7 * wanda
    assert wanda < 0.9 * magnitude


def test_best_is_near_the_best_support_of_all_on_a_layer_small_enough_to_enumerate(rng):
    inputs, kept = 8, 4
    weight, gram, _ = make_layer(rng, outputs=1, inputs=inputs)
    dense, gram64 = weight[0].astype(np.float64), gram.astype(np.float64)
    optimum = np.inf
    for chosen in itertools.combinations(range(inputs), kept):
        inside = list(chosen)
        v = np.zeros(inputs)
        v[inside] = np.linalg.solve(gram64[np.ix_(inside, inside)], (gram64 @ dense)[inside])
        optimum = min(optimum, error_of(v, dense, gram64))
    result = prune_layer(weight, gram, 0.5)
    assert optimum * (1 - 1e-3) <= result.relative_error <= 1.5 * optimum


def test_wanda_is_magnitude_in_scaled_coordinates_and_keeps_as_many_in_every_row(rng):
    weight, gram, _ = make_layer(rng)
    result = prune_layer(weight, gram, 0.5, method="wanda")
    score = np.abs(weight) * np.sqrt(np.diag(gram))
    expected = np.zeros(weight.shape, bool)
    np.put_along_axis(expected, np.argsort(-score, axis=1)[:, : weight.shape[1] // 2], True, axis=1)
    np.testing.assert_array_equal(result.weight, np.where(expected, weight, 0))
    uneven = prune_layer(weight, gram, 0.31, method="wanda").weight
    per_row = np.count_nonzero(uneven, axis=1)
    assert per_row.max() - per_row.min() == 1


@pytest.mark.parametrize("pattern", ["4:8", "1:4"])
@pytest.mark.parametrize(("method", "preset"), [("maiht", "paper"), ("wanda", None)])
def test_every_group_holds_the_pattern(rng, pattern, method, preset):
    weight, gram, _ = make_layer(rng)
    n, m = map(int, pattern.split(":"))
    result = prune_layer(weight, gram, pattern=pattern, method=method, preset=preset)
    groups = result.weight.reshape(weight.shape[0], -1, m)
    assert (np.count_nonzero(groups, axis=2) == n).all()
    assert result.sparsity == 1 - n / m


def test_a_pattern_costs_more_than_freedom_and_less_with_maiht_than_with_wanda(rng):
    weight, gram, _ = make_layer(rng)
    free = prune_layer(weight, gram, 0.5).relative_error
    bound = prune_layer(weight, gram, pattern="2:4").relative_error
    wanda = prune_layer(weight, gram, pattern="2:4", method="wanda").relative_error
    assert free < bound < wanda


@pytest.mark.parametrize(("method", "preset"), METHODS[:3])
def test_dead_inputs_are_pruned_first_and_reported(rng, method, preset):
    weight, gram, _ = make_layer(rng, outputs=23)
    dead = [3, 17, 40]
    gram[dead], gram[:, dead] = 0, 0
    result = prune_layer(weight, gram, 0.5, method=method, preset=preset)
    assert result.dead_inputs == 3
    assert np.isfinite(result.weight).all()
    assert np.count_nonzero(result.weight) == weight.size // 2
    if method != "wanda":
        assert (result.weight[:, dead] == 0).all()
    # Fewer to prune than dead weights: the smallest go, and those that must stay keep their value.
    little = prune_layer(weight, gram, 0.02, method=method, preset=preset)
    assert np.count_nonzero(little.weight) == weight.size - round(0.02 * weight.size)
    kept, size = little.weight[:, dead] != 0, np.abs(weight[:, dead])
    np.testing.assert_array_equal(little.weight[:, dead][kept], weight[:, dead][kept])
    axis = 1 if method == "wanda" else None  # Wanda compares the weights of one output only
    largest_gone, smallest_kept = np.max(size, axis, where=~kept, initial=0), np.min(size, axis, where=kept, initial=9)
    assert (largest_gone < smallest_kept).all()
    if method != "wanda":
        assert (np.delete(little.weight, dead, axis=1) != 0).all()


def test_magnitude_sees_the_weights_alone(rng):
    weight, gram, _ = make_layer(rng, outputs=23)
    # As quantised weights are, so that many are equal; and outputs that count differently.
    weight, counts = weight.astype(ml_dtypes.bfloat16), rng.uniform(0.1, 9, 23)
    found = prune_layer(weight, np.eye(len(gram)), 0.5, method="magnitude").weight
    assert np.min(np.abs(found), where=found != 0, initial=9) >= np.max(np.abs(weight), where=found == 0, initial=0)
    gram[:5], gram[:, :5] = 0, 0
    for other in (gram, np.zeros_like(gram)):
        result = prune_layer(weight, other, 0.5, method="magnitude", output_weights=counts)
        np.testing.assert_array_equal(result.weight, found)
    assert result.dead_inputs == len(gram)


def test_all_inputs_dead_costs_nothing(rng):
    weight, gram, _ = make_layer(rng, outputs=4, inputs=8)
    result = prune_layer(weight, np.zeros_like(gram), 0.5)
    assert np.count_nonzero(result.weight) == 16
    assert np.isnan(result.relative_error) or result.relative_error == 0


@pytest.mark.parametrize(
    "dtype",
    often([np.float16, ml_dtypes.bfloat16, np.float32, np.float64], ml_dtypes.bfloat16, np.float32, np.float64),
)
def test_the_weights_dtype_is_kept_and_its_rounding_is_in_the_error(rng, dtype):
    weight, gram, _ = make_layer(rng)
    weight = weight.astype(dtype)
    result = prune_layer(weight, gram, 0.5)
    assert result.weight.dtype == dtype
    assert np.count_nonzero(result.weight) == weight.size // 2
    assert result.relative_error == pytest.approx(error_of(result.weight, weight, gram), rel=1e-2)


def test_unchanged_weights_keep_their_value_where_the_dtype_is_wider_than_the_solve_s(rng):
    weight, gram, _ = make_layer(rng, dtype=np.float64)
    found = prune_layer(weight, gram, 0.5, method="magnitude").weight
    np.testing.assert_array_equal(found, np.where(found == 0, 0, weight))
    with pytest.raises(ValueError, match="must be of a float dtype, given complex128"):
        prune_layer(weight.astype(complex), gram, 0.5)


def test_exact_zeros_among_the_weights_do_not_stop_maiht(rng):
    """As in a model that was quantised or pruned before: close to zero they give the same answer."""
    weight, gram, _ = make_layer(rng)
    zero = rng.random(weight.shape) < 0.12
    exact = prune_layer(np.where(zero, 0, weight), gram, 0.5)
    nearly = prune_layer(np.where(zero, 1e-4 * weight, weight), gram, 0.5)
    assert int(exact.steps) > 5
    assert float(exact.relative_error) < 1.02 * float(nearly.relative_error)


def test_a_solve_that_a_singular_gram_made_nan_is_told_as_that(rng):
    weight, gram, _ = make_layer(rng)
    with pytest.raises(RuntimeError, match=r"non-finite.*a larger ridge"):
        prune_layer(weight, np.ones_like(gram), 0.5, method=SparseGpt(ridge=0.0))


def test_one_compile_a_shape_whatever_the_values_and_the_sparsity(rng):
    solver, compiled = Compiled(solve_layer), 0
    for outputs in (16, 24, 16):
        for sparsity in (0.3, 0.5):
            weight, gram, _ = make_layer(rng, outputs=outputs, inputs=32)
            pattern = parse_pattern("unstructured", sparsity, weight.shape)
            before = Compiled.seconds
            solver(LayerJob(weight, gram, None, pattern), MaihtPruning())
            # The first of each shape compiles.
            assert (Compiled.seconds > before) == (sparsity == 0.3 and len(solver.texts) > compiled)
            compiled = len(solver.texts)
    assert compiled == 2


def test_a_method_of_ones_own(rng):
    class KeepFirst:
        def __call__(self, layer, pattern):
            mask = jnp.arange(layer.center.size).reshape(layer.center.shape) < pattern.k
            return Pruned(jnp.where(mask, layer.center, 0), mask, 1, so.Status.CONVERGED)

    weight, gram, _ = make_layer(rng, outputs=4, inputs=8)
    result = prune_layer(weight, gram, 0.5, method=jax.tree_util.register_static(KeepFirst)())
    np.testing.assert_allclose(result.weight[:, :4], weight[:, :4], rtol=1e-6)
    assert (result.weight[:, 4:] == 0).all()


BAD = {
    "sparsity 1": ({"sparsity": 1.0}, r"sparsity must lie in \[0, 1\), given 1.0"),
    "sparsity negative": ({"sparsity": -0.1}, r"sparsity must lie in \[0, 1\), given -0.1"),
    "sparsity NaN": ({"sparsity": float("nan")}, "sparsity must lie in"),
    "no sparsity": ({"sparsity": None}, "needs a sparsity"),
    "indivisible": ({"sparsity": None, "pattern": "2:7"}, "divisible by 7.*leaves 1 over"),
    "blocks too high": ({"pattern": "block:5x4"}, r"outputs divisible by 5 .*out=48, in=64\] leaves 3 outputs and 0"),
    "blocks too wide": ({"pattern": "block:4x48"}, "leaves 0 outputs and 16 inputs over"),
    "empty blocks": ({"pattern": "block:0x4"}, "at least 1 output x 1 input"),
    "blocks for sparsegpt": ({"pattern": "block:4x4", "method": "sparsegpt"}, "sparsegpt .*not BlockTopK"),
    "long groups for sparsegpt": ({"sparsity": None, "pattern": "2:3", "method": "sparsegpt"}, "divisible by 3"),
    "per-row without sparsity": ({"sparsity": None, "pattern": "per-row"}, "'per-row' needs a sparsity"),
    "contradiction": ({"sparsity": 0.3, "pattern": "2:4"}, "contradicts the sparsity 0.3"),
    "n above m": ({"sparsity": None, "pattern": "5:4"}, "between 1 and 4 of every 4"),
    "unknown pattern": ({"pattern": "blocky"}, "unknown pattern 'blocky'; known are 'unstructured', 'per-row', 'n:m'"),
    "unknown method": ({"method": "magic"}, "unknown method 'magic'; known are best, maiht, admm"),
    "unknown preset": ({"preset": "fast"}, "unknown preset 'fast'; known are paper, tuned"),
    "no presets": (
        {"method": "wanda", "preset": "tuned"},
        "method 'wanda' has no presets, given preset 'tuned'; leave",
    ),
}


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD.keys())
def test_bad_choices_are_refused_with_what_is_possible(rng, changes, message):
    weight, gram, _ = make_layer(rng)
    with pytest.raises(ValueError, match=message):
        prune_layer(weight, gram, **({"sparsity": 0.5} | changes))


def test_bad_arrays_are_refused_with_their_name_and_figures(rng):
    weight, gram, _ = make_layer(rng)
    broken = weight.copy()
    broken[1, 2], broken[3, 4] = np.nan, np.inf
    with pytest.raises(ValueError, match="weight has 2 NaN or infinite entries of 3072"):
        prune_layer(broken, gram, 0.5)
    broken = gram.copy()
    broken[0, 0] = np.inf
    with pytest.raises(ValueError, match="gram has 1 NaN or infinite"):
        prune_layer(weight, broken, 0.5)
    with pytest.raises(ValueError, match=r"\[in, in\] = \[64, 64\].*given \[64, 63\]"):
        prune_layer(weight, gram[:, :-1], 0.5)
    with pytest.raises(ValueError, match=r"given \[48, 48\]"):
        prune_layer(weight, gram[:48, :48], 0.5)
    broken = gram.copy()
    broken[2, 5] += 10 * np.sqrt(gram[2, 2] * gram[5, 5])
    with pytest.raises(ValueError, match=r"gram is not symmetric: entry \(2, 5\)"):
        prune_layer(weight, broken, 0.5)
    broken = gram.copy()
    broken[4, 4] = -1
    with pytest.raises(ValueError, match="negative diagonal"):
        prune_layer(weight, broken, 0.5)
    with pytest.raises(ValueError, match=r"test_gram must be \[in, in\]"):
        prune_layer(weight, gram, 0.5, test_gram=gram[:3, :3])
    with pytest.raises(ValueError, match=r"matrix \[out, in\], given shape \[64\]"):
        prune_layer(weight[0], gram, 0.5)
    with pytest.raises(ValueError, match="float dtype, given int64"):
        prune_layer(weight.astype(np.int64), gram, 0.5)


@pytest.mark.parametrize("kind", often([so.L1, so.MCP, CappedL1], so.L1, CappedL1))
def test_a_penalty_of_ones_own_chooses_the_support_and_the_count_stays_exact(rng, kind):
    penalty = kind(1.0)
    weight, gram, _ = make_layer(rng, outputs=48, inputs=48)
    result = prune_layer(weight, gram, 0.6, penalty=penalty)
    assert np.count_nonzero(result.weight) == round(0.4 * weight.size)
    assert result.relative_error < prune_layer(weight, gram, 0.6, method="magnitude").relative_error
    # The level is found, so the one given changes nothing.
    other = prune_layer(weight, gram, 0.6, penalty=dataclasses.replace(penalty, weight=1e3))
    np.testing.assert_array_equal(other.weight, result.weight)


def test_l0_named_as_the_penalty_is_maiht_itself(rng):
    weight, gram, _ = make_layer(rng, outputs=48, inputs=48)
    ours = prune_layer(weight, gram, 0.5)
    named = prune_layer(weight, gram, 0.5, penalty=so.L0(1.0))
    assert named.relative_error == pytest.approx(ours.relative_error, rel=0.02)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 0.5, "method": "wanda", "penalty": so.L1(1.0)}, "only method 'maiht' takes a penalty"),
        ({"pattern": "2:4", "penalty": so.L1(1.0)}, "contradicts the pattern '2:4'"),
        ({"sparsity": 0.5, "penalty": so.TopK(3)}, "with a field `weight`"),
        ({"sparsity": 0.5, "penalty": 0.1}, "an object with value"),
    ],
)
def test_a_penalty_that_cannot_choose_is_an_error(rng, arguments, message):
    weight, gram, _ = make_layer(rng)
    with pytest.raises(ValueError, match=re.escape(message)):
        prune_layer(weight, gram, **arguments)
