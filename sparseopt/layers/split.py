"""Solve one layer: whole, in blocks of its outputs if memory is short, or cut over several devices.

    minimise over V    1/2 ||X Vᵀ - X Wᵀ||² = sum over outputs i of 1/2 ||X (v_i - w_i)||²,   V in the pattern

Outputs are coupled by the pattern alone. Per-row and n:m patterns have a count for every output, so a block of outputs
is its own problem. A count over the whole layer is first divided among the blocks: each gets as many as it has among
the layer's largest Wanda scores, `|W_ij| ||X_j||`, and the total stays exact. Whole groups of inputs are chosen for all
outputs together: such a layer is not split. If JAX knows the device's memory, the method's workspace says how many
blocks are tried first; otherwise the whole layer is tried, and split when memory runs out.

Over several devices a layer or block is cut by outputs over all of them, and its Gram is whole on each. Products
with the Gram stay on their device; devices exchange counts, sums and the sample that starts a selection. Several
processes do not split: memory may run out in one of them while the others wait for it.
"""

import dataclasses
import itertools
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sparseopt.core.base.mesh import over, put, whole
from sparseopt.core.base.types import pytree, static
from sparseopt.core.penalties.patterns import BlockTopK, GroupTopK, TopK
from sparseopt.core.problem.problem import Status
from sparseopt.layers.compiled import Compiled, laid_on
from sparseopt.layers.methods import Workspace, chooser, method_cost
from sparseopt.layers.methods.scores import Magnitude, Wanda
from sparseopt.layers.patterns import outputs_together
from sparseopt.layers.problem import (
    LayerJob,
    LayerMethod,
    LayerReport,
    layer_solver,
    ranking_scale,
    relative_scale,
    solve_layer,
)
from sparseopt.system import processes
from sparseopt.system.machine import device_memory_left

# With fewer outputs than this fraction of inputs, the hessian `[in, in]` decides the memory: smaller blocks save none.
LEAST_SHARE = 1 / 32
# What XLA says, in lower case; the last is a matrix product on the CPU without a workspace.
OUT_OF_MEMORY = ("resource_exhausted", "out of memory", "ynnpack operation failed")
# The status of a layer whose blocks ended differently: the first of these that any of them has.
WORST_FIRST = (Status.NONFINITE, Status.MAX_STEPS, Status.PRECISION, Status.STATIONARY, Status.CONVERGED)


