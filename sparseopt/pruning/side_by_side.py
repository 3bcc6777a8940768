"""Floor 6: the linears of a block, one after the other on one device, over several cut or side by side.

    cut             each device holds a share of a linear's outputs; all of them sum a dozen numbers at each iteration
    side by side    each device holds a linear of its own, all of one shape; none tells another anything

d linears of one shape take d times a d-th of one linear's time when they are cut, and the time of one side by side,
without the sums: of query and output, gate and up on two devices, and of the experts of a block on any number, none is
cut. What is left over, and so a linear that has no like, is cut unless `quicker_side_by_side` says that the other
devices had better rest. Side by side each device needs the memory for a whole linear; where there is none, it is cut.
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
from sparseopt.pruning.blocked import Solved, is_out_of_memory, solve_within_memory
from sparseopt.pruning.devices import place_side_by_side, reports_of, side_by_side_solver
from sparseopt.pruning.layer import LayerJob, LayerMethod
from sparseopt.pruning.method_cost import method_cost
from sparseopt.pruning.patterns import Pattern
from sparseopt.system import processes

# Operations of a product that a device does while one stage of a sum over the devices takes: 20 µs at 33 Tflop/s; on
# processors 1 ms at 100 Gflop/s, as long as two processes took that work beside their sums (see the page on scaling).
STAGE = {"cpu": 1e8}
ACCELERATOR_STAGE = 7e8


@dataclass(frozen=True)
class Linear:
    """A linear of a block, to be pruned.

    Attributes:
        key: of its weight.
        shape: `(out, in)`.
        pattern: which weights may survive.
        tokens: that its Gram was made of.
        starved: whether these were so few that its Gram is not looked at.
        tested: whether there is a held-out Gram.
        kind: equal for linears whose jobs differ in numbers only.
        job: makes the job and tells the seconds that took on the device; its weight lies on the host.
    """

    key: str
    shape: tuple[int, int]
    pattern: Pattern
    tokens: int
    starved: bool
    tested: bool
    kind: Hashable
    job: Callable[[], tuple[LayerJob, float]]

    @property
    def name(self) -> str:
        """For people."""
        return self.key.removesuffix(".weight")


def solve_block(linears: Sequence[Linear], method: LayerMethod, mesh: Mesh | None) -> Iterator[tuple[Linear, Solved]]:
    """Solve the linears of a block, each as soon as it is asked for, in their order.

    Args:
        linears: all of them.
        method: how.
        mesh: the devices to solve on; None for one. All processes of it ask for the same.

    Raises:
        MemoryError: naming the linear, as `solve_within_memory` does.
    """
    found = [] if mesh is None else share_out(linears, method, mesh.size, mesh.devices.flat[0].platform)
    batches = {linear.name: batch for batch in found for linear in batch}
    ready: dict[str, Solved] = {}
    for linear in linears:
        if linear.name not in batches:
            job, before = linear.job()
            yield linear, _plus(_solve_one(linear, job, method, mesh), before)
            continue
        if linear.name not in ready:
            assert mesh is not None
            ready |= _solve_batch(batches[linear.name], method, mesh)
        yield linear, ready.pop(linear.name)


def share_out(linears: Sequence[Linear], method: LayerMethod, devices: int, platform: str) -> list[list[Linear]]:
    """Batches of linears to be solved side by side, at most as many in each as devices; the others are to be cut."""
    alike: dict[Hashable, list[Linear]] = defaultdict(list)
    for linear in linears:
        alike[linear.kind].append(linear)
    batches = []
    for same in alike.values():
        for start in range(0, len(same), devices):
            batch = same[start : start + devices]
            if quicker_side_by_side(len(batch), batch[0].shape, method, devices, platform):
                batches.append(batch)
    return batches


def quicker_side_by_side(count: int, shape: tuple[int, int], method: LayerMethod, devices: int, platform: str) -> bool:
    """Whether linears take less time one a device, the other devices at rest, than all of them cut in turn.

    Args:
        count: of the linears, at most `devices`.
        shape: `(out, in)` of each.
        method: how they are solved.
        devices: how many there are.
        platform: "cpu" or that of an accelerator.
    """
    cost = method_cost(method)
    if count == devices or cost is None:
        return count == devices
    outputs, inputs = shape
    products = 2.0 * inputs**2 * outputs * cost.products + cost.updates * inputs * outputs
    inverses = 2.0 * inputs**3 * cost.inverses  # on every device, also of a linear that is cut
    stages = math.ceil(math.log2(devices))
    said = cost.sums * stages * STAGE.get(platform, ACCELERATOR_STAGE)
    return inverses + products < count * (inverses + products / devices + said)


def _plus(solved: Solved, seconds: float) -> Solved:
    return solved._replace(seconds=solved.seconds + seconds)


def _solve_one(linear: Linear, job: LayerJob, method: LayerMethod, mesh: Mesh | None) -> Solved:
    try:
        return solve_within_memory(job, method, mesh)
    except MemoryError as error:
        raise MemoryError(f"{linear.name}: {error}") from error


def _solve_batch(batch: Sequence[Linear], method: LayerMethod, mesh: Mesh) -> dict[str, Solved]:
    """All of a batch at once, or in turn where memory is too short for that."""
    jobs, before = zip(*(linear.job() for linear in batch), strict=True)
    solved: list[Solved] = []
    with contextlib.suppress(MemoryError):
        solved = solve_side_by_side(jobs, method, mesh)
    # Out here the attempt's arrays are gone.
    if not solved:
        solved = [_solve_one(linear, job, method, mesh) for linear, job in zip(batch, jobs, strict=True)]
    return {linear.name: _plus(one, spent) for linear, one, spent in zip(batch, solved, before, strict=True)}


def solve_side_by_side(jobs: Sequence[LayerJob], method: LayerMethod, mesh: Mesh) -> list[Solved]:
    """Solve layers of one shape at the same time, one on each device.

    Args:
        jobs: at most as many as devices, alike but in their numbers; weights and output weights on the host, the Grams
            on one device or whole on each of the mesh.
        method: how.
        mesh: of one axis, see `core.mesh`.

    Returns:
        The solved layers, host arrays, the same in every process; of the time that all took together each has an even
        share.

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
    # The solve itself needs no other process; what follows needs all of them.
    if processes.any_of(bool(failed)):
        raise MemoryError(f"{len(jobs)} layers do not fit side by side ({failed or 'in another process'})")
    reports = reports_of(whole(timed.value), len(jobs))
    seconds = (time.perf_counter() - start - timed.compile_seconds) / len(jobs)
    compiling = [timed.compile_seconds] + [0.0] * (len(jobs) - 1)
    return [Solved(report, seconds, spent, 1) for report, spent in zip(reports, compiling, strict=True)]
