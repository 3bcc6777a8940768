"""Activations through one block: Grams of its layers' inputs, and its outputs for the next block.

Gram of an input = sum over tokens t of w_t x_t x_tᵀ, [in, in], float32, accumulated on the device

Weighting "uniform" has w = 1. With "residual", a layer that writes into the residual stream has
`w_t = 1 / mean square of the stream at t after the block`: the norms that follow divide every token by its own size, so
what matters is an error relative to that size. Some tokens (the first of a text above all) carry a stream hundreds of
times larger than the others; with w = 1 they decide what is pruned.

The Gram of an expert sums over the tokens routed to it, or over all tokens. The Grams of all experts are one array,
`[E, in, in]`. With all tokens, gate and up of all experts share one Gram. The stream is always the routed one.

With several devices, each sums the Grams of its own windows, `[devices, in, in]` cut by device. The devices' sums are
added once a block, by one all-reduce whatever the number of batches.
"""

import math
import re
from collections.abc import Mapping
from functools import cache, partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from sparseopt.core.base.dense import activation_matmul
from sparseopt.core.base.mesh import AXIS, on_device, over
from sparseopt.layers.compiled import Compiled, Stopwatch, laid_on
from sparseopt.models import Block, Routed
from sparseopt.models.decoder.experts import rows_of_tokens, stacked_name
from sparseopt.pruning.base.activations import Batches, Stream

Weighting = Literal["uniform", "residual"]
ExpertTokens = Literal["routed", "all"]
# The stacked taps of a mixture: what gate and up of every expert read, and what its `down_proj` reads.
EXPERTS_INPUT, EXPERTS_HIDDEN = "mlp.experts.input", "mlp.experts.hidden"
# What every expert adds to the tokens routed to it: its outputs times the router's shares.
EXPERTS_ADDED = "mlp.experts.added"


def is_expert(name: str) -> bool:
    """Whether a layer belongs to an expert of a mixture, to which a batch may send no token."""
    return re.search(r"(^|[.])experts[._]", name) is not None


class Grams(NamedTuple):
    """Sums over tokens of one distinct layer input X~ `[tokens, in]`, with token weights w.

    The drift is None if it was not requested, and for experts with routed tokens: other tokens reach them in the dense
    model.
    """

    gram: Array  # `X~ᵀ w X~`, `[in, in]`
    mass: Array  # the sum of w, a scalar
    tokens: Array  # their number, a scalar
    total: Array  # the sum of w X~, `[in]`
    drift: Array | None = None  # `X~ᵀ w (X~ - X)`, `[in, in]`, with X the same input in the dense model

    @property
    def variances(self) -> Array:
        """The weighted variance of each input over the tokens, `[in]`."""
        mass = jnp.where(self.mass > 0, self.mass, 1)
        return jnp.maximum(jnp.diagonal(self.gram) / mass - (self.total / mass) ** 2, 0)

    def reordered(self, order: Int[np.ndarray, "in"]) -> "Grams":
        """The same sums with the inputs reordered: `order` says which input moves to each place."""
        both = np.ix_(order, order)
        drift = None if self.drift is None else self.drift[both]
        return self._replace(gram=self.gram[both], total=self.total[order], drift=drift)


class BlockGrams:
    """The Grams of a block by tap name; an expert's Gram is cut out of `stacked`, or shared, when accessed."""

    def __init__(self, stacked: Mapping[str, Grams]) -> None:
        self.stacked = stacked

    def __getitem__(self, tap: str) -> Grams:
        found, expert = self._place(tap)
        return found if expert is None else jax.tree.map(lambda part: part[expert], found)

    def tokens(self, tap: str) -> int:
        # Without a copy of the expert's Gram.
        found, expert = self._place(tap)
        return int(found.tokens if expert is None else found.tokens[expert])

    def _place(self, tap: str) -> tuple[Grams, int | None]:
        """The Grams that contain a tap, and its place among them; None if they are not stacked."""
        if tap in self.stacked:
            return self.stacked[tap], None
        name, expert = stacked_name(tap)
        found = self.stacked[name]
        return found, expert if found.mass.ndim else None

    def __bool__(self) -> bool:
        return bool(self.stacked)