def solve_within_memory(job: LayerJob, method: LayerMethod, mesh: Mesh | None = None) -> LayerReport:
    """Solve a layer whole, or in 2, 4, 8, ... blocks of its outputs if memory is too short.

    Over a mesh the job's weight is on the host.

    Raises:
        MemoryError: if the smallest blocks do not fit either, with their sizes; if the whole layer does not fit and is
            not split, as in several processes and for the pattern group:C.
    """
    outputs, inputs = job.weight.shape
    parts, unit, grouped = 1, outputs_together(job.pattern), isinstance(job.pattern, GroupTopK)
    if processes.count() == 1 and not grouped:
        share = (-(-outputs // (1 if mesh is None else mesh.size)), inputs)
        parts = fewest_blocks(share, method_cost(method).workspace, device_memory_left(), unit)
    while True:
        try:
            return _solve_parts(job, method, parts, mesh)
        except (MemoryError, jax.errors.JaxRuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            said = str(error).partition("\n")[0]
        # The attempt's arrays are gone here: they live as long as the error's traceback.
        if processes.count() > 1:
            raise MemoryError(
                f"the solve of a layer [out={outputs}, in={inputs}] does not fit in the memory of process "
                f"{jax.process_index()} ({said}); several processes do not split a layer: use more devices, or method "
                "'wanda'"
            )
        if grouped:
            raise MemoryError(
                f"the solve of a layer [out={outputs}, in={inputs}] does not fit in memory ({said}); its groups of "
                "inputs are chosen for all outputs together, so it is not split; use a device with more memory, or "
                "method 'wanda'"
            )
        tried, parts = parts, 2 * parts
        if not _splits((outputs, inputs), parts, unit):
            raise MemoryError(
                f"the solve of a layer [out={outputs}, in={inputs}] does not fit in memory, not even in blocks of "
                f"{-(-outputs // tried)} outputs, below which its Gram of {4 * inputs**2:,} bytes decides ({said}); "
                "use a device with more memory, or method 'wanda'"
            )


def fewest_blocks(shape: tuple[int, int], workspace: Workspace, room: int | None, unit: int = 1) -> int:
    """The fewest blocks of outputs, a power of two, of which each is estimated to fit in `room` bytes.

    As many as there may be, if none fits; 1 if room is not known. `unit` outputs stay together.
    """
    outputs, inputs = shape
    parts = 1
    if room is not None:
        while workspace.nbytes(-(-outputs // parts), inputs) > room and _splits(shape, 2 * parts, unit):
            parts *= 2
    return parts


def _splits(shape: tuple[int, int], parts: int, unit: int) -> bool:
    outputs, inputs = shape
    return parts <= outputs // unit and outputs / parts >= inputs * LEAST_SHARE


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on the host or on the device."""
    return isinstance(error, MemoryError) or any(words in str(error).lower() for words in OUT_OF_MEMORY)


def _solve_parts(job: LayerJob, method: LayerMethod, parts: int, mesh: Mesh | None) -> LayerReport:
    reports = []
    for each in split_job(job, method, parts):
        report = layer_solver(each, method) if mesh is None else solve_over(each, method, mesh)
        # Moved off the device at once if more follow; waited for, because memory may run out until then.
        reports.append(jax.block_until_ready(report) if parts == 1 else jax.device_get(report))
    return join_reports(reports)


def split_job(job: LayerJob, method: LayerMethod, parts: int) -> list[LayerJob]:
    """Jobs for consecutive blocks of outputs, all of one size if the number of outputs allows it, else of two.

    Magnitude and Wanda rank weights in their own way; their blocks get the counts of that ranking.
    """
    if parts == 1:
        return [job]
    outputs, unit, pattern = len(job.weight), outputs_together(job.pattern), job.pattern
    edges = [rows[0] * unit for rows in np.array_split(np.arange(outputs // unit), parts)] + [outputs]
    spans = [slice(start, stop) for start, stop in itertools.pairwise(edges)]
    patterns = [pattern] * parts
    if isinstance(pattern, TopK | BlockTopK):
        kept = kept_by_row(job, int(pattern.k), chooser(method))
        counts = [int(kept[span.start // unit : span.stop // unit].sum()) for span in spans]
        patterns = [dataclasses.replace(pattern, k=count) for count in counts]
    return [
        dataclasses.replace(job.by_output(operator.itemgetter(span)), pattern=own)
        for span, own in zip(spans, patterns, strict=True)
    ]


def join_reports(reports: Sequence[LayerReport]) -> LayerReport:
    """The report of a layer from the reports of its blocks of outputs, in order; errors are of the whole layer."""
    if len(reports) == 1:
        return reports[0]
    # Most scalars are sums; the others follow.
    scalars = [dataclasses.replace(report, weight=None) for report in reports]
    added = jax.tree.map(lambda *parts: sum(np.asarray(part).item() for part in parts), *scalars)
    found = {int(report.status) for report in reports}
    return dataclasses.replace(
        added,
        weight=np.concatenate([report.weight for report in reports]),
        fits=all(bool(report.fits) for report in reports),
        dead_inputs=reports[0].dead_inputs,
        steps=max(int(report.steps) for report in reports),
        status=next(status for status in WORST_FIRST if status in found),
        output_blocks=len(reports),
    )


def kept_by_row(job: LayerJob, k: int, method: LayerMethod) -> np.ndarray:
    """How many of the layer's k every output gets, `[out]`; of k blocks every row of blocks, `[out / R]`."""
    scores, support = _scores(job, method), job.support
    if not (isinstance(method, Wanda) and isinstance(job.pattern, TopK)):
        return largest_by_row(scores, k)
    # As Wanda does: as many of k in every row, and one more in the rows whose next score is largest.
    each, left = divmod(k, len(scores))
    kept = np.full(len(scores), each)
    if left:
        following = np.partition(scores, -each - 1, axis=1)[:, -each - 1]
        kept[np.argsort(-following, kind="stable")[:left]] += 1
    if support is None:
        return kept
    kept = np.minimum(kept, np.sum(support, axis=1))
    for row, own in zip(scores, kept, strict=True):
        row[np.argsort(-row, kind="stable")[:own]] = 0
    # What outputs with little support leave goes to the best others.
    return kept + largest_by_row(scores, int(min(k, np.sum(support)) - kept.sum()))


def _scores(job: LayerJob, method: LayerMethod) -> np.ndarray:
    """The score of every weight, `[out, in]`, or of every block, `[out / R, in / C]`: 0 or more, float32."""
    scores = np.array(job.weight, np.float32)
    if not isinstance(method, Magnitude):
        scores *= np.asarray(ranking_scale(jnp.sqrt(jnp.diagonal(job.gram))), np.float32)
        if job.output_weights is not None:
            scores *= np.asarray(relative_scale(jnp.asarray(job.output_weights, jnp.float32)))[:, None]
    np.abs(scores, out=scores)
    if job.support is not None:
        # A zero in the support ranks above all that is off it.
        np.maximum(scores, np.finfo(np.float32).tiny, out=scores)
        scores[~np.asarray(job.support)] = 0
    if isinstance(job.pattern, BlockTopK):
        wide, high = job.pattern.shape
        return np.sum(scores.reshape(-1, high, scores.shape[1] // wide, wide) ** 2, axis=(1, 3))
    return scores


def largest_by_row(scores: np.ndarray, k: int) -> np.ndarray:
    """How many of the k largest scores of all rows are in each row; equal scores at the limit are shared evenly."""
    if not k:
        return np.zeros(len(scores), int)
    limit = np.partition(scores, scores.size - k, axis=None)[scores.size - k]
    above, tied = np.count_nonzero(scores > limit, axis=1), np.count_nonzero(scores == limit, axis=1)
    running = np.cumsum(tied)
    return above + np.diff(running * (k - above.sum()) // running[-1], prepend=0)


@pytree
class Cut:
    """How a layer is cut: over which mesh, and how many of its padded rows are outputs; structure, not arrays.

    An array that enters or leaves a program must be cut evenly, so it is padded with zeros there; inside they are gone,
    and counts are the layer's.
    """

    mesh: Mesh = static()
    outputs: int = static()

    def kept(self, rows: Any) -> Any:
        return jax.lax.with_sharding_constraint(rows[: self.outputs], over(self.mesh))

    def padded(self, rows: Any) -> Any:
        zeros = [(0, -self.outputs % self.mesh.size)] + [(0, 0)] * (rows.ndim - 1)
        if isinstance(rows, np.ndarray):
            return np.pad(rows, zeros)
        return jax.lax.with_sharding_constraint(jnp.pad(rows, zeros), over(self.mesh))


def _solve_cut(weight: Any, job: LayerJob, cut: Cut, method: LayerMethod) -> LayerReport:
    """`solve_layer` of a job whose weight is given separately: the answer takes over its buffer."""
    report = solve_layer(dataclasses.replace(job, weight=weight).by_output(cut.kept), method)
    return dataclasses.replace(report, weight=cut.padded(report.weight))


# As `problem.layer_solver`, one for the process.
cut_solver = Compiled(_solve_cut, donate_argnums=(0,))


def solve_over(job: LayerJob, method: LayerMethod, mesh: Mesh) -> LayerReport:
    """Solve a layer over a mesh; the report's arrays are on the host, the same in every process.

    The job's weight, output weights and support are on the host, the Grams on one device or over the mesh.
    """
    cut = Cut(mesh, len(job.weight))
    gram, test_gram, variances = laid_on((job.gram, job.test_gram, job.input_variances), mesh)
    job = job.by_output(lambda rows: put(cut.padded(np.asarray(rows)), over(mesh)))
    rest = dataclasses.replace(job, weight=None, gram=gram, test_gram=test_gram, input_variances=variances)
    report = whole(cut_solver(job.weight, rest, cut, method))
    return dataclasses.replace(report, weight=report.weight[: cut.outputs])
