"""The problems of `bench_regression.py`: draws, and real designs that come with scikit-learn.

Only NumPy is imported, and SciPy or scikit-learn where they are needed: each program runs without the others.
"""

import dataclasses
import importlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

# Rows, columns, correlation of neighbouring columns, weight.
LASSOS = (
    (100, 10_000, 0.3, 0.1),
    (500, 600, 0.0, 0.05),
    (10_000, 100, 0.0, 0.01),
    (300, 4_000, 0.5, 0.02),
    (2_000, 2_000, 0.5, 0.05),
    (150, 9_000, 0.3, 0.1),
    (400, 20_000, 0.6, 0.05),
)
LOGISTIC = ((500, 2_000, 0.3, 0.1), (500, 5_000, 0.3, 0.05), (200, 10_000, 0.3, 0.1), (5_000, 200, 0.0, 0.01))
PATHS = ((100, 10_000, 0.3, 1.0), (400, 20_000, 0.6, 1.0))
FIRST = ((100, 50, 0.3, 0.1), (200, 100, 0.3, 0.1))
# The largest shape of a small problem.
SMALL = (60, 80)


@dataclasses.dataclass(frozen=True)
class Case:
    """A problem; a sum over rows, without a factor. Labels are 0 and 1, an intercept is the answer's last entry."""

    name: str
    matrix: Any
    target: np.ndarray
    level: float
    ridge_share: float = 0.0  # of the weight
    weights: np.ndarray | None = None
    logistic: bool = False
    intercept: bool = False
    nonnegative: bool = False
    weight: float = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        centre = np.average(self.target, weights=self.weights) if self.intercept else 0.5 * self.logistic
        slope = self.matrix.T @ ((1 if self.weights is None else self.weights) * (self.target - centre))
        largest = np.max(slope if self.nonnegative else np.abs(slope))
        object.__setattr__(self, "weight", self.level * float(largest))

    @property
    def ridge(self) -> float:
        return self.ridge_share * self.weight

    @property
    def mass(self) -> float:
        """What the peers divide their loss by."""
        return float(len(self.target) if self.weights is None else self.weights.sum())

    def objective(self, x: np.ndarray, weight: Any = None) -> Any:
        """That of an answer, or of answers `[columns, levels]` with their weights."""
        x, constant = (x[:-1], x[-1]) if self.intercept else (x, 0.0)
        image = self.matrix @ x + constant
        target = self.target.reshape(-1, *[1] * (image.ndim - 1))
        if self.logistic:
            loss = np.sum(np.logaddexp(0, image) - target * image, axis=0)
        else:
            loss = np.tensordot(np.ones(len(image)) if self.weights is None else self.weights, (target - image) ** 2, 1)
            loss = loss / 2
        outside = np.inf if self.nonnegative and np.any(x < 0) else 0.0
        norm = np.abs(x).sum(axis=0)
        return loss + (self.weight if weight is None else weight) * norm + self.ridge / 2 * np.sum(x**2, 0) + outside


def drawn(shape: tuple[int, int, float, float], small: bool, logistic: bool = False, **kind: Any) -> Case:
    """The image of 20 nonzero entries and noise of 1; every column is correlated with the previous one."""
    n, p, rho, level = shape
    if small:
        n, p = min(n, SMALL[0]), min(p, SMALL[1])
    rng = np.random.default_rng(n + p * logistic)
    z = rng.standard_normal((n, p))
    matrix = np.asfortranarray(z.copy())
    for j in range(1, p):
        matrix[:, j] = rho * matrix[:, j - 1] + np.sqrt(1 - rho**2) * z[:, j]
    x = np.zeros(p)
    x[rng.choice(p, 20, False)] = rng.standard_normal(20)
    target = matrix @ x + rng.standard_normal(n)
    if logistic:
        target = (target > 0).astype(float)
    name = f"{n:,} x {p:,}, correlation {rho:g}, weight {level:g}"
    return Case(name, matrix, target, level, logistic=logistic, **kind)


def lassos(small: bool) -> Iterator[Case]:
    return (drawn(shape, small) for shape in LASSOS)


def logistic(small: bool) -> Iterator[Case]:
    return (drawn(shape, small, logistic=True) for shape in LOGISTIC)


def real(name: str, small: bool, level: float, positive: int | None = None, degree: int = 1, **kind: Any) -> Case:
    """A design that comes with scikit-learn, standardised, without constant columns; labels: one class, or the rest."""
    matrix, target = getattr(importlib.import_module("sklearn.datasets"), f"load_{name}")(return_X_y=True)
    if small:
        every = -(-len(matrix) // SMALL[0])
        matrix, target = matrix[::every], target[::every]
    if degree > 1:
        preprocessing = importlib.import_module("sklearn.preprocessing")
        matrix = preprocessing.PolynomialFeatures(degree, include_bias=False).fit_transform(matrix)
    matrix = matrix[:, : SMALL[1] if small else None]
    spread = matrix.std(axis=0)
    kept = spread > 1e-9 * np.abs(matrix).max(axis=0)
    matrix = np.asfortranarray((matrix[:, kept] - matrix[:, kept].mean(axis=0)) / spread[kept])
    about = f"degree {degree}" if positive is None else f"class {positive} or another"
    target = np.asarray(target, float) if positive is None else (target == positive).astype(float)
    name = f"{name}, {about}, {len(matrix):,} x {matrix.shape[1]:,}, weight {level:g}"
    return Case(name, matrix, target, level, logistic=positive is not None, **kind)


def more(small: bool) -> Iterator[Case]:
    """Real designs, and what the other parts do not have."""
    yield real("diabetes", small, 0.01, degree=2, intercept=True)
    yield real("diabetes", small, 0.01, degree=3, intercept=True)
    yield real("breast_cancer", small, 0.02, positive=1, intercept=True)
    yield real("digits", small, 0.05, positive=0)
    yield real("wine", small, 0.05, positive=1)
    given = partial(drawn, (500, 5_000, 0.3, 0.05), small)
    plain = given()
    middle = dataclasses.replace(plain, matrix=plain.matrix + 1.0, target=plain.target + 5.0, intercept=True)
    weights = np.random.default_rng(1).uniform(0.5, 2.0, len(plain.target))
    cases = {
        "intercept": middle,
        "elastic net": given(ridge_share=0.1),
        "nonnegative": given(nonnegative=True),
        "weights of observations": given(weights=weights),
        "C order": dataclasses.replace(plain, matrix=np.ascontiguousarray(plain.matrix)),
        "correlated": drawn((200, 5_000, 0.95, 0.05), small),
    }
    yield from (dataclasses.replace(case, name=f"{kind}, {case.name}") for kind, case in cases.items())


def sparse_case(small: bool) -> Case:
    """A sparse design with normal entries, in CSC; noise of 1."""
    from scipy import sparse

    n, p, density = (200, 500, 0.02) if small else (20_000, 100_000, 0.001)
    rng = np.random.default_rng(3)
    matrix = sparse.random_array((n, p), density=density, format="csc", rng=rng, data_sampler=rng.standard_normal)
    x = np.zeros(p)
    x[rng.choice(p, p // 100, False)] = rng.standard_normal(p // 100)
    target = matrix @ x + rng.standard_normal(n)
    return Case(f"{n:,} x {p:,}, density {density:g}, weight 0.1", matrix, target, 0.1)