def _product(x: Float[Array, "... in"], y: Float[Array, "... in"]) -> Float[Array, "in in"]:
    return activation_matmul(x.reshape(-1, x.shape[-1]).T, y.reshape(-1, y.shape[-1]))


def gather_grams(
    block: Any,
    x: Float[Array, "B T D"],
    weighting: Weighting = "uniform",
    dense_x: Float[Array, "B T D"] | None = None,
    counted: Bool[Array, "B"] | None = None,
    expert_tokens: ExpertTokens = "routed",
) -> dict[str, Grams]:
    """Compute the Grams of each distinct layer input of a block, by tap name, stacked for experts.

    With `dense_x`, the dense model's stream, also the drifts from it. Windows not in `counted` are ignored; None counts
    all.
    """
    inputs, stream = tapped(block, x)
    dense = None if dense_x is None else tapped(block, dense_x)[0]
    every = expert_tokens == "all" and block.num_experts > 0
    if every:
        inputs = _unrouted(inputs, x.shape)
        dense = None if dense is None else _unrouted(dense, x.shape)
    even = jnp.ones((*x.shape[:2], 1), x.dtype)
    count = jnp.asarray(x.shape[0] * x.shape[1], jnp.int32)
    if counted is not None:
        even = even * counted[:, None, None]
        count = jnp.sum(counted, dtype=jnp.int32) * x.shape[1]
    residual = even
    if weighting == "residual":
        size = jnp.mean(stream**2, axis=-1, keepdims=True)
        residual = jnp.where(size > 0, 1 / jnp.where(size > 0, size, 1), 0)
        # A token whose stream overflows must not drop out of the Gram with weight 0.
        residual = jnp.where(jnp.isfinite(size), residual, jnp.nan) * even
    found = {}
    for name, value in inputs.items():
        weights = residual if name in block.residual_taps else even
        if isinstance(value, Routed):
            found[name] = _grams_of_experts(value, weights, even, block.num_experts)
            continue
        weighted = value * weights
        drift = None if dense is None else _product(weighted, value - dense[name])
        found[name] = Grams(_product(weighted, value), jnp.sum(weights), count, jnp.sum(weighted, (0, 1)), drift)
    if every:
        dense_input = None if dense is None else dense[EXPERTS_INPUT]
        found[EXPERTS_HIDDEN] = _grams_of_every_token(block, inputs[EXPERTS_INPUT], dense_input, residual, count)
    return found


def _unrouted(inputs: Mapping[str, Any], shape: tuple[int, ...]) -> dict[str, Any]:
    """The inputs, with the experts' input once for each token, `[B, T, D]`, and without the inputs inside experts."""
    plain = {name: value for name, value in inputs.items() if name != EXPERTS_HIDDEN}
    routed: Routed = plain[EXPERTS_INPUT]
    # All copies of a token are alike.
    empty = jnp.zeros((math.prod(shape[:-1]), shape[-1]), routed.rows.dtype)
    rows = empty.at[routed.token].set(routed.rows, mode="drop")
    return plain | {EXPERTS_INPUT: rows.reshape(shape)}


def _grams_of_every_token(
    block: Any,
    x: Float[Array, "B T D"],
    dense_x: Float[Array, "B T D"] | None,
    weights: Float[Array, "B T 1"],
    count: Array,
) -> Grams:
    """The Grams of what the experts' `down_proj` would read if each token were sent to all, `[E, in, in]`."""

    def hidden(x: Array, expert: Array) -> Array:
        # One tile of all tokens.
        rows = x.reshape(1, -1, x.shape[-1])
        return block.mlp.hidden(Routed(rows, expert[None], jnp.arange(rows.shape[1])[None])).rows[0]

    def grams(expert: Array) -> tuple[Array, Array, Array | None]:
        value = hidden(x, expert)
        weighted = value * weights.reshape(-1, 1)
        drift = None if dense_x is None else _product(weighted, value - hidden(dense_x, expert))
        return _product(weighted, value), jnp.sum(weighted, axis=0), drift

    # One expert at a time: the activations of all would not fit.
    gram, total, drift = jax.lax.map(grams, jnp.arange(block.num_experts))
    mass, tokens = (jnp.full(block.num_experts, part) for part in (jnp.sum(weights), count))
    return Grams(gram, mass, tokens, total, drift)


