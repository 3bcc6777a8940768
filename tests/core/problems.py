"""Random problems of every kind, each with its conic form for Clarabel: the cases of the tests of `solve`.

A problem is drawn in units in which its columns are alike, and solved there by Clarabel to 1e-10. `solve` gets columns,
and the columns of the operator, in other units: up to ten thousand times larger or smaller where they are spread.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import jax
import numpy as np
from scipy import sparse

import sparseopt as so
from tests.core import conic
from tests.core.conic import Conic

ROWS, COLUMNS, EDGES, CHANNELS = 30, 8, 9, 3
LABELS = np.arange(COLUMNS) // 2
BY_LABEL = [np.flatnonzero(g == LABELS) for g in range(LABELS.max() + 1)]
APG, PD, ADMM = so.AcceleratedProximalGradient(), so.PrimalDual(), so.SplitAdmm()


class Loss(NamedTuple):
    """A loss of `(matrix, target, weights)`, its conic term, and the targets that it takes."""

    make: Callable[..., Any]
    term: Callable[..., Any]
    target: Callable[[np.random.Generator, np.ndarray], np.ndarray]


def numbers(rng, clean):
    return clean + rng.standard_normal(clean.shape) * rng.choice([0.1, 1.0, 10.0])


def counts(rng, clean):
    return rng.poisson(np.exp(np.clip(clean, -3, 3))).astype(float)


def labels(rng, clean):
    return (clean + 2 * rng.standard_normal(clean.shape) > 0).astype(float)


def quadratic(matrix, target, weights):
    """The target is an image, so that the least squares are those of a centre."""
    return so.Quadratic(matrix.T @ matrix, np.linalg.lstsq(matrix, target)[0])


LOSSES = {
    "squares": Loss(so.LeastSquares, conic.squares, numbers),
    "quadratic": Loss(quadratic, conic.squares, lambda _, clean: clean),
    "absolute": Loss(so.AbsoluteLoss, conic.slopes(-1.0, 1.0), numbers),
    "quantile": Loss(lambda *data: so.QuantileLoss(*data[:2], 0.9, data[2]), conic.slopes(-0.9, 0.1), numbers),
    "huber": Loss(lambda *data: so.HuberLoss(*data[:2], 0.8, data[2]), conic.huber(0.8), numbers),
    "poisson": Loss(so.PoissonLoss, conic.poisson, counts),
    "logistic": Loss(so.LogisticLoss, conic.logistic, labels),
    "squared hinge": Loss(so.SquaredHingeLoss, conic.squared_hinge, lambda rng, clean: 2 * labels(rng, clean) - 1),
}


class Rows(NamedTuple):
    """A penalty of weights on `lengths * (matrix @ x)`, where the rows of the matrix are of length 1."""

    matrix: Any
    lengths: np.ndarray
    weight: np.ndarray
    low: np.ndarray
    high: np.ndarray


def absolute(form, at):
    conic.absolute(form, at.matrix, at.weight * at.lengths)


def elastic(form, at):
    absolute(form, at)
    conic.ridge(form, at.matrix, 0.5 * at.weight * at.lengths**2)


def boxed(form, at):
    absolute(form, at)
    conic.between(form, at.matrix, at.low / at.lengths, at.high / at.lengths)


def positive(form, at):
    conic.between(form, at.matrix, 0.0, np.inf)
    absolute(form, at)


def grouped(form, at):
    conic.lengths(form, at.matrix, (at.weight * at.lengths)[::2], BY_LABEL)


def twice_grouped(form, at):
    absolute(form, at)
    grouped(form, at)


def of_channels(form, at):
    every = np.arange(at.lengths.size * CHANNELS).reshape(-1, CHANNELS)
    conic.lengths(form, sparse.kron(at.matrix, sparse.eye_array(CHANNELS)).tocsr(), at.weight * at.lengths, every)


# Made of `(weight, low, high)`, and the conic terms.
PENALTIES = {
    "L1": (lambda weight, *_: so.L1(weight), absolute),
    "elastic net": (lambda weight, *_: so.ElasticNet(weight, 0.5 * weight), elastic),
    "groups": (lambda weight, *_: so.GroupL2(weight[::2], groups=LABELS), grouped),
    "sparse groups": (lambda weight, *_: so.SparseGroup(weight, weight[::2], groups=LABELS), twice_grouped),
    "groups of channels": (lambda weight, *_: so.GroupL2(weight[0]), of_channels),
    "box": (lambda weight, low, high: so.Box(low, high, weight), boxed),
    "nonnegative": (lambda weight, *_: so.Nonnegative(weight), positive),
}


class Kind(NamedTuple):
    """What a problem is made of.

    Its operator is "any", a matrix of edges or of random numbers; "edges" or "bends", which are sparse; "differences",
    or None. Its matrix is "dense", "sparse", "wide and sparse", whose first column of ones has no penalty, or None.
    `spread` are the solvers whose certificates are checked where the units of the columns are far apart, `more` others
    than the three above that take it.
    """

    loss: str
    penalty: str
    operator: str | None = None
    matrix: str | None = "dense"
    weight: float = 1.0
    spread: tuple[Any, ...] = ()
    more: tuple[Any, ...] = ()

    def __str__(self):
        parts = [self.loss, self.penalty, self.operator and f"of {self.operator}", self.matrix or "no matrix"]
        return ", ".join(filter(None, parts))


LISTED = [
    Kind("quantile", "L1", spread=(ADMM, PD)),
    Kind("quantile", "L1", "any", spread=(ADMM,)),
    Kind("quantile", "L1", "edges", weight=0.4),
    Kind("quantile", "elastic net", weight=0.5),
    Kind("quantile", "nonnegative", spread=(ADMM,)),
    Kind("absolute", "L1", weight=2.0),
    Kind("absolute", "L1", "any", spread=(PD,)),
    Kind("absolute", "elastic net", spread=(ADMM,)),
    Kind("absolute", "box", spread=(ADMM,)),
    Kind("absolute", "groups", spread=(ADMM,)),
    Kind("squares", "L1", weight=6.0, spread=(APG,)),
    Kind("squares", "L1", matrix="wide and sparse", weight=1.5),
    Kind("squares", "elastic net", matrix="sparse", weight=3.0),
    Kind("squares", "L1", "any", spread=(ADMM, PD)),
    Kind("squares", "L1", "edges", None, weight=0.3),
    Kind("squares", "L1", "bends", None, weight=0.3),
    Kind("squares", "L1", "differences", weight=6.0),
    Kind("squares", "groups of channels", weight=30.0),
    Kind("squares", "nonnegative", spread=(APG,)),
    Kind("squares", "nonnegative", "differences", None, weight=0.0),
    Kind("squares", "box", weight=3.0, spread=(PD,)),
    Kind("quadratic", "groups", weight=4.0, more=(so.Maiht(), so.ProximalGradient())),
    Kind("quadratic", "L1", "differences", weight=2.0),
    Kind("huber", "L1", "differences"),
    Kind("huber", "L1", "any", spread=(ADMM,)),
    Kind("huber", "groups", spread=(APG,)),
    Kind("huber", "box", weight=3.0),
    Kind("poisson", "elastic net", spread=(APG,)),
    Kind("poisson", "L1", "any", spread=(ADMM,)),
    Kind("poisson", "L1", "edges", None, weight=0.5),
    Kind("logistic", "L1", spread=(APG,)),
    Kind("logistic", "L1", "any", spread=(PD,)),
    Kind("logistic", "sparse groups", weight=0.7),
    Kind("logistic", "groups of channels", "edges", weight=0.3),
    Kind("squared hinge", "L1", weight=2.0, spread=(APG,)),
    Kind("squared hinge", "L1", "any", spread=(ADMM,)),
]
KINDS = {str(kind): kind for kind in LISTED}


def sparse_rows(rng, rows, columns):
    """Of four entries a row, so that all of them have equally many."""
    column = np.concatenate([rng.choice(columns, 4, replace=False) for _ in range(rows)])
    entries = rng.standard_normal(rows * 4)
    return sparse.csr_array((entries, (np.repeat(np.arange(rows), 4), column)), shape=(rows, columns))


def edges(rng):
    """Rows `x_i - x_j`."""
    pairs = np.array([rng.choice(COLUMNS, 2, replace=False) for _ in range(EDGES)])
    ends = (np.tile([1.0, -1.0], EDGES), (np.repeat(np.arange(EDGES), 2), pairs.reshape(-1)))
    return sparse.csr_array(ends, shape=(EDGES, COLUMNS))


OPERATORS = {
    "any": lambda rng: edges(rng).toarray() if rng.random() < 0.5 else rng.standard_normal((EDGES, COLUMNS)),
    "edges": edges,
    "bends": lambda _: sparse.csr_array(np.diff(np.eye(COLUMNS), 2, axis=0)),
    "differences": lambda _: np.diff(np.eye(COLUMNS), axis=0),
}


def drawn(rng, kind, spread, dtype=np.float64):
    """A problem, its least objective, and the x that has it; None if Clarabel does not solve it.

    Spread: columns in other units, and weights and bounds that are all, in part, or nowhere at work.
    """
    loss = LOSSES[kind.loss]
    if kind.matrix == "wide and sparse":
        matrix = sparse.csr_array(sparse.hstack([np.ones((20, 1)), sparse_rows(rng, 20, 49)]))
    elif kind.matrix == "sparse":
        matrix = sparse_rows(rng, ROWS, COLUMNS)
    else:
        matrix = rng.standard_normal((ROWS, COLUMNS)) if kind.matrix else np.eye(COLUMNS)
    if spread and rng.random() < 0.5:
        matrix[:, 0] = 1.0
    rows, columns = matrix.shape
    channels = (CHANNELS,) if kind.penalty == "groups of channels" else ()
    truth = rng.standard_normal((columns, *channels)) * (rng.random((columns, *channels)) < 0.7)
    target = loss.target(rng, matrix @ truth / 2)
    if kind.loss == "poisson" and kind.matrix:
        matrix = matrix / 3
    weights = np.ones(rows) if kind.loss == "quadratic" else rng.uniform(0.5, 2, rows)
    operator = OPERATORS[kind.operator](rng) if kind.operator else sparse.eye_array(columns).tocsr()
    size = operator.shape[0]
    weight, scale, of_operator = np.full(size, kind.weight), np.ones(columns), np.ones(columns)
    bounds = rng.uniform(0.1, 1, (2, size))
    if kind.matrix == "wide and sparse":
        weight[0] = 0
    if spread:
        weight = rng.choice([0.1, 1.0, 4.0]) * (rng.random(size) >= rng.choice([0.0, 0.3, 1.0]))
        bounds = bounds * np.where(rng.random((2, size)) < 0.2, np.inf, 1)
        far = rng.choice([0.0, 2.0, 4.0])
        scale = 10.0 ** rng.uniform(-far, far, columns)
        scale = scale[2 * LABELS] if kind.penalty == "groups" else scale
        of_operator = scale if rng.random() < 0.5 else of_operator
        if not kind.operator:
            weight, bounds, of_operator = weight * of_operator, bounds / scale, np.ones(columns)
    low, high = bounds * [[-1], [1]]
    data = [part.astype(dtype) for part in (matrix * scale, target, weights)]
    numbers = [part.astype(dtype) for part in (weight, low, high)]
    over = (operator * of_operator).astype(dtype)
    problem = so.Problem(
        loss.make(data[0] if kind.matrix else None, *data[1:]),
        PENALTIES[kind.penalty][0](*numbers),
        over if kind.operator else None,
    )
    form = Conic(columns * max(sum(channels), 1))
    wide = sparse.csr_array(sparse.csr_array(data[0].astype(float)) / scale)
    if channels:
        wide = sparse.kron(wide, sparse.eye_array(CHANNELS)).tocsr()
    repeated = np.repeat(data[2].astype(float), max(sum(channels), 1))
    loss.term(form, wide, data[1].astype(float).reshape(-1), repeated)
    over = sparse.csr_array(sparse.csr_array(over.astype(float)) / scale)
    lengths = np.sqrt(over.multiply(over).sum(axis=1))
    unit = sparse.csr_array(sparse.diags_array(1 / lengths) @ over)
    PENALTIES[kind.penalty][1](form, Rows(unit, lengths, *(part.astype(float) for part in numbers)))
    try:
        least = form.least()
        return problem, least, form.answer.reshape(columns, *channels) / scale.reshape(-1, *[1 for _ in channels])
    except AssertionError:
        return None


@cache
def made(kind, instances, spread=False, dtype=np.float64):
    """Several problems, alone and stacked, Clarabel's optima and where it has them."""
    rng = np.random.default_rng([3 if spread else 7, LISTED.index(kind), np.dtype(dtype).itemsize, spread])
    found = []
    while len(found) < instances:
        one = drawn(rng, kind, spread, dtype)
        # Not those that Clarabel does not solve, nor those of optimum 0.
        if one is not None and one[1] > 1e-3:
            found.append(one)
    problems, optima, points = zip(*found, strict=True)

    def stacked(*leaves):
        together = np.stack(leaves)
        return together.astype(dtype) if together.dtype.kind == "f" else together

    return problems, jax.tree.map(stacked, *problems), np.array(optima), np.stack(points)


def takers(kind):
    """The solvers that take a problem: the chosen one is among them."""
    smooth = () if kind.operator or kind.loss in ("quantile", "absolute") else (APG,)
    return (*smooth, PD, ADMM, *kind.more)
