"""Floor 6: the linears of a block, in turn on one device; over several, each cut or several side by side.

    cut             each device holds a share of a linear's outputs; all of them sum a dozen numbers at each iteration
    side by side    each device solves its own linear, all of one shape, and exchanges nothing

d linears of one shape take d times a d-th of one linear's time when they are cut, and one linear's time, without the
sums, side by side. So on two devices none of query and output, gate and up is cut, and none of a block's experts on any
number. A linear that is left over is cut, unless `quicker_side_by_side` says that the other devices should rather be
idle. Side by side each device needs the memory for a whole linear; where that is too much, the linear is cut.
"""

import contextlib
import math
import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass

import jax
from jax.sharding import Mesh

from sparseopt.core.mesh import whole
from sparseopt.pruning.blocked import is_out_of_memory, solve_within_memory
from sparseopt.pruning.compiled import Timed
from sparseopt.pruning.devices import place_side_by_side, reports_of, side_by_side_solver
from sparseopt.pruning.layer import LayerJob, LayerMethod
from sparseopt.pruning.method_cost import method_cost
from sparseopt.system import processes

# Operations of a product in the time of one stage of a sum over the devices: 20 µs at 33 Tflop/s; on processors 1 ms at
# 100 Gflop/s, as measured for two processes (see the page on scaling).
STAGE = {"cpu": 1e8}
ACCELERATOR_STAGE = 7e8


@dataclass(frozen=True)
class LayerTask:
    """A layer to be solved, whose job is made when its turn comes.

    Attributes:
        name: for people.
        shape: `(out, in)`.
        kind: equal for layers whose jobs differ in numbers only.
        job: makes the `LayerJob`, timed; its weight is on the host.
    """

    name: str
    shape: tuple[int, int]
    kind: Hashable
    job: Callable[[], Timed]


def solve_block(tasks: Sequence[LayerTask], method: LayerMethod, mesh: Mesh | None) -> Iterator[Timed]:
    """The report of each layer of a block in their order, each solved when it is asked for; all processes ask for it.

    Raises:
        MemoryError: naming the layer, as `solve_within_memory` does.
    """
    found = [] if mesh is None else share_out(tasks, method, mesh.size, mesh.devices.flat[0].platform)
    batches = {task.name: batch for batch in found for task in batch}
    ready: dict[str, Timed] = {}
    for task in tasks:
        if task.name not in batches:
            yield _solve_one(task.name, task.job(), method, mesh)
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
    """Whether some linears, at most as many as devices, take less time one a device than cut one after the other."""
    cost = method_cost(method)
    if count == devices or cost is None:
        return count == devices
    outputs, inputs = shape
    products = 2.0 * inputs**2 * outputs * cost.products + cost.updates * inputs * outputs
    inverses = 2.0 * inputs**3 * cost.inverses  # on every device, also of a linear that is cut
    stages = math.ceil(math.log2(devices))
    summing = cost.sums * stages * STAGE.get(platform, ACCELERATOR_STAGE)
    return inverses + products < count * (inverses + products / devices + summing)


def _solve_one(name: str, job: Timed, method: LayerMethod, mesh: Mesh | None) -> Timed:
    try:
        return _plus(solve_within_memory(job.value, method, mesh), job)
    except MemoryError as error:
        raise MemoryError(f"{name}: {error}") from error


def _plus(solved: Timed, job: Timed) -> Timed:
    """The solved layer with the time that making its job took."""
    return Timed(solved.value, solved.seconds + job.seconds, solved.compile_seconds + job.compile_seconds)


def _solve_batch(batch: Sequence[LayerTask], method: LayerMethod, mesh: Mesh) -> dict[str, Timed]:
    """All of a batch at once, or in turn where memory is too short for that."""
    names, jobs = [task.name for task in batch], [task.job() for task in batch]
    solved: list[Timed] = []
    with contextlib.suppress(MemoryError):
        solved = solve_side_by_side([job.value for job in jobs], method, mesh)
    # The attempt's arrays are gone here.
    if not solved:
        return {name: _solve_one(name, job, method, mesh) for name, job in zip(names, jobs, strict=True)}
    return {name: _plus(one, job) for name, one, job in zip(names, solved, jobs, strict=True)}


def solve_side_by_side(jobs: Sequence[LayerJob], method: LayerMethod, mesh: Mesh) -> list[Timed]:
    """Solve layers of one shape at the same time, one on each device of a mesh.

    The jobs, at most as many as devices, differ in numbers only: weights and output weights on the host, the Grams on
    one device or whole on each. Reports are host arrays, the same in every process, each with an even share of the time
    that all took together.

    Raises:
        MemoryError: in every process, if memory ran out in any.
    """
    start, failed = time.perf_counter(), ""
    try:
        timed = side_by_side_solver(mesh)(*place_side_by_side(jobs, mesh), method)
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        failed = str(error).partition("\n")[0]
    # The solve needs no other process; what follows needs all of them.
    if processes.any_of(bool(failed)):
        raise MemoryError(f"{len(jobs)} layers do not fit side by side ({failed or 'in another process'})")
    reports = reports_of(whole(timed.value), len(jobs))
    seconds = (time.perf_counter() - start - timed.compile_seconds) / len(jobs)
    compiling = [timed.compile_seconds] + [0.0] * (len(jobs) - 1)
    return [Timed(report, seconds, spent) for report, spent in zip(reports, compiling, strict=True)]
