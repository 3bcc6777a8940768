"""Floor 6: one layer over several devices.

    weight [out, in]      cut by outputs: device i of d holds about out / d of them
    Gram   [in, in]       whole on each device

Outputs meet in the pattern's count, in the objective and in the stopping rule alone. So products with the Gram stay on
their device, and what devices tell each other are counts, sums and the sample that starts a selection: see `exchange`.
The pruned weight stays cut until the solve is done, and is then brought together once.

Where the number of devices does not divide the outputs, the last devices hold fewer. An array that enters or leaves a
program must be cut evenly, so zeros stand behind it there; inside they are gone, and every count is that of the layer.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sparseopt import processes
from sparseopt.core.mesh import over, put, whole
from sparseopt.core.patterns import BlockTopK
from sparseopt.core.types import pytree, static
from sparseopt.pruning.compiled import Compiled, Timed, laid_on
from sparseopt.pruning.layer import LayerJob, LayerMethod, LayerReport, solve_layer
from sparseopt.pruning.patterns import Pattern


@pytree
class Line:
    """The mesh that a layer is cut over, and how many of its rows are outputs; both are structure, not arrays."""

    mesh: Mesh = static()
    outputs: int = static()

    def cut(self, rows: Any) -> Any:
        """Of padded rows the outputs, each device's on that device."""
        return None if rows is None else jax.lax.with_sharding_constraint(rows[: self.outputs], over(self.mesh))

    def padded(self, rows: Any) -> Any:
        """Zeros behind the rows, up to a multiple of the devices."""
        behind = [(0, -self.outputs % self.mesh.size)] + [(0, 0)] * (rows.ndim - 1)
        if isinstance(rows, np.ndarray):
            return np.pad(rows, behind)
        return jax.lax.with_sharding_constraint(jnp.pad(rows, behind), over(self.mesh))


def _solve_cut(weight: Any, job: LayerJob, line: Line, method: LayerMethod) -> LayerReport:
    """`solve_layer` of a job whose weight is given apart: its buffer is taken over by the answer."""
    job = dataclasses.replace(job, weight=line.cut(weight), output_weights=line.cut(job.output_weights))
    report = solve_layer(job, method)
    return dataclasses.replace(report, weight=line.padded(report.weight))


# As `layer.layer_solver`, one for the process.
cut_solver = Compiled(_solve_cut, donate_argnums=(0,))


def place(job: LayerJob, mesh: Mesh) -> tuple[Any, LayerJob, Line]:
    """The arguments of `cut_solver`: the weight cut over the mesh, the job without it, how it lies."""
    weight = np.asarray(job.weight)
    line = Line(mesh, len(weight))
    outputs = None
    if job.output_weights is not None:
        outputs = put(line.padded(np.asarray(job.output_weights, np.float32)), over(mesh))
    gram, test_gram = laid_on((job.gram, job.test_gram), mesh)
    return put(line.padded(weight), over(mesh)), LayerJob(None, gram, test_gram, job.pattern, outputs), line


def solve_over(job: LayerJob, method: LayerMethod, mesh: Mesh) -> Timed:
    """Solve a layer over a mesh; the report's weight is a host array, the same in every process.

    Args:
        job: weight and output weights on the host; the Grams on one device or over the mesh.
        method: how.
        mesh: of one axis, see `core.mesh`.
    """
    weight, rest, line = place(job, mesh)
    timed = cut_solver(weight, rest, line, method)
    report = dataclasses.replace(timed.value, weight=whole(timed.value.weight)[: line.outputs])
    return timed._replace(value=report)


def check_cut(pattern: Pattern, shape: tuple[int, int], mesh: Mesh | None) -> None:
    """Whether a weight `(out, in)` can be cut over the mesh.

    Raises:
        ValueError: for a pattern of blocks that a cut would part, naming the sizes.
    """
    if mesh is None or not isinstance(pattern, BlockTopK):
        return
    outputs, high = shape[0], pattern.shape[1]
    each = -(-outputs // mesh.size)
    if each % high:
        fitting = [d for d in range(1, mesh.size) if -(-outputs // d) % high == 0]
        raise ValueError(
            f"{mesh.size} devices hold {each} outputs each of the layer [out={outputs}, in={shape[1]}], which parts "
            f"the pattern's blocks of {high} outputs; {', '.join(map(str, fitting))} devices do not"
        )


def agreed(values: Any) -> Any:
    """A tree of host arrays as process 0 has it, in every process; what travels are values of 32 bits."""
    if processes.count() == 1:
        return values
    from jax.experimental import multihost_utils

    received = multihost_utils.broadcast_one_to_all(values)
    return jax.tree.map(lambda own, new: np.asarray(new, own.dtype), values, received)
