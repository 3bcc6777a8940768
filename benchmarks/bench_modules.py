"""What watching a Flax network costs in `prune_module`, beyond its forward passes and the Gram products. JSON lines.

    python benchmarks/bench_modules.py [--small]

A transformer in NNX is pruned by magnitude, whose solves take next to no time. Beside it, in the same process: two
passes of every block over every batch, in a compiled program, and the products of the inputs of its linears.
"""

import jax
import jax.numpy as jnp
import numpy as np
from common import emit, environment, options, timed
from flax import nnx

import sparseopt as so


class Block(nnx.Module):
    """A block of a transformer."""

    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        self.attention = nnx.MultiHeadAttention(8, width, decode=False, rngs=rngs)
        self.norms = nnx.List([nnx.LayerNorm(width, rngs=rngs) for _ in range(2)])
        self.up, self.down = nnx.Linear(width, 4 * width, rngs=rngs), nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.norms[0](x))
        return x + self.down(nnx.gelu(self.up(self.norms[1](x))))


class Network(nnx.Module):
    """Its blocks, and a head."""

    def __init__(self, width: int, blocks: int) -> None:
        rngs = nnx.Rngs(0)
        self.blocks = nnx.List([Block(width, rngs) for _ in range(blocks)])
        self.head = nnx.Linear(width, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(axis=1))


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--small", action="store_true", help="seconds instead of minutes, for a test")
    small = parser.parse_args().small
    width, blocks, count, shape = (32, 2, 2, (2, 16)) if small else (512, 6, 8, (8, 256))
    network, rng = Network(width, blocks), np.random.default_rng(0)
    batches = [jnp.asarray(rng.standard_normal((*shape, width)), jnp.float32) for _ in range(count)]
    run = nnx.jit(lambda block, x: block(x))
    product = jax.jit(lambda x: (jnp.matmul(x.T, x, precision="highest"), x.sum(axis=0)))
    # What attention's projections read, its output, `up` and `down`.
    inputs = [jnp.ones((shape[0] * shape[1], size)) for size in (width, width, width, 4 * width)]

    def forward() -> None:
        for block in network.blocks:
            for x in batches:
                jax.block_until_ready(run(block, x))

    def products() -> None:
        for _ in range(blocks * count):
            for x in inputs:
                jax.block_until_ready(product(x))

    def prune() -> so.pruning.ModuleReport:
        return so.pruning.prune_module(network, batches, so.pruning.Recipe(method="magnitude"))[1]

    for call in (forward, products, prune):
        call()
    # The parts in turn, so that all have the same machine.
    for repeat in range(2 if small else 5):
        passes, grams = 2 * timed(forward).seconds, timed(products).seconds
        report = prune()
        watching = report.seconds - report.solver_seconds
        emit(
            "watching a network", repeat=repeat, reduced=small, width=width, blocks=blocks,
            tokens=count * shape[0] * shape[1], passes=passes, products=grams, seconds=watching,
            ratio=watching / (passes + grams),
        )  # fmt: skip
    emit("environment", **environment())


if __name__ == "__main__":
    main()
