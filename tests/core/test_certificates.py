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
from sparseopt.core.base.types import precision
from sparseopt.core.operators.differences import Difference, GridBase
from tests.core import conic
from tests.core.conic import Conic
from tests.tiers import often

ROWS, COLUMNS, EDGES = 30, 8, 9
LABELS = np.arange(COLUMNS) // 2
BY_LABEL = [np.flatnonzero(g == LABELS) for g in range(LABELS.max() + 1)]
# The rounding of an objective's sums; how far Clarabel's value, which meets its cones up to 1e-10, may be from ours.
ALLOWED, ORACLE = 1e-11, 1e-6
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
    return lambda at: so.DataLoss(scalar, at.matrix, at.target, at.weights)


LOSSES = {
    "squares": Loss(lambda at: so.LeastSquares(at.matrix, at.target, at.weights), conic.squares, numbers),
    "absolute": Loss(composed(so.scalar.Absolute()), conic.slopes(-1.0, 1.0), numbers),
    "quantile": Loss(composed(so.scalar.Quantile(0.9)), conic.slopes(-0.9, 0.1), numbers),
    "huber": Loss(composed(so.scalar.Huber(0.8)), conic.huber(0.8), numbers),
    "poisson": Loss(composed(so.scalar.Poisson()), conic.poisson, counts),
    "logistic": Loss(composed(so.scalar.Logistic()), conic.logistic, labels),
    "squared hinge": Loss(
        composed(so.scalar.SquaredHinge()), conic.squared_hinge, lambda rng, clean: 2 * labels(rng, clean) - 1
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
    """An instance, the least objective by Clarabel, and its x; None if it does not solve it."""
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
        low, high = bounds * [[-1], [1]] / scale
        at = Instance(matrix * scale, target, weights, np.eye(COLUMNS), weight, low, high)
    at = Instance(*(part.astype(dtype) for part in at))
    wide = Instance(*(part.astype(np.float64) for part in at))
    form = Conic(COLUMNS)
    loss.term(form, sparse.csr_array(wide.matrix / scale), wide.target, wide.weights)
    rows = wide.operator / scale
    lengths = np.linalg.norm(rows, axis=1)
    PENALTIES[kind.penalty][1](form, Rows(sparse.csr_array(rows / lengths[:, None]), lengths), wide)
    try:
        least = form.least()
        return at, least, form.answer / scale
    except AssertionError:
        return None


def problem(kind, at):
    return so.Problem(
        LOSSES[kind.loss].make(at), PENALTIES[kind.penalty][0](at), at.operator if kind.operator else None
    )


def ended(kind, dtype, instances, max_steps=20_000):
    """Solutions, and in float64 how far above the objective at Clarabel's answer theirs are.

    No lower bound on the optimum is above the objective of any point.
    """
    rng = np.random.default_rng([KINDS.index(kind), np.dtype(dtype).itemsize])
    pairs = []
    while len(pairs) < instances:
        pair = drawn(rng, kind, dtype)
        # Not those that Clarabel does not solve, nor those of optimum 0.
        if pair is not None and pair[1] > 1e-3:
            pairs.append(pair)
    optima = np.array([least for _, least, _ in pairs])
    with precision(np.dtype(np.float64)):
        together = jax.tree.map(lambda *leaves: np.stack(leaves), *(at for at, _, _ in pairs))
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

        points = np.stack([x for _, _, x in pairs])
        if kind.penalty in ("box", "nonnegative"):
            points = np.clip(
                points, wide.low if kind.penalty == "box" else 0, wide.high if kind.penalty == "box" else None
            )
        reached, least = (np.asarray(objective(wide, x)) for x in (found.value.astype(np.float64), points))
    assert np.all(np.abs(least / optima - 1) <= ORACLE)
    return found, reached / least - 1


CASES = [(kind, dtype) for kind in KINDS for dtype in (np.float32, np.float64)]
# Each compiles a program. The others run in `make test-thorough`.
OFTEN = [
    (KINDS[0], np.float64),
    (KINDS[3], np.float32),
    (KINDS[8], np.float64),
    (KINDS[11], np.float64),
    (KINDS[17], np.float32),
]
FEW, MANY = 20, 48


@pytest.mark.parametrize(
    ("kind", "dtype", "instances"),
    often(
        [(*case, count) for case in CASES for count in (FEW, MANY) if count == MANY or case in OFTEN],
        *[(*case, FEW) for case in OFTEN],
    ),
)
def test_no_gap_is_below_the_true_suboptimality(kind, dtype, instances):
    found, excess = ended(kind, dtype, instances)
    assert not np.any(found.gap < excess - ALLOWED)
    # And a gap is found: other units of the columns change little.
    certified = (found.status == so.Status.CONVERGED) & (found.gap <= TOL[dtype])
    # Coupled entries have one step, which other units make short.
    assert np.mean(certified) >= (0.5 if kind.penalty == "groups" else 0.85)
    assert set(found.status.tolist()) <= {so.Status.CONVERGED, so.Status.MAX_STEPS}


@pytest.fixture
def _float64():
    with precision(np.dtype(np.float64)):
        yield


def status(found):
    return so.Status(int(found.status))


@pytest.mark.usefixtures("_float64")
def test_another_unit_of_a_feature_without_a_penalty_changes_no_answer():
    rng = np.random.default_rng(0)
    hours = rng.uniform(0, 10, 200)
    costs = 1 + 0.5 * hours + (0.2 + 0.2 * hours) * rng.standard_normal(200)
    for unit in (1.0, 5e-3, 1e-3, 1e-8):
        line = np.column_stack([np.ones(200), unit * (hours - hours.mean())])
        found = so.solve(so.Problem(so.DataLoss(so.scalar.Quantile(0.9), line, costs), so.L1(0.0))).check()
        assert float(found.gap) <= 1e-6
        assert float(found.objective) == pytest.approx(50.857288279, rel=1e-6)


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("least", [-0.5, -1e-3])
def test_a_loss_without_a_minimum_is_not_certified(least):
    """The Hessian is checked before the solve up to 256 rows only."""
    loss = so.Quadratic(np.diag(np.r_[least, np.ones(299)]), np.ones(300))
    found = so.solve(so.Problem(loss, so.L1(0.01)), max_steps=500)
    assert np.isnan(found.gap)
    assert status(found) in (so.Status.MAX_STEPS, so.Status.NONFINITE)
    assert status(so.solve(so.Problem(loss, so.L1(0.01), np.eye(300)), max_steps=500)) is so.Status.NONFINITE


BENDS, LINE = np.diff(np.eye(20), n=2, axis=0), np.arange(20.0)
FREE = {
    "squares": so.LeastSquares(None, LINE),
    "absolute": so.AbsoluteLoss(None, LINE / 3),
    "quadratic": so.Quadratic(np.eye(20) + 0.5, LINE),
    "no rows": so.LeastSquares(np.eye(20), np.sin(LINE), np.zeros(20)),
}


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("name", often(FREE, "squares", "absolute"))
def test_an_optimum_of_0_is_found_up_to_rounding(name):
    found = so.solve(so.Problem(FREE[name], so.L1(1.0), BENDS), max_steps=1000).check()
    assert float(found.gap) <= 1e-6
    assert float(found.objective) <= 1e-11


@pytest.mark.usefixtures("_float64")
def test_a_penalty_of_weight_0_or_ridge_0_has_the_gap_of_the_norm_that_it_is():
    rng = np.random.default_rng(1)
    loss = so.LeastSquares(rng.standard_normal((30, 8)), rng.standard_normal(30))
    for weight, same in ((2.0, so.ElasticNet(2.0, 0.0)), (0.0, so.Box(-np.inf, np.inf))):
        found, other = so.solve(so.Problem(loss, so.L1(weight))).check(), so.solve(so.Problem(loss, same)).check()
        assert float(other.gap) == pytest.approx(float(found.gap), rel=1e-3, abs=1e-12)
        np.testing.assert_allclose(other.value, found.value, atol=1e-9)


@so.pytree
class Blur:
    """Gaussian means of standard deviation 2 along both axes of a picture."""

    rows: Any
    columns: Any

    def mv(self, x):
        return self.rows @ x @ self.columns

    rmv = mv


@pytest.mark.usefixtures("_float64")
def test_the_dual_of_a_blurred_picture_reaches_the_equation_along_its_ball():
    """Moved out of it, the whole pair would be scaled by the worst pixel: a gap of 1e-5 where the answer has 1e-8."""
    rng, shape = np.random.default_rng(0), (16, 24)
    at = [np.arange(n) for n in shape]
    blur = Blur(*(np.exp(-((a[:, None] - a) ** 2) / 8) / np.sqrt(8 * np.pi) for a in at))
    clean = 0.2 + 0.6 * ((at[0][:, None] - 8) ** 2 + (at[1] - 8) ** 2 < 16)
    noisy = np.asarray(blur.mv(clean)) + 0.05 * rng.standard_normal(shape)
    problem = so.Problem(so.LeastSquares(blur, noisy), so.GroupL2(0.02, axis=0), Difference(GridBase(shape), 1))
    found = so.solve(problem, PD, max_steps=1500).check()
    best = so.solve(problem, PD, tol=1e-8, max_steps=30_000).objective
    assert -1e-12 <= found.objective / best - 1 <= found.gap <= 1e-6


@pytest.mark.usefixtures("_float64")
def test_the_objective_is_that_of_the_answer_before_convergence():
    rng = np.random.default_rng(2)
    loss = so.DataLoss(so.scalar.Quantile(0.3), rng.standard_normal((ROWS, COLUMNS)), 3 * rng.standard_normal(ROWS))
    problem = so.Problem(loss, so.Box(-0.2, 0.2))
    for steps in (10, 20, 400):
        found = so.solve(problem, tol=1e-14, max_steps=steps)
        assert float(found.objective) == pytest.approx(float(loss.value(found.value)), rel=1e-12)


def test_the_advice_for_constraints_that_no_point_meets_names_them():
    rows, ends = np.vstack([np.eye(4), -np.eye(4)]).astype(np.float32), np.ones(8, np.float32)
    problem = so.Problem(so.LeastSquares(None, np.ones(4, np.float32)), so.Box(ends, 2 * ends), rows)
    with pytest.raises(RuntimeError, match="constraints, check that some x meets all"):
        so.solve(problem, max_steps=200).check()
