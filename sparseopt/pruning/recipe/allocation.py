"""How a model's zeros are divided among its layers at a fixed total, and what is measured for that.

    uniform    the same fraction everywhere
    curves     minimise  sum_l loss_l(s_l)   subject to   sum_l size_l s_l = s sum_l size_l,   low <= s_l <= high

With an n:m pattern a layer has the pattern's fraction of zeros or none, and curves chooses the layers that stay dense.

Losses are known at some levels of sparsity. On the lower convex hulls of these curves the problem is a continuous
knapsack: its Lagrangian takes the pieces of all hulls in the order of their slope per weight, and the multiplier is the
slope at which the total is reached.

Source: Sinha and Zoltners, "The multiple-choice knapsack problem", 1979, for hulls and multipliers.
"""

from dataclasses import replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from scipy.optimize import isotonic_regression

from sparseopt.core.base.dense import product
from sparseopt.core.penalties.patterns import TopK
from sparseopt.core.penalties.sets import Support
from sparseopt.core.problem.problem import Problem
from sparseopt.core.solvers.refit import Refit
from sparseopt.layers.compiled import Compiled
from sparseopt.layers.methods.admm import QuadraticAdmm
from sparseopt.layers.patterns import implied_sparsity
from sparseopt.layers.problem import scale_layer

Allocation = Literal["uniform", "curves"]
# How far a layer's sparsity may be below and above the model's, and the largest sparsity of any layer.
BELOW, ABOVE, MOST = 0.2, 0.15, 0.95
RIDGE, RHO = 0.1, 0.4
ADMM_STEPS, REFIT_STEPS = 3, 2
# Smallest number of rows used, if a layer has that many.
ROWS = 192
# Points between the bounds at which hulls are computed.
GRID = 201


def default_bounds(sparsity: float) -> tuple[float, float]:
    """Smallest and largest sparsity of a layer around a model's sparsity."""
    return max(0.0, sparsity - BELOW), max(sparsity, min(MOST, sparsity + ABOVE))


def check_allocation(name: Allocation, pattern: str, sparsity: float, bounds: tuple[float, float] | None) -> None:
    """Raise a ValueError if the pattern contradicts the allocation, or the bounds cannot meet the total."""
    implied = implied_sparsity(pattern)
    if bounds is not None and (name == "uniform" or implied is not None):
        what = "allocation 'uniform'" if name == "uniform" else f"pattern {pattern!r}"
        raise ValueError(f"{what} fixes the fraction of zeros of every layer, which contradicts bounds; leave them out")
    if name == "curves" and implied is not None and not 0 < sparsity < implied:
        raise ValueError(
            f"pattern {pattern!r} with allocation 'curves' leaves some layers dense, so the sparsity must lie "
            f"between 0 and {implied:g}, given {sparsity:g}; leave the allocation out to prune all of them"
        )
    if bounds is not None and not bounds[0] <= sparsity <= bounds[1]:
        raise ValueError(
            f"the bounds {bounds[0]:g} and {bounds[1]:g} cannot meet the total, a sparsity of {sparsity:g}; widen them"
        )


def allocate_curves(
    levels: Float[np.ndarray, "levels"],
    losses: Float[np.ndarray, "linears levels"],
    sizes: Int[np.ndarray, "linears"],
    sparsity: float,
    bounds: tuple[float, float],
) -> Float[np.ndarray, "linears"]:
    """Fractions of zeros with the smallest total loss; see the problem above.

    Losses, 0 or more, have one unit for all layers and are known at ascending levels. Fractions stay between the bounds
    and between the levels; `sparsity` is the fraction for all weights together.
    """
    low, high = bounds
    if low == high:
        return np.full(len(sizes), low)
    grid = np.linspace(low, high, GRID)
    # The slopes of a lower convex hull are the isotonic regression of the curve's own.
    slopes = np.stack([isotonic_regression(np.diff(curve)).x for curve in between(levels, losses, grid)])
    width = np.repeat(sizes * (grid[1] - grid[0]), GRID - 1)
    # Stable: with equal slopes one layer is filled to the end of its hull piece, where its curve meets the hull.
    order = np.argsort((slopes / sizes[:, None]).ravel(), kind="stable")
    width = width[order]
    taken = np.empty_like(width)
    taken[order] = np.clip((sparsity - low) * sizes.sum() - (np.cumsum(width) - width), 0, width)
    return low + taken.reshape(len(sizes), -1).sum(axis=1) / sizes


def choose_pruned(
    losses: Float[np.ndarray, "linears"], sizes: Int[np.ndarray, "linears"], share: float, sparsity: float
) -> Bool[np.ndarray, "linears"]:
    """Which layers to prune, each with the same fraction of zeros, for at least `sparsity` of all weights.

    As few layers as reach it, with the smallest loss per weight: the greedy answer to the knapsack.
    """
    order = np.argsort(losses / sizes, kind="stable")
    before = np.cumsum(share * sizes[order]) - share * sizes[order]
    pruned = np.zeros(len(sizes), bool)
    pruned[order] = before < sparsity * sizes.sum() - 1e-6
    return pruned


