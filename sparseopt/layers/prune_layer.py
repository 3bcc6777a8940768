"""`prune_layer`, one weight and one Gram from a notebook: checks on the host, then the jitted solve."""

import math
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from sparseopt.core.penalties.patterns import TopK
from sparseopt.core.penalties.protocols import Penalty
from sparseopt.core.problem.problem import Status
from sparseopt.layers.bits import parse_bits
from sparseopt.layers.compiled import Stopwatch
from sparseopt.layers.methods import chooser, find_method
from sparseopt.layers.patterns import parse_pattern
from sparseopt.layers.problem import LayerJob, LayerMethod, check_answer, check_method
from sparseopt.layers.split import solve_within_memory


@dataclass(frozen=True)
class LayerResult:
    """A pruned layer.

    Attributes:
        weight: `[out, in]` in the given dtype, or with bits in float32; pruned entries are exactly zero.
        relative_error: `||X (V - W)ᵀ||² / ||X Wᵀ||²` on the given Gram matrix.
        test_error: the same on the held-out Gram matrix, NaN without one.
        sparsity: fraction of zeros.
        steps: iterations.
        seconds: device time of the solve, without compilation.
        status: how it ended.
        dead_inputs: number of inputs that were zero on every token; their weights were pruned first.
        output_blocks: number of blocks of outputs in which the layer was solved to fit in memory; 1 if it fitted whole.
        pruned_error: with bits, the relative error of the zeros alone; NaN without.
        rounded_error: with bits, the relative error of the zeros and plain rounding.
    """

    weight: np.ndarray
    relative_error: float
    test_error: float
    sparsity: float
    steps: int
    seconds: float
    status: Status
    dead_inputs: int
    output_blocks: int = 1
    pruned_error: float = math.nan
    rounded_error: float = math.nan


def prune_layer(
    weight: Any,
    gram: Any,
    sparsity: float | None = None,
    pattern: str = "unstructured",
    method: str | LayerMethod = "maiht",
    preset: str | None = None,
    *,
    bits: str | None = None,
    penalty: Penalty | None = None,
    test_gram: Any = None,
    output_weights: Any = None,
    input_variances: Any = None,
    support: Any = None,
) -> LayerResult:
    """Prune one linear layer: minimise `||X Vᵀ - X Wᵀ||²` over V in the pattern, given `gram = XᵀX`.

    With output weights s the norm is of `(X Vᵀ - X Wᵀ) diag(sqrt(s))`; the reported errors ignore them.

    Args:
        weight: dense weight W, `[out, in]`, any float dtype; used in float32 if that is wider.
        gram: `XᵀX` of the layer's inputs over the calibration tokens, `[in, in]`; used in float32.
        sparsity: fraction of zeros in [0, 1), exact to one weight; optional with an n:m pattern.
        pattern: "unstructured" (anywhere in the layer), "per-row" (equally many in every output row), "n:m" such as
            "2:4" along the inputs of each output, "block:RxC", whole blocks of R outputs × C inputs, or "group:C",
            whole groups of C consecutive inputs.
        method: a name in `METHODS`, or your own `LayerMethod`.
        preset: settings of the method: for "maiht" "paper", the published ones, or "tuned"; None for its defaults.
        bits: the grid that the remaining weights are put on: "q8_0", "q5_0" or "q4_0" with a scale per 32 inputs and
            output as GGUF stores them, "int8" with a scale per output, or "int4:G" with a scale per G inputs and output
            ("int4": G = 128). Scales are float16. All grids are symmetric: others would move zeros. None keeps floats.
        penalty: chooses the weights that survive with its prox, instead of L0 (method "maiht", unstructured). The
            sparsity sets its field `weight`; a refit removes the shrinkage of convex penalties.
        test_gram: Gram matrix of held-out inputs, for a second error.
        output_weights: weight of the squared error at each output, `[out]`, above 0; None for equal ones.
        input_variances: variance of each input over the calibration tokens, `[in]`, for method "flap".
        support: the weights that may be non-zero, `[out, in]` bool; None for all. The pattern chooses among them, and
            if fewer are left than it asks for, all stay: a sparsity of 0 fits W on the support.

    Raises:
        ValueError: for an impossible sparsity, pattern, bits, penalty, method, shape or non-finite value, before any
            work.
        RuntimeError: if the solve became non-finite, or your own method does not keep the pattern's count.
        MemoryError: if the solve does not fit in memory, not even in small blocks of outputs, into which the pattern
            group:C cannot be split.
    """
    weight = np.asarray(weight)
    if weight.ndim != 2 or weight.size == 0:
        raise ValueError(f"weight must be a matrix [out, in], given shape {list(weight.shape)}")
    # JAX knows ml_dtypes.bfloat16 as a float, which NumPy does not.
    if not jnp.issubdtype(weight.dtype, jnp.floating):
        raise ValueError(f"weight must be of a float dtype, given {weight.dtype}; cast it first")
    _check_finite("weight", weight)
    given, weight = weight, weight.astype(np.float32) if weight.itemsize > 4 else weight
    gram = check_gram("gram", gram, weight.shape[1])
    if test_gram is not None:
        test_gram = check_gram("test_gram", test_gram, weight.shape[1])
    outputs, inputs = weight.shape
    if output_weights is not None:
        output_weights = _one_each("output_weights", output_weights, "out", outputs)
        if output_weights.min() <= 0:
            raise ValueError(f"output_weights must be above 0, the smallest given is {output_weights.min():.3g}")
    if input_variances is not None:
        input_variances = _one_each("input_variances", input_variances, "in", inputs)
        if input_variances.min() < 0:
            raise ValueError(f"input_variances must be 0 or more, the smallest given is {input_variances.min():.3g}")
    if support is not None:
        support = np.asarray(support)
        if support.shape != weight.shape or support.dtype != np.bool_:
            raise ValueError(
                f"support must be bool [out, in] = {list(weight.shape)} as the weight, given {support.dtype} "
                f"{list(support.shape)}"
            )
    allowed = parse_pattern(pattern, sparsity, (outputs, inputs))
    job = LayerJob(weight, gram, test_gram, allowed, output_weights, input_variances, support)
    solver = find_method(method, preset, penalty, pattern=pattern, bits=bits)
    if penalty is not None and not isinstance(job.pattern, TopK):
        raise ValueError(f"a penalty chooses weights anywhere in the layer, which contradicts the pattern {pattern!r}")
    first = chooser(solver)
    if bits is not None:
        parse_bits(bits).check_weight(weight)
        # Checked alone, so that the message names it.
        check_method(first, job.pattern, weight.shape, input_variances is not None, support is not None)
    check_method(solver, job.pattern, weight.shape, input_variances is not None, support is not None)
    watch = Stopwatch()
    report = solve_within_memory(job, solver)
    seconds, _ = watch.read(report)
    status, pruned = check_answer(report, first, job.pattern), np.asarray(report.weight)
    before, rounded = report.grid_energies or (None, None)
    return LayerResult(
        # In the given dtype, in which unchanged entries keep the given value.
        weight=pruned
        if before
        else np.where((pruned == weight) & (pruned != 0), given, pruned.astype(given.dtype, copy=False)),
        relative_error=float(report.relative_error),
        test_error=float(report.test_error),
        sparsity=int(report.zeros) / weight.size,
        steps=int(report.steps),
        seconds=seconds,
        status=status,
        dead_inputs=int(report.dead_inputs),
        output_blocks=report.output_blocks,
        pruned_error=float(before.ratio) if before else math.nan,
        rounded_error=float(rounded.ratio) if rounded else math.nan,
    )


