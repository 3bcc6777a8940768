"""Floor 6: what a prune will take, estimated from shapes alone: time by kind of work, and memory, see `memory_cost`.

Work is counted in floating-point operations, two a multiply-add, and divided by a measured rate of matrix products. The
constants below are measured: on a CPU with two cores predictions are mostly within a half of what a run reports.
"""

import math
import time
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from sparseopt.core.dense import product
from sparseopt.models import StreamedModel
from sparseopt.models.attention import QUERY_CHUNK
from sparseopt.pruning.layer import LayerMethod
from sparseopt.pruning.memory_cost import (
    Activations,
    BlockSizes,
    Phase,
    block_sizes,
    memory_phases,
    scratch_bytes,
    streams_at_once,
    survey_tokens,
)
from sparseopt.pruning.method_cost import MethodCost, method_cost
from sparseopt.pruning.recipe import Recipe
from sparseopt.pruning.survey import LEVELS

# Products of a layer's shapes reach this share of the rate of large square ones; passes with their softmax a bit less.
SOLVE_EFFICIENCY, PASS_EFFICIENCY = 0.85, 0.8
# Operations for an entry of a weight that cost as much time as choosing the largest of all entries once does.
SELECTION = 600
# An inverse of n x n by `spd_inverse`, in operations over n³.
INVERSE = 6
# Measuring a stored weight's errors: two products on the calibration Gram and two on the held-out one.
MEASURING = 4
# Seconds to start, and a byte to read, check, convert and write.
START, SECONDS_A_BYTE = 3.0, 2e-9
# Seconds compiling a pass over a kind of block, and what trains or differentiates one, on a machine of this rate in
# GFLOP/s; a slower or busier one takes longer.
COMPILE_PASS, COMPILE_GRADIENT = 1.5, 4.0
COMPILE_GFLOPS = 180.0


@dataclass(frozen=True)
class Cost:
    """The estimate for one prune.

    Attributes:
        phases: memory, device and host together.
        solve_flops: operations of all layer solves; None for a method of your own.
        pass_flops: of the forward passes and Grams.
        survey_flops: of what is measured on the dense model before.
        training_flops: of the reconstruction of blocks.
        compile_seconds: compiling, on a machine of `COMPILE_GFLOPS` or more.
        file_seconds: starting, reading and writing.
        scratch_bytes: of activations, where they lie on disk.
    """

    phases: tuple[Phase, ...]
    solve_flops: float | None
    pass_flops: float
    survey_flops: float
    training_flops: float
    compile_seconds: float
    file_seconds: float
    scratch_bytes: int

    @property
    def peak(self) -> Phase:
        """The largest phase."""
        return max(self.phases, key=lambda phase: phase.nbytes)

    def seconds(self, gflops: float) -> dict[str, float] | None:
        """Seconds by kind of work at a rate of matrix products in 10⁹ operations a second; None without a solve's."""
        if self.solve_flops is None:
            return None
        rate = gflops * 1e9
        return {
            "layer solves": self.solve_flops / (rate * SOLVE_EFFICIENCY),
            "forward passes and Grams": self.pass_flops / (rate * PASS_EFFICIENCY),
            "survey": self.survey_flops / (rate * PASS_EFFICIENCY),
            "training": self.training_flops / (rate * PASS_EFFICIENCY),
            "compiling": self.compile_seconds * max(1.0, COMPILE_GFLOPS / gflops),
            "reading and writing": self.file_seconds,
        }


def prune_cost(
    model: StreamedModel,
    recipe: Recipe,
    method: LayerMethod,
    activations: Activations = "memory",
    plans: int = 1,
) -> Cost:
    """The estimate for a model and a checked recipe; no tensor is read.

    Args:
        model: opened.
        recipe: gives samples, sequence length and what surrounds the method.
        method: the recipe's, as `recipe.check()` gives it.
        activations: where those between blocks lie.
        plans: recipes that share the pass; each has a stream of its own.
    """
    blocks, cost = block_sizes(model), method_cost(method)
    shapes = {linear[:2] for block in blocks for linear in block.linears}
    with_survey = recipe.output_weighting() == "gradient" or recipe.allocation == "curves"
    trains = recipe.reconstruction is not None
    compiling = COMPILE_PASS * len(blocks) * (2 if recipe.heldout_samples else 1)
    compiling += COMPILE_GRADIENT * len(blocks) * (with_survey + trains)
    compiling += (cost.compile_seconds if cost else 0) * len(shapes)
    stored = sum(math.prod(info.shape) * info.dtype.itemsize for info in model.source.tensors.values())
    on_disk = activations == "disk"
    return Cost(
        phases=memory_phases(
            model, recipe, blocks, cost, with_survey, 0 if on_disk else streams_at_once(recipe, plans)
        ),
        solve_flops=None if cost is None else sum(block.count * _solve_flops(block, cost) for block in blocks),
        pass_flops=_pass_flops(model, recipe, blocks),
        survey_flops=_survey_flops(model, recipe, blocks, with_survey),
        training_flops=_training_flops(model, recipe, blocks),
        compile_seconds=compiling,
        # Every tensor is looked through once, read once more, and written.
        file_seconds=START + 3 * stored * SECONDS_A_BYTE,
        scratch_bytes=scratch_bytes(model, recipe, plans, with_survey) if on_disk else 0,
    )


