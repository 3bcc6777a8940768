"""Floor 6: what a prune will take, estimated from shapes alone: memory by phase, time by kind of work.

Work is counted in floating-point operations, two a multiply-add, and divided by a measured rate of matrix products.
Memory is the sum of what a phase holds at once, and the peak is that of the largest phase. The constants below are
measured: on a CPU with two cores predictions are mostly within a half of what a run reports. They are estimates.
"""

import math
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from sparseopt.core.dense import product
from sparseopt.models import StreamedModel
from sparseopt.models.attention import QUERY_CHUNK
from sparseopt.pruning.calibration import BATCH_TOKENS
from sparseopt.pruning.layer import LayerMethod
from sparseopt.pruning.method_cost import MethodCost, method_cost
from sparseopt.pruning.recipe import Recipe
from sparseopt.pruning.survey import LEVELS, TOKENS

FLOAT32 = 4

# Resident bytes of the interpreter with its libraries, and what compiled programs and the allocator add to that.
LIBRARIES, PROGRAMS = 300 * 2**20, 450 * 2**20
# Share of the arrays that the allocator keeps besides, of those freed before.
FREED = 0.2
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
class Phase:
    """What lies in memory at once.

    Attributes:
        name: of the phase.
        parts: bytes by what they hold.
    """

    name: str
    parts: Mapping[str, int]

    @property
    def nbytes(self) -> int:
        """All parts."""
        return sum(self.parts.values())


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
    """

    phases: tuple[Phase, ...]
    solve_flops: float | None
    pass_flops: float
    survey_flops: float
    training_flops: float
    compile_seconds: float
    file_seconds: float

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


@dataclass(frozen=True)
class BlockSizes:
    """One kind of block.

    Attributes:
        count: blocks of this kind.
        parameters: of one.
        stored: bytes of one, in the source's dtypes.
        linears: `(out, in, share)` of each; the share of the tokens that reach it, below 1 for experts.
        taps: `(in, share)` of each distinct input of the linears.
    """

    count: int
    parameters: int
    stored: int
    linears: tuple[tuple[int, int, float], ...]
    taps: tuple[tuple[int, float], ...]

    @property
    def gram_bytes(self) -> int:
        """One set of Grams."""
        return FLOAT32 * sum(width**2 for width, _ in self.taps)

    @property
    def widths(self) -> float:
        """Numbers a token in the inputs and outputs of all linears."""
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
        found.append(
            BlockSizes(
                count=count,
                parameters=sum(math.prod(info.shape) for info in infos),
                stored=sum(math.prod(info.shape) * info.dtype.itemsize for info in infos),
                linears=tuple(linears),
                taps=tuple(taps.values()),
            )
        )
    return found


def prune_cost(model: StreamedModel, recipe: Recipe, method: LayerMethod) -> Cost:
    """The estimate for a model and a checked recipe; no tensor is read.

    Args:
        model: opened.
        recipe: gives samples, sequence length and what surrounds the method.
        method: the recipe's, as `recipe.check()` gives it.
    """
    blocks, cost = block_sizes(model), method_cost(method)
    shapes = {linear[:2] for block in blocks for linear in block.linears}
    with_survey = recipe.output_weighting() == "gradient" or recipe.allocation == "curves"
    trains = recipe.reconstruction is not None
    compiling = COMPILE_PASS * len(blocks) * (2 if recipe.heldout_samples else 1)
    compiling += COMPILE_GRADIENT * len(blocks) * (with_survey + trains)
    compiling += (cost.compile_seconds if cost else 0) * len(shapes)
    stored = sum(math.prod(info.shape) * info.dtype.itemsize for info in model.source.tensors.values())
    return Cost(
        phases=_phases(model, recipe, blocks, cost, with_survey),
        solve_flops=None if cost is None else sum(block.count * _solve_flops(block, cost) for block in blocks),
        pass_flops=_pass_flops(model, recipe, blocks),
        survey_flops=_survey_flops(model, recipe, blocks, with_survey),
        training_flops=_training_flops(model, recipe, blocks),
        compile_seconds=compiling,
        # Every tensor is looked through once, read once more, and written.
        file_seconds=START + 3 * stored * SECONDS_A_BYTE,
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
    tokens = _survey_tokens(recipe)
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


def _survey_tokens(recipe: Recipe) -> int:
    return min(recipe.samples, max(1, TOKENS // recipe.seqlen)) * recipe.seqlen


def _phases(
    model: StreamedModel, recipe: Recipe, blocks: list[BlockSizes], cost: MethodCost | None, with_survey: bool
) -> tuple[Phase, ...]:
    config, tensors = model.config, model.source.tensors
    tokens = (recipe.samples + recipe.heldout_samples) * recipe.seqlen
    stream = FLOAT32 * tokens * config.hidden_size
    batch = min(recipe.samples * recipe.seqlen, max(BATCH_TOKENS, recipe.seqlen))
    # Of one chunk of queries, before and behind the softmax; a gradient keeps those of all chunks.
    scores = 3 * FLOAT32 * batch * min(recipe.seqlen, QUERY_CHUNK) * config.num_heads
    pairs = 2 * FLOAT32 * recipe.seqlen * config.num_heads
    block = max(blocks, key=lambda b: b.parameters)
    weights = FLOAT32 * block.parameters
    grams = max(b.gram_bytes for b in blocks)
    sets = 1 + (recipe.heldout_samples > 0) + (recipe.propagated_share > 0)
    # Embedded windows stay to the end; behind them are the streams in front of a block and behind it.
    streams = (5 if recipe.needs_dense_stream else 3) * stream
    # A method of your own is taken for the hungriest of ours.
    square, wide = (cost.square, cost.wide) if cost else (7.5, 10.0)
    workspace = max(square * i * i + wide * i * o for b in blocks for o, i, _ in b.linears)
    if recipe.propagated_share:
        workspace = max(workspace, max(5 * i * i + 3 * i * o for b in blocks for o, i, _ in b.linears))
    outer = [tensors[key] for key in model.outer_keys()]
    outer_bytes = sum(math.prod(info.shape) * info.dtype.itemsize for info in outer)
    widest = max(math.prod(info.shape) * info.dtype.itemsize for info in outer)
    embedding = FLOAT32 * config.vocab_size * config.hidden_size
    running = {"libraries": LIBRARIES, "compiled programs": PROGRAMS}
    phases: list[tuple[str, dict[str, int]]] = [
        (
            "start",
            {
                "libraries": LIBRARIES,
                "embedding and head": outer_bytes + widest + 2 * embedding,
                "activations": 2 * stream,
            },
        ),
        (
            "Grams",
            running
            | {
                "block": 2 * weights,
                "Grams": (sets + 1) * grams,
                "activations": streams + scores + int(2 * FLOAT32 * batch * block.widths),
            },
        ),
        (
            "layer solves",
            running
            | {
                "block": 2 * weights + 2 * block.stored,
                "Grams": sets * grams,
                "activations": streams,
                "workspace": int(FLOAT32 * workspace),
            },
        ),
    ]
    if with_survey:
        kept = 2 * math.sqrt(config.num_layers) + 3
        phases.append(
            (
                "survey",
                running
                | {
                    "block": 3 * weights,
                    "embedding and head": embedding,
                    "activations": int(kept * FLOAT32 * _survey_tokens(recipe) * config.hidden_size)
                    + 2 * stream
                    + batch * pairs
                    + int(3 * FLOAT32 * batch * block.widths),
                },
            )
        )
    if recipe.reconstruction is not None:
        window = min(recipe.reconstruction.windows, recipe.samples) * recipe.seqlen
        phases.append(
            (
                "training",
                running
                | {
                    # Dense and pruned, gradient, two moments, the best state, updates in the making.
                    "block": 8 * weights + 2 * block.stored,
                    "Grams": sets * grams,
                    "activations": streams + window * pairs + scores + int(3 * FLOAT32 * window * block.widths),
                },
            )
        )
    fixed = ("libraries", "compiled programs")
    return tuple(
        Phase(name, parts | {"freed, not returned": int(FREED * sum(n for p, n in parts.items() if p not in fixed))})
        for name, parts in phases
    )