def _check_finite(name: str, array: np.ndarray) -> None:
    bad = int(np.size(array) - np.count_nonzero(np.isfinite(np.asarray(array, np.float32))))
    if bad:
        raise ValueError(f"{name} has {bad} NaN or infinite entries of {array.size}; fix the input first")


def _one_each(name: str, values: Any, axis: str, count: int) -> np.ndarray:
    """A float32 vector with a finite entry for each input or output."""
    array = np.asarray(values, np.float32)
    if array.shape != (count,):
        raise ValueError(f"{name} must be [{axis}] = [{count}], given {list(array.shape)}")
    _check_finite(name, array)
    return array


def check_gram(name: str, gram: Any, inputs: int) -> jnp.ndarray:
    """A Gram as a float32 device array, after checks of shape, finiteness, symmetry and sign.

    Raises:
        ValueError: saying which check failed, with the figures.
    """
    gram = np.asarray(gram)
    if gram.shape != (inputs, inputs):
        raise ValueError(
            f"{name} must be [in, in] = [{inputs}, {inputs}] for this weight [out, in], given {list(gram.shape)}"
        )
    _check_finite(name, gram)
    diagonal = np.diagonal(gram)
    if diagonal.min() < 0:
        raise ValueError(f"{name} has a negative diagonal entry ({diagonal.min():.3g}); XᵀX never has")
    # An entry of XᵀX is a sum that rounds to about eps * sqrt(tokens) * |x_i| |x_j|; 1e-3 is far beyond that.
    norms = np.sqrt(diagonal.astype(np.float64))
    skew = np.abs(gram - gram.T) > 1e-3 * np.maximum(np.outer(norms, norms), 1e-30)
    if skew.any():
        row, column = np.argwhere(skew)[0]
        raise ValueError(
            f"{name} is not symmetric: entry ({row}, {column}) is {gram[row, column]:.6g}, its mirror "
            f"{gram[column, row]:.6g}; give XᵀX, or (A + Aᵀ) / 2"
        )
    return jnp.asarray(gram, jnp.float32)
