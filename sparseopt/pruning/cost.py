"""Floor 6: what a run will take of time, memory and disk, and where its activations are kept so that it fits a budget.

    estimate with activations in memory <= budget      they stay there
    estimate with activations on disk <= budget        one file per stream, in the first output folder's file system
    neither                                            an error that says what takes the memory

Without a budget, the memory that the machine has available decides, and nothing is refused. Estimates are made from
shapes alone; no tensor is read.

Time is the number of floating-point operations, two per multiply-add, over a measured rate of matrix products. Memory
is what a phase of the run holds at once; the peak is that of the largest phase. The constants were measured on a CPU
with two cores. There, times are mostly within a half of what a run reports, and memory is mostly a fifth above it.
"""

import math
import shutil
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from sparseopt.core.dense import product
from sparseopt.models import PrunableModel, StreamedModel, TensorInfo
from sparseopt.models.attention import QUERY_CHUNK
from sparseopt.pruning.activations import windows_per_batch
from sparseopt.pruning.evaluation import LOGIT_ROWS
from sparseopt.pruning.layer import LayerMethod
from sparseopt.pruning.methods import MethodCost, method_cost
from sparseopt.pruning.plan import Plan
from sparseopt.pruning.recipe import Recipe
from sparseopt.pruning.reports import Footprint
from sparseopt.pruning.survey import LEVELS, TOKENS
from sparseopt.system.machine import available_memory_bytes, format_bytes

# What makes each phase smaller.
ADVICE = {
    "survey": "output_weights='uniform' and an allocation without curves do without the survey",
    "training": "reconstruct=0 trains no blocks",
    "layer solves": "method 'wanda' or 'magnitude' needs the least for a solve",
    "Grams": "heldout_samples=0 and propagate=0 gather one set of Grams only",
}
# Where the activations between blocks are kept.
Activations = Literal["memory", "disk"]
PLACES: tuple[Activations, ...] = get_args(Activations)

FLOAT32 = 4

# Products of a layer's shapes reach this fraction of the rate of large square ones; passes with their softmax, less.
SOLVE_EFFICIENCY, PASS_EFFICIENCY = 0.85, 0.8
# Choosing the largest entries of a weight takes as long as this many operations per entry.
SELECTION = 600
# An inverse of n x n by `spd_inverse`, in operations over n³.
INVERSE = 6
# Measuring a stored weight's errors: two products with the calibration Gram and two with the held-out one.
MEASURING = 4
# Seconds to start, and a byte to read, check, convert and write.
START, SECONDS_A_BYTE = 3.0, 2e-9
# Seconds to compile a pass over a kind of block, and what trains or differentiates one, on a machine of this rate in
# GFLOP/s; a slower one takes longer.
COMPILE_PASS, COMPILE_GRADIENT = 1.5, 4.0
COMPILE_GFLOPS = 180.0

# Resident bytes of the interpreter with its libraries, and what compiled programs and the allocator add to that.
LIBRARIES, PROGRAMS = 300 * 2**20, 450 * 2**20
# The allocator keeps this fraction of the arrays besides, of those freed before; large ones go back to the system.
FREED = 0.05


@dataclass(frozen=True)
class Cost:
    """The estimate of one pruning run."""

    phases: Mapping[str, Mapping[str, int]]  # bytes by phase and by what they hold, device and host together
    flops: Mapping[str, float] | None  # by kind of work, at the rate of large products; None for a method of your own
    compile_seconds: float  # on a machine of `COMPILE_GFLOPS` or more
    file_seconds: float  # to start, read and write
    scratch_bytes: int  # of activations on disk

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=lambda phase: sum(self.phases[phase].values()))

    @property
    def peak_memory_bytes(self) -> int:
        return sum(self.phases[self.peak_phase].values())

    def seconds(self, gflops: float) -> dict[str, float] | None:
        """Seconds by kind of work at a rate of matrix products in 10⁹ operations a second; None without `flops`."""
        if self.flops is None:
            return None
        return {kind: flops / (gflops * 1e9) for kind, flops in self.flops.items()} | {
            "compiling": self.compile_seconds * max(1.0, COMPILE_GFLOPS / gflops),
            "reading and writing": self.file_seconds,
        }