def _grams_of_experts(
    value: Routed, weights: Float[Array, "B T 1"], counted: Float[Array, "B T 1"], experts: int
) -> Grams:
    """The Grams of all experts, `[E, in, in]`: each tile adds to its expert's Gram; `counted` is 1 or 0 per token."""
    weight_PR1 = rows_of_tokens(weights.reshape(-1, 1), value.token)
    filled_PR = rows_of_tokens(counted.reshape(-1, 1), value.token)[..., 0] > 0

    def add(grams: Array, tile: tuple[Array, Array, Array]) -> tuple[Array, None]:
        rows, weight, expert = tile
        return grams.at[expert].add(activation_matmul((rows * weight).T, rows)), None

    start = jnp.zeros((experts, value.rows.shape[-1], value.rows.shape[-1]), value.rows.dtype)
    gram, _ = jax.lax.scan(add, start, (value.rows, weight_PR1, value.expert))
    mass = jax.ops.segment_sum(jnp.sum(weight_PR1, axis=(1, 2)), value.expert, experts)
    tokens = jax.ops.segment_sum(jnp.sum(filled_PR, axis=1, dtype=jnp.int32), value.expert, experts)
    total = jax.ops.segment_sum(jnp.sum(value.rows * weight_PR1, axis=1), value.expert, experts)
    return Grams(gram, mass, tokens, total)


def tapped(block: Any, x: Float[Array, "B T D"]) -> tuple[dict[str, Any], Float[Array, "B T D"]]:
    """Run a block; return the distinct inputs of its layers by tap name (`Routed` for experts), and its output."""
    inputs: dict[str, Any] = {}
    names = {stacked_name(tap)[0] for tap in block.linears.values()}

    def tap(name: str, value: Any) -> Any:
        if name in names:
            inputs[name] = value
        return value

    output = block(x, tap=tap)
    return inputs, output


@cache
def _adding() -> Compiled:
    """Add a batch's norms of what each expert adds to its tokens to the totals `[E]`."""

    def add(block: Any, x: Array, totals: Array) -> Array:
        seen = dict[str, Any]()
        block(x, tap=lambda name, value: seen.setdefault(name, value) if name == EXPERTS_ADDED else value)
        # Empty rows are zero.
        norms = jnp.sum(jnp.linalg.norm(seen[EXPERTS_ADDED].rows, axis=-1), axis=1)
        return totals + jax.ops.segment_sum(norms, seen[EXPERTS_ADDED].expert, block.num_experts)

    return Compiled(add)


def rows_of(value: Any) -> Array:
    """The values at a tap, `[..., in]`; in tiles for experts."""
    return value.rows if isinstance(value, Routed) else value


