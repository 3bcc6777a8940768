"""The layers of one part, a block of a folder or a part of a module: solved, rounded and recorded.

    weights, Grams -[propagate]-> targets -[method]-> pruned layers        `solve_part`
    weights, Grams -[few bits]-> the nearest weights on a grid             `round_part`

Both minimise `||X (V - W)ᵀ||²`; rounding keeps the zeros of W, a layer after pruning and training.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from sparseopt.core.base.dense import product, spd_inverse
from sparseopt.core.base.mesh import over, put, whole
from sparseopt.core.problem.problem import Status
from sparseopt.layers.bits import Bits
from sparseopt.layers.compiled import Compiled
from sparseopt.layers.methods.few_bits import FewBits
from sparseopt.layers.methods.scores import Magnitude
from sparseopt.layers.patterns import parse_pattern
from sparseopt.layers.problem import (
    LayerJob,
    LayerMethod,
    LayerReport,
    check_answer,
    reads_variances,
    scaled_gram,
)
from sparseopt.layers.side_by_side import LayerTask, Solved, solve_block
from sparseopt.layers.split import Cut
from sparseopt.models import ModelError
from sparseopt.models.base.errors import named
from sparseopt.pruning.base.grams import Grams, is_expert
from sparseopt.pruning.base.records import GridRecord, LayerRecord

# The fraction of a layer's weights that the stored dtype may round to zero: any model has a few that small, and they
# are the first to be pruned.
MOST_LOST = 1e-3
# Relative to each input's own square; a smaller ridge follows the drift of single tokens.
PROPAGATION_RIDGE = 0.1


class PruningError(RuntimeError):
    """Raised if a run has to stop; the message names the layer and what to do."""


@dataclass(frozen=True)
class PartLayer:
    """A layer of a part.

    Attributes:
        name: as in its record.
        weight: `[out, in]` before pruning, or before rounding.
        grams: returns the Grams of its inputs when its turn comes.
        tokens: number of tokens in them.
        starved: whether these are too few to rank the weights: then all inputs and outputs count the same.
        dtype: the dtype to store, to which the weight is converted when its turn comes; None for its own.
        pattern: which weights may survive; not used for rounding.
        test_gram: returns the Gram of held-out inputs; None without any.
        outputs: weights of squared errors at its outputs, `[out]`; None for equal weights.
        support: returns which entries of the weight may be non-zero, or None for all.
    """

    name: str
    weight: np.ndarray
    grams: Callable[[], Grams]
    tokens: int
    starved: bool
    dtype: np.dtype | None = None
    pattern: Any = None
    test_gram: Callable[[], Array] | None = None
    outputs: np.ndarray | None = None
    support: Callable[[np.ndarray], np.ndarray | None] = lambda weight: None

    def task(self, method: LayerMethod, propagate: float, mesh: Mesh | None) -> LayerTask:
        outputs, tested = None if self.starved else self.outputs, self.test_gram is not None
        dtype = self.weight.dtype if self.dtype is None else self.dtype

        def job() -> LayerJob:
            target, grams, inputs = _stored_as(self.name, self.weight, dtype), self.grams(), self.weight.shape[1]
            if not self.starved and propagate and grams.drift is not None:
                target = propagated(target, grams, propagate, mesh)
            gram = jnp.eye(inputs, dtype=jnp.float32) if self.starved else grams.gram
            variances = None
            if reads_variances(method):
                variances = np.ones(inputs, np.float32) if self.starved else whole(grams.variances)
            test_gram = None if self.test_gram is None else self.test_gram()
            return LayerJob(target, gram, test_gram, self.pattern, outputs, variances, self.support(self.weight))

        shape, pattern = (self.weight.shape[0], self.weight.shape[1]), jax.tree.structure(self.pattern)
        return LayerTask(self.name, shape, (shape, dtype, tested, outputs is None, pattern), job)


def is_starved(name: str, tokens: int, least: int) -> bool:
    """Whether a layer belongs to an expert that too few tokens reach."""
    return is_expert(name) and tokens < max(1, least)


def _solved(
    layers: Sequence[PartLayer], method: LayerMethod, propagate: float, mesh: Mesh | None
) -> Iterator[tuple[PartLayer, Solved]]:
    tasks = [layer.task(method, propagate, mesh) for layer in layers]
    try:
        yield from zip(layers, solve_block(tasks, method, mesh), strict=True)
    except MemoryError as error:
        raise PruningError(str(error)) from error


def _checked(layer: PartLayer, report: LayerReport, method: LayerMethod) -> Status:
    try:
        return check_answer(report, method, layer.pattern)
    except RuntimeError as error:
        raise PruningError(f"{layer.name}: {error}") from error


def solve_part(
    layers: Sequence[PartLayer], method: LayerMethod, propagate: float, index: int, mesh: Mesh | None
) -> Iterator[tuple[LayerRecord, np.ndarray]]:
    """Prune the layers of a part, which has this index in the records; yields each record and new weight in turn.

    If Grams have a drift, `propagate` is the fraction of the upstream error that each layer corrects.

    Raises:
        PruningError: naming the layer, if its answer is not finite or breaks the pattern, or it does not fit in memory.
        ModelError: naming the layer, if the dtype cannot hold its weights.
    """
    for layer, solved in _solved(layers, method, propagate, mesh):
        report, shape = solved.report, layer.weight.shape
        status = _checked(layer, report, method)
        heldout = math.inf if layer.test_gram is None else float(report.test_error)
        record = LayerRecord(
            block=index,
            layer=layer.name,
            shape=(shape[0], shape[1]),
            size=layer.weight.size,
            zeros=int(report.zeros),
            relative_error=float(report.relative_error),
            heldout_error=heldout if math.isfinite(heldout) else None,
            steps=int(report.steps),
            status=status.name,
            seconds=solved.seconds,
            compile_seconds=solved.compile_seconds,
            dead_inputs=int(report.dead_inputs),
            tokens=layer.tokens,
            starved=layer.starved,
            output_blocks=report.output_blocks,
            given_zeros=layer.weight.size - int(report.supported),
        )
        yield record, np.asarray(report.weight)


def round_part(
    layers: Sequence[PartLayer], grids: Mapping[str, Bits], index: int, mesh: Mesh | None
) -> Iterator[tuple[GridRecord, np.ndarray]]:
    """Round layers of a part to their grids, one grid after the other; yields records and new weights, float32.

    Raises:
        PruningError, ModelError: as in `solve_part`; also if weights are too large or too small for float16 scales.
    """
    every = []
    for layer in layers:
        weight = layer.weight.astype(np.float32)
        named(f"{layer.name}.weight", partial(grids[layer.name].check_weight, weight))
        pattern = parse_pattern("unstructured", 0.0, (weight.shape[0], weight.shape[1]))
        rounded = replace(layer, weight=weight, dtype=None, pattern=pattern, test_gram=None)
        every.append(replace(rounded, support=lambda weight: weight != 0))
    for bits in dict.fromkeys(grids.values()):
        method = FewBits(Magnitude(), bits)
        for layer, solved in _solved([each for each in every if grids[each.name] == bits], method, 0.0, mesh):
            report = solved.report
            _checked(layer, report, method.first)
            plain = report.grid_energies[1].ratio if report.grid_energies else math.nan
            sizes, errors = (layer.weight.size, int(report.zeros)), (float(report.relative_error), float(plain))
            times = (solved.seconds, solved.compile_seconds)
            yield GridRecord(index, layer.name, bits.name, *sizes, *errors, *times), np.asarray(report.weight)


def _stored_as(name: str, dense: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """A layer's weight in the dtype to store; a ModelError if the dtype cannot hold it."""
    with np.errstate(over="ignore"):
        weight = dense.astype(dtype, copy=False)
    name = f"{name}.weight"
    if weight is dense:
        return weight
    if not np.isfinite(weight.astype(np.float32)).all():
        most = np.max(np.abs(dense.astype(np.float32)))
        raise ModelError(f"{name} has values up to {most:g}, which {dtype} cannot hold: choose dtype bfloat16")
    lost = dense[(weight == 0) & (dense != 0)]
    if len(lost) > MOST_LOST * dense.size:
        least = np.min(np.abs(lost.astype(np.float32)))
        raise ModelError(
            f"{name} has {len(lost):,} values as small as {least:g}, which {dtype} makes 0: choose dtype bfloat16"
        )
    return weight


