"""Floor 6: layers over several devices: one that is cut by outputs, or one for each device.

    weight [out, in]      cut by outputs: device i of d holds about out / d of them
    Gram   [in, in]       whole on each device

Outputs are coupled by the pattern's count, the objective and the stopping rule alone. So products with the Gram stay on
their device, and devices exchange counts, sums and the sample that starts a selection. The pruned weight stays cut
until the solve is done, and is then gathered once.

Where the number of devices does not divide the outputs, the last devices hold fewer. An array that enters or leaves a
program must be cut evenly, so it is padded with zeros there; inside they are gone, and counts are those of the layer.

Layers of one shape, one for each device, are concatenated to `[d out, in]` and cut between layers. Each device then
solves its layer as if it were alone, at its own number of steps, in one program for all of them.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from sparseopt.core.mesh import AXIS, over, put, whole
from sparseopt.core.patterns import BlockTopK
from sparseopt.core.types import pytree, static
from sparseopt.pruning.compiled import Compiled, Timed, laid_on
from sparseopt.pruning.layer import LayerJob, LayerMethod, LayerReport, solve_layer
from sparseopt.pruning.patterns import Pattern
from sparseopt.system import processes


@pytree
class Cut:
    """How a layer is cut: over which mesh, and how many of its padded rows are outputs; structure, not arrays."""

    mesh: Mesh = static()
    outputs: int = static()

    def kept(self, rows: Any) -> Any:
        """The outputs among padded rows, each device's on that device."""
        return None if rows is None else jax.lax.with_sharding_constraint(rows[: self.outputs], over(self.mesh))

    def padded(self, rows: Any) -> Any:
        """The rows and zeros after them, up to a multiple of the devices."""
        zeros = [(0, -self.outputs % self.mesh.size)] + [(0, 0)] * (rows.ndim - 1)
        if isinstance(rows, np.ndarray):
            return np.pad(rows, zeros)
        return jax.lax.with_sharding_constraint(jnp.pad(rows, zeros), over(self.mesh))


def _solve_cut(weight: Any, job: LayerJob, cut: Cut, method: LayerMethod) -> LayerReport:
    """`solve_layer` of a job whose weight is given separately: the answer takes over its buffer."""
    job = dataclasses.replace(job, weight=cut.kept(weight), output_weights=cut.kept(job.output_weights))
    report = solve_layer(job, method)
    return dataclasses.replace(report, weight=cut.padded(report.weight))


# As `layer.layer_solver`, one for the process.
cut_solver = Compiled(_solve_cut, donate_argnums=(0,))


def solve_over(job: LayerJob, method: LayerMethod, mesh: Mesh) -> Timed:
    """Solve a layer over a mesh; the report's arrays are on the host, the same in every process.

    The job's weight and output weights are on the host, the Grams on one device or over the mesh.
    """
    weight, weights = np.asarray(job.weight), job.output_weights
    cut = Cut(mesh, len(weight))
    if weights is not None:
        weights = put(cut.padded(np.asarray(weights, np.float32)), over(mesh))
    gram, test_gram = laid_on((job.gram, job.test_gram), mesh)
    rest = LayerJob(None, gram, test_gram, job.pattern, weights)
    timed = cut_solver(put(cut.padded(weight), over(mesh)), rest, cut, method)
    report = whole(timed.value)
    return timed._replace(value=dataclasses.replace(report, weight=report.weight[: cut.outputs]))