def measure_gflops(budget: float = 0.7) -> float:
    """The rate of large float32 matrix products on JAX's default device, in 10⁹ operations a second.

    Args:
        budget: seconds of measuring, besides compiling one small program.
    """
    size = 1024 if jax.default_backend() == "cpu" else 4096
    matrix = jnp.full((size, size), 1 / size, jnp.float32)
    multiply = jax.jit(product)
    jax.block_until_ready(multiply(matrix, matrix))
    done, start = 0, time.perf_counter()
    while (spent := time.perf_counter() - start) < budget or not done:
        jax.block_until_ready(multiply(matrix, matrix))
        done += 1
    return 2 * size**3 * done / spent / 1e9


def _solve_flops(block: BlockSizes, cost: MethodCost) -> float:
    """Of all solves of one block."""
    return sum(
        2 * (cost.products + MEASURING) * inputs**2 * outputs
        + cost.inverses * INVERSE * inputs**3
        + (cost.selections * SELECTION + cost.updates) * inputs * outputs
        for outputs, inputs, _ in block.linears
    )


def _forward_flops(model: StreamedModel, block: BlockSizes, tokens: int, length: int) -> float:
    """Of one pass through one block."""
    linears = sum(2 * outputs * inputs * share for outputs, inputs, share in block.linears)
    # Scores and mixed values of the positions up to the end of each query's chunk.
    pairs = 2 * (length + QUERY_CHUNK)
    return tokens * (linears + pairs * model.config.num_heads * model.config.head_dim)


def _pass_flops(model: StreamedModel, recipe: Recipe, blocks: list[BlockSizes]) -> float:
    """Through every block twice, for its Grams and behind it, and the dense stream beside it."""
    tokens = (recipe.samples + recipe.heldout_samples) * recipe.seqlen
    calibration = recipe.samples * recipe.seqlen
    total = 0.0
    for block in blocks:
        forward = _forward_flops(model, block, tokens, recipe.seqlen)
        gram = sum(2 * width**2 * share for width, share in block.taps)
        each = 2 * forward + tokens * gram
        if recipe.needs_dense_stream:
            each += forward
        if recipe.propagated_share:
            each += _forward_flops(model, block, calibration, recipe.seqlen) + calibration * gram
        total += block.count * each
    return total


def _survey_flops(model: StreamedModel, recipe: Recipe, blocks: list[BlockSizes], with_survey: bool) -> float:
    """One pass forward, one forward again and three in work backward; curves take about 60 products on some rows."""
    if recipe.allocation == "owl":
        tokens = recipe.samples * recipe.seqlen
        return sum(2 * b.count * _forward_flops(model, b, tokens, recipe.seqlen) for b in blocks)
    if not with_survey:
        return 0.0
    tokens = survey_tokens(recipe)
    vocabulary = 6 * tokens * model.config.vocab_size * model.config.hidden_size
    total = vocabulary + sum(5 * b.count * _forward_flops(model, b, tokens, recipe.seqlen) for b in blocks)
    if recipe.allocation == "curves":
        for block in blocks:
            gram = sum(2 * width**2 * share for width, share in block.taps) * tokens
            rows = sum(2 * inputs**2 * min(outputs, 256) for outputs, inputs, _ in block.linears)
            inverses = sum(INVERSE * inputs**3 for _, inputs, _ in block.linears)
            # A level has about six products, and the selections of three steps.
            chosen = sum(3 * SELECTION * inputs * min(outputs, 256) for outputs, inputs, _ in block.linears)
            total += block.count * (gram + inverses + len(LEVELS) * (6 * rows + chosen))
    return total


def _training_flops(model: StreamedModel, recipe: Recipe, blocks: list[BlockSizes]) -> float:
    """Forward and backward, three passes in work, an epoch; and judging on the held-out or the same windows."""
    settings = recipe.reconstruction
    if settings is None:
        return 0.0
    judged = recipe.heldout_samples or recipe.samples
    passes = 3 * settings.epochs * recipe.samples + (settings.epochs + 1) * judged + 2 * recipe.samples
    return sum(b.count * _forward_flops(model, b, passes * recipe.seqlen, recipe.seqlen) for b in blocks)