def nonfinite_windows(block: Any, batches: Batches, name: str) -> list[int]:
    """Numbers of the windows whose activations at a tap, squared as in a Gram, are not finite; experts are stacked."""
    found: list[int] = []
    first = 0
    for x in batches:
        value = tapped(block, x)[0][name]
        rows = np.asarray(rows_of(value), np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            # A product of two of a token's entries is at most the sum of their squares.
            bad = ~np.isfinite(np.sum(rows**2, axis=-1))
        if isinstance(value, Routed):
            tokens = np.asarray(value.token)[bad]
            windows = np.unique(tokens[tokens < x.shape[0] * x.shape[1]] // x.shape[1])
        else:
            windows = np.flatnonzero(bad.any(axis=1))
        found += [first + int(window) for window in windows]
        first += len(x)
    return found


_EACH, _ALL = PartitionSpec(AXIS), PartitionSpec()


# Kept for the process: all blocks of all models of the same shape share a compiled program.
@cache
def grams_over(mesh: Mesh | None, weighting: Weighting, expert_tokens: ExpertTokens) -> Compiled:
    """Add a batch's Grams to the totals; over a mesh each device adds its windows' Grams to its own totals."""

    def add(block: Any, x: Array, dense_x: Array | None, counted: Array | None, totals: Any) -> Any:
        found = gather_grams(block, x, weighting, dense_x, counted, expert_tokens)
        # Over a mesh each device has its part of the totals, `[1, ...]`.
        return jax.tree.map(lambda total, new: total + new.reshape(total.shape), totals, found)

    if mesh is None:
        return Compiled(add, donate_argnums=(4,))
    specs = (_ALL, _EACH, _EACH, _EACH, _EACH)
    # Counts of tiles and the like begin as constants that all devices share: their types are left unchecked.
    return Compiled(jax.shard_map(add, mesh=mesh, in_specs=specs, out_specs=_EACH, check_vma=False), (4,))


@cache
def _gathering(expert_tokens: ExpertTokens) -> Any:
    """Used for shapes, which are equal for every weighting; one function, so that similar blocks are traced once."""
    return partial(gather_grams, expert_tokens=expert_tokens)


@cache
def sum_over(mesh: Mesh) -> Compiled:
    """Sum the devices' totals on each device: the only communication for a block's Grams."""

    def total(totals: Any) -> Any:
        return jax.lax.psum(jax.tree.map(lambda part: part[0], totals), AXIS)

    return Compiled(jax.shard_map(total, mesh=mesh, in_specs=(_EACH,), out_specs=_ALL, check_vma=False))


@cache
def _output_over(mesh: Mesh | None) -> Compiled:
    def run(block: Any, x: Array) -> Array:
        return block(x)

    if mesh is None:
        return Compiled(run)
    return Compiled(jax.shard_map(run, mesh=mesh, in_specs=(_ALL, _EACH), out_specs=_EACH, check_vma=False))


def _empty_totals(shapes: Any, mesh: Mesh | None) -> Any:
    def zeros(shape: Any) -> Array:
        if mesh is None:
            return on_device(np.zeros(shape.shape, shape.dtype))
        whole = (mesh.size, *shape.shape)
        return jax.make_array_from_callback(whole, over(mesh), lambda part: np.zeros((1, *shape.shape), shape.dtype))

    return jax.tree.map(zeros, shapes)


class BlockRunner:
    """Runs the blocks of one model over batches of activations.

    Attributes:
        seconds: time spent so far, without compiling.
    """

    def __init__(self) -> None:
        self.seconds = 0.0

    def grams(
        self,
        block: Block,
        batches: Batches,
        weighting: Weighting = "uniform",
        dense: Batches | None = None,
        expert_tokens: ExpertTokens = "routed",
    ) -> BlockGrams:
        """Sum Grams over all batches, by tap name; with the dense model's batches also the drifts from them."""
        watch, mesh = Stopwatch(), batches.mesh
        dense_x = None if dense is None else dense[0]
        shapes = jax.eval_shape(_gathering(expert_tokens), block, batches[0], dense_x=dense_x)
        laid, totals = laid_on(block, mesh), _empty_totals(shapes, mesh)
        adding = grams_over(mesh, weighting, expert_tokens)
        for index, x in enumerate(batches):
            dense_x = None if dense is None else dense[index]
            totals = adding(laid, x, dense_x, batches.counted(index), totals)
        found = totals if mesh is None else sum_over(mesh)(totals)
        self.seconds += watch.read(found)[0]
        return BlockGrams(found)

    def contributions(self, block: Block, batches: Batches) -> Float[np.ndarray, "E"]:
        """What each expert of a mixture adds to the tokens T_e that the router sends to it; 0 without any.

            sum over t in T_e of  share_e(x_t) ||expert_e(x_t)||

        REAP's score is the mean over T_e. The sum also counts how often an expert is needed, and was better on two
        small trained mixtures.

        Source: Lasby et al., "REAP the experts: why pruning prevails for one-shot MoE compression", 2025.
        """
        watch, totals = Stopwatch(), on_device(np.zeros(block.num_experts, np.float32))
        for x in batches.on_one_device():
            totals = _adding()(block, x, totals)
        self.seconds += watch.read(totals)[0]
        return np.asarray(totals)

    def run(self, block: Block, x: Array, mesh: Mesh | None = None) -> Array:
        return _output_over(mesh)(block, x)

    def forward(self, block: Block, batches: Batches) -> Batches:
        watch, outputs, laid, y = Stopwatch(), batches.empty(), laid_on(block, batches.mesh), None
        for x in batches:
            y = self.run(laid, x, batches.mesh)
            outputs.append(y)
        self.seconds += watch.read(y)[0]
        return outputs

    def through(self, block: Block, stream: Stream) -> Stream:
        return Stream(self.forward(block, stream.calibration), self.forward(block, stream.heldout))
