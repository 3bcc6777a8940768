"""The linear layers of a block, in turn on one device; over several, each cut or several side by side.

    cut             each device holds a part of a layer's outputs; all of them sum a dozen numbers at each iteration
    side by side    each device solves its own layer, all of one shape, and exchanges nothing

d layers of one shape take d times a d-th of one layer's time if they are cut, and one layer's time, without the sums,
side by side. So on two devices query and output run side by side, and gate and up; experts do on any number. A layer
that is left over is cut, unless `quicker_side_by_side` says that the other devices should rather be idle. Side by side
each device needs the memory for a whole layer; if that is too much, the layer is cut.
"""

import contextlib
import functools
import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from sparseopt.core.base.mesh import AXIS, over, whole
from sparseopt.layers.compiled import Compiled, Stopwatch
from sparseopt.layers.methods import method_cost
from sparseopt.layers.problem import LayerJob, LayerMethod, LayerReport, solve_layer
from sparseopt.layers.split import is_out_of_memory, solve_within_memory
from sparseopt.system import processes

# Operations of a product in the time of one stage of a sum over the devices: 20 µs at 33 Tflop/s; on processors 1 ms at
# 100 Gflop/s, as measured for two processes (see the page on scaling).
STAGE = {"cpu": 1e8}
ACCELERATOR_STAGE = 7e8


@dataclass(frozen=True)
class LayerTask:
    """A layer to be solved, whose job is made when its turn comes."""

    name: str
    shape: tuple[int, int]
    kind: Hashable  # equal for layers whose jobs differ in numbers only
    job: Callable[[], LayerJob]


class Solved(NamedTuple):
    """The report of a layer, with the seconds of its job and its solve, without compilation and of compilation."""

    report: LayerReport
    seconds: float
    compile_seconds: float


def solve_block(tasks: Sequence[LayerTask], method: LayerMethod, mesh: Mesh | None) -> Iterator[Solved]:
    """Each layer of a block in their order, solved when it is asked for; all processes ask for it.

    Layers that are solved side by side share their time evenly.

    Raises:
        MemoryError: naming the layer, as `solve_within_memory` does.
    """
    found = [] if mesh is None else share_out(tasks, method, mesh.size, mesh.devices.flat[0].platform)
    batches = {task.name: batch for batch in found for task in batch}
    ready: dict[str, Solved] = {}
    for task in tasks:
        if task.name not in batches:
            watch = Stopwatch()
            report = _solve_one(task.name, task.job(), method, mesh)
            yield Solved(report, *watch.read(report))
            continue
        if task.name not in ready:
            assert mesh is not None
            ready |= _solve_batch(batches[task.name], method, mesh)
        yield ready.pop(task.name)


def share_out(tasks: Sequence[LayerTask], method: LayerMethod, devices: int, platform: str) -> list[list[LayerTask]]:
    """Batches of layers to be solved side by side, at most as many in each as devices; the others are to be cut."""
    alike: dict[Hashable, list[LayerTask]] = defaultdict(list)
    for task in tasks:
        alike[task.kind].append(task)
    batches = []
    for same in alike.values():
        for start in range(0, len(same), devices):
            batch = same[start : start + devices]
            if quicker_side_by_side(len(batch), batch[0].shape, method, devices, platform):
                batches.append(batch)
    return batches


def quicker_side_by_side(count: int, shape: tuple[int, int], method: LayerMethod, devices: int, platform: str) -> bool:
    """Whether some layers, at most as many as devices, take less time one per device than cut one after the other."""
    if count == devices:
        return True
    cost = method_cost(method)
    outputs, inputs = shape
    products = 2.0 * inputs**2 * outputs * cost.products + cost.updates * inputs * outputs
    inverses = 2.0 * inputs**3 * cost.inverses  # on every device, even for a layer that is cut
    stages = math.ceil(math.log2(devices))
    summing = cost.sums * stages * STAGE.get(platform, ACCELERATOR_STAGE)
    # Never for your own method, whose operations are NaN.
    return inverses + products < count * (inverses + products / devices + summing)


def _solve_one(name: str, job: LayerJob, method: LayerMethod, mesh: Mesh | None) -> LayerReport:
    try:
        return solve_within_memory(job, method, mesh)
    except MemoryError as error:
        raise MemoryError(f"{name}: {error}") from error


