"""Pruning of one block; results are returned, and nothing is stored.

stream before the block -> Grams -[propagate]-> targets -[method]-> pruned layers  -[train]-> new tensors
                                                  a smaller model: pruned groups -[slice]-^
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from sparseopt.core.base.dense import product, spd_inverse
from sparseopt.core.base.mesh import over, put, whole
from sparseopt.core.penalties.patterns import NM
from sparseopt.layers.bits import Bits
from sparseopt.layers.compiled import Compiled
from sparseopt.layers.patterns import Pattern
from sparseopt.layers.problem import LayerJob, LayerMethod, check_answer, reads_variances, scaled_gram
from sparseopt.layers.side_by_side import LayerTask, Solved, agreed, solve_block
from sparseopt.layers.split import Cut
from sparseopt.models import (
    Block,
    Joined,
    ModelError,
    Move,
    StreamedModel,
    UnreadTensor,
    block_moves,
    reordered_block,
    unread,
)
from sparseopt.pruning.base.activations import Batches, Stream
from sparseopt.pruning.base.grams import BlockGrams, BlockRunner, Grams, nonfinite_windows
from sparseopt.pruning.base.records import BlockRecord, GridRecord, LayerRecord
from sparseopt.pruning.recipe.pass_recipe import PassRecipe
from sparseopt.pruning.run.permutation import block_orders
from sparseopt.pruning.run.plan import Plan
from sparseopt.pruning.run.rounding import linears_to_round, round_block
from sparseopt.pruning.train.reconstruction import reconstruct_block
from sparseopt.system import processes

# The fraction of a layer's weights that the stored dtype may round to zero: any model has a few that small, and they
# are the first to be pruned.
MOST_LOST = 1e-3
# Relative to each input's own square; a smaller ridge follows the drift of single tokens.
PROPAGATION_RIDGE = 0.1


class PruningError(RuntimeError):
    """Raised if a run has to stop; the message names the layer and what to do."""


class Stopped(PruningError):
    """Raised if a run was asked to stop, after a finished block; the same call resumes it."""


class DenseBlock:
    """A dense block, of which plans prune copies, and what is measured on it once.

    Attributes:
        model: the dense model.
        index: index of the block in the model.
        stream: the dense model's stream before the block; None if no plan needs it.
        runner: runs the block.
        block: the block.
        keys: keys of its tensors, by path.
    """

    def __init__(self, model: StreamedModel, index: int, stream: Stream | None, runner: BlockRunner) -> None:
        self.model, self.index, self.stream, self.runner = model, index, stream, runner
        self.block, self.keys = model.block(index), model.block_keys(index)
        self._grams: dict[tuple[Any, ...], tuple[BlockGrams, BlockGrams]] = {}
        self._outputs: Stream | None = None

    def grams(self, stream: Stream, recipe: PassRecipe, *, drift: bool) -> tuple[BlockGrams, BlockGrams]:
        """Grams by tap, for the calibration tokens and for the held-out tokens (empty if there are none).

        Tokens are weighted and sent to experts as the recipe says.

        Raises:
            PruningError: naming the tap, if activations are not finite.
        """
        weighting, experts = recipe.weighting, recipe.expert_tokens
        key = (stream, weighting, experts, drift)
        if key not in self._grams:
            dense = self.stream.calibration if drift and self.stream is not None else None
            found = self.runner.grams(self.block, stream.calibration, weighting, dense, experts)
            tests = BlockGrams({})
            if stream.heldout:
                tests = self.runner.grams(self.block, stream.heldout, weighting, expert_tokens=experts)
            self._check(found, "calibration", stream.calibration)
            self._check(tests, "held-out", stream.heldout)
            self._grams[key] = (found, tests)
        return self._grams[key]

    def outputs(self) -> Stream:
        """The dense model's stream after the block."""
        if self._outputs is None:
            assert self.stream is not None
            self._outputs = self.runner.through(self.block, self.stream)
        return self._outputs

    def unchanged(self, tensors: Mapping[str, np.ndarray]) -> dict[str, UnreadTensor]:
        """The tensors, by path, that equal the block's own, as stored in the source."""
        source = self.model.source
        same = {path for path, value in tensors.items() if path in self.keys and self._has(path, value)}
        return {path: unread(source, [self.keys[path]])[self.keys[path]] for path in same}

    def _has(self, path: str, value: np.ndarray) -> bool:
        own = np.asarray(self.block.read(path))
        return own.shape == value.shape and np.array_equal(own, value.astype(np.float32))

    def _check(self, grams: BlockGrams, tokens: str, batches: Batches) -> None:
        for name, found in grams.stacked.items():
            if not all(bool(jnp.isfinite(part).all()) for part in found if part is not None):
                batches = batches.on_one_device()
                windows = nonfinite_windows(self.block, batches, name) if isinstance(self.block, Block) else []
                shown = ", ".join(map(str, windows[:8]))
                where = f", in windows {shown} of {batches.windows}" if windows else ""
                raise PruningError(
                    f"non-finite activations in block {self.index}, {name}, on the {tokens} tokens{where}: the model's "
                    "weights overflow there or the tokens are out of its range; check the source with `sparseopt eval`"
                )


