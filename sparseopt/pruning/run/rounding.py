"""Rounding the layers of a finished block to grids of few bits, one after the other or side by side, as in pruning.

    minimise over V    1/2 ||X (V - W)ᵀ||²    subject to V on the grid, and zero where W is

with W the layer after pruning and training, and X its inputs in this block before rounding.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from sparseopt.layers.bits import Bits
from sparseopt.layers.methods.few_bits import FewBits
from sparseopt.layers.methods.scores import Magnitude
from sparseopt.layers.patterns import parse_pattern
from sparseopt.layers.problem import LayerJob, check_answer
from sparseopt.layers.side_by_side import LayerTask, solve_block
from sparseopt.models import Block
from sparseopt.models.base.errors import named
from sparseopt.pruning.base.activations import Stream
from sparseopt.pruning.base.grams import BlockGrams, BlockRunner
from sparseopt.pruning.base.records import GridRecord
from sparseopt.pruning.run.plan import Plan


def linears_to_round(
    plan: Plan, block: Block, place: int, keys: Mapping[str, str], same: Collection[str]
) -> dict[str, tuple[str, Bits]]:
    """The layers of a target's block to round: by name, their key in the dense model, and the grid.

    Args:
        plan: what to do.
        block: the block of the target.
        place: its index there.
        keys: keys of the dense block's tensors, by path.
        same: paths of unchanged tensors.
    """
    grids = {name: plan.form.bits.get(plan.target.weight_key(place, name)) for name in block.linears}
    paths = {name: f"{name}.weight" for name in block.linears}
    return {name: (keys[paths[name]], bits) for name, bits in grids.items() if bits and paths[name] not in same}


def round_block(
    plan: Plan,
    index: int,
    block: Block,
    linears: dict[str, tuple[str, Bits]],
    stream: Stream,
    runner: BlockRunner,
    told: Callable[[GridRecord], None],
) -> dict[str, np.ndarray]:
    """Round layers of a block to their grids.

    Args:
        plan: what to do.
        index: index of the block in the dense model.
        block: the block of the target; its parameters stay.
        linears: the layers by name, with their key in the dense model and their grid.
        stream: the stream before the block.
        runner: runs it.
        told: called with each record.

    Returns:
        The weights by path, float32.

    Raises:
        ModelError: naming the layer, if its weights are too large or too small for float16 scales.
        RuntimeError: if a solve is not finite.
        MemoryError: as `solve_block` does.
    """
    recipe, weights = plan.recipe, dict[str, np.ndarray]()
    grams = runner.grams(block, stream.calibration, recipe.weighting, None, recipe.expert_tokens)
    for name, (key, bits) in linears.items():
        weights[name] = np.asarray(block.read(f"{name}.weight"), np.float32)
        named(key, partial(bits.check_weight, weights[name]))
    keys = {name: key.removesuffix(".weight") for name, (key, _) in linears.items()}
    grids = {keys[name]: bits for name, (_, bits) in linears.items()}
    tasks = [_task(plan, block, name, linears[name][0], weights[name], grams) for name in linears]
    found = round_linears(index, tasks, grids, stream.calibration.mesh, told)
    return {f"{name}.weight": found[key] for name, key in keys.items()}


def round_linears(
    block: int,
    tasks: Sequence[LayerTask],
    grids: Mapping[str, Bits],
    mesh: Mesh | None,
    told: Callable[[GridRecord], None],
) -> dict[str, np.ndarray]:
    """Round layers to grids, one grid after the other.

    Args:
        block: index of the block, for the records.
        tasks: tasks with jobs that hold the weights, with their zeros as supports.
        grids: grids by task name.
        mesh: the devices.
        told: called with each record.

    Returns:
        The weights by task name, float32; errors are as for `round_block`.
    """
    found = dict[str, np.ndarray]()
    for bits in dict.fromkeys(grids.values()):
        own, method = [task for task in tasks if grids[task.name] == bits], FewBits(Magnitude(), bits)
        for task, solved in zip(own, solve_block(own, method, mesh), strict=True):
            report = solved.report
            check_answer(report, method.first, parse_pattern("unstructured", 0.0, task.shape))
            found[task.name] = np.asarray(report.weight)
            plain = report.grid_energies[1].ratio if report.grid_energies else math.nan
            errors = float(report.relative_error), float(plain)
            sizes, times = (report.weight.size, int(report.zeros)), (solved.seconds, solved.compile_seconds)
            told(GridRecord(block, task.name, bits.name, *sizes, *errors, *times))
    return found


def _task(plan: Plan, block: Block, name: str, key: str, weight: np.ndarray, grams: BlockGrams) -> LayerTask:
    tap, shape = block.linears[name], weight.shape
    starved = ".experts." in name and grams.tokens(tap) < max(1, plan.recipe.min_expert_tokens)
    outputs = plan.output_weights.get(key)
    # In a smaller model, and if outputs were reordered, they are not known.
    outputs = None if starved or plan.smaller or plan.recipe.get("permute") else outputs

    def gram() -> Array:
        return jnp.eye(shape[1], dtype=jnp.float32) if starved else grams[tap].gram

    return grid_task(key.removesuffix(".weight"), weight, gram, outputs)


def grid_task(name: str, weight: np.ndarray, gram: Callable[[], Array], outputs: np.ndarray | None) -> LayerTask:
    """A layer to round to a grid: its zeros stay, and no further weights become zero.

    Args:
        name: name of the layer.
        weight: `[out, in]`, float32.
        gram: returns the Gram of its inputs when needed.
        outputs: weights of squared errors at its outputs; None for equal weights.
    """
    shape = (weight.shape[0], weight.shape[1])

    def job() -> LayerJob:
        return LayerJob(weight, gram(), None, parse_pattern("unstructured", 0.0, shape), outputs, None, weight != 0)

    return LayerTask(name, shape, (shape, outputs is None), job)