def between(
    levels: Float[np.ndarray, "levels"], losses: Float[np.ndarray, "linears levels"], grid: Float[np.ndarray, "points"]
) -> Float[np.ndarray, "linears points"]:
    """Losses between the levels, by linear interpolation of their cube root.

    Weights near zero have about constant density, so the loss of the smallest fraction s of them grows as s³. A loss
    above the loss at a higher level is lowered to it: a sparser answer is also an answer at the lower level.
    """
    rising = np.minimum.accumulate(losses[:, ::-1], axis=1)[:, ::-1]
    return np.stack([np.interp(grid, levels, curve) for curve in np.cbrt(rising)]) ** 3


def exact_shares(
    shares: Float[np.ndarray, "linears"],
    sizes: Int[np.ndarray, "linears"],
    units: Int[np.ndarray, "linears"],
    sparsity: float,
    bounds: tuple[float, float],
) -> Float[np.ndarray, "linears"]:
    """Fractions with whole numbers of zeros and the sparsity's total, as close as possible to the given ones.

    The number of zeros in all is `round(sparsity * weights)`: exactly if the units are single weights, else to within
    half of the smallest unit that can be added or removed within the bounds. Bounds hold to a unit. Zeros of a layer
    come in multiples of its unit: 1, or a whole column or block.
    """
    parts = sizes // units
    wanted = shares * parts
    least = np.floor(bounds[0] * parts + 1e-9).astype(int)
    most = np.minimum(np.ceil(bounds[1] * parts - 1e-9).astype(int), parts - 1)
    counts = np.clip(np.floor(wanted + 1e-9).astype(int), least, most)
    missing = round(sparsity * int(sizes.sum())) - int(counts @ units)
    # Largest remainders first, then the smallest unit as long as it brings the total closer.
    while missing:
        side = 1 if missing > 0 else -1
        room = counts < most if side > 0 else counts > least
        fits, nearer = room & (units <= abs(missing)), room & (units < 2 * abs(missing))
        if not nearer.any():
            break
        rank = np.where(fits, side * (wanted - counts), -np.inf) if fits.any() else np.where(nearer, -units, -np.inf)
        chosen = int(np.argmax(rank))
        counts[chosen] += side
        missing -= side * int(units[chosen])
    return counts * units / sizes


def estimated_losses(
    weight: Float[Array, "out in"],
    gram: Float[Array, "in in"],
    sensitivity: Float[Array, "out"],
    output_weights: Float[Array, "out"],
    levels: Float[Array, "levels"],
) -> Float[Array, "levels"]:
    """A cheap estimate of the model's loss at ascending fractions of zeros in one layer.

        loss(s)  =  1/2 sum_c F_c ||X (V_s - W)_c||² / tokens          nats per token, to second order

    with F the outputs' sensitivity, the Gram `XᵀX / tokens`, and V_s a reasonable answer at sparsity s: a few ADMM
    steps from the answer at the previous sparsity, with one rho and so one inverse for the whole path, then conjugate
    gradients on the support. Only some output rows are used, evenly spaced. A path of levels then costs about as much
    as one solve. An allocation uses the differences along the path, not the absolute values.
    """
    every = max(1, weight.shape[0] // ROWS)
    share = weight.shape[0] / len(range(0, weight.shape[0], every))
    layer = scale_layer(weight[::every], gram, output_weights[::every])
    loss = layer.ridged(RIDGE)
    solver = QuadraticAdmm(rho=RHO, watch=False)

    def level(state: Any, sparsity: Array) -> tuple[Any, Array]:
        kept = jnp.round((1 - sparsity) * layer.center.size).astype(jnp.int32)
        problem = Problem(loss, TopK(kept))
        # The dual belongs to the previous count.
        state = replace(state, point=state.x)
        state = jax.lax.fori_loop(0, ADMM_STEPS, lambda _, s: solver.step(problem, s), state)
        fixed, refit = Problem(loss, Support(state.x != 0)), Refit()
        found = refit.init(fixed, state.x)
        found = jax.lax.fori_loop(0, REFIT_STEPS, lambda _, s: refit.step(fixed, s), found)
        change = (found.x - layer.center) / layer.output_scale
        errors = jnp.sum(change * product(layer.hessian, change), axis=0)
        return replace(state, x=found.x), 0.5 * share * jnp.sum(errors * sensitivity[::every])

    start = solver.init(Problem(loss, TopK(layer.center.size)), layer.center)
    return jax.lax.scan(level, start, levels)[1]


losses_of_linear = Compiled(estimated_losses)