def prune_block(
    plan: Plan,
    dense: DenseBlock,
    place: int,
    stream: Stream,
    dtype_of: Callable[[str], np.dtype],
    told: Callable[[LayerRecord | GridRecord | BlockRecord], None],
) -> tuple[Block, dict[str, np.ndarray | UnreadTensor]]:
    """Prune the layers of one block, train the block and round its layers to grids, as the plan says.

    Args:
        plan: what to do.
        dense: the block.
        place: its index in the plan's target.
        stream: the target's stream before the block.
        dtype_of: returns the dtype to store for a key of the target.
        told: called with each record as soon as it is known.

    Returns:
        The target's block and all its tensors by key, with layers as `[out, in]`; in one file, unchanged tensors are
        the source's.

    Raises:
        PruningError: naming the layer, if activations or a solve become non-finite, or a solve does not fit in memory.
    """
    recipe = plan.recipe
    tensors = {path: dense.model.stored(key) for path, key in dense.keys.items()}
    dtypes = {path: dtype_of(key) for path, key in plan.target.block_keys(place).items()}
    moves: Mapping[str, Move] = {}
    if recipe.get("permute"):
        moves = _moves(plan, dense, stream, tensors)
        tensors = reordered_block(tensors, moves)
    pruned = _pruned(plan, dense, stream, tensors, dtypes, told, moves)
    tensors |= pruned
    gather = partial(dense.grams, stream, recipe, drift=False)
    block, found = plan.finish(dense.block.copy(), place, tensors, pruned, dtypes, gather)
    trained = None

    def train(masks: Mapping[str, Array], grids: Mapping[str, Bits] | None = None) -> BlockRecord:
        record = _reconstruct(block, masks, grids, plan, dense, stream, list(dtypes))
        found.update({path: np.asarray(block.read(path)).astype(dtype) for path, dtype in dtypes.items()})
        # The block runs with the rounding of what is stored.
        block.write(found)
        return record

    if recipe.reconstruction is not None and (pruned or plan.smaller):
        trained = train(trained_entries(plan, block, dense.keys))
    # Without requested bits, a layer that equals the source stays so.
    same = dense.unchanged(found) if plan.form.bits and recipe.bits is None else {}
    if linears := linears_to_round(plan, block, place, dense.keys, same):
        try:
            rounded = round_block(plan, dense.index, block, linears, stream, dense.runner, told)
        except (MemoryError, RuntimeError) as error:
            raise PruningError(f"{error}; then start the same command again") from error
        block.write(rounded)
        found.update(rounded)
        if recipe.reconstruction is not None:
            # Norms and scales: the weights stay on their grids.
            nothing = {name: jnp.zeros(block.weight_shape(name), bool) for name in block.linears}
            after = train(nothing, {name: bits for name, (_, bits) in linears.items()})
            trained = after if trained is None else trained.followed_by(after)
    if trained is not None:
        told(trained)
    stays = dense.unchanged(found) if isinstance(plan.form, Joined) else {}
    return block, {key: stays.get(path, found[path]) for path, key in plan.target.block_keys(place).items()}


def masked_blocks(plans: Sequence[Plan], dense: DenseBlock, stream: Stream) -> Iterator[Block]:
    """For each plan in turn, the dense block with removed parts set to zero and the rest fitted again.

    It computes the same as the plan's smaller block before training. All plans share the Grams of the stream.

    Raises:
        PruningError: as `prune_block` does.
    """
    pruned = {path: key for path, key in dense.keys.items() if any(key in plan.patterns for plan in plans)}
    tensors = {path: dense.model.stored(key) for path, key in pruned.items()}
    for plan in plans:
        block = dense.block.copy()
        block.write(_pruned(plan, dense, stream, tensors, {}, lambda record: None, {}))
        yield block


