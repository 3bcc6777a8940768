"""One layer, whatever the method: dead inputs, dtypes, exact zeros, one compilation, and what is refused."""

import re

import ml_dtypes
import numpy as np
import pytest

import sparseopt as so
from sparseopt.layers.compiled import Compiled
from sparseopt.layers.patterns import parse_pattern
from sparseopt.pruning import GroupRemoval, LayerJob, MaihtPruning, SparseGpt, prune_layer, solve_layer
from tests.layers.layers import error_of, make_layer
from tests.tiers import often


@pytest.mark.parametrize(("method", "preset"), [("maiht", "paper"), ("maiht", "tuned"), ("wanda", None)])
def test_dead_inputs_are_pruned_first_and_reported(rng, method, preset):
    weight, gram, _ = make_layer(rng)
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


def test_all_inputs_dead_costs_nothing(rng):
    weight, gram, _ = make_layer(rng, outputs=4, inputs=8)
    result = prune_layer(weight, np.zeros_like(gram), 0.5)
    assert np.count_nonzero(result.weight) == 16
    assert np.isnan(result.relative_error) or result.relative_error == 0


DTYPES = [np.float16, ml_dtypes.bfloat16, np.float32, np.float64]


@pytest.mark.parametrize("dtype", often(DTYPES, *DTYPES[1:]))
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


