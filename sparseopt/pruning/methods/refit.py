"""Floor 6: the last stage of a method, the values on a fixed support."""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from sparseopt.core.constraints import Support
from sparseopt.core.iterate import iterate
from sparseopt.core.losses import Quadratic
from sparseopt.core.problem import Problem, Status
from sparseopt.core.solvers.refit import Refit
from sparseopt.pruning.layer import Pruned


def refitted(loss: Quadratic, start: Array, mask: Array, steps: int, *, done: Array | int, status: Array) -> Pruned:
    """Conjugate gradients on the mask, and the method's whole answer.

    Args:
        loss: of the layer, with the ridge.
        start: `[in, out]`, cut to the mask first.
        mask: the support.
        steps: of conjugate gradients.
        done: iterations that found the support.
        status: how the search for the support ended. To use up a fixed number of steps is an end as it should be.
    """
    kept = iterate(Problem(loss, Support(mask)), Refit(), jnp.where(mask, start, 0), tol=-1.0, max_steps=steps)
    bad = (status == Status.NONFINITE) | (kept.status == Status.NONFINITE)
    ended = jax.lax.select(bad, jnp.int32(Status.NONFINITE), jnp.int32(Status.CONVERGED))
    return Pruned(kept.value, mask, done, ended)
