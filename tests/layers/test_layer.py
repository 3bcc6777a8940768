"""`prune_layer` whatever the method: dead inputs, dtypes, exact zeros, one compilation, and what it rejects."""

import itertools
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
    # Fewer to prune than dead weights: the smallest go, and those that must stay keep their value.
    little = prune_layer(weight, gram, 0.02, method=method, preset=preset)
    assert np.count_nonzero(little.weight) == weight.size - round(0.02 * weight.size)
    kept, size = little.weight[:, dead] != 0, np.abs(weight[:, dead])
    np.testing.assert_array_equal(little.weight[:, dead][kept], weight[:, dead][kept])
    axis = 1 if method == "wanda" else None  # Wanda compares the weights of one output only
    largest_gone, smallest_kept = np.max(size, axis, where=~kept, initial=0), np.min(size, axis, where=kept, initial=9)
    assert (largest_gone < smallest_kept).all()
    if method != "wanda":
        assert (result.weight[:, dead] == 0).all()
        assert (np.delete(little.weight, dead, axis=1) != 0).all()


DTYPES = [np.float16, ml_dtypes.bfloat16, np.float32, np.float64]


@pytest.mark.parametrize("dtype", often(DTYPES, *DTYPES[1:]))
def test_the_weights_dtype_is_kept_and_its_rounding_is_in_the_error(rng, dtype):
    weight, gram, _ = make_layer(rng)
    weight = weight.astype(dtype)
    result = prune_layer(weight, gram, 0.5)
    assert result.weight.dtype == dtype
    assert np.count_nonzero(result.weight) == weight.size // 2
    assert result.relative_error == pytest.approx(error_of(result.weight, weight, gram), rel=1e-2)
    # Unchanged weights keep every digit, also those that the solve does not have.
    kept = prune_layer(weight, gram, 0.5, method="magnitude").weight
    np.testing.assert_array_equal(kept, np.where(kept == 0, 0, weight))


def test_exact_zeros_among_the_weights_do_not_stop_maiht(rng):
    """As in a model that was quantised or pruned before: close to zero they give the same answer."""
    weight, gram, _ = make_layer(rng)
    zero = rng.random(weight.shape) < 0.12
    exact = prune_layer(np.where(zero, 0, weight), gram, 0.5)
    nearly = prune_layer(np.where(zero, 1e-4 * weight, weight), gram, 0.5)
    assert int(exact.steps) > 5
    assert float(exact.relative_error) < 1.02 * float(nearly.relative_error)


def test_a_gram_of_zeros_costs_nothing_and_a_singular_one_without_a_ridge_is_told(rng):
    weight, gram, _ = make_layer(rng)
    result = prune_layer(weight, np.zeros_like(gram), 0.5)
    assert np.count_nonzero(result.weight) == weight.size // 2
    assert np.isnan(result.relative_error) or result.relative_error == 0
    with pytest.raises(RuntimeError, match=r"non-finite.*a larger ridge"):
        prune_layer(weight, np.ones_like(gram), 0.5, method=SparseGpt(ridge=0.0))


def test_a_gram_is_symmetric_up_to_rounding_whatever_the_unit_of_its_inputs(rng):
    weight, gram, _ = make_layer(rng)
    lengths = np.sqrt(np.diag(gram))
    skew = np.triu(np.outer(lengths, lengths), 1)
    for unit in (1e-8, 1.0, 1e8):
        prune_layer(weight, unit * (gram + 1e-4 * skew), 0.5, method="magnitude")
        with pytest.raises(ValueError, match="gram is not symmetric"):
            prune_layer(weight, unit * (gram + 1e-2 * skew), 0.5, method="magnitude")


def test_one_compile_a_shape_whatever_the_values_and_the_sparsity(rng):
    solver = Compiled(solve_layer)
    for outputs, sparsity in itertools.product((16, 24, 16), (0.3, 0.5)):
        weight, gram, _ = make_layer(rng, outputs=outputs, inputs=32)
        solver(LayerJob(weight, gram, None, parse_pattern("unstructured", sparsity, weight.shape)), MaihtPruning())
    assert len(solver.texts) == 2


