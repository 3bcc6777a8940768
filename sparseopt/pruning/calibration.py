"""Floor 6: activations through one block: Grams of its linears' inputs, and its outputs for the next block.

Gram of an input = sum over tokens t of w_t x_t x_tᵀ, [in, in], float32, accumulated on the device

Weighting "uniform" has w = 1. With "residual", a linear that writes into the residual stream has
`w_t = 1 / mean square of the stream at t behind the block`: the norms behind divide every token by its own size, so
what matters is an error relative to that size. Some tokens (the first of a text above all) carry a stream that is
hundreds of times larger than the others'; with w = 1 they decide what is pruned.
"""

from functools import partial
from typing import Any, Literal, get_args

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


def _gram(x: Float[Array, "... in"]) -> Float[Array, "in in"]:
    flat = x.reshape(-1, x.shape[-1])
    return jnp.matmul(flat.T, flat, precision=HIGHEST)


def gather_grams(block: Any, x: Float[Array, "B T D"], weighting: Weighting = "uniform") -> dict[str, Array]:
    """The Gram of each distinct linear input of a block, by tap name."""
    inputs: dict[str, Array] = {}

    def tap(name: str, value: Array) -> Array:
        inputs[name] = value
        return value

    stream = block(x, tap=tap)
    if weighting == "residual":
        size = jnp.sqrt(jnp.mean(stream**2, axis=-1, keepdims=True))
        factor = jnp.where(size > 0, 1 / jnp.where(size > 0, size, 1), 0)
        inputs |= {name: inputs[name] * factor for name in block.residual_taps}
    return {name: _gram(value) for name, value in inputs.items()}


def _add_grams(weighting: Weighting, block: nnx.Module, x: Array, totals: dict[str, Array]) -> dict[str, Array]:
    return jax.tree.map(jnp.add, totals, gather_grams(block, x, weighting))


# One each for the process: all blocks of all models of the same shape share a compiled program.
_grams_of_batch = {kind: Compiled(partial(_add_grams, kind), donate_argnums=(2,)) for kind in WEIGHTINGS}
_output_of_batch = Compiled(lambda block, x: block(x))


class BlockRunner:
    """Runs the blocks of one model over batches of activations and keeps account.

    Attributes:
        weighting: of the tokens in the Grams.
        seconds: device time of all forward passes so far, compilation apart.
        flops: floating-point operations of these passes (two a multiply-add; products only).
        compilations: programs compiled.
        compile_seconds: the time that took.
    """

    def __init__(self, weighting: Weighting = "uniform") -> None:
        self.weighting: Weighting = weighting
        self.seconds = 0.0
        self.flops = 0.0
        self.compilations = 0
        self.compile_seconds = 0.0

    def grams(self, block: nnx.Module, batches: list[Array]) -> dict[str, Array]:
        """Grams summed over all batches, by tap name."""
        shapes = jax.eval_shape(gather_grams, block, batches[0])
        totals: Any = {name: jnp.asarray(np.zeros(s.shape, np.float32)) for name, s in shapes.items()}
        for x in batches:
            totals = self._account(_grams_of_batch[self.weighting](block, x, totals))
            self.flops += forward_flops(block, x.shape, skip_last=self.weighting == "uniform")
            self.flops += sum(2 * x.shape[0] * x.shape[1] * s.shape[0] ** 2 for s in shapes.values())
        return totals

    def forward(self, block: nnx.Module, batches: list[Array]) -> list[Array]:
        """The block's outputs, batch by batch."""
        outputs = []
        for x in batches:
            outputs.append(self._account(_output_of_batch(block, x)))
            self.flops += forward_flops(block, x.shape)
        return outputs

    def _account(self, timed: Timed) -> Any:
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
