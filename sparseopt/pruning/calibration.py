"""Floor 6: activations through one block: Grams of its linears' inputs, and its outputs for the next block.

Gram of an input = sum over tokens t of w_t x_t x_tᵀ, [in, in], float32, accumulated on the device

Weighting "uniform" has w = 1. With "residual", a linear that writes into the residual stream has
`w_t = 1 / mean square of the stream at t behind the block`: the norms behind divide every token by its own size, so
what matters is an error relative to that size. Some tokens (the first of a text above all) carry a stream that is
hundreds of times larger than the others'; with w = 1 they decide what is pruned.
"""

from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from sparseopt.core.losses import HIGHEST
from sparseopt.pruning.compiled import Compiled, Timed

# Tokens a batch: enough for the matrix products to reach their rate, little enough to stay in cache.
BATCH_TOKENS = 2048

Weighting = Literal["uniform", "residual"]
WEIGHTINGS: tuple[Weighting, ...] = get_args(Weighting)


class Grams(NamedTuple):
    """What the tokens say of one distinct linear input X~ `[tokens, in]`, with token weights w.

    Attributes:
        gram: `X~ᵀ w X~`, `[in, in]`.
        mass: the sum of w, a scalar; the number of tokens where all weigh 1.
        drift: `X~ᵀ w (X~ - X)`, `[in, in]`, with X the same input in the dense model; None where it was not asked for.
    """

    gram: Array
    mass: Array
    drift: Array | None = None


def _product(x: Float[Array, "... in"], y: Float[Array, "... in"]) -> Float[Array, "in in"]:
    return jnp.matmul(x.reshape(-1, x.shape[-1]).T, y.reshape(-1, y.shape[-1]), precision=HIGHEST)


def gather_grams(
    block: Any,
    x: Float[Array, "B T D"],
    weighting: Weighting = "uniform",
    dense_x: Float[Array, "B T D"] | None = None,
) -> dict[str, Grams]:
    """The Grams of each distinct linear input of a block, by tap name; with `dense_x` also the drifts from it."""
    inputs, stream = tapped(block, x)
    dense = None if dense_x is None else tapped(block, dense_x)[0]
    even = jnp.ones((*x.shape[:2], 1), x.dtype)
    residual = even
    if weighting == "residual":
        size = jnp.mean(stream**2, axis=-1, keepdims=True)
        residual = jnp.where(size > 0, 1 / jnp.where(size > 0, size, 1), 0)
    found = {}
    for name, value in inputs.items():
        weights = residual if name in block.residual_taps else even
        weighted = value * weights
        drift = None if dense is None else _product(weighted, value - dense[name])
        found[name] = Grams(_product(weighted, value), jnp.sum(weights), drift)
    return found


def tapped(block: Any, x: Float[Array, "B T D"]) -> tuple[dict[str, Array], Float[Array, "B T D"]]:
    """Run a block: the distinct inputs of its linears by tap name, and its output."""
    inputs: dict[str, Array] = {}

    def tap(name: str, value: Array) -> Array:
        if name not in block.linears:
            inputs[name] = value
        return value

    output = block(x, tap=tap)
    return inputs, output


def _add_grams(
    weighting: Weighting, block: nnx.Module, x: Array, dense_x: Array | None, totals: dict[str, Grams]
) -> dict[str, Grams]:
    return jax.tree.map(jnp.add, totals, gather_grams(block, x, weighting, dense_x))


# One each for the process: all blocks of all models of the same shape share a compiled program.
_grams_of_batch = {kind: Compiled(partial(_add_grams, kind), donate_argnums=(3,)) for kind in WEIGHTINGS}
_output_of_batch = Compiled(lambda block, x: block(x))


class BlockRunner:
    """Runs the blocks of one model over batches of activations and keeps account.

    Attributes:
        seconds: device time of all forward passes so far, compilation apart.
        flops: floating-point operations of these passes (two a multiply-add; products only).
        compilations: programs compiled.
        compile_seconds: the time that took.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.flops = 0.0
        self.compilations = 0
        self.compile_seconds = 0.0

    def grams(
        self,
        block: nnx.Module,
        batches: list[Array],
        weighting: Weighting = "uniform",
        dense_batches: list[Array] | None = None,
    ) -> dict[str, Grams]:
        """Grams summed over all batches, by tap name; with `dense_batches` also the drifts from them."""
        first = None if dense_batches is None else dense_batches[0]
        gather = partial(gather_grams, weighting=weighting)
        shapes = jax.eval_shape(lambda b, x, dense: gather(b, x, dense_x=dense), block, batches[0], first)
        totals: Any = jax.tree.map(lambda s: jnp.asarray(np.zeros(s.shape, np.float32)), shapes)
        for index, x in enumerate(batches):
            dense_x = None if dense_batches is None else dense_batches[index]
            totals = self.account(_grams_of_batch[weighting](block, x, dense_x, totals))
            self.flops += forward_flops(block, x.shape, skip_last=weighting == "uniform")
            self.flops += 0 if dense_x is None else forward_flops(block, x.shape, skip_last=True)
            self.flops += sum(2 * x.shape[0] * x.shape[1] * s.size for s in jax.tree.leaves(shapes) if s.ndim == 2)
        return totals

    def forward(self, block: nnx.Module, batches: list[Array]) -> list[Array]:
        """The block's outputs, batch by batch."""
        outputs = []
        for x in batches:
            outputs.append(self.account(_output_of_batch(block, x)))
            self.flops += forward_flops(block, x.shape)
        return outputs

    def account(self, timed: Timed) -> Any:
        """The result of a timed program, its time counted."""
        self.seconds += timed.seconds
        self.compile_seconds += timed.compile_seconds
        self.compilations += timed.compile_seconds > 0
        return timed.value


def forward_flops(block: Any, shape: tuple[int, ...], *, skip_last: bool = False) -> float:
    """Operations of a block's products on activations `[B, T, D]`; softmax and norms are not counted.

    `skip_last` leaves out the last linear, whose output a Gram pass does not need.
    """
    batch, time, _ = shape
    sizes = [np.prod(block.linear(name).weight.shape) for name in block.linears]
    linears = 2 * batch * time * sum(sizes[:-1] if skip_last else sizes)
    # Scores and mixed values of the positions up to each query's own: half of a full square.
    attention = 2 * batch * time * time * block.attention_width
    return float(linears + attention)


def make_batches(embedded: Float[Array, "windows T D"]) -> list[Array]:
    """Split windows into equal batches of about `BATCH_TOKENS` tokens; equal, so that one program serves all."""
    windows, time = embedded.shape[:2]
    per_batch = max(1, min(windows, BATCH_TOKENS // time))
    while windows % per_batch:
        per_batch -= 1
    return [embedded[i : i + per_batch] for i in range(0, windows, per_batch)]
