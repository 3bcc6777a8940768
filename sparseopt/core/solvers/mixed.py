"""Floor 4: a split ADMM that goes as far as float32 carries it, and finishes in float64.

Where a problem does not fit in the caches a step costs the bytes that it moves, so half of them cost half the time.
Its certificate is that of the float64 state.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from sparseopt.core.iterate import iterate
from sparseopt.core.problem import Problem, Solution, Status
from sparseopt.core.solvers.admm import Admm, Start

# The float32 gap follows the float64 one down to about its estimated rounding error: this multiple of it ends the first
# solve, and so do so many steps without progress.
HANDOVER = 1.5
PATIENCE = 50


def _short(tree: Any) -> Any:
    """Every float64 array of a pytree in float32."""
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32) if leaf.dtype == jnp.float64 else leaf, tree)


def _long(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float64) if leaf.dtype == jnp.float32 else leaf, tree)


def solve_mixed(problem: Problem, solver: Admm, start: Start, *, tol: Array, max_steps: Array) -> Solution:
    """As `solve` in float64, arguments as there; all arrays are float64.

    The float32 solve ends at the tolerance, or where its gap comes near its rounding error. The steps of both count.
    """
    problem, solver, start = jax.tree.map(jnp.asarray, (problem, solver, start))
    brief = dataclasses.replace(solver, patience=PATIENCE, margin=math.inf, enough=HANDOVER)
    first = iterate(_short(problem), _short(brief), _short(start), tol=tol.astype(jnp.float32), max_steps=max_steps)
    # Squares of a signal of 1e30 are beyond float32.
    state = jax.lax.cond(
        first.status == Status.NONFINITE,
        lambda: solver.init(problem, start),
        lambda: solver.init(problem, _long(first.state)),
    )
    found = iterate(problem, solver, state, tol=tol, max_steps=jnp.maximum(max_steps - first.steps, 0))
    return dataclasses.replace(found, steps=first.steps + found.steps)
