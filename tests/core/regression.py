"""A small regression, and parts of a problem written outside the package."""

from typing import Any

import jax.numpy as jnp
import numpy as np

import sparseopt as so
from sparseopt.core.operators.differences import Difference, GridBase
from sparseopt.core.operators.maps import Identity, Split
from sparseopt.core.operators.normal_solves import cosine_solve
from sparseopt.core.problem.certify import Anchor
from sparseopt.core.problem.problem import Start
from sparseopt.core.solvers.admm import Admm
from sparseopt.core.solvers.loss_admm import LossAdmm

ROWS, COLUMNS = 30, 12
DIFFERENCES = np.diff(np.eye(COLUMNS), axis=0)


def drawn():
    """A matrix, and a target that half of its columns explain."""
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((ROWS, COLUMNS))
    truth = rng.standard_normal(COLUMNS) * (np.arange(COLUMNS) % 2)
    return matrix, truth @ matrix.T + rng.standard_normal(ROWS)


MATRIX, TARGET = drawn()
LABELS = (TARGET > 0).astype(float)
SQUARES = so.LeastSquares(MATRIX, TARGET)


@so.pytree
class OwnSquares:
    """A loss with nothing but its value and its gradient."""

    matrix: Any
    target: Any

    def value(self, x):
        return 0.5 * jnp.sum((self.matrix @ x - self.target) ** 2)

    def gradient(self, x):
        return self.matrix.T @ (self.matrix @ x - self.target)


@so.pytree
class ImageGradient:
    """Differences down and to the right, `[h, w]` to `[2, h, w]`, 0 at the edges."""

    def mv(self, x):
        down = jnp.zeros_like(x).at[:-1].set(x[1:] - x[:-1])
        right = jnp.zeros_like(x).at[:, :-1].set(x[:, 1:] - x[:, :-1])
        return jnp.stack([down, right])

    def rmv(self, e):
        down, right = e
        x = jnp.zeros_like(down).at[1:].add(down[:-1]).at[:-1].add(-down[:-1])
        return x.at[:, 1:].add(right[:, :-1]).at[:, :-1].add(-right[:, :-1])


def split(base, order):
    """`Δ^order` as a `Split` whose metrics are integers, in which nothing is differentiated."""
    inner = Difference(base, order)
    return Split(Identity(inner.out_shape), inner, 1, 1)


def on_chain(loss, penalty, solver=Admm, **options):
    """A problem on the differences of a chain, its solver, and a start at 0."""
    y = loss.target
    operator, node_solve = split(GridBase(y.shape), 1), cosine_solve(y.shape, (1,), y.dtype)
    if solver is LossAdmm:
        options["anchor"] = Anchor(np.zeros((1, y.size), y.dtype), np.zeros_like(y))
    start = Start(np.zeros_like(y), np.zeros((1, y.size), y.dtype))
    return so.Problem(loss, penalty, operator), solver(node_solve, y.dtype.type(1), **options), start
