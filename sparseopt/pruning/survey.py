"""Floor 6: what is measured on the dense model before any block is pruned, once for all plans of a pass.

| asked for | measured |
|---|---|
| outputs "gradient", allocation "curves" | one forward and one backward pass, see `sensitivity` |
| allocation "curves" | the loss against the sparsity of each linear, see `loss_curves` |
| allocation "owl" | the share of outliers of each block |
| anything else | nothing |

The first looks at a few thousand tokens and runs on one device in each process; all continue with what the first
process found. The last runs on all devices.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from sparseopt.core.types import Observer
from sparseopt.models import PrunableBlock, PrunableModel
from sparseopt.pruning.activations import Batches, Stream
from sparseopt.pruning.allocation import allocate_curves, allocate_owl, default_bounds, exact_shares
from sparseopt.pruning.calibration import BlockRunner
from sparseopt.pruning.devices import agreed
from sparseopt.pruning.loss_curves import losses_of_linear, outliers_of_block
from sparseopt.pruning.patterns import share_unit
from sparseopt.pruning.plan import CalibrationWindows, Plan, layer_patterns
from sparseopt.pruning.recipe import Recipe
from sparseopt.pruning.sensitivity import Site, backward_sweep, output_weights

# Calibration tokens taken at most for sensitivities and curves, and at least one window: both are means over tokens.
TOKENS = 8192
# Levels of sparsity at which a curve is taken.
LEVELS = np.round(np.arange(0.1, 0.96, 0.05), 2)


def survey(
    model: PrunableModel,
    plans: Sequence[Plan],
    stream: Stream,
    windows: CalibrationWindows,
    runner: BlockRunner,
    observer: Observer,
) -> list[Plan]:
    """Measure what the recipes of one pass ask for, and return the plans with the patterns and output weights for it.

    The stream is that of the windows before the first block.
    """
    recipes = [plan.recipe for plan in plans]
    allocations = {recipe.allocation for recipe in recipes}
    levels = _levels([recipe for recipe in recipes if recipe.allocation == "curves"])
    weights: dict[str, np.ndarray] = {}
    curves: dict[str, np.ndarray] = {}
    outliers: list[float] = []

    def told(done: int, total: int) -> None:
        observer("survey, pass", done, total)

    if "curves" in allocations or any(recipe.output_weighting() == "gradient" for recipe in recipes):
        tokens = windows.calibration[: max(1, TOKENS // windows.calibration.shape[1])]
        batches, skipped = stream.calibration.first(len(tokens)), int(windows.bos is not None)
        for site in backward_sweep(model, batches, tokens, runner, told, skipped=skipped):
            keys = {name: model.weight_key(site.index, name) for name in site.sensitivity}
            weights |= {keys[name]: output_weights(value) for name, value in site.sensitivity.items()}
            if len(levels):
                curves |= {keys[name]: curve for name, curve in _curves(site, levels, runner).items()}
        weights, curves = agreed((weights, curves))
    if "owl" in allocations:
        batches = stream.calibration
        for index in range(model.num_blocks):
            block = model.block(index)
            outliers.append(_outliers(block, batches, runner))
            batches = runner.forward(block, batches)
            told(index + 1, model.num_blocks)
    found = []
    for plan in plans:
        recipe, patterns = plan.recipe, plan.patterns
        if recipe.allocation != "uniform" and recipe.sparsity is not None:
            shares = _shares(model, recipe, levels, curves, outliers)
            patterns = layer_patterns(model, recipe, plan.method, shares)
        own_weights = weights if recipe.output_weighting() == "gradient" else {}
        found.append(replace(plan, patterns=patterns, output_weights=own_weights))
    return found


def _levels(recipes: Sequence[Recipe]) -> np.ndarray:
    """The levels between the bounds of all recipes; none where no recipe asks for curves."""
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


def _shares(
    model: PrunableModel,
    recipe: Recipe,
    levels: np.ndarray,
    curves: Mapping[str, np.ndarray],
    outliers: Sequence[float],
) -> dict[str, float]:
    """The share of zeros of every linear, by the key of its weight."""
    sparsity, bounds = recipe.sparsity or 0.0, _bounds(recipe)
    names = [list(model.block_linears(index)) for index in range(model.num_blocks)]
    keys = [model.weight_key(index, name) for index, each in enumerate(names) for name in each]
    shapes = [model.weight_shape(key) for key in keys]
    sizes = np.array([np.prod(shape) for shape in shapes])
    if recipe.allocation == "curves":
        shares = allocate_curves(levels, np.stack([curves[key] for key in keys]), sizes, sparsity, bounds)
    else:
        counts = [len(each) for each in names]
        blocks = np.add.reduceat(sizes, np.cumsum([0, *counts[:-1]]))
        shares = np.repeat(allocate_owl(np.array(outliers), blocks, sparsity, bounds), counts)
    units = np.array([share_unit(recipe.pattern, shape) for shape in shapes])
    exact = exact_shares(shares, sizes, units, sparsity, bounds)
    return dict(zip(keys, exact.tolist(), strict=True))
