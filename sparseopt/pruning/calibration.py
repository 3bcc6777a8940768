"""Floor 6: activations through one block: Grams of its linears' inputs, and its outputs for the next block.

Gram of an input = sum over tokens of x xᵀ, [in, in], float32, accumulated on the device
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from sparseopt.core.losses import HIGHEST
from sparseopt.pruning.compiled import Compiled

# Tokens a batch: enough for the matrix products to reach their rate, little enough to stay in cache.
BATCH_TOKENS = 2048


def _gram(x: Float[Array, "... in"]) -> Float[Array, "in in"]:
    flat = x.reshape(-1, x.shape[-1])
    return jnp.matmul(flat.T, flat, precision=HIGHEST)


def gather_grams(block: nnx.Module, x: Float[Array, "B T D"]) -> dict[str, Array]:
    """The Gram of each distinct linear input of a block, by tap name."""
    grams: dict[str, Array] = {}

    def tap(name: str, value: Array) -> Array:
        grams[name] = _gram(value)
        return value

    block(x, tap=tap)
    return grams


class BlockRunner:
    """Runs the blocks of one model over batches of activations, compiled once for all blocks.

    Attributes:
        seconds: device time of all forward passes so far, compilation apart.
        flops: floating-point operations of these passes (two a multiply-add; products only).
    """

    def __init__(self) -> None:
        self._grams = Compiled(self._accumulate, donate_argnums=(2,))
        self._forward = Compiled(lambda block, x: block(x))
        self.seconds = 0.0
        self.flops = 0.0

    @property
    def compilations(self) -> int:
        """Programs compiled so far."""
        return self._grams.compilations + self._forward.compilations

    @property
    def compile_seconds(self) -> float:
        """Time spent compiling them."""
        return self._grams.compile_seconds + self._forward.compile_seconds

    @staticmethod
    def _accumulate(block: nnx.Module, x: Array, totals: dict[str, Array]) -> dict[str, Array]:
        return jax.tree.map(jnp.add, totals, gather_grams(block, x))

    def grams(self, block: nnx.Module, batches: list[Array]) -> dict[str, Array]:
        """Grams summed over all batches, by tap name."""
        shapes = jax.eval_shape(gather_grams, block, batches[0])
        totals: Any = {name: jnp.asarray(np.zeros(s.shape, np.float32)) for name, s in shapes.items()}
        for x in batches:
            timed = self._grams(block, x, totals)
            totals = timed.value
            self.seconds += timed.seconds
            self.flops += forward_flops(block, x.shape, skip_last=True)
            self.flops += sum(2 * x.shape[0] * x.shape[1] * s.shape[0] ** 2 for s in shapes.values())
        return totals

    def forward(self, block: nnx.Module, batches: list[Array]) -> list[Array]:
        """The block's outputs, batch by batch."""
        outputs = []
        for x in batches:
            timed = self._forward(block, x)
            outputs.append(timed.value)
            self.seconds += timed.seconds
            self.flops += forward_flops(block, x.shape)
        return outputs


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