@dataclass(frozen=True)
class BlockSizes:
    """One kind of block; `share` is the fraction of the tokens that reach a linear, below 1 for experts."""

    count: int
    parameters: int
    stored: int  # bytes, in the source's dtypes
    linears: tuple[tuple[int, int, float], ...]  # `(out, in, share)` of each
    taps: tuple[tuple[int, float], ...]  # `(in, share)` of each distinct input of the linears

    @property
    def gram_bytes(self) -> int:
        return FLOAT32 * sum(width**2 for width, _ in self.taps)

    @property
    def gram_flops(self) -> float:
        """Adding one token to the Grams."""
        return sum(2 * width**2 * share for width, share in self.taps)

    @property
    def widths(self) -> float:
        """Numbers per token in the inputs and outputs of all linears."""
        return sum(width * share for width, share in self.taps) + sum(o * share for o, _, share in self.linears)


def block_sizes(model: StreamedModel) -> list[BlockSizes]:
    """The kinds of blocks, in the order of the first of each; headers are enough."""
    experts = model.config.experts
    routed = experts.chosen / experts.count if experts else 1.0
    found = []
    for kind, count in Counter(model.config.kinds).items():
        index = model.config.kinds.index(kind)
        infos = [model.source.tensors[key] for key in model.block_keys(index).values()]
        linears, taps = [], {}
        for name, tap in model.block_linears(index).items():
            outputs, inputs = model.weight_shape(model.weight_key(index, name))
            share = routed if ".experts." in name else 1.0
            linears.append((outputs, inputs, share))
            taps[tap] = (inputs, share)
        parameters = sum(math.prod(info.shape) for info in infos)
        stored = sum(map(_nbytes, infos))
        found.append(BlockSizes(count, parameters, stored, tuple(linears), tuple(taps.values())))
    return found


def prune_cost(
    model: StreamedModel,
    recipe: Recipe,
    method: LayerMethod,
    activations: Activations = "memory",
    plans: int = 1,
) -> Cost:
    """The estimate for a model, of which the headers are enough, and a checked recipe with its method.

    Each of the `plans` that share a pass has its own stream of activations.
    """
    blocks, work = block_sizes(model), method_cost(method)
    compiling = COMPILE_PASS * len(blocks) * (2 if recipe.heldout_samples else 1)
    compiling += COMPILE_GRADIENT * len(blocks) * (recipe.needs_sensitivities + (recipe.reconstruction is not None))
    if work is not None:
        compiling += work.compile_seconds * len({linear[:2] for block in blocks for linear in block.linears})
    stored = sum(map(_nbytes, model.source.tensors.values()))

    # Each plan has one stream before a block, all share one after it, and the dense model has both.
    stream = FLOAT32 * (recipe.samples + recipe.heldout_samples) * recipe.seqlen * model.config.hidden_size
    streams = (plans + 1 + (2 if recipe.needs_dense_stream else 0)) * stream
    # The backward pass keeps the streams of some blocks, see `survey`; its gradients stay in memory in any case.
    gradient = FLOAT32 * _survey_tokens(recipe) * model.config.hidden_size if recipe.needs_sensitivities else 0
    survey_streams = stream + (2 * math.isqrt(model.config.num_layers) + 3) * gradient
    on_disk = activations == "disk"
    kept = (0, 0, gradient) if on_disk else (stream, streams, survey_streams)
    return Cost(
        phases=_phases(model, recipe, blocks, work, *kept),
        flops=None if work is None else _flops(model, recipe, blocks, work),
        compile_seconds=compiling,
        # Every tensor is looked through once, read once more, and written.
        file_seconds=START + 3 * stored * SECONDS_A_BYTE,
        scratch_bytes=max(streams, survey_streams) if on_disk else 0,
    )


