"""Floor 6: the pruning methods and their presets, all behind one call: `method(layer, pattern) -> Pruned`."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array

from sparseopt.core.losses import largest_eigenvalue_bound
from sparseopt.core.penalties import L0, Penalty, Support, TopK
from sparseopt.core.solve import Problem, Status, solve
from sparseopt.core.solvers.aiht import STEP_FRACTION, Maiht
from sparseopt.core.solvers.proximal_gradient import ProximalGradient
from sparseopt.core.solvers.refit import Refit
from sparseopt.core.thresholds import count_nonzero, kth_largest, top_k_mask
from sparseopt.core.types import pytree, static
from sparseopt.pruning.layer import LayerMethod, Pruned, ScaledLayer
from sparseopt.pruning.patterns import Pattern


@pytree
class Magnitude:
    """Keep the largest `|W_ij|` in the pattern; no calibration data enters.

    Source: Han, Pool, Tran, Dally, "Learning both weights and connections", 2015.
    """

    def __call__(self, layer: ScaledLayer, pattern: Pattern) -> Pruned:
        """Score, mask, keep the values."""
        scale = layer.scale[:, None]
        # A dead input hides its weight's size (center is 0 there) and is pruned first in every method.
        score = jnp.where(scale > 0, jnp.abs(layer.center) / jnp.where(scale > 0, scale, 1), 0)
        return _keep(layer, pattern.mask(score))


@pytree
class Wanda:
    """Keep the largest `|W_ij| ||X_j||` among the inputs of each output; no refit.

    With an unstructured pattern every output row keeps the same number of weights, and where the exact count
    does not divide, the largest next scores fill up.

    Source: Sun, Liu, Bair, Kolter, "A simple and effective pruning approach for LLMs", ICLR 2024, eq. 1.
    """

    def __call__(self, layer: ScaledLayer, pattern: Pattern) -> Pruned:
        """Score, mask, keep the values."""
        score = jnp.abs(layer.center)
        if not isinstance(pattern, TopK):
            return _keep(layer, pattern.mask(score))
        each, left = pattern.k // score.shape[1], pattern.k % score.shape[1]
        rows = jax.vmap(top_k_mask, in_axes=(1, None), out_axes=1)
        mask = rows(score, each)
        following = rows(score, each + 1) & ~mask
        extra = top_k_mask(jnp.max(_among(following, score), axis=0), left)
        return _keep(layer, mask | (following & extra[None, :]))


def _among(candidates: Array, score: Array) -> Array:
    """Scores that rank every candidate, also one of score 0, above all others."""
    return jnp.where(candidates, jnp.maximum(score, jnp.finfo(score.dtype).tiny), 0)


def _keep(layer: ScaledLayer, mask: Array) -> Pruned:
    return Pruned(jnp.where(mask, layer.center, 0), mask, 1, Status.CONVERGED)


@pytree
class MaihtPruning:
    """mAIHT, then the exact count, then a refit of the kept weights on their support.

    Unstructured: L0, or a penalty of yours, with the paper's adaptive level. n:m: the same three sequences with
    the projection onto the pattern as prox, so every iterate has it.

    Attributes:
        ridge: added to the unit diagonal of the scaled hessian.
        monitor: see `Maiht`.
        max_steps: mAIHT iterations at most.
        rest: stop when at most this share of the entries changed sides in a step; negative: never.
        refit: "gradient" is the paper's projected gradient, "cg" conjugate gradients.
        refit_steps: steps of the refit.
        undershoot: how far below the asked sparsity the level aims (the final count prunes the rest), above
            35 % sparsity and below. The level starts low, where the first threshold keeps 95 %, 97 % or 99 % of
            the entries, by the sparsity asked for, and the iteration raises it.
        penalty: chooses the support by its prox in place of L0; a frozen dataclass with a field `weight`, which
            is the level and is set by the sparsity asked for. Unstructured patterns only.
    """

    ridge: Any = 0.1
    undershoot: Any = (0.015, 0.01)
    monitor: Literal["always", "on_increase"] = static(default="always")
    max_steps: int = static(default=20)
    rest: float = static(default=-1.0)
    refit: Literal["gradient", "cg"] = static(default="gradient")
    refit_steps: int = static(default=30)
    seed: int = static(default=0)
    penalty: Any = None

    def __call__(self, layer: ScaledLayer, pattern: Pattern) -> Pruned:
        """Solve, count, refit."""
        loss = layer.ridged(self.ridge)
        step = STEP_FRACTION / largest_eigenvalue_bound(loss.hessian, jax.random.key(self.seed))
        penalty: Any = pattern
        target = None
        if isinstance(pattern, TopK):
            sparsity = 1 - pattern.k / layer.center.size
            undershoot = jnp.where(sparsity > 0.35, *self.undershoot)
            target = sparsity - undershoot
            first = jnp.where(sparsity > 0.35, 0.95, jnp.where(sparsity < 0.15, 0.99, 0.97))
            if self.penalty is None:
                penalty = L0(self._first_level(layer, first, step))
            else:
                penalty = _at_sparsity(self.penalty, layer.center, step, 1 - first)
        solver = Maiht(step, target, self.monitor, "support")
        found = solve(Problem(loss, penalty), solver, layer.center, tol=self.rest, max_steps=self.max_steps)
        mask = self._exact_mask(found.value, layer, pattern)
        refit = ProximalGradient(step) if self.refit == "gradient" else Refit()
        start = jnp.where(mask, found.value, 0)
        kept = solve(Problem(loss, Support(mask)), refit, start, tol=-1.0, max_steps=self.refit_steps)
        status = jnp.where(found.status == Status.NONFINITE, found.status, kept.status)
        # A fixed number of steps was asked for: running all of them is the method ending as it should.
        status = jnp.where(status == Status.MAX_STEPS, Status.CONVERGED, status)
        return Pruned(kept.value, mask, found.steps, status)

    def _first_level(self, layer: ScaledLayer, share: Array, step: Array) -> Array:
        """The weight at which the threshold keeps this share of the entries of |center|."""
        kept = (share * layer.center.size).astype(jnp.int32) + 1
        threshold = kth_largest(jnp.abs(layer.center), kept)
        return threshold**2 / (2 * step)

    def _exact_mask(self, x: Array, layer: ScaledLayer, pattern: Pattern) -> Array:
        """The pattern's exact count: the largest of x; if x is too sparse, then the largest dense weights."""
        if not isinstance(pattern, TopK):
            return pattern.mask(jnp.abs(x))
        alive = jnp.minimum(pattern.k, count_nonzero(x))
        first = top_k_mask(jnp.abs(x), alive)
        return jax.lax.cond(
            alive < pattern.k,
            lambda: first | top_k_mask(_among(x == 0, jnp.abs(layer.center)), pattern.k - alive),
            lambda: first,
        )


