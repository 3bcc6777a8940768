"""Pruning of one block; results are returned, and nothing is stored.

stream before the block -> Grams -[propagate]-> targets -[method]-> pruned layers  -[repair]-[train]-> new tensors
                                                  a smaller model: pruned groups -[slice]--^
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from sparseopt.core.base.mesh import whole
from sparseopt.core.penalties.patterns import NM
from sparseopt.layers.bits import Bits
from sparseopt.layers.side_by_side import agreed
from sparseopt.models import (
    Block,
    Joined,
    Move,
    StreamedModel,
    UnreadTensor,
    block_moves,
    reordered_block,
    unread,
)
from sparseopt.pruning.base.activations import Batches, Stream
from sparseopt.pruning.base.grams import BlockGrams, BlockRunner, Grams, nonfinite_windows
from sparseopt.pruning.base.records import BlockRecord, GridRecord, LayerRecord, RepairRecord
from sparseopt.pruning.recipe.pass_recipe import PassRecipe
from sparseopt.pruning.run.part import PartLayer, PruningError, is_starved, round_part, solve_part
from sparseopt.pruning.run.permutation import block_orders
from sparseopt.pruning.run.plan import Plan
from sparseopt.pruning.train.reconstruction import reconstruct_block
from sparseopt.pruning.train.repair import is_repairable, repair_block
from sparseopt.system import processes


class Stopped(PruningError):
    """Raised if a run was asked to stop, after a finished block; the same call resumes it."""


class DenseBlock:
    """A dense block, of which plans prune copies, and what is measured on it once.

    Attributes:
        model: the dense model.
        index: index of the block in the model.
        stream: the dense model's stream before the block; None if no plan needs it.
        runner: runs the block.
        gap: indices of the removed blocks right behind it.
        block: the block.
        keys: keys of its tensors, by path.
    """

    def __init__(
        self, model: StreamedModel, index: int, stream: Stream | None, runner: BlockRunner, gap: Sequence[int] = ()
    ) -> None:
        self.model, self.index, self.stream, self.runner, self.gap = model, index, stream, runner, gap
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
        """The dense model's stream after the block and the gap."""
        if self._outputs is None:
            assert self.stream is not None
            stream = self.runner.through(self.block, self.stream)
            for index in self.gap:
                stream = self.runner.through(self.model.block(index), stream)
            self._outputs = stream
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
    told: Callable[[LayerRecord | GridRecord | RepairRecord | BlockRecord], None],
) -> tuple[Block, dict[str, np.ndarray | UnreadTensor]]:
    """Prune the layers of one block, repair a gap behind it, train it and round it to grids, as the plan says.

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

    def contributions() -> np.ndarray:
        found = agreed(dense.runner.contributions(dense.block, stream.calibration))
        if not np.isfinite(found).all():
            raise PruningError(
                f"non-finite outputs of experts in block {dense.index}: the weights overflow there or the tokens "
                "are out of its range; check the source with `sparseopt eval`"
            )
        return found

    block, found = plan.finish(dense.block.copy(), place, tensors, pruned, dtypes, contributions)
    trained = None
    if dense.gap and recipe.get("repair") and is_repairable(block):
        repaired, record = repair_block(block, stream, dense.outputs(), dtypes, dense.index, dense.gap)
        found.update(repaired)
        told(record)

    def train(masks: Mapping[str, Array], grids: Mapping[str, Bits] | None = None) -> BlockRecord:
        # A step sees one window or a few, in turn, so devices have nothing to share: one trains in each process.
        before, after = stream.on_one_device(), dense.outputs().on_one_device()
        record = reconstruct_block(block, masks, before, after, recipe.reconstruction, dense.index, grids)
        if processes.count() > 1:
            # All processes continue with the first one's block.
            block.write(agreed({path: np.asarray(block.read(path)) for path in dtypes}))
        found.update({path: np.asarray(block.read(path)).astype(dtype) for path, dtype in dtypes.items()})
        # The block runs with the rounding of what is stored.
        block.write(found)
        return record

    if recipe.reconstruction is not None and (pruned or plan.smaller):
        trained = train(trained_entries(plan, block, dense.keys))
    # Without requested bits, a layer that equals the source stays so.
    same = dense.unchanged(found) if plan.form.bits and recipe.bits is None else {}
    grids = {name: plan.form.bits.get(plan.target.weight_key(place, name)) for name in block.linears}
    if rounding := {name: bits for name, bits in grids.items() if bits and f"{name}.weight" not in same}:
        rounded = _rounded(plan, dense, block, rounding, stream, told)
        block.write(rounded)
        found.update(rounded)
        if recipe.reconstruction is not None:
            # Norms and scales: the weights stay on their grids.
            nothing = {name: jnp.zeros(block.weight_shape(name), bool) for name in block.linears}
            after = train(nothing, rounding)
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
    told: Callable[[LayerRecord], None],
    moves: Mapping[str, Move],
) -> dict[str, np.ndarray]:
    """The new weights of the layers that the plan prunes, by path; the given tensors are reordered already."""
    recipe, linears = plan.recipe, dense.block.linears
    paths = [path for path in (f"{name}.weight" for name in linears) if dense.keys[path] in plan.patterns]
    if not paths:
        return {}
    grams, tests = dense.grams(stream, recipe, drift=recipe.propagate > 0)

    def layer(path: str) -> PartLayer:
        name, key = path.removesuffix(".weight"), dense.keys[path]
        tap, move, outputs = linears[name], moves.get(name, Move()), plan.output_weights.get(key)

        def own(found: BlockGrams) -> Grams:
            return found[tap] if move.columns is None else found[tap].reordered(move.columns)

        found = _layer(plan, dense, name, tensors[path], grams)
        return replace(
            found,
            grams=lambda: own(grams),
            # A removed expert has no dtype to be stored in.
            dtype=dtypes.get(path),
            pattern=plan.patterns[key],
            test_gram=(lambda: own(tests).gram) if not found.starved and tests and tests.tokens(tap) else None,
            outputs=outputs if outputs is None or move.rows is None else outputs[move.rows],
            support=partial(plan.support, key),
        )

    layers, mesh = [layer(path) for path in paths], stream.calibration.mesh
    return _stored(dense, paths, solve_part(layers, plan.method, recipe.propagate, dense.index, mesh), told)


def _rounded(
    plan: Plan, dense: DenseBlock, block: Block, grids: Mapping[str, Bits], stream: Stream,
    told: Callable[[GridRecord], None],
) -> dict[str, np.ndarray]:  # fmt: skip
    """The weights of layers of the target's block on their grids, by path."""
    recipe = plan.recipe
    grams = dense.runner.grams(block, stream.calibration, recipe.weighting, None, recipe.expert_tokens)
    weights = {name: np.asarray(block.read(f"{name}.weight"), np.float32) for name in grids}
    layers = [_layer(plan, dense, name, weight, grams) for name, weight in weights.items()]
    if not (plan.smaller or recipe.get("permute")):
        # Else, with other outputs or in another order, their weights are not known.
        layers = [replace(each, outputs=plan.output_weights.get(f"{each.name}.weight")) for each in layers]
    own = {each.name: bits for each, bits in zip(layers, grids.values(), strict=True)}
    rounded = round_part(layers, own, dense.index, stream.calibration.mesh)
    return _stored(dense, [f"{name}.weight" for name in grids], rounded, told)


def _layer(plan: Plan, dense: DenseBlock, name: str, weight: np.ndarray, grams: BlockGrams) -> PartLayer:
    """A layer with this weight, by its name in the block."""
    tap = dense.block.linears[name]
    tokens = grams.tokens(tap)
    starved = is_starved(name, tokens, plan.recipe.min_expert_tokens)
    key = dense.keys[f"{name}.weight"].removesuffix(".weight")
    return PartLayer(key, weight, lambda: grams[tap], tokens, starved)


def _stored(
    dense: DenseBlock, paths: Sequence[str], solved: Iterator[tuple[Any, np.ndarray]], told: Callable[[Any], None]
) -> dict[str, np.ndarray]:
    """The solved weights by path; records are told as they come."""
    found = {}
    for record, weight in solved:
        found[f"{record.layer}.weight"] = weight
        told(record)
    return {path: found[dense.keys[path]] for path in paths}


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
