"""The memory and disk that a run needs, estimated from shapes alone, and where it keeps its activations.

Memory is what a phase of the run holds at once; the peak is the memory of the largest phase. The constants were
measured on a CPU with two cores, where estimates are mostly within 10 % of what a run reports. The estimate decides
where the activations of a pass are kept:

    estimate with activations in memory <= budget      they stay there
    estimate with activations on disk <= budget        one file per stream, in the output folder's file system
    neither                                            an error that says what needs the memory

Without a budget, the machine's available memory decides, and no run is rejected. On an accelerator its own memory
decides; it cannot be swapped, so too little is an error.
"""

import math
import shutil
from collections.abc import Mapping
from typing import Literal, NamedTuple, get_args

import jax.numpy as jnp
import numpy as np

from sparseopt.layers.methods import Workspace, method_cost
from sparseopt.layers.methods.few_bits import FewBits
from sparseopt.layers.patterns import is_group_pattern
from sparseopt.layers.problem import LayerMethod
from sparseopt.layers.split import fewest_blocks
from sparseopt.models import Form, PrunableModel, StreamedModel, TensorInfo
from sparseopt.models.decoder.attention import QUERY_CHUNK
from sparseopt.models.decoder.experts import stacked_name
from sparseopt.models.decoder.settings import DecoderConfig
from sparseopt.models.files.safetensors import SLICE
from sparseopt.pruning.base.activations import windows_per_batch
from sparseopt.pruning.base.grams import EXPERTS_INPUT
from sparseopt.pruning.base.records import Footprint
from sparseopt.pruning.evaluate.perplexity import LOGIT_ROWS
from sparseopt.pruning.measure.survey import TOKENS
from sparseopt.pruning.recipe.pass_recipe import PassRecipe
from sparseopt.pruning.recipe.prune_recipe import Recipe
from sparseopt.pruning.recipe.shrink_recipe import ShrinkRecipe
from sparseopt.pruning.run.plan import GROUPED, Plan, layer_shares
from sparseopt.system.machine import device_memory_left, format_bytes, resident_bytes, working_memory_bytes

# Where the activations between blocks are kept.
Activations = Literal["memory", "disk"]
PLACES: tuple[Activations, ...] = get_args(Activations)

FLOAT32 = 4

# For finding a target with propagated errors.
PROPAGATION = Workspace(5, 3)
# Resident bytes of the interpreter with its libraries, and of a pass's compiled programs.
LIBRARIES, PROGRAMS = 300 * 2**20, 50 * 2**20
# Fraction of the arrays' size that the allocator keeps besides, in arrays freed since it last returned memory.
FREED = 0.05

# What reduces the memory of each phase.
ADVICE = {
    "survey": "output_weights='uniform' and an allocation without curves do without the survey",
    "training": "train_epochs=0 trains no blocks",
    "distillation": "distil_epochs=0 leaves out the training of the whole model",
    "layer solves": "method 'wanda' or 'magnitude' needs the least memory for a solve",
    "Grams": "heldout_windows=0 and propagate=0 gather one set of Grams only",
}


class BudgetError(ValueError):
    """Raised if a run does not fit in memory or on disk; the message says what needs the space and how to need less."""


class BlockSizes(NamedTuple):
    """A block; layers are `(out, in, share)` with the fraction of the tokens that reach the layer."""

    parameters: int
    stored: int  # bytes in the source's dtypes
    linears: tuple[tuple[int, int, float], ...]  # `share` is below 1 for experts
    solved: tuple[tuple[int, int, float], ...]  # that are pruned; for a smaller model, all that may have to be
    gram_bytes: int  # of one set of Grams
    widths: float  # numbers per token in the inputs and outputs of all linear layers