def _at_sparsity(penalty: Any, x: Array, step: Array, sparsity: Array) -> Any:
    """The penalty at the level where its prox at x leaves this share of zeros, found by bisection on log2(level)."""

    def at(exponent: Array) -> Any:
        return dataclasses.replace(penalty, weight=jnp.exp2(exponent))

    def halve(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low + high) / 2
        enough = 1 - count_nonzero(at(middle).prox(x, step)) / x.size >= sparsity
        return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

    low, high = jax.lax.fori_loop(0, 20, halve, (jnp.float32(-60), jnp.float32(60)))
    return at((low + high) / 2)


MAIHT_PRESETS: dict[str, Callable[[], LayerMethod]] = {
    "paper": MaihtPruning,
    "best": lambda: MaihtPruning(
        ridge=0.03,
        undershoot=(0.02, 0.015),
        monitor="on_increase",
        max_steps=80,
        rest=5e-4,
        refit="cg",
        refit_steps=15,
    ),
}

METHODS: dict[str, dict[str, Callable[[], LayerMethod]]] = {
    "maiht": MAIHT_PRESETS,
    "wanda": {"paper": Wanda, "best": Wanda},
    "magnitude": {"paper": Magnitude, "best": Magnitude},
}


def find_method(method: str | LayerMethod, preset: str = "best", penalty: Any = None) -> LayerMethod:
    """The method object for a name and a preset; an object is returned as it is.

    Raises:
        ValueError: for an unknown name or preset, listing those known, or a penalty that the method cannot take.
    """
    found = _find_method(method, preset) if isinstance(method, str) else method
    if penalty is None:
        return found
    if not isinstance(found, MaihtPruning):
        raise ValueError(f"only method 'maiht' takes a penalty, given {method!r}; leave the penalty out")
    named = dataclasses.is_dataclass(penalty) and "weight" in {f.name for f in dataclasses.fields(penalty)}
    if not isinstance(penalty, Penalty) or not named:
        raise ValueError(
            f"penalty must be an object with value(x) and prox(x, step), a frozen dataclass made by "
            f"sparseopt.pytree with a field `weight`, given {penalty!r}"
        )
    return dataclasses.replace(found, penalty=penalty)


def _find_method(method: str, preset: str) -> LayerMethod:
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; known are {', '.join(METHODS)}")
    presets = METHODS[method]
    if preset not in presets:
        raise ValueError(f"unknown preset {preset!r}; known are {', '.join(presets)}")
    return presets[preset]()
