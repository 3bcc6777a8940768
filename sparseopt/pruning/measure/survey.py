"""What is measured on the dense model before any block is pruned.

| asked for | measured |
|---|---|
| outputs "gradient", allocation "curves" | how sensitive the loss is to an error at each output of its layers |
| allocation "curves" | the loss against the sparsity of each layer, see `allocation` |

Both use a few thousand tokens and run on one device in each process; all continue with what the first process found.

    sensitivity of output c of a layer  =  mean over calibration tokens t of ( d loss / d y_tc )²          [out]

with `loss = - sum log p(next token)` and y the layer's output in the dense model. To second order an error d at y
costs `1/2 d F d`, with F the Fisher information, of which this is the diagonal, for the tokens of the text. Some query
and key rows matter a hundred times as much as others; a layer with weighted errors keeps more weights there. Squared
errors are weighted by the root: the loss is far from quadratic when half of a model is pruned, and the full weights
leave too little to the other rows. Perplexity of SmolLM2-135M at 50 %: 50.6 without weights, 48.0 with full weights,
46.8 with their root.

The dense model runs forward once, and backward block by block. Activations before about sqrt(L) of L blocks are kept
and the others recomputed: at most 2 sqrt(L) streams are in memory, for one more forward pass (Griewank and Walther,
"Algorithm 799: revolve", 2000).

Source: the diagonal of the Fisher information as in LeCun, Denker, Solla, "Optimal brain damage", 1990; its split
into inputs (the Gram) and outputs as in Martens and Grosse, "Optimizing neural networks with Kronecker-factored
approximate curvature", 2015.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sparseopt.layers.compiled import Compiled
from sparseopt.layers.patterns import implied_sparsity, share_unit
from sparseopt.layers.side_by_side import agreed
from sparseopt.models import Block, Head, Routed, StreamedModel
from sparseopt.models.decoder.experts import stacked_name, unstacked_names
from sparseopt.pruning.base.activations import Batches, Stream
from sparseopt.pruning.base.grams import BlockRunner, rows_of
from sparseopt.pruning.base.records import AllocationRecord
from sparseopt.pruning.evaluate.perplexity import negative_log_likelihood
from sparseopt.pruning.recipe.allocation import (
    allocate_curves,
    between,
    choose_pruned,
    default_bounds,
    exact_shares,
    losses_of_linear,
)
from sparseopt.pruning.recipe.prune_recipe import Recipe
from sparseopt.pruning.run.folder_pass import Pass
from sparseopt.pruning.run.measured import measured_once
from sparseopt.pruning.run.plan import Plan, layer_patterns

# Most calibration tokens used for sensitivities and curves, but at least one window: both are means over tokens.
TOKENS = 8192
# Levels of sparsity at which a curve is measured.
LEVELS = np.round(np.arange(0.1, 0.96, 0.05), 2)

# Smallest sensitivity of an output, relative to the mean of its layer: the weights stay above 0.
FLOOR = 1e-4
# Weights of squared errors are this power of the sensitivity.
POWER = 0.5


@dataclass(frozen=True)
class Site:
    """One block of the dense model in the backward pass, with the activations before it."""

    index: int
    block: Block
    batches: Batches
    sensitivity: dict[str, np.ndarray]  # of its layers' outputs, `[out]` float32, 0 or more


def survey(work: Pass, stream: Stream) -> Plan:
    """Measure what the recipe of a pass needs; return the plan with the patterns and output weights that follow.

    An allocation is stored with its run, since a resumed run may have other devices. `stream` is the stream before the
    first block.
    """
    model, plan, windows, own = work.model, work.plan, work.windows, work.progress
    recipe, patterns = plan.recipe, plan.patterns
    by_curves = recipe.get("allocation") == "curves" and own.allocation is None
    weighted = recipe.output_weights == "gradient"
    levels = _levels(cast(Recipe, recipe)) if by_curves else LEVELS[:0]
    weights: dict[str, np.ndarray] = {}
    curves: dict[str, np.ndarray] = {}
    if by_curves or weighted:
        tokens = windows.calibration[: max(1, TOKENS // windows.calibration.shape[1])]
        key = work.key("survey", tokens, levels=levels.tolist(), layers=list(patterns) if by_curves else [])
        batches = stream.calibration.first(len(tokens))
        (weights, curves), spared = measured_once(key, lambda: _measured(work, batches, tokens, levels))
        # So that the times of several runs can be compared.
        work.survey_seconds += spared
    if recipe.get("allocation") not in (None, "uniform"):
        recipe = cast(Recipe, recipe)
        if own.allocation is None:
            work.keep(AllocationRecord(_shares(model, plan, recipe, levels, curves)))
        assert own.allocation is not None
        patterns = layer_patterns(model, recipe, plan.method, own.allocation.shares)
    return replace(plan, patterns=patterns, output_weights=weights if weighted else {})


def _measured(
    work: Pass, batches: Batches, tokens: Int[np.ndarray, "windows T"], levels: np.ndarray
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The output weights of all layers and, with levels, the curves of the layers that the plan prunes, by key."""
    weights: dict[str, np.ndarray] = {}
    curves: dict[str, np.ndarray] = {}

    def told(done: int, total: int) -> None:
        work.observer("survey, pass", done, total)

    skipped = int(work.windows.bos is not None)
    for site in backward_sweep(work.model, batches, tokens, work.runner, told, skipped=skipped):
        keys = {name: work.model.weight_key(site.index, name) for name in site.sensitivity}
        weights |= {keys[name]: output_weights(value) for name, value in site.sensitivity.items()}
        names = [name for name, key in keys.items() if key in work.plan.patterns] if len(levels) else []
        if names:
            curves |= {keys[name]: curve for name, curve in _curves(site, names, levels, work.runner).items()}
    return agreed((weights, curves))


