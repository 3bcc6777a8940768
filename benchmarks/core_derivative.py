"""The gradient of a validation loss in the weight and target of a lasso: implicit, unrolled, and by differences."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import warmed

import sparseopt as so

MANY = 100_000
# The requested gap.
TOL = 1e-6
# Relative step of the central differences in the weight and in the target.
MOVE = 1e-6


def correlated(rows: int, columns: int, rho: float, rng: np.random.Generator) -> np.ndarray:
    """Normal columns, each correlated by rho with the previous one."""
    matrix = rng.standard_normal((rows, columns))
    for j in range(1, columns):
        matrix[:, j] = rho * matrix[:, j - 1] + (1 - rho**2) ** 0.5 * matrix[:, j]
    return matrix


class Study:
    """A lasso, validation rows, and the validation loss `1/2 ||V x(weight, target) - v||²`.

    The weight is a fraction of the smallest one at which the answer is 0.
    """

    def __init__(self, small: bool, share: float) -> None:
        rows, columns = (100, 200) if small else (500, 1000)
        rng = np.random.default_rng(6)
        matrix = correlated(2 * rows, columns, 0.5, rng)
        # The image of a vector with 2 % nonzero entries, and noise of a third of its standard deviation.
        truth = np.zeros(columns)
        chosen = rng.choice(columns, columns // 50, replace=False)
        truth[chosen] = rng.standard_normal(chosen.size)
        image = matrix @ truth
        target = image + image.std() / 3 * rng.standard_normal(image.size)
        self.name = f"{rows:,} x {columns:,}, weight {share:g}"
        self.target = target[:rows]
        self.weight = share * float(np.abs(matrix[:rows].T @ self.target).max())
        self.matrix, self.held = jnp.asarray(matrix[:rows]), jnp.asarray(matrix[rows:])
        self.held_target = jnp.asarray(target[rows:])
        self.curvature = np.linalg.norm(matrix[:rows], 2) ** 2
        self.direction = rng.standard_normal(rows)
        self.direction *= np.linalg.norm(self.target) / np.linalg.norm(self.direction)

    def judged(self, x: Any) -> Any:
        """The validation loss."""
        return jnp.sum((self.held @ x - self.held_target) ** 2) / 2

    def solved(self, weight: Any, target: Any, tol: float = TOL) -> so.Solution:
        """The solution by sparseopt."""
        problem = so.Problem(so.LeastSquares(self.matrix, target), so.L1(weight))
        return so.solve(problem, tol=tol, max_steps=MANY)

    def unrolled(self, weight: Any, target: Any, steps: int) -> Any:
        """The textbook FISTA from zeros, for a number of steps."""
        size = 1 / self.curvature

        def step(state: tuple, _: None) -> tuple[tuple, None]:
            x, y, t = state
            z = y - size * (self.matrix.T @ (self.matrix @ y - target))
            z = jnp.sign(z) * jnp.maximum(jnp.abs(z) - size * weight, 0)
            t_next = (1 + jnp.sqrt(1 + 4 * t**2)) / 2
            return (z, z + (t - 1) / t_next * (z - x), t_next), None

        zeros = jnp.zeros(self.matrix.shape[1])
        return jax.lax.scan(step, (zeros, zeros, 1.0), None, length=steps)[0][0]

    def differences(self) -> np.ndarray:
        """Central differences in the weight and along the direction of the target.

        Each solution is made exact by the normal equations on its support and signs.
        """
        matrix = np.asarray(self.matrix)
        solve = jax.jit(lambda weight, target: self.solved(weight, target, tol=1e-10).value)

        def value(weight: float, target: np.ndarray) -> float:
            x = np.array(solve(weight, target))
            kept = x != 0
            part = matrix[:, kept]
            x[kept] = np.linalg.solve(part.T @ part, part.T @ target - weight * np.sign(x[kept]))
            return float(self.judged(x))

        weight, target = self.weight, self.target
        moved = MOVE * weight, MOVE * self.direction
        across = value(weight + moved[0], target) - value(weight - moved[0], target)
        along = value(weight, target + moved[1]) - value(weight, target - moved[1])
        return np.array([across / (2 * moved[0]), along / (2 * MOVE)])

    def rows(self) -> Iterator[dict[str, Any]]:
        """A record for every method, and for the solve alone."""
        point = jnp.asarray(self.weight), jnp.asarray(self.target)
        known = self.differences()
        forward = jax.jit(self.solved)
        spent = warmed(partial(forward, *point))
        found = forward(*point)
        steps = int(found.steps)
        about = {"problem": self.name, "tol": TOL, "steps": steps}
        yield {"way": "the solve alone", **about, **spent, "gap": float(found.gap)}
        ways: dict[str, Callable] = {
            "implicit": lambda weight, target: self.judged(self.solved(weight, target).value),
            "unrolled FISTA": lambda weight, target: self.judged(self.unrolled(weight, target, steps)),
        }
        for way, loss in ways.items():
            slopes = jax.jit(jax.grad(loss, argnums=(0, 1)))
            spent = warmed(partial(slopes, *point))
            of_weight, of_target = slopes(*point)
            errors = np.abs(np.array([of_weight, of_target @ self.direction]) / known - 1)
            of = {"error_in_weight": float(errors[0]), "error_in_target": float(errors[1])}
            yield {"way": way, **about, **spent, **of}
