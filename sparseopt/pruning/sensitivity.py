"""Floor 6: how sensitive the model's loss is to an error at each output of its linears, by one backward pass.

    sensitivity of output c of a linear  =  mean over calibration tokens t of ( d loss / d y_tc )²          [out]

with `loss = - sum log p(next token)` and y the linear's output in the dense model. To second order an error d at y
costs `1/2 d F d`, with F the Fisher information, of which this is the diagonal, for the tokens of the text. Outputs
differ widely: some query and key rows matter a hundred times as much as others. A layer whose errors are weighted by
sensitivity keeps more weights in the rows that matter.

Squared errors are weighted by the root of the sensitivity: the loss is far from quadratic where half of a model is
pruned, and the full weights leave too little to the other rows. Perplexity of SmolLM2-135M at 50 %: without weights
50.6, with full ones 48.0, with their root 46.8.

The dense model runs forward once, and backward block by block. Of L blocks, the activations before about sqrt(L) are
kept and the others recomputed: 2 sqrt(L) streams at most are in memory, for one more forward pass (Griewank and
Walther, "Algorithm 799: revolve", 2000).

Source: the diagonal of the Fisher information as in LeCun, Denker, Solla, "Optimal brain damage", 1990; its split
into inputs (the Gram) and outputs as in Martens and Grosse, "Optimizing neural networks with Kronecker-factored
approximate curvature", 2015.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sparseopt.models import Block, Head, PrunableModel, Routed
from sparseopt.models.experts import stacked_name, unstacked_names
from sparseopt.pruning.activations import Batches
from sparseopt.pruning.calibration import BlockRunner, forward_flops
from sparseopt.pruning.compiled import Compiled
from sparseopt.pruning.evaluation import negative_log_likelihood

OutputWeighting = Literal["uniform", "gradient"]
# Least sensitivity of an output, relative to the mean of its linear: the weights stay above 0.
FLOOR = 1e-4
# Weights of squared errors are this power of the sensitivity.
POWER = 0.5


def _loss_gradient(
    head: Head, x: Float[Array, "B T D"], tokens: Int[Array, "B T"], skipped: Int[Array, ""]
) -> Float[Array, "B T D"]:
    def loss(x: Array) -> Array:
        return jnp.sum(jax.lax.map(lambda pair: negative_log_likelihood(head, pair[0], pair[1], skipped), (x, tokens)))

    return jax.grad(loss)(x)


def _block_gradient(
    block: Block, x: Float[Array, "B T D"], after: Float[Array, "B T D"]
) -> tuple[Float[Array, "B T D"], dict[str, Float[Array, "out"]]]:
    """From the gradient after a block to that before it, and the squared gradients at its linears' outputs.

    Those of experts are stacked, `[E, out]`.
    """
    names = {stacked_name(name)[0] for name in block.linears}

    def run(x: Array, errors: dict[str, Array]) -> tuple[Array, dict[str, Any]]:
        outputs: dict[str, Any] = {}

        def tap(name: str, value: Any) -> Any:
            if name not in names:
                return value
            outputs[name] = value
            if name not in errors:
                return value
            return value._replace(rows=value.rows + errors[name]) if isinstance(value, Routed) else value + errors[name]

        return block(x, tap=tap), outputs

    def rows_of(value: Any) -> Any:
        return value.rows if isinstance(value, Routed) else value

    shapes = jax.eval_shape(run, x, {})[1]
    errors = {name: jnp.zeros(rows_of(value).shape, x.dtype) for name, value in shapes.items()}
    _, backward, outputs = jax.vjp(run, x, errors, has_aux=True)
    before, gradients = backward(after)
    squares = {}
    for name, gradient in gradients.items():
        value = outputs[name]
        if isinstance(value, Routed):
            squares[name] = jax.ops.segment_sum(jnp.sum(gradient**2, axis=1), value.expert, block.num_experts)
        else:
            squares[name] = jnp.sum(gradient**2, axis=(0, 1))
    return before, squares


_gradient_after_blocks = Compiled(_loss_gradient)
_gradient_through_block = Compiled(_block_gradient)


@dataclass(frozen=True)
class Site:
    """One block of the dense model in the backward pass.

    Attributes:
        index: its number.
        block: dense.
        batches: activations before it.
        sensitivity: of its linears' outputs, `[out]` float32, 0 or more, by the linear's name.
    """

    index: int
    block: Block
    batches: Batches
    sensitivity: dict[str, np.ndarray]


def backward_sweep(
    model: PrunableModel,
    batches: Batches,
    tokens: Int[np.ndarray, "windows T"],
    runner: BlockRunner,
    observer: Callable[[int, int], None],
    *,
    skipped: int = 0,
) -> Iterator[Site]:
    """Every block of the dense model with the sensitivity of its linears' outputs, the last block first.

    The batches are embedded windows of these tokens. The observer is called with (block passes done, in all). The loss
    does not count the first `skipped` predictions of every window.
    """
    blocks = model.num_blocks
    stride = math.isqrt(blocks - 1) + 1
    starts = range(0, blocks, stride)
    done, steps = 0, 3 * blocks - len(starts)

    def forward(index: int, stream: Batches) -> Batches:
        nonlocal done
        done += 1
        observer(done, steps)
        return runner.forward(model.block(index), stream)

    marks, stream = {}, batches
    for index in range(blocks):
        if index in starts:
            marks[index] = stream
        stream = forward(index, stream)
    gradients: list[Array] = []
    head = model.head()
    for x in stream:
        ids = jnp.asarray(tokens[len(gradients) * len(x) :][: len(x)])
        gradients.append(runner.account(_gradient_after_blocks(head, x, ids, skipped)))
    del head
    for start in reversed(starts):
        segment = [marks.pop(start)]
        for index in range(start, min(start + stride, blocks) - 1):
            segment.append(forward(index, segment[-1]))
        while segment:
            index, block, stream = start + len(segment) - 1, model.block(start + len(segment) - 1), segment.pop()
            squares: Any = None
            for position, x in enumerate(stream):
                gradients[position], new = runner.account(_gradient_through_block(block, x, gradients[position]))
                squares = new if squares is None else jax.tree.map(jnp.add, squares, new)
                runner.flops += 3 * forward_flops(block, x.shape)
            found = _by_linear({name: np.asarray(value) / tokens.size for name, value in squares.items()})
            yield Site(index, block, stream, found)
            done += 1
            observer(done, steps)


def _by_linear(stacked: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The sensitivities of every linear, those of experts one by one."""
    found: dict[str, np.ndarray] = {}
    for name, value in stacked.items():
        alone = unstacked_names(name, len(value))
        found |= {name: value} if alone is None else dict(zip(alone, value, strict=True))
    return found


def output_weights(sensitivity: Float[np.ndarray, "out"]) -> Float[np.ndarray, "out"]:
    """Weights of squared errors at a linear's outputs, above 0; ones where the loss does not depend on any."""
    mean = sensitivity.mean()
    return np.maximum(sensitivity, FLOOR * mean) ** POWER if mean > 0 else np.ones_like(sensitivity)
