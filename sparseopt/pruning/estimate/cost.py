"""What a run will take of time, memory and disk, estimated from shapes alone; no tensor is read.

Time is the number of floating-point operations, two per multiply-add, over a measured rate of matrix products. Memory
is what a phase of the run holds at once; the peak is that of the largest phase. The constants were measured on a CPU
with two cores. There, times are mostly within a half of what a run reports, and memory within a tenth.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, cast, get_args

import jax.numpy as jnp

from sparseopt.core.penalties.patterns import NM
from sparseopt.layers.methods import MethodCost, Workspace, method_cost, workspace_of
from sparseopt.layers.patterns import is_group_pattern, parse_pattern
from sparseopt.layers.problem import LayerMethod
from sparseopt.layers.split import fewest_blocks
from sparseopt.models import PrunableModel, StreamedModel, TensorInfo
from sparseopt.models.decoder.attention import QUERY_CHUNK
from sparseopt.models.decoder.experts import stacked_name
from sparseopt.models.decoder.settings import DecoderConfig
from sparseopt.models.files.safetensors import SLICE
from sparseopt.pruning.base.activations import windows_per_batch
from sparseopt.pruning.base.grams import EXPERTS_INPUT
from sparseopt.pruning.evaluate.evaluation import LOGIT_ROWS
from sparseopt.pruning.measure.survey import LEVELS, TOKENS
from sparseopt.pruning.recipe.pass_recipe import PassRecipe
from sparseopt.pruning.recipe.prune_recipe import Recipe
from sparseopt.pruning.recipe.shrink_recipe import ShrinkRecipe
from sparseopt.pruning.run.permutation import GROUPS, ROWS
from sparseopt.pruning.run.plan import GROUPED, layer_shares
from sparseopt.pruning.run.variants import ROUNDS, SHARE

# Where the activations between blocks are kept.
Activations = Literal["memory", "disk"]
PLACES: tuple[Activations, ...] = get_args(Activations)

FLOAT32 = 4

# The fraction of the rate of large square products that a kind of work reaches: a layer's shapes, and passes with their
# softmax.
EFFICIENCY = {"layer solves": 0.85, "forward passes and Grams": 0.8, "survey": 0.8, "training": 0.8}
# The same of drawing text, a token of each text at a time.
DRAWING = 0.4
# Of finding a target with propagated errors.
PROPAGATION = Workspace(5, 3)
# Searching an order takes as long as this many operations per pair of groups and row, over all rounds.
EXCHANGES = 10_000
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

# Resident bytes of the interpreter with its libraries, of the programs of a pass, and of those of the layer solves for
# each second that they take to compile, which grows as they do.
LIBRARIES, PROGRAMS, SOLVE_PROGRAMS = 300 * 2**20, 50 * 2**20, 40 * 2**20
# That a method of your own takes to compile for each shape.
OWN_COMPILE = 2.6
# The allocator keeps this fraction of the arrays besides, of those freed since it last returned all to the system.
FREED = 0.05


@dataclass(frozen=True)
class Cost:
    """The estimate of one pruning run."""

    phases: Mapping[str, Mapping[str, int]]  # bytes by phase and by what they hold, device and host together
    flops: Mapping[str, float] | None  # by kind of work, at the rate of large products; None for a method of your own
    compile_seconds: float  # on a machine of `COMPILE_GFLOPS` or more
    file_seconds: float  # to start, read and write
    solve_blocks: int  # of its outputs, by which a layer is solved, at most
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
    solved: tuple[tuple[int, int, float], ...]  # of those that are pruned, for a smaller model all that may have to be
    grouped: tuple[tuple[int, int], ...]  # `(out, in)` of those whose inputs are channels or values
    taps: tuple[tuple[int, float], ...]  # `(in, share)` of each distinct input of the linears
    grams: tuple[tuple[int, float], ...]  # the same of each Gram
    unrouted: float  # operations to run one token through all experts for their Grams, 0 with routed tokens

    @property
    def gram_bytes(self) -> int:
        return FLOAT32 * sum(width**2 for width, _ in self.grams)

    @property
    def gram_flops(self) -> float:
        """Adding one token to the Grams."""
        return self.unrouted + sum(2 * width**2 * share for width, share in self.grams)

    @property
    def widths(self) -> float:
        """Numbers per token in the inputs and outputs of all linears."""
        return sum(width * share for width, share in self.taps) + sum(o * share for o, _, share in self.linears)


def block_sizes(model: StreamedModel, recipe: PassRecipe) -> list[BlockSizes]:
    """The kinds of blocks, by what they hold and what is pruned, in the order of the first; headers are enough."""
    experts, every = model.config.experts, recipe.expert_tokens == "all"
    routed = experts.chosen / experts.count if experts else 1.0
    targeted = layer_shares(model, recipe) if isinstance(recipe, Recipe) else None

    def pruned(index: int) -> tuple[str, ...]:
        names = model.block_linears(index)
        if targeted is None:
            return tuple(name for name in names if name.endswith(GROUPED))
        return tuple(name for name in names if model.weight_key(index, name) in targeted)

    alike: dict[Any, list[int]] = {}
    for index, kind in enumerate(model.config.kinds):
        alike.setdefault((kind, pruned(index)), []).append(index)
    found = []
    for (_, names), (index, *others) in alike.items():
        infos = [model.source.tensors[key] for key in model.block_keys(index).values()]
        linears, solved, grouped, taps, grams, unrouted = [], [], [], {}, {}, 0.0
        for name, tap in model.block_linears(index).items():
            outputs, inputs = model.weight_shape(model.weight_key(index, name))
            share = routed if ".experts." in name else 1.0
            linears.append((outputs, inputs, share))
            taps[tap] = (inputs, share)
            shared = every and stacked_name(tap)[0] == EXPERTS_INPUT
            grams[EXPERTS_INPUT if shared else tap] = (inputs, 1.0 if every else share)
            unrouted += 2 * outputs * inputs * shared
            if name in names:
                solved.append(linears[-1])
            if name.endswith(GROUPED):
                grouped.append((outputs, inputs))
        parameters = sum(math.prod(info.shape) for info in infos)
        stored = sum(map(_nbytes, infos))
        kinds = tuple(linears), tuple(solved), tuple(grouped), tuple(taps.values()), tuple(grams.values())
        found.append(BlockSizes(1 + len(others), parameters, stored, *kinds, unrouted))
    return found


def prune_cost(
    model: StreamedModel,
    recipe: PassRecipe,
    method: LayerMethod,
    activations: Activations = "memory",
    plans: int = 1,
    room: int | None = None,
) -> Cost:
    """The estimate for a model, of which the headers are enough, and a checked recipe with its method.

    Each of the `plans` that share a pass has its own stream of activations. Layers whose solves would take more than
    is left of `room` bytes are taken by blocks of their outputs, as `split` does on a device.
    """
    blocks, work, kinds = block_sizes(model, recipe), method_cost(method), len(set(model.config.kinds))
    compiling = COMPILE_PASS * kinds * (2 if recipe.heldout_samples else 1)
    trained = (recipe.reconstruction is not None) + (recipe.distillation is not None)
    compiling += COMPILE_GRADIENT * kinds * (recipe.needs_sensitivities + trained)
    shapes = len({linear[:2] for block in blocks for linear in block.solved})
    solving = (OWN_COMPILE if work is None else work.compile_seconds) * shapes
    if work is not None:
        compiling += solving
    stored = sum(map(_nbytes, model.source.tensors.values()))

    # Each plan has one stream before a block, all share one after it, and the dense model has both.
    stream = FLOAT32 * (recipe.all_windows + recipe.heldout_samples) * recipe.seqlen * model.config.hidden_size
    streams = (plans + 1 + (2 if recipe.needs_dense_stream else 0)) * stream
    if isinstance(recipe, ShrinkRecipe) and recipe.has_budget:
        # The dense model's before and after a block, while the one before the first block waits for the pass.
        streams = max(streams, 3 * stream)
    # The backward pass keeps the streams of some blocks, see `survey`; its gradients stay in memory in any case.
    gradient = FLOAT32 * _survey_tokens(recipe) * model.config.hidden_size if recipe.needs_sensitivities else 0
    survey_streams = stream + (2 * math.isqrt(model.config.num_layers) + 3) * gradient
    on_disk = activations == "disk"
    kept = (0, 0, gradient) if on_disk else (stream, streams, survey_streams)
    running = {"libraries": LIBRARIES, "compiled programs": PROGRAMS + int(SOLVE_PROGRAMS * solving)}
    phases, solve_blocks = _phases(model, recipe, blocks, workspace_of(method), running, *kept, room)
    return Cost(
        phases=phases,
        flops=None if work is None else _flops(model, recipe, blocks, work),
        compile_seconds=compiling,
        # Every tensor is looked through once, read once more, and written.
        file_seconds=START + 3 * stored * SECONDS_A_BYTE,
        solve_blocks=solve_blocks,
        scratch_bytes=max(streams, survey_streams) if on_disk else 0,
    )


def with_drawing(cost: Cost, held: Mapping[str, int], flops: float) -> Cost:
    """The cost of a run that first draws its text, which holds so much and takes so many operations."""
    phases = {"drawing text": {"libraries": LIBRARIES, **held}, **cost.phases}
    work = None if cost.flops is None else {"drawing text": flops / DRAWING, **cost.flops}
    return replace(cost, phases=phases, flops=work)


def output_bytes(model: PrunableModel, recipe: PassRecipe) -> dict[str, int]:
    """Bytes of each tensor of the output, dense."""
    found = {}
    for key in model.exported_keys():
        info = model.source.tensors[key]
        floating = jnp.issubdtype(info.dtype, jnp.floating)
        dtype = jnp.dtype(recipe.dtype) if recipe.dtype and floating else info.dtype
        found[key] = math.prod(info.shape) * dtype.itemsize
    return found


def distillation_bytes(config: DecoderConfig, parameters: int, largest: int, tokens: int) -> dict[str, int]:
    """Bytes of `distil` by what they hold, without the streams given and what one block's gradient keeps.

    Args:
        config: the model's.
        parameters: of all blocks.
        largest: parameters of the largest block.
        tokens: of one step.
    """
    # The dense model's logits of a slice and the model's, the logarithms of their softmax, and the gradient.
    logits = 5 * LOGIT_ROWS * config.vocab_size
    return {
        # In the best state, trained, two moments; of one block also the gradient, the updates and the moments' copies.
        "blocks": FLOAT32 * (4 * parameters + 4 * largest),
        "embedding and head": FLOAT32 * (config.vocab_size * config.hidden_size + logits),
        # Before every block; the dense model's, and the gradients before and after a block.
        "activations of a step": FLOAT32 * (config.num_layers + 4) * tokens * config.hidden_size,
    }


def _nbytes(info: TensorInfo) -> int:
    return math.prod(info.shape) * info.dtype.itemsize


def token_flops(block: BlockSizes, config: DecoderConfig, seqlen: int) -> float:
    """Of one token: the linears, and the scores and mixed values of the positions up to the end of its chunk."""
    linears = sum(2 * outputs * inputs * share for outputs, inputs, share in block.linears)
    return linears + 2 * (seqlen + QUERY_CHUNK) * config.num_heads * config.head_dim


def _survey_tokens(recipe: PassRecipe) -> int:
    """Tokens on which the dense model's sensitivities are measured."""
    return min(recipe.window_count, max(1, TOKENS // recipe.seqlen)) * recipe.seqlen


def _flops(model: StreamedModel, recipe: PassRecipe, blocks: list[BlockSizes], work: MethodCost) -> dict[str, float]:
    config, settings = model.config, recipe.reconstruction
    calibration, heldout = recipe.all_windows * recipe.seqlen, recipe.heldout_samples * recipe.seqlen
    epoch = recipe.window_count * recipe.seqlen
    varied = ROUNDS * recipe.variant_count * epoch
    surveyed, tokens, rebuilt, trained = _survey_tokens(recipe), calibration + heldout, 0, 0
    solves = training = orders = 0.0
    passes = 2.0 * varied * SHARE * config.vocab_size * config.hidden_size
    if settings is not None:
        # Forward and backward count as three passes in each epoch; then every epoch is judged.
        rebuilt = 3 * settings.epochs * epoch + (settings.epochs + 1) * (heldout or calibration) + 2 * calibration
    if (last := recipe.distillation) is not None:
        # The same, with one more pass forward in each epoch; the head also gives the dense model's logits.
        trained = 4 * last.epochs * epoch + (last.epochs + 1) * tokens
        logits = 2.0 * config.vocab_size * config.hidden_size
        training += (4 * last.epochs * epoch + 2 * (last.epochs + 1) * tokens) * logits
    survey = 6.0 * surveyed * config.vocab_size * config.hidden_size if recipe.needs_sensitivities else 0.0
    for block in blocks:
        forward = token_flops(block, config, recipe.seqlen)
        grams = block.gram_flops if block.solved else 0
        inverses = sum(INVERSE * i**3 for _, i, _ in block.solved)
        solves += block.count * work.inverses * inverses
        for outputs, inputs, _ in block.solved:
            solves += block.count * 2 * (work.products + MEASURING) * inputs**2 * outputs
            solves += block.count * (work.selections * SELECTION + work.updates) * inputs * outputs
        # Before and after pruning; the dense model's; and the Grams of its inputs.
        passes += block.count * varied * forward
        passes += block.count * tokens * ((3 if recipe.needs_dense_stream else 2) * forward + grams)
        if recipe.propagated_share:
            passes += block.count * calibration * (forward + grams)
        if recipe.chosen_allocation == "owl":
            survey += 2 * block.count * calibration * forward
        if recipe.needs_sensitivities:
            # Twice forward, and backward, which counts as three.
            survey += 5 * block.count * surveyed * forward
        if recipe.chosen_allocation == "curves":
            # Each level has about six products and three selections, on some of the rows.
            some = [(min(o, 256), i) for o, i, _ in block.solved]
            level = sum(12 * i**2 * o + 3 * SELECTION * i * o for o, i in some)
            survey += block.count * (surveyed * block.gram_flops + inverses + len(LEVELS) * level)
        training += block.count * (trained + (rebuilt if block.solved else 0)) * forward
        if recipe.permutes:
            assert isinstance(recipe, Recipe)
            for outputs, inputs in block.grouped:
                groups = inputs / cast(NM, parse_pattern(recipe.pattern, None, (outputs, inputs))).m
                orders += block.count * EXCHANGES * groups * min(groups, GROUPS) * min(outputs, ROWS)
    counted = zip(EFFICIENCY, (solves, passes, survey, training), strict=True)
    found = {kind: flops / EFFICIENCY[kind] for kind, flops in counted}
    return found | ({"channel orders": orders} if orders else {})


def _phases(
    model: StreamedModel,
    recipe: PassRecipe,
    blocks: list[BlockSizes],
    workspace: Workspace,
    running: dict[str, int],
    start: int,
    streams: int,
    survey_streams: int,
    room: int | None,
) -> tuple[dict[str, dict[str, int]], int]:
    """Bytes by phase and part, and the most blocks of outputs by which a layer is solved.

    The workspace is that of the solve of a layer, `running` what the process holds besides arrays; the three before the
    room are the activations kept at the start, then, in the survey.
    """
    config = model.config
    batch = windows_per_batch(recipe.all_windows, recipe.seqlen) * recipe.seqlen
    # A batch before a block and after it, of the dense model too.
    current = 4 * FLOAT32 * batch * config.hidden_size
    # Of one chunk of queries, before and after the softmax; a gradient keeps those of all chunks.
    scores = 3 * FLOAT32 * batch * min(recipe.seqlen, QUERY_CHUNK) * config.num_heads
    pairs = 2 * FLOAT32 * recipe.seqlen * config.num_heads
    block = max(blocks, key=lambda b: b.parameters)
    weights = FLOAT32 * block.parameters
    grams = max(b.gram_bytes for b in blocks if b.solved)
    sets = 1 + (recipe.heldout_samples > 0) + (recipe.propagated_share > 0)
    shapes = {(outputs, inputs) for b in blocks for outputs, inputs, _ in b.solved}
    widest = max(_nbytes(model.source.tensors[key]) for key in model.outer_keys())
    # Packed at once, else copied in pieces, which are read, dequantised and converted.
    copied = 2 * widest if recipe.get("pack") else 4 * min(widest, SLICE)
    rows = min(config.vocab_size, (recipe.all_windows + recipe.heldout_samples) * recipe.seqlen)
    phases: dict[str, dict[str, int]] = {
        "start": {
            "libraries": running["libraries"],
            "embedding and head": max(copied, 2 * FLOAT32 * rows * config.hidden_size),
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
        },
    }
    solves = phases["layer solves"]
    left = None
    if room is not None and isinstance(recipe, Recipe) and not is_group_pattern(recipe.pattern):
        left = max(0, room - sum(solves.values()))
    parts = {shape: fewest_blocks(shape, workspace, left) for shape in shapes}
    workspaces = [workspace.nbytes(-(-outputs // parts[outputs, inputs]), inputs) for outputs, inputs in shapes]
    if recipe.propagated_share:
        workspaces += [PROPAGATION.nbytes(*shape) for shape in shapes]
    solves["workspace"] = max(workspaces)
    if recipe.needs_sensitivities:
        # Logits of a slice of rows, with their softmax and gradient.
        logits = 3 * FLOAT32 * LOGIT_ROWS * config.vocab_size
        # Nothing was solved before.
        phases["survey"] = running | {
            "compiled programs": PROGRAMS,
            "block": 3 * weights,
            "embedding and head": FLOAT32 * config.vocab_size * config.hidden_size + logits,
            "activations": survey_streams + current + batch * pairs + int(3 * FLOAT32 * batch * block.widths),
        }
    if recipe.reconstruction is not None:
        window = min(recipe.reconstruction.windows, recipe.window_count) * recipe.seqlen
        seen = window * pairs + scores + int(3 * FLOAT32 * window * block.widths)
        phases["training"] = running | {
            # Dense and pruned, gradient, two moments, the best state, updates.
            "block": 8 * weights + 2 * block.stored,
            "Grams": sets * grams,
            "activations": streams + current + seen,
        }
    if recipe.distillation is not None:
        # As if nothing went: the smaller model is not known yet.
        tokens = min(recipe.distillation.windows, recipe.window_count) * recipe.seqlen
        held = distillation_bytes(config, sum(b.count * b.parameters for b in blocks), block.parameters, tokens)
        seen = tokens * pairs // recipe.seqlen + int(3 * FLOAT32 * tokens * block.widths)
        held["activations of a step"] += 2 * start + seen
        phases["distillation"] = running | held
    for held in phases.values():
        arrays = sum(nbytes for part, nbytes in held.items() if part not in running)
        held["freed, not returned"] = int(FREED * arrays)
    return phases, max(parts.values())