def _solve_batch(batch: Sequence[LayerTask], method: LayerMethod, mesh: Mesh) -> dict[str, Solved]:
    """All of a batch at once, or in turn if memory is too short for that."""
    watch, names, jobs = Stopwatch(), [task.name for task in batch], [task.job() for task in batch]
    reports: list[LayerReport] = []
    with contextlib.suppress(MemoryError):
        reports = solve_side_by_side(jobs, method, mesh)
    # The attempt's arrays are gone here.
    if not reports:
        reports = [_solve_one(name, job, method, mesh) for name, job in zip(names, jobs, strict=True)]
    seconds, compiling = watch.read(reports)
    share, spent = seconds / len(batch), [compiling] + [0.0] * (len(batch) - 1)
    return {name: Solved(found, share, own) for name, found, own in zip(names, reports, spent, strict=True)}


def solve_side_by_side(jobs: Sequence[LayerJob], method: LayerMethod, mesh: Mesh) -> list[LayerReport]:
    """Solve layers of one shape at the same time, one on each device of a mesh, each at its own number of steps.

    The jobs, at most as many as devices, differ in numbers only: weights, output weights and supports on the host, the
    Grams on one device or whole on each. Reports are host arrays, the same in every process.

    Raises:
        MemoryError: in every process, if memory ran out in any.
    """
    failed = ""
    try:
        found = jax.block_until_ready(side_by_side_solver(mesh)(*place_side_by_side(jobs, mesh), method))
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        failed = str(error).partition("\n")[0]
    # The solve needs no other process; the next step needs all of them.
    if processes.any_of(bool(failed)):
        raise MemoryError(f"{len(jobs)} layers do not fit side by side ({failed or 'in another process'})")
    return _reports_of(whole(found), len(jobs))


@functools.cache
def side_by_side_solver(mesh: Mesh) -> Compiled:
    """`solve_layer` of a layer for each of the first devices; arrays are concatenated, scalars in a row."""

    def solve(weight: Any, job: LayerJob, count: Any, method: LayerMethod) -> LayerReport:
        pattern = jax.tree.map(lambda row: row[0], job.pattern)
        own = replace(job, weight=weight, pattern=pattern)
        nothing = jax.eval_shape(solve_layer, own, method)
        report = jax.lax.cond(
            jax.lax.axis_index(AXIS) < count,
            lambda: solve_layer(own, method),
            lambda: jax.tree.map(lambda one: jnp.zeros(one.shape, one.dtype), nothing),
        )
        rows = jax.tree.map(lambda scalar: scalar[None], replace(report, weight=None))
        return replace(rows, weight=report.weight)

    each, everywhere = PartitionSpec(AXIS), PartitionSpec()
    specs = (each, each, everywhere, everywhere)
    # Devices exchange nothing, so there is nothing to check.
    return Compiled(jax.shard_map(solve, mesh=mesh, in_specs=specs, out_specs=each, check_vma=False), (0,))


def place_side_by_side(jobs: Sequence[LayerJob], mesh: Mesh) -> tuple[Any, LayerJob, np.int32]:
    """Weights, jobs and their number for `side_by_side_solver`: job i on device i; devices after the last are idle."""
    turns = [*jobs, *[jobs[0]] * (mesh.size - len(jobs))]
    patterns = [jax.tree.map(lambda leaf: np.asarray(leaf)[None], job.pattern) for job in turns]
    rest = [replace(job, weight=None, pattern=row) for job, row in zip(turns, patterns, strict=True)]
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


def _reports_of(found: LayerReport, count: int) -> list[LayerReport]:
    rows = replace(found, weight=found.weight.reshape(len(found.steps), -1, found.weight.shape[1]))
    return [jax.tree.map(lambda row, i=i: row[i], rows) for i in range(count)]


def agreed(values: Any) -> Any:
    """Process 0's tree of host arrays in every process; values are sent with 32 bits."""
    if processes.count() == 1:
        return values
    from jax.experimental import multihost_utils

    received = multihost_utils.broadcast_one_to_all(values)
    return jax.tree.map(lambda own, new: np.asarray(new, own.dtype), values, received)