WEIGHT = np.ones((48, 64), np.float32)
BROKEN = WEIGHT.copy()
BROKEN[1, 2], BROKEN[3, 4] = np.nan, np.inf
NEGATIVE, SKEW = np.diag([-1.0] + [1.0] * 63), np.eye(64) + 10 * np.eye(64, k=3) * (np.arange(64) == 5)
GIVEN = {"weight": WEIGHT, "gram": np.eye(64), "sparsity": 0.5}
OSSCAR, FLAP = {"pattern": "group:4", "method": "osscar"}, {"pattern": "group:4", "method": "flap"}
ALONE = {"sparsity": None}
# Changes to what is given, and two parts of what is told: what is meant, and what was given.
BAD = [
    ({"weight": BROKEN}, "weight has 2 NaN", "3072"),
    ({"weight": WEIGHT[0]}, "weight", "[64]"),
    ({"weight": WEIGHT.astype(np.int64)}, "weight", "int64"),
    ({"gram": np.full((64, 64), np.inf)}, "gram has 4096", "infinite"),
    ({"gram": np.eye(64, 63)}, "gram must be [in, in] = [64, 64]", "[64, 63]"),
    ({"gram": SKEW}, "gram is not symmetric", "(2, 5) is 10, its mirror 0"),
    ({"gram": NEGATIVE}, "gram has a negative diagonal", "(-1)"),
    ({"test_gram": np.eye(3)}, "test_gram", "[3, 3]"),
    ({"output_weights": np.zeros(48)}, "output_weights", "given is 0"),
    ({"support": np.ones((48, 64))}, "support", "float64"),
    ({"sparsity": 1.0}, "sparsity", "1.0"),
    ({"sparsity": -0.1}, "sparsity", "-0.1"),
    ({"sparsity": float("nan")}, "sparsity", "nan"),
    (ALONE, "'unstructured' needs", "sparsity"),
    (ALONE | {"pattern": "5:4"}, "'5:4'", "between 1 and 4"),
    (ALONE | {"pattern": "2:7"}, "divisible by 7", "leaves 1 over"),
    ({"sparsity": 0.3, "pattern": "2:4"}, "'2:4'", "0.3"),
    ({"pattern": "block:5x4"}, "divisible by 5", "leaves 3 outputs and 0"),
    ({"pattern": "block:4x48"}, "divisible by 48", "0 outputs and 16 inputs"),
    ({"pattern": "block:0x4"}, "'block:0x4'", "at least 1 output"),
    ({"pattern": "group:0"}, "'group:0'", "at least 1 input"),
    ({"pattern": "group:5"}, "divisible by 5", "leaves 4 over"),
    ({"pattern": "blocky"}, "'blocky'", "'per-row'"),
    ({"pattern": "block:4x4", "method": "sparsegpt"}, "sparsegpt", "BlockTopK"),
    (ALONE | {"pattern": "2:3", "method": "sparsegpt"}, "divisible by 3", "'2:3'"),
    (ALONE | {"pattern": "8:16", "method": SparseGpt(block=24)}, "blocks of 24", "16"),
    (OSSCAR | {"method": GroupRemoval(chunk=0)}, "chunk", "given 0"),
    (ALONE | {"pattern": "2:4", "method": "flap"}, "flap", "NM"),
    (FLAP, "flap", "input_variances"),
    (FLAP | {"input_variances": np.ones(12)}, "input_variances must be [in] = [64]", "[12]"),
    (FLAP | {"input_variances": np.full(64, -1.0)}, "input_variances", "-1"),
    ({"method": "magic"}, "method", "'magic'"),
    ({"preset": "fast"}, "preset", "'fast'"),
    ({"method": "wanda", "preset": "tuned"}, "'wanda'", "'tuned'"),
    ({"method": "wanda", "penalty": so.L1(1.0)}, "penalty", "'maiht'"),
    (ALONE | {"pattern": "2:4", "penalty": so.L1(1.0)}, "penalty", "'2:4'"),
    ({"penalty": so.TopK(3)}, "field", "`weight`"),
    ({"penalty": 0.1}, "an object", "value"),
    ({"bits": "q4"}, "bits", "'q4'"),
    ({"bits": "q4_1"}, "'q4_1'", "offset"),
    ({"bits": "int4"}, "each 128 inputs", "64"),
    ({"bits": 4}, "bits", "given 4"),
    ({"bits": "int4:0"}, "int4:0", "at least 1"),
    ({"weight": 1e6 * WEIGHT, "bits": "q4_0"}, "524032", "1e"),
]


@pytest.mark.parametrize(("changes", "field", "given"), BAD, ids=lambda each: each if isinstance(each, str) else "")
def test_what_cannot_be_is_rejected_before_any_work(changes, field, given):
    with pytest.raises(ValueError, match=re.escape(field)) as caught:
        prune_layer(**(GIVEN | changes))
    assert given in str(caught.value)