def _pruned(
    plan: Plan,
    dense: DenseBlock,
    stream: Stream,
    tensors: Mapping[str, np.ndarray],
    dtypes: Mapping[str, np.dtype],
    told: Callable[[LayerRecord | BlockRecord], None],
    moves: Mapping[str, Move],
) -> dict[str, np.ndarray]:
    """The new weights of the layers that the plan prunes, by path; the given tensors are reordered already."""
    recipe, keys, mesh = plan.recipe, dense.keys, stream.calibration.mesh
    linears = {n: tap for n, tap in dense.block.linears.items() if keys[f"{n}.weight"] in plan.patterns}
    if not linears:
        return {}
    grams, tests = dense.grams(stream, recipe, drift=recipe.propagate > 0)
    evidence = {name: _evidence(plan, name, tap, grams, tests) for name, tap in linears.items()}

    def task(name: str, tap: str) -> LayerTask:
        path = f"{name}.weight"
        dense_weight, key = tensors[path], keys[path]
        # A removed expert has no dtype to be stored in.
        dtype, shape, pattern = dtypes.get(path, dense_weight.dtype), dense_weight.shape, plan.patterns[key]
        _, starved, tested = evidence[name]
        move = moves.get(name, Move())
        outputs = None if starved else plan.output_weights.get(key)
        outputs = outputs if outputs is None or move.rows is None else outputs[move.rows]

        def own(found: Grams) -> Grams:
            return found if move.columns is None else found.reordered(move.columns)

        def job() -> LayerJob:
            target, found = _stored_as(key, dense_weight, dtype), own(grams[tap])
            if not starved and recipe.propagate and found.drift is not None:
                target = propagated(target, found, recipe.propagate, mesh)
            # Too few tokens to rank the weights: all inputs count the same.
            gram = jnp.eye(len(found.gram), dtype=jnp.float32) if starved else found.gram
            variances = None
            if reads_variances(plan.method):
                variances = np.ones(len(gram), np.float32) if starved else whole(found.variances)
            test_gram = own(tests[tap]).gram if tested else None
            support = plan.support(key, dense_weight)
            return LayerJob(target, gram, test_gram, pattern, outputs, variances, support)

        kind = (shape, dtype, tested, outputs is None, jax.tree.structure(pattern))
        return LayerTask(key.removesuffix(".weight"), (shape[0], shape[1]), kind, job)

    tasks, found = [task(name, tap) for name, tap in linears.items()], {}
    try:
        for name, solved in zip(linears, solve_block(tasks, plan.method, mesh), strict=True):
            path = f"{name}.weight"
            key = keys[path]
            record = layer_record(
                dense.index, key.removesuffix(".weight"), solved, plan.method, plan.patterns[key], *evidence[name]
            )
            found[path] = np.asarray(solved.report.weight)
            told(record)
    except MemoryError as error:
        raise PruningError(f"{error}; then start the same command again") from error
    return found