def drifted_target(
    weight: Float[Array, "out in"],
    gram: Float[Array, "in in"],
    drift: Float[Array, "in in"],
    strength: float | Array,
    ridge: float | Array,
) -> Float[Array, "out in"]:
    """Propagated error: the target that corrects the loss of earlier layers, float32.

        minimise over W'    1/2 ||X~ W'ᵀ - X Wᵀ||²  +  ridge/2 ||(W' - W) e||²                              [out, in]

    with X~ the inputs in the pruned model, X the inputs in the dense model, e the norms of X~. The minimiser is
    `W' = W - ((Gram + ridge e²)⁻¹ drift Wᵀ)ᵀ`, with Gram `X~ᵀX~` and drift `X~ᵀ(X~ - X)`; strength is the fraction of
    the way from W to it.

    Source: the normal equations of Frantar and Alistarh, "SparseGPT", 2023, with a second input, as in Li, Yin, Lee,
    Xiao, Panda, "GPTAQ: efficient finetuning-free quantization for asymmetric calibration", 2025.
    """
    hessian, _, inverse = scaled_gram(gram)
    shifted = spd_inverse(hessian + ridge * jnp.eye(len(hessian), dtype=jnp.float32))
    moved = product(inverse[:, None] * drift, weight.astype(jnp.float32).T)
    return weight - strength * (inverse[:, None] * product(shifted, moved)).T


propagated_target = Compiled(drifted_target)


def propagated(weight: np.ndarray, grams: Grams, share: float, mesh: Mesh | None) -> np.ndarray:
    """The `drifted_target` of a weight, in its dtype, from Grams with a drift; devices of a mesh share the rows."""
    target: Any = weight
    if mesh is not None:
        # Each output has its own target: rows of zeros after them change nothing.
        target = put(Cut(mesh, len(weight)).padded(weight), over(mesh))
    found = propagated_target(target, grams.gram, grams.drift, np.float32(share), np.float32(PROPAGATION_RIDGE))
    return whole(found)[: len(weight)].astype(weight.dtype)
