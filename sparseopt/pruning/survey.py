"""Floor 6: what is measured on the dense model before any block is pruned, once for all recipes of a pass.

| asked for | measured |
|---|---|
| outputs "gradient", allocation "curves" | one forward and one backward pass, see `sensitivity` |
| allocation "curves" | the loss against the sparsity of each linear, see `loss_curves` |
| allocation "owl" | the share of outliers of each block |
| anything else | nothing |

The first looks at a few thousand tokens and runs on one device in each process; what processes go on with is what the
first of them found. The last runs on all devices.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from sparseopt.models import PrunableBlock, PrunableModel
from sparseopt.pruning.activations import Batches, first_windows, make_batches
from sparseopt.pruning.allocation import allocate_curves, allocate_owl, default_bounds, exact_shares
from sparseopt.pruning.branch import Stream
from sparseopt.pruning.calibration import BlockRunner
from sparseopt.pruning.devices import agreed
from sparseopt.pruning.loss_curves import losses_of_linear, outliers_of_block
from sparseopt.pruning.patterns import share_unit
from sparseopt.pruning.recipe import Recipe
from sparseopt.pruning.reports import Event, SurveyStep
from sparseopt.pruning.sensitivity import Site, backward_sweep, output_weights

# Calibration tokens taken at most for sensitivities and curves, and at least one window: both are means over tokens.
TOKENS = 8192
# Levels of sparsity at which a curve is taken.
LEVELS = np.round(np.arange(0.1, 0.96, 0.05), 2)


@dataclass(frozen=True)
class Survey:
    """What a recipe needs to know beforehand, by the key of each linear's weight.

    Attributes:
        shares: share of zeros; None where the recipe's sparsity is that of every linear.
        weights: of squared errors at the outputs, `[out]`; None where all count the same.
    """

    shares: dict[str, float] | None = None
    weights: dict[str, np.ndarray] | None = None


@dataclass
class _Findings:
    """Filled block by block: by the key of each linear's weight, and outliers in the order of the blocks."""

    weights: dict[str, np.ndarray] = field(default_factory=dict)
    curves: dict[str, np.ndarray] = field(default_factory=dict)
    outliers: list[float] = field(default_factory=list)


def survey(
    model: PrunableModel,
    recipes: Sequence[Recipe],
    embedded: Stream,
    tokens: Int[np.ndarray, "windows T"],
    skipped: int,
    runner: BlockRunner,
    observer: Callable[[Event], None],
) -> list[Survey]:
    """Measure what the recipes ask for, and nothing else.

    Args:
        model: dense.
        recipes: of one pass.
        embedded: the streams in front of the first block.
        tokens: ids of the calibration windows.
        skipped: predictions at the beginning of every window that the loss does not count.
        runner: keeps account of the time.
        observer: is told of every step.
    """
    found = _Findings()
    allocations = {recipe.allocation for recipe in recipes}
    levels = _levels([recipe for recipe in recipes if recipe.allocation == "curves"])

    def told(done: int, total: int) -> None:
        observer(SurveyStep("survey, pass", done, total))

    if "curves" in allocations or any(recipe.output_weighting() == "gradient" for recipe in recipes):
        count = max(1, TOKENS // tokens.shape[1])
        batches = make_batches(first_windows(embedded.calibration, count))
        for site in backward_sweep(model, batches, tokens[:count], runner, told, skipped=skipped):
            keys = {name: model.weight_key(site.index, name) for name in site.sensitivity}
            found.weights |= {keys[name]: output_weights(value) for name, value in site.sensitivity.items()}
            if len(levels):
                found.curves |= {keys[n]: curve for n, curve in _curves(site, levels, runner).items()}
        found.weights, found.curves = agreed((found.weights, found.curves))
    if "owl" in allocations:
        batches = embedded.calibration
        for index in range(model.num_blocks):
            block = model.block(index)
            found.outliers.append(_outliers(block, batches, runner))
            batches = runner.forward(block, batches)
            told(index + 1, model.num_blocks)
    return [_survey_of(model, recipe, found, levels) for recipe in recipes]


def _levels(recipes: Sequence[Recipe]) -> np.ndarray:
    """The levels between the bounds of all recipes; none where no recipe wants a curve."""
    if not recipes:
        return LEVELS[:0]
    bounds = np.array([_bounds(recipe) for recipe in recipes])
    low, high = bounds[:, 0].min(), bounds[:, 1].max()
    inner = [level for level in LEVELS if low + 0.01 < level < high - 0.01]
    return np.unique([low, *inner, high])


def _bounds(recipe: Recipe) -> tuple[float, float]:
    return recipe.bounds or default_bounds(recipe.sparsity or 0.0)


def _curves(site: Site, levels: np.ndarray, runner: BlockRunner) -> dict[str, np.ndarray]:
    """Estimated loss at the levels, by linear; token weights as those of method best, at a mean of 1."""
    grams = runner.grams(site.block, site.batches, "residual")
    curves = {}
    for name, tap in site.block.linears.items():
        sensitivity = site.sensitivity[name]
        arguments: Any = (
            site.block.read(f"{name}.weight"),
            grams[tap].gram / grams[tap].mass,
            sensitivity,
            output_weights(sensitivity),
            jnp.asarray(levels, jnp.float32),
        )
        curves[name] = np.asarray(runner.account(losses_of_linear(*arguments)), np.float64)
    return curves


def _outliers(block: PrunableBlock, batches: Batches, runner: BlockRunner) -> float:
    grams = runner.grams(block, batches)
    weights = {name: block.read(f"{name}.weight") for name in block.linears}
    inputs = {name: grams[tap].gram for name, tap in block.linears.items()}
    return float(runner.account(outliers_of_block(weights, inputs)))


def _survey_of(model: PrunableModel, recipe: Recipe, found: _Findings, levels: np.ndarray) -> Survey:
    weights = found.weights if recipe.output_weighting() == "gradient" else None
    if recipe.allocation == "uniform" or recipe.sparsity is None:
        return Survey(None, weights)
    names = [list(model.block_linears(index)) for index in range(model.num_blocks)]
    keys = [model.weight_key(index, name) for index, each in enumerate(names) for name in each]
    shapes = [model.weight_shape(key) for key in keys]
    sizes = np.array([np.prod(shape) for shape in shapes])
    bounds = _bounds(recipe)
    if recipe.allocation == "curves":
        losses = np.stack([found.curves[key] for key in keys])
        sparsities = allocate_curves(levels, losses, sizes, recipe.sparsity, bounds)
    else:
        counts = [len(each) for each in names]
        blocks = np.add.reduceat(sizes, np.cumsum([0, *counts[:-1]]))
        sparsities = np.repeat(allocate_owl(np.array(found.outliers), blocks, recipe.sparsity, bounds), counts)
    units = np.array([share_unit(recipe.pattern, shape) for shape in shapes])
    exact = exact_shares(sparsities, sizes, units, recipe.sparsity, bounds)
    return Survey(dict(zip(keys, exact.tolist(), strict=True)), weights)