def _levels(recipe: Recipe) -> np.ndarray:
    low, high = _bounds(recipe)
    inner = [level for level in LEVELS if low + 0.01 < level < high - 0.01]
    return np.unique([low, *inner, high])


def _bounds(recipe: Recipe) -> tuple[float, float]:
    if (implied := implied_sparsity(recipe.pattern)) is not None:
        return implied, implied
    return recipe.bounds or default_bounds(recipe.sparsity)


def _curves(site: Site, names: Sequence[str], levels: np.ndarray, runner: BlockRunner) -> dict[str, np.ndarray]:
    """Estimated loss at the levels, by layer; token weights as with method best, scaled to mean 1."""
    grams = runner.grams(site.block, site.batches, "residual")
    curves = {}
    for name in names:
        sensitivity, inputs = site.sensitivity[name], grams[site.block.linears[name]]
        arguments: Any = (
            site.block.read(f"{name}.weight"),
            inputs.gram / jnp.where(inputs.mass > 0, inputs.mass, 1),  # of an expert that no token reaches 0
            sensitivity,
            output_weights(sensitivity),
            jnp.asarray(levels, jnp.float32),
        )
        curves[name] = np.asarray(losses_of_linear(*arguments), np.float64)
    return curves


def _shares(
    model: StreamedModel,
    plan: Plan,
    recipe: Recipe,
    levels: np.ndarray,
    curves: Mapping[str, np.ndarray],
) -> dict[str, float]:
    """The fraction of zeros of each layer that the plan prunes, by key; the total is over these."""
    sparsity, bounds, keys = recipe.sparsity, _bounds(recipe), list(plan.patterns)
    shapes = [model.weight_shape(key) for key in keys]
    sizes = np.array([np.prod(shape) for shape in shapes])
    if (implied := implied_sparsity(recipe.pattern)) is not None:
        found = between(levels, np.stack([curves[key] for key in keys]), np.array([implied]))[:, 0]
        pruned = choose_pruned(found, sizes, implied, sparsity)
        return {key: implied for key, goes in zip(keys, pruned, strict=True) if goes}
    shares = allocate_curves(levels, np.stack([curves[key] for key in keys]), sizes, sparsity, bounds)
    units = np.array([share_unit(recipe.pattern, shape) for shape in shapes])
    exact = exact_shares(shares, sizes, units, sparsity, bounds)
    return dict(zip(keys, exact.tolist(), strict=True))