WEIGHT = np.ones((48, 64), np.float32)
BROKEN = WEIGHT.copy()
BROKEN[1, 2], BROKEN[3, 4] = np.nan, np.inf
NEGATIVE, SKEW = np.diag([-1.0] + [1.0] * 63), np.eye(64) + 10 * np.eye(64, k=3) * (np.arange(64) == 5)
GIVEN = {"weight": WEIGHT, "gram": np.eye(64), "sparsity": 0.5}
GROUPS = {"pattern": "group:4", "method": "osscar"}
# Changes to what is given, and what is told.
REFUSED = {
    "NaN and infinity": ({"weight": BROKEN}, "weight has 2 NaN or infinite entries of 3072"),
    "a vector": ({"weight": WEIGHT[0]}, r"matrix \[out, in\], given shape \[64\]"),
    "an infinite gram": ({"gram": np.full((64, 64), np.inf)}, "gram has 4096 NaN or infinite entries"),
    "no square gram": ({"gram": np.eye(64, 63)}, r"gram must be \[in, in\] = \[64, 64\] .*given \[64, 63\]"),
    "a gram of other inputs": ({"gram": np.eye(48)}, r"gram must be \[in, in\] .*given \[48, 48\]"),
    "a test gram of other inputs": ({"test_gram": np.eye(3)}, r"test_gram must be \[in, in\] .*given \[3, 3\]"),
    "a skew gram": ({"gram": SKEW}, r"gram is not symmetric: entry \(2, 5\) is 10, its mirror 0"),
    "a negative square": ({"gram": NEGATIVE}, r"gram has a negative diagonal entry \(-1\)"),
    "whole numbers": ({"weight": WEIGHT.astype(np.int64)}, "must be of a float dtype, given int64"),
    "complex numbers": ({"weight": WEIGHT.astype(complex)}, "must be of a float dtype, given complex128"),
    "sparsity 1": ({"sparsity": 1.0}, r"sparsity must lie in \[0, 1\), given 1.0"),
    "sparsity negative": ({"sparsity": -0.1}, r"sparsity must lie in \[0, 1\), given -0.1"),
    "sparsity NaN": ({"sparsity": float("nan")}, "sparsity must lie in"),
    "no sparsity": ({"sparsity": None}, "needs a sparsity"),
    "per-row without sparsity": ({"sparsity": None, "pattern": "per-row"}, "'per-row' needs a sparsity"),
    "groups without sparsity": (GROUPS | {"sparsity": None}, "'group:4' needs a sparsity"),
    "contradiction": ({"sparsity": 0.3, "pattern": "2:4"}, "contradicts the sparsity 0.3"),
    "n above m": ({"sparsity": None, "pattern": "5:4"}, "between 1 and 4 of every 4"),
    "indivisible": ({"sparsity": None, "pattern": "2:7"}, "divisible by 7.*leaves 1 over"),
    "blocks too high": ({"pattern": "block:5x4"}, r"outputs divisible by 5 .*out=48, in=64\] leaves 3 outputs and 0"),
    "blocks too wide": ({"pattern": "block:4x48"}, "leaves 0 outputs and 16 inputs over"),
    "empty blocks": ({"pattern": "block:0x4"}, "at least 1 output × 1 input"),
    "empty groups": ({"pattern": "group:0"}, "'group:0' must have groups of at least 1 input"),
    "groups that do not divide": ({"pattern": "group:5"}, "inputs divisible by 5; .*leaves 4 over"),
    "unknown pattern": ({"pattern": "blocky"}, "unknown pattern 'blocky'; known are 'unstructured', 'per-row', 'n:m'"),
    "blocks for sparsegpt": ({"pattern": "block:4x4", "method": "sparsegpt"}, "sparsegpt .*not BlockTopK"),
    "groups for sparsegpt": ({"pattern": "group:4", "method": "sparsegpt"}, "sparsegpt .*not GroupTopK"),
    "long groups for sparsegpt": ({"sparsity": None, "pattern": "2:3", "method": "sparsegpt"}, "divisible by 3"),
    "groups across its blocks": (
        {"sparsity": None, "pattern": "8:16", "method": SparseGpt(block=24)},
        "blocks of 24 inputs, which 16 does not divide",
    ),
    "removal of weights": ({"pattern": "unstructured", "method": "osscar"}, "osscar .*group:C only, not TopK"),
    "no group in a step": (GROUPS | {"method": GroupRemoval(chunk=0)}, "chunk = 1 or more groups in a step, given 0"),
    "flap for weights": (
        {"sparsity": None, "pattern": "2:4", "method": "flap"},
        "flap ranks whole groups .*group:C only, not NM",
    ),
    "flap without variances": (GROUPS | {"method": "flap"}, "flap ranks inputs by .*give input_variances"),
    "variances by output": (
        GROUPS | {"input_variances": np.ones(12)},
        r"input_variances must be \[in\] = \[64\], given \[12\]",
    ),
    "negative variances": (GROUPS | {"input_variances": np.full(64, -1.0)}, "0 or more, the smallest given is -1"),
    "unknown method": ({"method": "magic"}, "unknown method 'magic'; known are best, maiht, admm"),
    "unknown preset": ({"preset": "fast"}, "unknown preset 'fast'; known are paper, tuned"),
    "no presets": (
        {"method": "wanda", "preset": "tuned"},
        "method 'wanda' has no presets, given preset 'tuned'; leave",
    ),
    "another method": ({"method": "wanda", "penalty": so.L1(1.0)}, "only method 'maiht' accepts a penalty"),
    "a penalty for a pattern": (
        {"sparsity": None, "pattern": "2:4", "penalty": so.L1(1.0)},
        re.escape("contradicts the pattern '2:4'"),
    ),
    "unknown bits": ({"bits": "q4"}, "unknown bits 'q4'; known are q8_0, q5_0, q4_0, int8, int4, int4:group; did you"),
    "a grid with an offset": ({"bits": "q4_1"}, "'q4_1' moves zeros, since its grid has an offset; known are q8_0"),
    "empty groups of bits": ({"bits": "int4:0"}, "bits 'int4:0' needs groups of at least 1 input"),
    "a scale for more inputs": (
        {"bits": "int4"},
        "'int4' have a scale for each 128 inputs, which do not tile 64: use",
    ),
    "bits as a number": ({"bits": 4}, "bits is one of q8_0, q5_0, q4_0, int8, int4, int4:group, given 4"),
    "weights beyond all scales": (
        {"weight": 1e6 * WEIGHT, "bits": "q4_0"},
        "hold weights up to 524032, given one of 1e",
    ),
    "no level": ({"penalty": so.TopK(3)}, "with a field `weight`"),
    "no penalty": ({"penalty": 0.1}, "an object with value"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_is_refused_with_what_is_possible_before_any_work(changes, message):
    with pytest.raises(ValueError, match=message):
        prune_layer(**(GIVEN | changes))