def output_bytes(model: PrunableModel, recipe: Recipe) -> dict[str, int]:
    """Bytes of each tensor of the output, dense."""
    found = {}
    for key in model.exported_keys():
        info = model.source.tensors[key]
        floating = jnp.issubdtype(info.dtype, jnp.floating)
        dtype = jnp.dtype(recipe.dtype) if recipe.dtype and floating else info.dtype
        found[key] = math.prod(info.shape) * dtype.itemsize
    return found


def measure_gflops(seconds: float = 0.7) -> float:
    """The rate of large float32 matrix products on JAX's default device, in 10⁹ operations a second."""
    size = 1024 if jax.default_backend() == "cpu" else 4096
    matrix = jnp.full((size, size), 1 / size, jnp.float32)
    multiply = jax.jit(product)
    jax.block_until_ready(multiply(matrix, matrix))
    done, start = 0, time.perf_counter()
    while (spent := time.perf_counter() - start) < seconds or not done:
        jax.block_until_ready(multiply(matrix, matrix))
        done += 1
    return 2 * size**3 * done / spent / 1e9


def _nbytes(info: TensorInfo) -> int:
    return math.prod(info.shape) * info.dtype.itemsize


def _survey_tokens(recipe: Recipe) -> int:
    """Tokens on which the dense model's sensitivities are measured."""
    return min(recipe.samples, max(1, TOKENS // recipe.seqlen)) * recipe.seqlen


def _flops(model: StreamedModel, recipe: Recipe, blocks: list[BlockSizes], work: MethodCost) -> dict[str, float]:
    config, settings = model.config, recipe.reconstruction
    calibration, heldout = recipe.samples * recipe.seqlen, recipe.heldout_samples * recipe.seqlen
    surveyed, tokens, trained = _survey_tokens(recipe), calibration + heldout, 0
    if settings is not None:
        # Forward and backward count as three passes in each epoch; then every epoch is judged.
        trained = 3 * settings.epochs * calibration + (settings.epochs + 1) * (heldout or calibration) + 2 * calibration
    solves = passes = training = 0.0
    survey = 6.0 * surveyed * config.vocab_size * config.hidden_size if recipe.needs_sensitivities else 0.0
    for block in blocks:
        # Of one token: the linears, and the scores and mixed values of the positions up to the end of its chunk.
        forward = sum(2 * o * i * share for o, i, share in block.linears)
        forward += 2 * (recipe.seqlen + QUERY_CHUNK) * config.num_heads * config.head_dim
        inverses = sum(INVERSE * i**3 for _, i, _ in block.linears)
        solves += block.count * work.inverses * inverses
        for outputs, inputs, _ in block.linears:
            solves += block.count * 2 * (work.products + MEASURING) * inputs**2 * outputs
            solves += block.count * (work.selections * SELECTION + work.updates) * inputs * outputs
        # Before and after pruning; the dense model's; and the Grams of its inputs.
        passes += block.count * tokens * ((3 if recipe.needs_dense_stream else 2) * forward + block.gram_flops)
        if recipe.propagated_share:
            passes += block.count * calibration * (forward + block.gram_flops)
        if recipe.allocation == "owl":
            survey += 2 * block.count * calibration * forward
        if recipe.needs_sensitivities:
            # Twice forward, and backward, which counts as three.
            survey += 5 * block.count * surveyed * forward
        if recipe.allocation == "curves":
            # Each level has about six products and three selections, on some of the rows.
            some = [(min(o, 256), i) for o, i, _ in block.linears]
            level = sum(12 * i**2 * o + 3 * SELECTION * i * o for o, i in some)
            survey += block.count * (surveyed * block.gram_flops + inverses + len(LEVELS) * level)
        training += block.count * trained * forward
    return {
        "layer solves": solves / SOLVE_EFFICIENCY,
        "forward passes and Grams": passes / PASS_EFFICIENCY,
        "survey": survey / PASS_EFFICIENCY,
        "training": training / PASS_EFFICIENCY,
    }


def _phases(
    model: StreamedModel,
    recipe: Recipe,
    blocks: list[BlockSizes],
    work: MethodCost | None,
    start: int,
    streams: int,
    survey_streams: int,
) -> dict[str, dict[str, int]]:
    """Bytes by phase and part; the last three are the activations kept in memory at the start, then, and in the survey.

    A method of your own (`work` is None) is taken for the one of ours with the largest workspace.
    """
    config = model.config
    batch = windows_per_batch(recipe.samples, recipe.seqlen) * recipe.seqlen
    # A batch before a block and after it, of the dense model too.
    current = 4 * FLOAT32 * batch * config.hidden_size
    # Of one chunk of queries, before and after the softmax; a gradient keeps those of all chunks.
    scores = 3 * FLOAT32 * batch * min(recipe.seqlen, QUERY_CHUNK) * config.num_heads
    pairs = 2 * FLOAT32 * recipe.seqlen * config.num_heads
    block = max(blocks, key=lambda b: b.parameters)
    weights = FLOAT32 * block.parameters
    grams = max(b.gram_bytes for b in blocks)
    sets = 1 + (recipe.heldout_samples > 0) + (recipe.propagated_share > 0)
    square, wide = (work.square, work.wide) if work else (7.5, 10.0)
    spaces = [(square, wide), (5, 3)] if recipe.propagated_share else [(square, wide)]
    workspace = max(s * i * i + w * i * o for s, w in spaces for b in blocks for o, i, _ in b.linears)
    widest = max(_nbytes(model.source.tensors[key]) for key in model.outer_keys())
    rows = min(config.vocab_size, (recipe.samples + recipe.heldout_samples) * recipe.seqlen)
    running = {"libraries": LIBRARIES, "compiled programs": PROGRAMS}
    phases: dict[str, dict[str, int]] = {
        "start": {
            "libraries": LIBRARIES,
            "embedding and head": max(2 * widest, 2 * FLOAT32 * rows * config.hidden_size),
            "activations": start + current,
        },
        "Grams": running
        | {
            "block": 2 * weights,
            "Grams": (sets + 1) * grams,
            "activations": streams + current + int(max(scores, FLOAT32 * batch * block.widths)),
        },
        "layer solves": running
        | {
            "block": 2 * weights + 2 * block.stored,
            "Grams": sets * grams,
            "activations": streams + current,
            "workspace": int(FLOAT32 * workspace),
        },
    }
    if recipe.needs_sensitivities:
        # Logits of a slice of rows, with their softmax and gradient.
        logits = 3 * FLOAT32 * LOGIT_ROWS * config.vocab_size
        phases["survey"] = running | {
            "block": 3 * weights,
            "embedding and head": FLOAT32 * config.vocab_size * config.hidden_size + logits,
            "activations": survey_streams + current + batch * pairs + int(3 * FLOAT32 * batch * block.widths),
        }
    if recipe.reconstruction is not None:
        window = min(recipe.reconstruction.windows, recipe.samples) * recipe.seqlen
        seen = window * pairs + scores + int(3 * FLOAT32 * window * block.widths)
        phases["training"] = running | {
            # Dense and pruned, gradient, two moments, the best state, updates.
            "block": 8 * weights + 2 * block.stored,
            "Grams": sets * grams,
            "activations": streams + current + seen,
        }
    for parts in phases.values():
        arrays = sum(nbytes for part, nbytes in parts.items() if part not in running)
        parts["freed, not returned"] = int(FREED * arrays)
    return phases


class BudgetError(ValueError):
    """A run that memory or disk cannot hold; the text says what takes the room and what would take less."""


def choose_footprint(
    model: PrunableModel,
    plans: Sequence[Plan],
    calibration: np.ndarray,
    heldout: np.ndarray,
    budget: int | None = None,
    *,
    spread: bool = False,
) -> Footprint:
    """Choose where the activations of the plans of one pass are kept.

    Args:
        model: opened.
        plans: their folders need not exist yet.
        calibration: windows of token ids, `[samples, seqlen]`.
        heldout: windows of held-out tokens, `[0, seqlen]` without any.
        budget: bytes of memory, device and host together.
        spread: whether the run works on several devices, in whose memories activations stay; nothing is estimated.

    Raises:
        BudgetError: if the run does not fit the budget, or output and activations do not fit on the disk.
    """
    sizes = {"samples": len(calibration), "seqlen": calibration.shape[1], "heldout_samples": len(heldout)}
    recipes = [(replace(plan.recipe, **sizes), plan.method) for plan in plans]
    where: Activations = "memory"
    parts: Mapping[str, int] = {}
    memory, phase, scratch = None, "", 0
    if isinstance(model, StreamedModel) and not spread:
        where, cost = _choose(model, recipes, budget)
        memory, phase, scratch = cost.peak_memory_bytes, cost.peak_phase, cost.scratch_bytes
        parts = cost.phases[phase]
    elif budget and not spread:
        # What torch holds is not known; activations do not add to it.
        where = "disk"
        scratch = (len(plans) + 3) * FLOAT32 * (calibration.size + heldout.size) * model.config.hidden_size
    output = [sum(output_bytes(model, recipe).values()) for recipe, _ in recipes]
    _check_disks([plan.folder for plan in plans], output, scratch)
    return Footprint(where, memory, dict(parts), phase, budget, sum(output), scratch)


def _choose(
    model: StreamedModel, recipes: Sequence[tuple[Recipe, LayerMethod]], budget: int | None
) -> tuple[Activations, Cost]:
    limit = available_memory_bytes() if budget is None else budget
    for where in PLACES:
        costs = [prune_cost(model, *recipe, activations=where, plans=len(recipes)) for recipe in recipes]
        largest = max(costs, key=lambda cost: cost.peak_memory_bytes)
        if largest.peak_memory_bytes <= limit:
            return where, largest
    if budget is not None:
        raise BudgetError(_too_little(largest, budget))
    # The estimate may be wrong, and activations on disk are at least not swapped.
    return where, largest


def _too_little(cost: Cost, budget: int) -> str:
    parts = sorted(cost.phases[cost.peak_phase].items(), key=lambda part: -part[1])
    advice = ADVICE.get(cost.peak_phase)
    return (
        f"a budget of {format_bytes(budget)} is too little: with activations on disk the run is estimated to take "
        f"{format_bytes(cost.peak_memory_bytes)} in phase {cost.peak_phase} "
        f"({', '.join(f'{name} {format_bytes(nbytes)}' for name, nbytes in parts if nbytes)}); give at least that"
        + (f", or less to do: {advice}" if advice else "")
    )


def _check_disks(folders: Sequence[Path], output: Sequence[int], scratch: int) -> None:
    """Raise a BudgetError without room for what is written, less what an earlier run has written already."""
    needed: dict[int, int] = {}
    places: dict[int, Path] = {}
    for folder, nbytes in zip(folders, output, strict=True):
        place = next(parent for parent in (folder, *folder.parents) if parent.is_dir())
        device = place.stat().st_dev
        written = sum(file.stat().st_size for file in folder.glob("*.safetensors")) if folder.is_dir() else 0
        needed[device] = needed.get(device, 0) + max(0, nbytes - written)
        places.setdefault(device, place)
    first = next(iter(places))
    needed[first] += scratch
    for device, nbytes in needed.items():
        free = shutil.disk_usage(places[device]).free
        if nbytes > free:
            activations = f", {format_bytes(scratch)} of it activations" if scratch and device == first else ""
            raise BudgetError(
                f"the disk of {places[device]} has {format_bytes(free)} free, the run needs {format_bytes(nbytes)}"
                f"{activations}; make room or choose another output folder"
            )