def block_sizes(model: StreamedModel, recipe: PassRecipe) -> list[BlockSizes]:
    """The sizes of all blocks; headers are enough."""
    experts, every = model.config.experts, recipe.expert_tokens == "all"
    routed = experts.chosen / experts.count if experts else 1.0
    targeted = layer_shares(model, recipe) if isinstance(recipe, Recipe) else None
    found = []
    for index in range(model.num_blocks):
        infos = [model.source.tensors[key] for key in model.block_keys(index).values()]
        linears, solved, taps, grams = [], [], {}, {}
        for name, tap in model.block_linears(index).items():
            key, share = model.weight_key(index, name), routed if ".experts." in name else 1.0
            outputs, inputs = model.weight_shape(key)
            linears.append((outputs, inputs, share))
            if name.endswith(GROUPED) if targeted is None else key in targeted:
                solved.append(linears[-1])
            taps[tap] = inputs * share
            shared = every and stacked_name(tap)[0] == EXPERTS_INPUT
            grams[EXPERTS_INPUT if shared else tap] = inputs
        found.append(
            BlockSizes(
                parameters=sum(math.prod(info.shape) for info in infos),
                stored=sum(map(_nbytes, infos)),
                linears=tuple(linears),
                solved=tuple(solved),
                gram_bytes=FLOAT32 * sum(width**2 for width in grams.values()),
                widths=sum(taps.values()) + sum(outputs * share for outputs, _, share in linears),
            )
        )
    return found


