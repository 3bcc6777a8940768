"""No gap lies below the true suboptimality: random problems of every kind, scaled badly, against Clarabel.

A problem is drawn in units in which its columns are alike and solved there by Clarabel. `solve` gets columns, and the
columns of the operator, in other units, up to ten thousand times larger or smaller.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from scipy import sparse

import sparseopt as so
from sparseopt.core.types import precision
from tests.core import conic
from tests.core.conic import Conic

ROWS, COLUMNS, EDGES = 30, 8, 9
LABELS = np.arange(COLUMNS) // 2
BY_LABEL = [np.flatnonzero(g == LABELS) for g in range(LABELS.max() + 1)]
# Clarabel's own relative error.
ALLOWED = 1e-8
TOL = {np.float32: 1e-3, np.float64: 1e-6}
APG, PD, ADMM = so.AcceleratedProximalGradient(), so.PrimalDual(), so.SplitAdmm()


class Instance(NamedTuple):
    """Arrays of one problem in the units of `solve`."""

    matrix: np.ndarray
    target: np.ndarray
    weights: np.ndarray  # of the rows
    operator: np.ndarray
    weight: np.ndarray  # of the penalty's rows, some or all of them 0
    low: np.ndarray
    high: np.ndarray


class Loss(NamedTuple):
    """A loss, its conic term, and the targets that it takes."""

    make: Callable[..., Any]
    term: Callable[..., Any]
    target: Callable[[np.random.Generator, np.ndarray], np.ndarray]


def numbers(rng, clean):
    return clean + rng.standard_normal(clean.size) * rng.choice([0.1, 1.0, 10.0])


def counts(rng, clean):
    return rng.poisson(np.exp(np.clip(clean, -3, 3))).astype(float)


def labels(rng, clean):
    return (clean + 2 * rng.standard_normal(clean.size) > 0).astype(float)


def composed(scalar):
    return lambda at: so.Composed(scalar, at.matrix, at.target, at.weights)


def as_quadratic(at):
    root = at.matrix.astype(np.float64) * np.sqrt(at.weights.astype(np.float64))[:, None]
    center = np.linalg.lstsq(root, np.sqrt(at.weights) * at.target)[0]
    return so.Quadratic((root.T @ root).astype(at.matrix.dtype), center.astype(at.matrix.dtype))


LOSSES = {
    "squares": Loss(lambda at: so.LeastSquares(at.matrix, at.target, at.weights), conic.squares, numbers),
    "absolute": Loss(composed(so.AbsoluteLoss()), conic.slopes(-1.0, 1.0), numbers),
    "quantile": Loss(composed(so.QuantileLoss(0.9)), conic.slopes(-0.9, 0.1), numbers),
    "huber": Loss(composed(so.HuberLoss(0.8)), conic.huber(0.8), numbers),
    "poisson": Loss(composed(so.PoissonLoss()), conic.poisson, counts),
    "logistic": Loss(composed(so.LogisticLoss()), conic.logistic, labels),
    "squared hinge": Loss(
        composed(so.SquaredHingeLoss()), conic.squared_hinge, lambda rng, clean: 2 * labels(rng, clean) - 1
    ),
}


class Rows(NamedTuple):
    """The penalty on `lengths * (matrix @ x)`; the rows of the matrix are of length 1."""

    matrix: Any
    lengths: np.ndarray


def absolute(form, rows, at):
    conic.absolute(form, rows.matrix, at.weight * rows.lengths)


def elastic(form, rows, at):
    absolute(form, rows, at)
    conic.ridge(form, rows.matrix, 0.5 * at.weight * rows.lengths**2)


def boxed(form, rows, at):
    absolute(form, rows, at)
    for bound, low, high in ((at.low, True, False), (at.high, False, True)):
        ends, bound = np.isfinite(bound), bound / rows.lengths
        conic.between(form, rows.matrix[ends], bound[ends] if low else -np.inf, bound[ends] if high else np.inf)


def positive(form, rows, at):
    conic.between(form, rows.matrix, 0.0, np.inf)
    absolute(form, rows, at)


def grouped(form, rows, at):
    conic.lengths(form, rows.matrix, (at.weight * rows.lengths)[::2], BY_LABEL)


PENALTIES = {
    "L1": (lambda at: so.L1(at.weight), absolute),
    "elastic net": (lambda at: so.ElasticNet(at.weight, 0.5 * at.weight), elastic),
    "groups": (lambda at: so.GroupL2(at.weight[::2], groups=LABELS), grouped),
    "box": (lambda at: so.Box(at.low, at.high, at.weight), boxed),
    "nonnegative": (lambda at: so.Nonnegative(at.weight), positive),
}


class Kind(NamedTuple):
    loss: str
    penalty: str
    operator: bool
    solver: Any


KINDS = [
    Kind("quantile", "L1", False, ADMM),
    Kind("quantile", "L1", False, PD),
    Kind("quantile", "L1", True, ADMM),
    Kind("absolute", "L1", True, PD),
    Kind("absolute", "elastic net", False, ADMM),
    Kind("absolute", "box", False, ADMM),
    Kind("quantile", "nonnegative", False, ADMM),
    Kind("absolute", "groups", False, ADMM),
    Kind("squares", "L1", True, ADMM),
    Kind("squares", "L1", True, PD),
    Kind("squares", "L1", False, APG),
    Kind("squares", "nonnegative", False, APG),
    Kind("squares", "box", False, PD),
    Kind("huber", "L1", True, ADMM),
    Kind("huber", "groups", False, APG),
    Kind("poisson", "L1", True, ADMM),
    Kind("poisson", "elastic net", False, APG),
    Kind("logistic", "L1", False, APG),
    Kind("logistic", "L1", True, PD),
    Kind("squared hinge", "L1", False, APG),
    Kind("squared hinge", "L1", True, ADMM),
]


def drawn(rng, kind, dtype):
    """An instance, and the least objective by Clarabel."""
    loss, size = LOSSES[kind.loss], EDGES if kind.operator else COLUMNS
    matrix = rng.standard_normal((ROWS, COLUMNS))
    if rng.random() < 0.5:
        matrix[:, 0] = 1.0
    truth = rng.standard_normal(COLUMNS) * (rng.random(COLUMNS) < 0.7)
    target = loss.target(rng, matrix @ truth / 2)
    if kind.loss == "poisson":
        matrix /= 3
    weights = rng.uniform(0.5, 2, ROWS)
    pairs = np.array([rng.choice(COLUMNS, 2, replace=False) for _ in range(EDGES)])
    differences = np.eye(COLUMNS)[pairs[:, 0]] - np.eye(COLUMNS)[pairs[:, 1]]
    operator = [differences, rng.standard_normal((EDGES, COLUMNS))][rng.integers(2)]
    # All rows penalised, some, or none.
    weight = rng.choice([0.1, 1.0, 4.0]) * (rng.random(size) >= rng.choice([0.0, 0.3, 1.0]))
    bounds = rng.uniform(0.1, 1, (2, COLUMNS)) * np.where(rng.random((2, COLUMNS)) < 0.2, np.inf, 1)
    spread = rng.choice([0.0, 2.0, 4.0])
    scale = 10.0 ** rng.uniform(-spread, spread, COLUMNS)
    if kind.penalty == "groups":
        scale = scale[2 * LABELS]
    # In the units of the columns, with an operator that has them too or not.
    of_operator = scale if rng.random() < 0.5 else np.ones(COLUMNS)
    if kind.operator:
        at = Instance(matrix * scale, target, weights, operator * of_operator, weight, *bounds)
    else:
        weight = weight * (scale if rng.random() < 0.5 else 1)
        at = Instance(matrix * scale, target, weights, np.eye(COLUMNS), weight, *(-bounds[:1] / scale), *(bounds[1:] / scale))
    at = Instance(*(part.astype(dtype) for part in at))
    wide = Instance(*(part.astype(np.float64) for part in at))
    form = Conic(COLUMNS)
    loss.term(form, sparse.csr_array(wide.matrix / scale), wide.target, wide.weights)
    rows = wide.operator / scale
    lengths = np.linalg.norm(rows, axis=1)
    PENALTIES[kind.penalty][1](form, Rows(sparse.csr_array(rows / lengths[:, None]), lengths), wide)
    return at, form.least()


def problem(kind, at):
    return so.Problem(LOSSES[kind.loss].make(at), PENALTIES[kind.penalty][0](at), at.operator if kind.operator else None)


def ended(kind, dtype, instances, seed=0, max_steps=20_000):
    """Statuses, gaps and true suboptimalities."""
    rng = np.random.default_rng([seed, KINDS.index(kind), np.dtype(dtype).itemsize])
    pairs = []
    while len(pairs) < instances:
        try:
            pair = drawn(rng, kind, dtype)
        except AssertionError:
            continue
        if pair[1] > 1e-3:
            pairs.append(pair)
    optima = np.array([least for _, least in pairs])
    with precision(np.dtype(np.float64)):
        together = jax.tree.map(lambda *leaves: np.stack(leaves), *(at for at, _ in pairs))
        solve = jax.jit(
            jax.vmap(lambda at: so.solve(problem(kind, at), kind.solver, tol=TOL[dtype], max_steps=max_steps))
        )
        found = jax.device_get(solve(together))
        assert found.value.dtype == dtype
        wide = jax.tree.map(lambda leaf: leaf.astype(np.float64), together)

        @jax.jit
        @jax.vmap
        def objective(at, x):
            posed = problem(kind, at)
            return posed.loss.value(x) + posed.penalty.value(x if posed.operator is None else posed.operator.mv(x))

        reached = np.asarray(objective(wide, found.value.astype(np.float64)))
    return found, reached / optima - 1


if __name__ == "__main__":
    import sys
    import time

    count = int(sys.argv[1])
    chosen = [int(i) for i in sys.argv[2].split(",")] if len(sys.argv) > 2 and sys.argv[2] != "all" else range(len(KINDS))
    kinds = [np.float64, np.float32] if len(sys.argv) <= 3 else [getattr(np, sys.argv[3])]
    all_false = all_good = n = 0
    for number in chosen:
        for dtype in kinds:
            kind = KINDS[number]
            start = time.process_time()
            found, excess = ended(kind, dtype, count)
            false = found.gap < excess - ALLOWED
            good = (found.status == 0) & np.isfinite(found.gap)
            names = {so.Status(int(s)).name: int(np.sum(found.status == s)) for s in set(found.status.tolist())}
            nan = int(np.sum(np.isnan(found.gap)))
            worst = np.max(np.where(false, excess, 0))
            slight = int(np.sum(false & (found.gap > 0.5 * excess)))
            print(number, kind.loss, kind.penalty, kind.operator, type(kind.solver).__name__, dtype.__name__,
                  f"false {int(np.sum(false))} (slight {slight}, worst {worst:.2g}) good {int(np.sum(good))}/{count} nan {nan} falseconv {int(np.sum(false & (found.status == 0)))}",
                  names, f"steps {np.median(found.steps):.0f} {time.process_time() - start:.1f}s", flush=True)
            all_false += int(np.sum(false)); all_good += int(np.sum(good)); n += count
    print("all", n, "false", all_false, "good", all_good)