@functools.cache
def side_by_side_solver(mesh: Mesh) -> Compiled:
    """`solve_layer` of a layer for each of the first devices; arrays are concatenated, scalars in a row."""

    def solve(weight: Any, job: LayerJob, count: Any, method: LayerMethod) -> LayerReport:
        pattern = jax.tree.map(lambda row: row[0], job.pattern)
        own = dataclasses.replace(job, weight=weight, pattern=pattern)
        nothing = jax.eval_shape(solve_layer, own, method)
        report = jax.lax.cond(
            jax.lax.axis_index(AXIS) < count,
            lambda: solve_layer(own, method),
            lambda: jax.tree.map(lambda one: jnp.zeros(one.shape, one.dtype), nothing),
        )
        rows = jax.tree.map(lambda scalar: scalar[None], dataclasses.replace(report, weight=None))
        return dataclasses.replace(rows, weight=report.weight)

    each, everywhere = PartitionSpec(AXIS), PartitionSpec()
    specs = (each, each, everywhere, everywhere)
    # Devices exchange nothing, so there is nothing to check.
    return Compiled(jax.shard_map(solve, mesh=mesh, in_specs=specs, out_specs=each, check_vma=False), (0,))


def place_side_by_side(jobs: Sequence[LayerJob], mesh: Mesh) -> tuple[Any, LayerJob, np.int32]:
    """Weights, jobs and their number for `side_by_side_solver`: job i on device i; devices after the last are idle."""
    turns = [*jobs, *[jobs[0]] * (mesh.size - len(jobs))]
    patterns = [jax.tree.map(lambda leaf: np.asarray(leaf)[None], job.pattern) for job in turns]
    rest = [dataclasses.replace(job, weight=None, pattern=row) for job, row in zip(turns, patterns, strict=True)]
    laid = jax.tree.map(lambda *parts: _concatenated(parts, mesh), *rest)
    return _concatenated([job.weight for job in turns], mesh), laid, np.int32(len(jobs))


def _concatenated(parts: Sequence[Any], mesh: Mesh) -> jax.Array:
    """Arrays of one shape as one, part i on device i; a part that is there already is not copied."""
    mine = [
        _on_device(part, device)
        for part, device in zip(parts, mesh.devices.flat, strict=True)
        if device.process_index == jax.process_index()
    ]
    shape = (mesh.size * mine[0].shape[0], *mine[0].shape[1:])
    return jax.make_array_from_single_device_arrays(shape, over(mesh), mine)


def _on_device(part: Any, device: Any) -> jax.Array:
    if isinstance(part, jax.Array) and part.is_fully_replicated:
        for shard in part.addressable_shards:
            if shard.device == device:
                return shard.data
    return jax.device_put(np.asarray(part), device)


def reports_of(found: LayerReport, count: int) -> list[LayerReport]:
    """The first reports among those of `side_by_side_solver`, whose arrays are on the host."""
    outputs = len(found.weight) // len(found.steps)
    scalars = dataclasses.replace(found, weight=None)
    return [
        dataclasses.replace(
            jax.tree.map(lambda row, i=i: row[i], scalars), weight=found.weight[i * outputs : (i + 1) * outputs]
        )
        for i in range(count)
    ]


def check_cut(pattern: Pattern, shape: tuple[int, int], mesh: Mesh | None) -> None:
    """Refuse to cut a weight `(out, in)` over the mesh inside the blocks of its pattern.

    Raises:
        ValueError: naming the sizes.
    """
    if mesh is None or not isinstance(pattern, BlockTopK):
        return
    outputs, high = shape[0], pattern.shape[1]
    each = -(-outputs // mesh.size)
    if each % high:
        fitting = [d for d in range(1, mesh.size) if -(-outputs // d) % high == 0]
        raise ValueError(
            f"{mesh.size} devices hold {each} outputs each of the layer [out={outputs}, in={shape[1]}], which splits "
            f"the pattern's blocks of {high} outputs; {', '.join(map(str, fitting))} devices do not"
        )


def agreed(values: Any) -> Any:
    """Process 0's tree of host arrays in every process; values are sent with 32 bits."""
    if processes.count() == 1:
        return values
    from jax.experimental import multihost_utils

    received = multihost_utils.broadcast_one_to_all(values)
    return jax.tree.map(lambda own, new: np.asarray(new, own.dtype), values, received)
