"""Floor 4: a split ADMM that runs in float32 as far as rounding allows and finishes in float64.

For a problem larger than the caches the time of a step is that of moving its bytes, so float32 takes half the time. The
certificate is that of the float64 state.
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

# The float32 gap follows the float64 gap down to about its estimated rounding error: this multiple of it ends the first
# solve, and so do this many steps without progress.
HANDOVER = 1.5
PATIENCE = 50


def _short(tree: Any) -> Any:
    """Every float64 array of a pytree in float32."""
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32) if leaf.dtype == jnp.float64 else leaf, tree)


def _long(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float64) if leaf.dtype == jnp.float32 else leaf, tree)


def solve_mixed(problem: Problem, solver: Admm, start: Start, *, tol: Array, max_steps: Array) -> Solution:
    """As `solve`, for arrays of float64; the steps of both solves count.

    The float32 solve ends at the tolerance, or where its gap comes near its rounding error.
    """
    problem, solver, start = jax.tree.map(jnp.asarray, (problem, solver, start))
    brief = dataclasses.replace(solver, patience=PATIENCE, margin=math.inf, enough=HANDOVER)
    first = iterate(_short(problem), _short(brief), _short(start), tol=tol.astype(jnp.float32), max_steps=max_steps)
    # The squares of a signal of 1e30 overflow in float32.
    state = jax.lax.cond(
        first.status == Status.NONFINITE,
        lambda: solver.init(problem, start),
        lambda: solver.init(problem, _long(first.state)),
    )
    found = iterate(problem, solver, state, tol=tol, max_steps=jnp.maximum(max_steps - first.steps, 0))
    return dataclasses.replace(found, steps=first.steps + found.steps)
