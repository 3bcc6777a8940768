"""Floor 6: the memory that a prune will take, estimated from shapes alone, and what its activations take on disk.

Memory is the sum of what a phase holds at once, and the peak is that of the largest phase. The constants below are
measured on a CPU; estimates are mostly a fifth above what a run takes.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from sparseopt.models import StreamedModel
from sparseopt.models.attention import QUERY_CHUNK
from sparseopt.pruning.activations import windows_per_batch
from sparseopt.pruning.evaluation import LOGIT_ROWS
from sparseopt.pruning.method_cost import MethodCost
from sparseopt.pruning.recipe import Recipe
from sparseopt.pruning.survey import TOKENS

FLOAT32 = 4

# Where the activations between blocks lie.
Activations = Literal["memory", "disk"]
PLACES: tuple[Activations, ...] = get_args(Activations)

# Resident bytes of the interpreter with its libraries, and what compiled programs and the allocator add to that.
LIBRARIES, PROGRAMS = 300 * 2**20, 450 * 2**20
# Share of the arrays that the allocator keeps besides, of those freed before; large ones go back to the system.
FREED = 0.05


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


def streams_at_once(recipe: Recipe, plans: int) -> int:
    """Streams at once: one a plan in front of a block and one behind it, and both of the dense model."""
    return plans + 1 + (2 if recipe.needs_dense_stream else 0)


def _stream_bytes(model: StreamedModel, recipe: Recipe) -> int:
    return FLOAT32 * (recipe.samples + recipe.heldout_samples) * recipe.seqlen * model.config.hidden_size


def _survey_streams(model: StreamedModel) -> int:
    """Streams that the backward pass keeps, see `sensitivity`."""
    return 2 * math.isqrt(model.config.num_layers) + 3


def scratch_bytes(model: StreamedModel, recipe: Recipe, plans: int, with_survey: bool) -> int:
    """What streams take on disk at most."""
    stream = _stream_bytes(model, recipe)
    surveyed = FLOAT32 * survey_tokens(recipe) * model.config.hidden_size if with_survey else 0
    return max(streams_at_once(recipe, plans) * stream, stream + _survey_streams(model) * surveyed)


def survey_tokens(recipe: Recipe) -> int:
    """Tokens that the dense model is measured on."""
    return min(recipe.samples, max(1, TOKENS // recipe.seqlen)) * recipe.seqlen


def memory_phases(
    model: StreamedModel,
    recipe: Recipe,
    blocks: list[BlockSizes],
    cost: MethodCost | None,
    with_survey: bool,
    in_memory: int,
) -> tuple[Phase, ...]:
    """What each phase holds.

    Args:
        model: opened.
        recipe: checked.
        blocks: its kinds of blocks.
        cost: of the method; None for one of your own, which is taken for the hungriest of ours.
        with_survey: whether the dense model is measured before.
        in_memory: streams that lie in memory at once, 0 where they lie on disk.
    """
    config, tensors = model.config, model.source.tensors
    stream = _stream_bytes(model, recipe)
    batch = windows_per_batch(recipe.samples, recipe.seqlen) * recipe.seqlen
    # In front of a block and behind it, of the dense model too.
    at_hand = 4 * FLOAT32 * batch * config.hidden_size
    # Of one chunk of queries, before and behind the softmax; a gradient keeps those of all chunks.
    scores = 3 * FLOAT32 * batch * min(recipe.seqlen, QUERY_CHUNK) * config.num_heads
    pairs = 2 * FLOAT32 * recipe.seqlen * config.num_heads
    block = max(blocks, key=lambda b: b.parameters)
    weights = FLOAT32 * block.parameters
    grams = max(b.gram_bytes for b in blocks)
    sets = 1 + (recipe.heldout_samples > 0) + (recipe.propagated_share > 0)
    streams = in_memory * stream + at_hand
    square, wide = (cost.square, cost.wide) if cost else (7.5, 10.0)
    workspace = max(square * i * i + wide * i * o for b in blocks for o, i, _ in b.linears)
    if recipe.propagated_share:
        workspace = max(workspace, max(5 * i * i + 3 * i * o for b in blocks for o, i, _ in b.linears))
    outer = [tensors[key] for key in model.outer_keys()]
    widest = max(math.prod(info.shape) * info.dtype.itemsize for info in outer)
    rows = min(config.vocab_size, (recipe.samples + recipe.heldout_samples) * recipe.seqlen)
    embedding = FLOAT32 * config.vocab_size * config.hidden_size
    # Of a slice of rows, with its softmax and its gradient.
    logits = 3 * FLOAT32 * LOGIT_ROWS * config.vocab_size
    running = {"libraries": LIBRARIES, "compiled programs": PROGRAMS}
    phases: list[tuple[str, dict[str, int]]] = [
        (
            "start",
            {
                "libraries": LIBRARIES,
                "embedding and head": max(2 * widest, 2 * FLOAT32 * rows * config.hidden_size),
                "activations": (stream if in_memory else 0) + at_hand,
            },
        ),
        (
            "Grams",
            running
            | {
                "block": 2 * weights,
                "Grams": (sets + 1) * grams,
                "activations": streams + int(max(scores, FLOAT32 * batch * block.widths)),
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
        surveyed = FLOAT32 * survey_tokens(recipe) * config.hidden_size
        # Gradients stay in memory, wherever the streams lie.
        kept = _survey_streams(model) * surveyed + stream if in_memory else surveyed
        phases.append(
            (
                "survey",
                running
                | {
                    "block": 3 * weights,
                    "embedding and head": embedding + logits,
                    "activations": kept + at_hand + batch * pairs + int(3 * FLOAT32 * batch * block.widths),
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
