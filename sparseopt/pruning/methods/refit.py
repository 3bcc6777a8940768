"""Floor 6: the last stage of a method: the values on a fixed support."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from sparseopt.core.constraints import Support
from sparseopt.core.iterate import iterate
from sparseopt.core.losses import Quadratic
from sparseopt.core.problem import Problem, Status
from sparseopt.core.solvers.refit import Refit
from sparseopt.pruning.layer import Pruned


def refitted(
    loss: Quadratic, start: Array, mask: Array, steps: int, *, done: Array | int, status: Array, solver: Any = None
) -> Pruned:
    """The method's answer: the loss minimised on the mask.

    Args:
        loss: of the layer, with the ridge.
        start: `[in, out]`, restricted to the mask first.
        mask: the support.
        steps: of the solver.
        done: iterations that found the support.
        status: of the search for the support. Using up a fixed number of steps counts as converged.
        solver: None for conjugate gradients.
    """
    solver = Refit() if solver is None else solver
    kept = iterate(Problem(loss, Support(mask)), solver, jnp.where(mask, start, 0), tol=-1.0, max_steps=steps)
    bad = (status == Status.NONFINITE) | (kept.status == Status.NONFINITE)
    ended = jnp.where(bad, jnp.int32(Status.NONFINITE), jnp.int32(Status.CONVERGED))
    return Pruned(kept.value, mask, done, ended)