def phase_bytes(
    model: StreamedModel,
    recipe: PassRecipe,
    method: LayerMethod,
    activations: Activations = "memory",
    room: int | None = None,
) -> tuple[dict[str, dict[str, int]], int]:
    """The bytes of a run by phase and by content, device and host together, and of its activations on disk.

    The model's headers are enough. If a layer's solve would need more than is left of `room` bytes, it is split into
    blocks of outputs, as `split` does on a device.
    """
    config, blocks, work = model.config, block_sizes(model, recipe), method_cost(method)
    windows, token = recipe.window_count + recipe.heldout_windows, FLOAT32 * config.hidden_size
    block, largest_grams = max(blocks, key=lambda b: b.parameters), max(b.gram_bytes for b in blocks if b.solved)
    shapes = {linear[:2] for b in blocks for linear in b.solved}
    # Before a block and after it, of the dense model too.
    stream = token * windows * recipe.seqlen
    streams = (4 if recipe.needs_dense_stream else 2) * stream
    if isinstance(recipe, ShrinkRecipe) and recipe.has_budget:
        # The dense model's before and after a block, while the one before the first block waits for the pass.
        streams = max(streams, 3 * stream)
    # The backward pass keeps the streams of some blocks, see `survey`; its gradients stay in memory in any case.
    surveyed = min(recipe.window_count, max(1, TOKENS // recipe.seqlen)) * recipe.seqlen
    gradient = token * surveyed if recipe.needs_sensitivities else 0
    survey_streams = stream + (2 * math.isqrt(config.num_layers) + 3) * gradient
    scratch = 0
    if activations == "disk":
        scratch = max(streams, survey_streams)
        stream, streams, survey_streams = 0, 0, gradient

    batch = windows_per_batch(recipe.window_count, recipe.seqlen) * recipe.seqlen
    # A batch before a block and after it, of the dense model too.
    current = 4 * token * batch
    # Scores of one chunk of queries, before and after the softmax; a gradient keeps the scores of all chunks.
    scores = 3 * FLOAT32 * batch * min(recipe.seqlen, QUERY_CHUNK) * config.num_heads
    pairs = 2 * FLOAT32 * recipe.seqlen * config.num_heads

    def backward(tokens: int) -> int:
        """Bytes that a gradient through a block keeps for this many tokens."""
        return tokens * pairs + int(3 * FLOAT32 * tokens * block.widths)

    running = {"libraries": LIBRARIES, "compiled programs": PROGRAMS + work.program_mib * 2**20 * len(shapes)}
    weights = FLOAT32 * block.parameters
    sets = 1 + (recipe.heldout_windows > 0) + (recipe.propagate > 0)
    widest = max(_nbytes(model.source.tensors[key]) for key in model.outer_keys())
    # Copied in pieces, which are read, dequantised and converted.
    copied = 4 * min(widest, SLICE)
    rows = min(config.vocab_size, windows * recipe.seqlen)
    solves = running | {
        "block": 2 * weights + 2 * block.stored,
        "Grams": sets * largest_grams,
        "activations": streams + current,
    }
    left = None
    if room is not None and isinstance(recipe, Recipe) and not is_group_pattern(recipe.pattern):
        left = max(0, room - sum(solves.values()))
    workspaces = [work.workspace.nbytes(-(-o // fewest_blocks((o, i), work.workspace, left)), i) for o, i in shapes]
    if recipe.propagate:
        workspaces += [PROPAGATION.nbytes(*shape) for shape in shapes]
    phases: dict[str, dict[str, int]] = {
        "start": {
            "libraries": LIBRARIES,
            "embedding and head": max(copied, 2 * token * rows),
            "activations": stream + current,
        },
        "Grams": running
        | {
            "block": 2 * weights,
            "Grams": (sets + 1) * largest_grams,
            "activations": streams + current + int(max(scores, FLOAT32 * batch * block.widths)),
        },
        "layer solves": solves | {"workspace": max(workspaces)},
    }
    if recipe.needs_sensitivities:
        # Logits of a slice of rows, with their softmax and gradient. Nothing was solved before.
        phases["survey"] = running | {
            "compiled programs": PROGRAMS,
            "block": 3 * weights,
            "embedding and head": token * config.vocab_size + 3 * FLOAT32 * LOGIT_ROWS * config.vocab_size,
            "activations": survey_streams + current + backward(batch),
        }
    if recipe.reconstruction is not None:
        tokens = min(recipe.reconstruction.windows, recipe.window_count) * recipe.seqlen
        phases["training"] = running | {
            # Dense and pruned, gradient, two moments, the best state, updates.
            "block": 8 * weights + 2 * block.stored,
            "Grams": sets * largest_grams,
            "activations": streams + current + scores + backward(tokens),
        }
    if recipe.distillation is not None:
        # As if nothing were removed: the smaller model is not known yet.
        tokens = min(recipe.distillation.windows, recipe.window_count) * recipe.seqlen
        held = distillation_bytes(config, sum(b.parameters for b in blocks), block.parameters, tokens)
        seen = tokens * pairs // recipe.seqlen + int(3 * FLOAT32 * tokens * block.widths)
        held["activations of a step"] += 2 * stream + seen
        if isinstance(recipe, Recipe):
            # A byte for each weight; those of experts also stacked.
            held["masks"] = sum(o * i * (1 + (share < 1)) for b in blocks for o, i, share in b.linears)
        # Its own programs come on top, and compiling them while all this is held.
        phases["distillation"] = running | {"compiled programs": running["compiled programs"] + 2 * PROGRAMS} | held
    for held in phases.values():
        arrays = sum(nbytes for part, nbytes in held.items() if part not in running)
        held["freed, not returned"] = int(FREED * arrays)
    return phases, scratch


def output_bytes(model: PrunableModel, recipe: PassRecipe, form: Form) -> dict[str, int]:
    """Largest possible bytes of each tensor of the output."""
    found = {}
    for key in model.exported_keys():
        info = model.source.tensors[key]
        floating = jnp.issubdtype(info.dtype, jnp.floating)
        dtype = jnp.dtype(recipe.dtype) if recipe.dtype and floating else info.dtype
        found[key] = form.most_bytes(key, TensorInfo(info.shape, dtype))
    return found


def distillation_bytes(config: DecoderConfig, parameters: int, largest: int, tokens: int) -> dict[str, int]:
    """Bytes of `distil` by content, without the given streams and without what one block's gradient keeps.

    Args:
        config: configuration of the model.
        parameters: of all blocks.
        largest: parameters of the largest block.
        tokens: number of tokens in one step.
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


def choose_footprint(
    model: StreamedModel,
    plan: Plan,
    calibration: np.ndarray,
    heldout: np.ndarray,
    budget: int | None = None,
    *,
    spread: bool = False,
) -> Footprint:
    """Choose where the activations of a run are kept.

    Args:
        model: opened.
        plan: its folder need not exist yet.
        calibration: windows of token ids, `[windows, seqlen]`.
        heldout: windows of held-out tokens; `[0, seqlen]` if there are none.
        budget: bytes of memory, device and host together.
        spread: whether the run uses several devices; these then hold the activations, and nothing is estimated, as
            without windows.

    Raises:
        BudgetError: if the run does not fit the budget or, without one, the device; if output and activations do not
            fit on the disk.
    """
    output = sum(output_bytes(plan.target, plan.recipe, plan.form).values())
    if spread or not len(calibration):
        check_disk(plan, 0)
        return Footprint("memory", None, {}, "", budget, output, 0)
    sizes = {"windows": len(calibration), "seqlen": calibration.shape[1], "heldout_windows": len(heldout)}
    recipe, left = plan.recipe.model_copy(update=sizes), device_memory_left()
    # With rounding to grids; the larger of the two decides.
    bits = next(iter(plan.form.bits.values()), None)
    method = plan.method if bits is None else FewBits(plan.method, bits)
    for where in PLACES:
        phases, scratch = phase_bytes(model, recipe, method, where, left)
        phase = max(phases, key=lambda name: sum(phases[name].values()))
        needed, limit = sum(phases[phase].values()), working_memory_bytes() if budget is None else budget
        if needed <= limit:
            break
    else:
        # On a CPU the estimate may be wrong, and activations on disk are at least not swapped.
        if budget is not None:
            raise _too_little(phase, phases[phase], f"a budget of {format_bytes(budget)}", "give at least that")
        if left is not None and needed > left:
            what, instead = (
                f"the memory left on the device, {format_bytes(left)},",
                "give memory=... to try nevertheless",
            )
            raise _too_little(phase, phases[phase], what, instead)
    check_disk(plan, scratch)
    parts, held = phases[phase], resident_bytes() - LIBRARIES
    if budget is None and held > 0:
        # From earlier work in this process: not part of the run, but of the measured peak.
        parts = {**parts, "held before the run": held}
    return Footprint(where, sum(parts.values()), parts, phase, budget, output, scratch)


def _too_little(phase: str, held: Mapping[str, int], what: str, instead: str) -> BudgetError:
    advice = f", or less to do: {ADVICE[phase]}" if phase in ADVICE else ""
    return BudgetError(
        f"{what} is too little: with activations on disk the run is estimated to take "
        f"{format_bytes(sum(held.values()))} in phase {phase} ({', '.join(bytes_by_size(held))}); "
        f"{instead}{advice}"
    )


def bytes_by_size(parts: Mapping[str, int]) -> list[str]:
    """Named numbers of bytes as text, the largest first."""
    return [f"{name} {format_bytes(n)}" for name, n in sorted(parts.items(), key=lambda part: -part[1]) if n]


def check_disk(plan: Plan, scratch: int) -> None:
    """Raise a BudgetError if the disk lacks room for what is still to be written, and for `scratch` bytes."""
    place = next(parent for parent in (plan.folder, *plan.folder.parents) if parent.is_dir())
    sizes = output_bytes(plan.target, plan.recipe, plan.form)
    # Blocks that distillation trains are stored beside the ones that they replace.
    twice = () if plan.recipe.distillation is None else sizes.keys() - set(plan.target.outer_keys())
    most = plan.form.copies * sum(sizes.values()) + sum(sizes[key] for key in twice)
    written = sum(file.stat().st_size for file in plan.folder.glob(plan.form.file_name("*")))
    needed, free = max(0, most - written) + scratch, shutil.disk_usage(place).free
    if needed > free:
        activations = f", {format_bytes(scratch)} of it activations" if scratch else ""
        raise BudgetError(
            f"the disk of {place} has {format_bytes(free)} free, the run needs {format_bytes(needed)}{activations}; "
            "make room or choose another output folder"
        )


def _nbytes(info: TensorInfo) -> int:
    return math.prod(info.shape) * info.dtype.itemsize