def _loss_gradient(
    head: Head, x: Float[Array, "B T D"], tokens: Int[Array, "B T"], skipped: Int[Array, ""]
) -> Float[Array, "B T D"]:
    def loss(x: Array) -> Array:
        return jnp.sum(jax.lax.map(lambda pair: negative_log_likelihood(head, pair[0], pair[1], skipped), (x, tokens)))

    return jax.grad(loss)(x)


def _block_gradient(
    block: Block, x: Float[Array, "B T D"], after: Float[Array, "B T D"]
) -> tuple[Float[Array, "B T D"], dict[str, Float[Array, "out"]]]:
    """Propagate the gradient back through a block; also return the squared gradients at its layers' outputs.

    Squared gradients of experts are stacked, `[E, out]`.
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


def backward_sweep(
    model: StreamedModel,
    batches: Batches,
    tokens: Int[np.ndarray, "windows T"],
    runner: BlockRunner,
    observer: Callable[[int, int], None],
    *,
    skipped: int = 0,
) -> Iterator[Site]:
    """Every block of the dense model with the sensitivity of its layers' outputs, the last block first.

    The batches are embedded windows of these tokens. The observer is called with (block passes done, their total). The
    loss ignores the first `skipped` predictions of every window.
    """
    blocks = model.num_blocks
    stride = math.isqrt(blocks - 1) + 1
    starts = range(0, blocks, stride)
    # The first pass keeps what stands before the first block of each segment, and before all blocks of the last one.
    done, steps = 0, 2 * blocks + len(starts[:-1]) * (stride - 1)

    def forward(index: int, stream: Batches) -> Batches:
        nonlocal done
        done += 1
        observer(done, steps)
        return runner.forward(model.block(index), stream)

    segments, stream = list[list[Batches]](), batches
    for index in range(blocks):
        if index in starts:
            segments.append([stream])
        elif index > starts[-1]:
            segments[-1].append(stream)
        stream = forward(index, stream)
    gradients: list[Array] = []
    head = model.head()
    for x in stream:
        ids = jnp.asarray(tokens[len(gradients) * len(x) :][: len(x)])
        gradients.append(_gradient_after_blocks(head, x, ids, skipped))
    del head
    for start in reversed(starts):
        segment = segments.pop()
        for index in range(start + len(segment) - 1, min(start + stride, blocks) - 1):
            segment.append(forward(index, segment[-1]))
        while segment:
            index, block, stream = start + len(segment) - 1, model.block(start + len(segment) - 1), segment.pop()
            squares: Any = None
            for position, x in enumerate(stream):
                gradients[position], new = _gradient_through_block(block, x, gradients[position])
                squares = new if squares is None else jax.tree.map(jnp.add, squares, new)
            found = _by_linear({name: np.asarray(value) / tokens.size for name, value in squares.items()})
            yield Site(index, block, stream, found)
            done += 1
            observer(done, steps)


def _by_linear(stacked: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for name, value in stacked.items():
        alone = unstacked_names(name, len(value))
        found |= {name: value} if alone is None else dict(zip(alone, value, strict=True))
    return found


def output_weights(sensitivity: Float[np.ndarray, "out"]) -> Float[np.ndarray, "out"]:
    """Weights of squared errors at a layer's outputs, above 0; ones if the loss depends on none of them."""
    mean = sensitivity.mean()
    return np.maximum(sensitivity, FLOOR * mean) ** POWER if mean > 0 else np.ones_like(sensitivity)
