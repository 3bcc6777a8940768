"""Sparse regressions for the benchmark of the core, and their duality gap in NumPy, independent of all solvers.

    minimise over x    sum_i f((A x)_i; b_i) + weight sum_g ||x_g||_2

f is `(z - b)² / 2` or `log(1 + e^z) - b z`, and the groups are single entries or blocks of neighbours.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from scipy import sparse, special

# Fractions of the smallest weight at which the answer is 0.
SHARES = (0.1, 0.02)
PATH_WEIGHTS = 100


@dataclasses.dataclass(frozen=True)
class Regression:
    """One problem, or one for each of several weights.

    Attributes:
        name: in records.
        matrix: A, in Fortran order or CSC, as coordinate descent needs it.
        target: b, float64; labels 0 and 1 for the logistic loss.
        weight: a number, or `[weights]`, decreasing.
        group: the size of the groups.
        logistic: whether f is the logistic loss.
    """

    name: str
    matrix: Any
    target: np.ndarray
    weight: Any
    group: int = 1
    logistic: bool = False

    def gap(self, x: np.ndarray) -> float:
        """`(P - D) / D`, the largest of all weights for an x of `[weights, columns]`; infinite where D <= 0.

        The dual point is the loss's gradient at A x, scaled by the largest factor, at most 1, that makes it feasible.
        """
        if np.ndim(self.weight):
            return max(self._gap(one, weight) for one, weight in zip(x, self.weight, strict=True))
        return self._gap(x, self.weight)

    def _gap(self, x: np.ndarray, weight: float) -> float:
        x, b = np.asarray(x, np.float64), self.target
        z = self.matrix @ x
        penalty = weight * np.linalg.norm(x.reshape(-1, self.group), axis=1).sum()
        slope = self._slope(z)
        share = min(1.0, weight / self.dual_norm(slope))
        if self.logistic:
            # The conjugate of f at s is the negative entropy of the probability b + s.
            p = b + share * slope
            upper = penalty + np.logaddexp(0, z).sum() - b @ z
            lower = -(special.xlogy(p, p) + special.xlogy(1 - p, 1 - p)).sum()
        else:
            dual = share * slope
            upper = penalty + slope @ slope / 2
            lower = -dual @ b - dual @ dual / 2
        return (upper - lower) / lower if lower > 0 else np.inf

    def _slope(self, z: np.ndarray) -> np.ndarray:
        return (special.expit(z) if self.logistic else z) - self.target

    def dual_norm(self, slope: np.ndarray) -> float:
        """The largest group norm of `Aᵀ slope`."""
        return float(np.linalg.norm((self.matrix.T @ slope).reshape(-1, self.group), axis=1).max())

    def at_shares(self, shares: Any) -> "Regression":
        """The problem at these fractions of the smallest weight at which the answer is 0."""
        largest = self.dual_norm(self._slope(np.zeros_like(self.target)))
        return dataclasses.replace(self, weight=largest * shares)


def correlated(rows: int, columns: int, rho: float, rng: np.random.Generator) -> np.ndarray:
    """Normal columns, each correlated by rho with the previous one."""
    matrix = rng.standard_normal((rows, columns))
    for j in range(1, columns):
        matrix[:, j] = rho * matrix[:, j - 1] + (1 - rho**2) ** 0.5 * matrix[:, j]
    return np.asfortranarray(matrix)


def measured(matrix: Any, group: int, rng: np.random.Generator) -> np.ndarray:
    """The image of a vector with 2 % nonzero groups, and noise of a third of its standard deviation."""
    count = matrix.shape[1] // group
    x = np.zeros((count, group))
    chosen = rng.choice(count, max(count // 50, 1), replace=False)
    x[chosen] = rng.standard_normal((chosen.size, group))
    image = matrix @ x.reshape(-1)
    return image + image.std() / 3 * rng.standard_normal(image.size)


def dense_lasso(small: bool) -> Iterator[Regression]:
    """Weakly and strongly correlated columns, two weights each."""
    rows, columns = (200, 1000) if small else (1000, 5000)
    for rho in (0.5, 0.9):
        rng = np.random.default_rng(0)
        matrix = correlated(rows, columns, rho, rng)
        problem = Regression("", matrix, measured(matrix, 1, rng), None)
        for share in SHARES:
            name = f"{rows:,} x {columns:,}, correlation {rho:g}, weight {share:g}"
            yield dataclasses.replace(problem.at_shares(share), name=name)


def _sparse(small: bool) -> tuple[sparse.csc_array, np.ndarray, str]:
    rows, columns, density = (2000, 5000, 5e-3) if small else (20_000, 50_000, 1e-3)
    rng = np.random.default_rng(1)
    matrix = sparse.random_array(
        (rows, columns), density=density, format="csc", rng=rng, data_sampler=lambda size: rng.standard_normal(size)
    )
    # Some peers take 32-bit indices only.
    matrix.indices, matrix.indptr = matrix.indices.astype(np.int32), matrix.indptr.astype(np.int32)
    return matrix, measured(matrix, 1, rng), f"{rows:,} x {columns:,}, density {density:g}"


def sparse_lasso(small: bool) -> Iterator[Regression]:
    """A sparse matrix, two weights."""
    matrix, target, name = _sparse(small)
    for share in SHARES:
        problem = Regression(f"{name}, weight {share:g}", matrix, target, None)
        yield problem.at_shares(share)


def sparse_logistic(small: bool) -> Iterator[Regression]:
    """The same with the signs of the target as labels."""
    matrix, target, name = _sparse(small)
    for share in SHARES:
        problem = Regression(f"{name}, weight {share:g}", matrix, 1.0 * (target > 0), None, logistic=True)
        yield problem.at_shares(share)


def group_lasso(small: bool) -> Iterator[Regression]:
    """Groups of ten neighbours, two weights."""
    rows, columns = (200, 1000) if small else (1000, 5000)
    rng = np.random.default_rng(2)
    matrix = correlated(rows, columns, 0.5, rng)
    target = measured(matrix, 10, rng)
    for share in SHARES:
        problem = Regression(f"{rows:,} x {columns:,}, weight {share:g}", matrix, target, None, group=10)
        yield problem.at_shares(share)


def lasso_path(small: bool) -> Iterator[Regression]:
    """A hundred weights from the largest down to a hundredth of it."""
    rows, columns = (100, 200) if small else (1000, 2000)
    rng = np.random.default_rng(3)
    matrix = correlated(rows, columns, 0.5, rng)
    problem = Regression(f"{rows:,} x {columns:,}, {PATH_WEIGHTS} weights", matrix, measured(matrix, 1, rng), None)
    yield problem.at_shares(np.geomspace(1, 0.01, PATH_WEIGHTS + 1)[1:])


PROBLEMS: dict[str, Callable[[bool], Iterator[Regression]]] = {
    "lasso-dense": dense_lasso,
    "lasso-sparse": sparse_lasso,
    "logistic-sparse": sparse_logistic,
    "group-lasso": group_lasso,
    "lasso-path": lasso_path,
}