def _stored_as(key: str, dense: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """A layer's weight in the dtype to store; a ModelError if the dtype cannot hold it."""
    with np.errstate(over="ignore"):
        weight = dense.astype(dtype, copy=False)
    if weight is dense:
        return weight
    if not np.isfinite(weight.astype(np.float32)).all():
        most = np.max(np.abs(dense.astype(np.float32)))
        raise ModelError(f"{key} has values up to {most:g}, which {dtype} cannot hold: choose dtype bfloat16")
    lost = dense[(weight == 0) & (dense != 0)]
    if len(lost) > MOST_LOST * dense.size:
        least = np.min(np.abs(lost.astype(np.float32)))
        raise ModelError(
            f"{key} has {len(lost):,} values as small as {least:g}, which {dtype} makes 0: choose dtype bfloat16"
        )
    return weight


def _moves(plan: Plan, dense: DenseBlock, stream: Stream, tensors: Mapping[str, np.ndarray]) -> dict[str, Move]:
    """The channels that move so that the patterns keep more."""
    block, keys = dense.block, dense.keys
    grams = dense.grams(stream, plan.recipe, drift=plan.recipe.propagate > 0)[0]
    found = {n: plan.patterns.get(keys[f"{n}.weight"]) for n in block.linears}
    patterns = {name: pattern for name, pattern in found.items() if isinstance(pattern, NM)}
    losses = {}
    for name in patterns:
        key, energy = keys[f"{name}.weight"], whole(jnp.diagonal(grams[block.linears[name]].gram))
        losses[name] = tensors[f"{name}.weight"].astype(np.float32) ** 2 * energy
        if key in plan.output_weights:
            losses[name] *= plan.output_weights[key][:, None]
    return block_moves(block.config, agreed(block_orders(block.config, losses, patterns)))


def _evidence(plan: Plan, name: str, tap: str, grams: BlockGrams, tests: BlockGrams) -> tuple[int, bool, bool]:
    """The tokens that reach a layer, whether they are too few to prune with, and whether held-out tokens reach it."""
    tokens = grams.tokens(tap)
    starved = ".experts." in name and tokens < max(1, plan.recipe.min_expert_tokens)
    return tokens, starved, not starved and bool(tests) and tests.tokens(tap) > 0


def layer_record(
    block: int,
    name: str,
    solved: Solved,
    method: LayerMethod,
    pattern: Pattern,
    tokens: int,
    starved: bool,
    tested: bool,
) -> LayerRecord:
    """The record of a solved layer; a PruningError if its answer is not finite or breaks the pattern."""
    report = solved.report
    heldout = float(report.test_error) if tested else math.inf
    try:
        status = check_answer(report, method, pattern)
    except RuntimeError as error:
        raise PruningError(f"{name}: {error}") from error
    shape = report.weight.shape
    return LayerRecord(
        block=block,
        layer=name,
        shape=(shape[0], shape[1]),
        size=math.prod(shape),
        zeros=int(report.zeros),
        relative_error=float(report.relative_error),
        heldout_error=heldout if math.isfinite(heldout) else None,
        steps=int(report.steps),
        status=status.name,
        seconds=solved.seconds,
        compile_seconds=solved.compile_seconds,
        dead_inputs=int(report.dead_inputs),
        tokens=tokens,
        starved=starved,
        output_blocks=report.output_blocks,
        given_zeros=math.prod(shape) - int(report.supported),
    )


def trained_entries(plan: Plan, block: Block, keys: Mapping[str, str]) -> dict[str, Array]:
    """True for the weights that training may change, by layer; `keys` are the keys of the dense block.

    Zeros stay, even if the pattern would allow a weight there. If a run only makes zeros, unpruned layers stay
    unchanged.
    """
    return {
        name: (block.read(path) != 0) & (plan.smaller or keys[path] in plan.patterns)
        for name in block.linears
        for path in [f"{name}.weight"]
    }


def _reconstruct(
    block: Block,
    masks: Mapping[str, Array],
    grids: Mapping[str, Bits] | None,
    plan: Plan,
    dense: DenseBlock,
    stream: Stream,
    paths: list[str],
) -> BlockRecord:
    # A step sees one window or a few, in turn, so devices have nothing to share: one trains in each process.
    before, after = stream.on_one_device(), dense.outputs().on_one_device()
    record = reconstruct_block(block, masks, before, after, plan.recipe.reconstruction, dense.index, grids)
    if processes.count() > 1:
        # All processes continue with the first one's block.
        block.write(agreed({path: np.asarray(block.read(path)) for path in paths}))
    return record


def drifted_target(
    weight: Float[Array, "out in"],
    gram: Float[Array, "in in"],
    drift: Float[Array, "in in"],
    strength: float | Array,
    ridge: float | Array,
) -> Float[Array, "out in"]:
    """Propagated error: the target that corrects the loss of earlier layers, float32.

        minimise over W'    1/2 ||X~ W'ᵀ - X Wᵀ||²  +  ridge/2 ||(W' - W) e||²                              [out, in]

    with X~ the inputs in the pruned model, X the inputs in the dense model, e the norms of X~. The minimiser is
    `W' = W - ((Gram + ridge e²)⁻¹ drift Wᵀ)ᵀ`, with Gram `X~ᵀX~` and drift `X~ᵀ(X~ - X)`; strength is the fraction of
    the way from W to it.

    Source: the normal equations of Frantar and Alistarh, "SparseGPT", 2023, with a second input, as in Li, Yin, Lee,
    Xiao, Panda, "GPTAQ: efficient finetuning-free quantization for asymmetric calibration", 2025.
    """
    hessian, _, inverse = scaled_gram(gram)
    shifted = spd_inverse(hessian + ridge * jnp.eye(len(hessian), dtype=jnp.float32))
    moved = product(inverse[:, None] * drift, weight.astype(jnp.float32).T)
    return weight - strength * (inverse[:, None] * product(shifted, moved)).T


propagated_target = Compiled(drifted_target)


def propagated(weight: np.ndarray, grams: Grams, share: float, mesh: Mesh | None) -> np.ndarray:
    """The `drifted_target` of a weight, in its dtype, from Grams with a drift; devices of a mesh share the rows."""
    target: Any = weight
    if mesh is not None:
        # Each output has its own target: rows of zeros after them change nothing.
        target = put(Cut(mesh, len(weight)).padded(weight), over(mesh))
    found = propagated_target(target, grams.gram, grams.drift, np.float32(share), np.float32(PROPAGATION_RIDGE))
    return whole(found)[: len(weight)].astype(weight.dtype)
