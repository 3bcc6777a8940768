"""The trend filter with covariates and a season beside the trend, as one problem with one certificate.

    minimise over t, c    sum_j w_j f((t + Z c)_j; y_j)  +  ||weight Δ^(k+1) t||_1

The columns of Z are the covariates X and an orthonormal basis of the periodic signals of mean zero. For a loss of the
residual, the square or Huber's, the best value for given c, `g(c) = min over t`, is a trend filter's of `y - Z c`. It
is convex and smooth, with `∇g(c) = -Zᵀ q` for the pull `q = Δᵀ u` of that fit. While the rows A of zero differences
stay the same, t moves by the projection Π onto the signals with these zeros, in the metric W of the loss's curvatures,
so that Newton's method ends after a few trend filters:

    H = Zᵀ W (I - Π) Z,    c <- c + H⁻¹ Zᵀ q

The solve with `[[W, Aᵀ], [A, 0]]` that computes Π Z gives multipliers too. They move u in the rows A alone until
`Zᵀ Δᵀ u = 0`, as a dual point of the whole problem must: then no c sees the pull, and the gap is one of all of t and c.
Other losses are expanded to second order around the last fit, which is a problem of the square loss.

Source: Tibshirani and Taylor, "Degrees of freedom in lasso problems", Annals of Statistics 40 (2012), for Π; Lee, Sun,
Saunders, "Proximal Newton-type methods for minimizing composite functions", SIAM J. Optimization 24 (2014).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import jax.numpy as jnp
import numpy as np
from scipy import sparse

from sparseopt.core.base.arguments import real_array, whole_number
from sparseopt.core.losses.data import DataLoss
from sparseopt.core.losses.residuals import Huber, Squared
from sparseopt.core.losses.scalar import SquaredHinge
from sparseopt.core.problem.certify import relative_gap
from sparseopt.core.problem.problem import Solution, Status
from sparseopt.trend.base.fit import Fit
from sparseopt.trend.base.ground import BOX_RANGES
from sparseopt.trend.base.penalties import leaves_as, vanishes
from sparseopt.trend.base.pieces import TrendSolution
from sparseopt.trend.methods.choice import choose
from sparseopt.trend.methods.losses import best_constants
from sparseopt.trend.methods.polynomials import expand

# A column that the earlier ones explain up to this fraction of its length is one of their combinations.
DEPENDENT = 1e-7
# Trend filters of one expansion, and expansions; the part of the tolerance that each may use.
ROUNDS, EXPANSIONS, PART = 60, 60, 0.3
# The smallest tolerance of a trend filter. A step is too long if the slope behind it has more than the first multiple
# of the one before, in the other direction; the longest step changes by the second. It has to end: a column may lie
# among the signals of the present pieces, with no curvature.
LEAST_TOL, OVERSHOOT, SHORTER = 1e-13, 0.5, 4.0
# The weight of a zero difference's row in the system, and of a node, where it has none: they keep it regular.
REGULAR = 1e-12
# Curvature below the first fraction of the mean counts as none, and is replaced by the second.
NO_CURVATURE, SOME_CURVATURE = 1e-9, 1e-2
# An objective within this many eps of the signal's largest value, at each node, is rounding.
ROUNDING = 64
Solve = Callable[[Fit], TrendSolution]


@dataclasses.dataclass(frozen=True)
class Beside:
    """The columns beside a trend, and the coefficients of an answer."""

    covariates: np.ndarray  # X, `[n, covariates]`
    periodic: np.ndarray  # the basis of the season at every node, `[n, period - 1]`, or `[n, 0]`
    free: np.ndarray  # of the columns of both, the part that no penalty sees, `[n, columns]`
    sizes: np.ndarray  # the length of what is left of each at the observed nodes

    @functools.cached_property
    def columns(self) -> np.ndarray:
        """Z without what a trend can do at no cost, in columns of length 1 at the observed nodes."""
        return (np.hstack([self.periodic, self.covariates]) - self.free) / self.sizes

    def finish(self, fit: TrendSolution, c: np.ndarray, shape: tuple[int, ...]) -> TrendSolution:
        """The fit of the trend and of `columns` in terms of X and the season."""
        c = c / self.sizes
        split = self.periodic.shape[1]
        trend, beta = fit.value - self.free @ c, c[split:]
        season = self.periodic @ c[:split] if split else None
        fitted = trend + self.covariates @ beta + (0 if season is None else season)
        parts = {"value": trend, "season": season, "fitted": fitted}
        parts = {name: None if part is None else part.reshape(shape) for name, part in parts.items()}
        return dataclasses.replace(fit, **parts, beta=beta if len(beta) else None)

    def explained(self, asked: Fit) -> np.ndarray:
        """What the columns explain of a signal by the first estimate, `[n]`."""
        return self.columns @ self.guess(asked)

    def guess(self, asked: Fit) -> np.ndarray:
        """A first estimate of c: least squares of the differences of the signal, most of which a trend has not."""
        matrix = _matrix(asked)
        seen = abs(matrix) @ (asked.mass == 0) == 0
        return np.linalg.lstsq((matrix @ self.columns)[seen], (matrix @ asked.values)[seen])[0]


def check_beside(covariates: Any, season: Any, asked: Fit) -> Beside:
    """Checked columns beside the trend of a request; a ValueError for what cannot be told from it."""
    geometry, n, alone = asked.geometry, asked.geometry.num_nodes, "covariates and a season"
    if not asked.is_l1 or asked.several or vanishes(asked.penalty) or geometry.num_edges == 0:
        raise ValueError(f"{alone} need one penalty L1 of a positive weight on a graph with edges, given {asked.terms}")
    if asked.channels:
        raise ValueError(f"{alone} belong to one channel, given {asked.channels[0]}: fit the channels one by one")
    if not asked.square and (isinstance(asked.loss, SquaredHinge) or not getattr(asked.loss, "smooth", False)):
        raise ValueError(
            f"{alone} need the square, Huber's, Poisson's or the logistic loss, or a smooth one of your own, given "
            f"{asked.loss}: use huber against outliers, logistic for labels"
        )
    if asked.history or asked.start is not None or geometry.several_devices or asked.dtype != np.float64:
        raise ValueError(f"a fit with {alone} runs in float64 on one device: leave out history, start, devices, dtype")
    names = [str(name) for name in getattr(covariates, "columns", ())]
    x = np.zeros((n, 0)) if covariates is None else real_array("covariates", covariates).astype(np.float64)
    nodes = next((shape for shape in geometry.shapes if x.shape[: len(shape)] == shape), (0,))
    if n != np.prod(nodes) or x.ndim > len(nodes) + 1:
        raise ValueError(
            f"covariates have one row for each of {n} nodes, [{n}] or [{n}, covariates]{geometry.or_shape}, given "
            f"{x.shape}"
        )
    x, periodic = x.reshape(n, -1), np.zeros((n, 0))
    names = names or [f"covariate {i}" for i in range(x.shape[1])]
    if (wrong := ~np.isfinite(x)).any():
        row, column = (int(i) for i in np.argwhere(wrong)[0])
        raise ValueError(f"covariates are known at every node, given {x[row, column]} of {names[column]} at node {row}")
    seen = asked.mass > 0
    if season is not None:
        if not geometry.line:
            raise ValueError("a season needs a series, Graph.chain(n): give periodic columns as covariates")
        period = whole_number("season", season, 2, n // 2, "a period in rows, at most half of the series")
        phase = np.arange(n) % period
        if (unseen := np.bincount(phase, seen, period) == 0).any():
            raise ValueError(f"row {int(np.argmax(unseen))} of the season of {period} rows is never observed")
        periodic = np.linalg.qr(np.eye(period) - 1 / period)[0][phase, :-1]
        names = [*["the season"] * (period - 1), *names]
    z = np.hstack([periodic, x])
    free = geometry.null_fit(z, asked.mass, asked.order)
    left = np.where(seen[:, None], z - free, 0)
    lengths, sizes = np.linalg.norm(np.where(seen[:, None], z, 0), axis=0), np.linalg.norm(left, axis=0)
    own = np.abs(np.diag(np.linalg.qr(left, mode="r"))) if len(z) >= z.shape[1] else np.zeros(z.shape[1])
    for name, short, rest in zip(names, sizes <= DEPENDENT * lengths, own <= DEPENDENT * lengths, strict=True):
        if short or rest:
            does = "no penalty sees it, so the trend does the same" if short else "the columns before it add up to it"
            raise ValueError(f"the coefficient of {name} is not determined by the observed nodes: {does}; leave it out")
    return Beside(x, periodic, free, sizes)


def fit_beside(asked: Fit, beside: Beside, solve: Solve) -> TrendSolution:
    """The trend with the coefficients of the columns beside it, by trend filters that `solve` fits."""
    mass, loss, columns = asked.mass, leaves_as(asked.loss, asked.dtype), beside.columns
    joint = _Joint.of(asked, loss, columns)
    if isinstance(loss, Squared | Huber):
        found = _newton(asked, joint, _State(c=beside.guess(asked)), solve, asked.tol)
        return beside.finish(joint.judge(found, asked), found.c, asked.shape)
    eta, nothing = best_constants(asked).fit[:, 0], np.zeros(joint.matrix.shape[0])
    state = _State(c=np.zeros(columns.shape[1]), value=eta, dual=nothing, nonzero=nothing > 0)
    for _ in range(EXPANSIONS):
        objective, _ = joint.value_and_slack(state)
        _, slope, curvature = (np.asarray(part) for part in expand(loss, asked.values, mass, joint.image(state)))
        seen, least = mass > 0, curvature[mass > 0].mean()
        curvature = np.where(curvature > NO_CURVATURE * least, curvature, SOME_CURVATURE * least) * seen
        target = np.where(seen, joint.image(state) - slope / np.where(seen, curvature, 1), 0)
        part = dataclasses.replace(asked, values=target, weights=curvature, loss=Squared())
        inner = _Joint.of(part, Squared(), columns)
        level = inner.value_and_slack(state)[0]
        tol = float(np.clip(PART * asked.tol * objective / max(level, objective), LEAST_TOL, 1e-2))
        after = _newton(part, inner, state, solve, tol)
        # The expansion may be too low far from its centre.
        share, start = 1.0, state
        state = after
        while not joint.value_and_slack(state)[0] <= objective and share > 1e-6:
            share /= 2
            state = after.between(start, share)
        if joint.gap(state) <= asked.tol or share <= 1e-6 or not after.reached:
            break
    return beside.finish(joint.judge(state, asked), state.c, asked.shape)


@dataclasses.dataclass(frozen=True)
class _State:
    """A trend and coefficients, with the dual of the trend's rows; rows as the graph lists them."""

    c: np.ndarray
    value: Any = None
    dual: Any = None
    nonzero: Any = None
    steps: int = 0
    reached: bool = True  # whether the trend filter ended before its limit of steps

    def between(self, other: "_State", share: float) -> Self:
        value, c = (share * a + (1 - share) * b for a, b in ((self.value, other.value), (self.c, other.c)))
        return dataclasses.replace(self, value=value, c=c)


class _Joint(NamedTuple):
    """The problem in t and c."""

    loss: DataLoss
    matrix: Any  # of the rows
    weight: np.ndarray  # of L1, `[rows]`
    columns: np.ndarray  # Z, 0 where nothing is observed
    least: float  # an objective that is rounding

    @classmethod
    def of(cls, asked: Fit, loss: Any, columns: np.ndarray) -> Self:
        matrix, seen = _matrix(asked), asked.mass > 0
        weight = np.broadcast_to(np.asarray(asked.penalty.weight, np.float64), matrix.shape[:1])
        size = np.abs(asked.values).max() * ROUNDING * np.finfo(np.float64).eps
        node_loss = DataLoss(loss, None, jnp.asarray(asked.values), asked.weights)
        least = asked.mass.sum() * size**2 + size * float(weight @ abs(matrix).sum(axis=1))
        return cls(node_loss, matrix, weight, np.where(seen[:, None], columns, 0), float(least))

    def image(self, state: _State) -> np.ndarray:
        return state.value + self.columns @ state.c

    def seen_of(self, dual: np.ndarray) -> np.ndarray:
        """`Zᵀ Δᵀ u`, what the columns see of a dual's pull; 0 at the optimum."""
        return self.columns.T @ (self.matrix.T @ dual)

    def curvature(self, state: _State) -> np.ndarray:
        """The second derivative of the loss at every node, `[n]`."""
        mass = np.ones(len(state.value)) if self.loss.weights is None else np.asarray(self.loss.weights)
        return np.asarray(expand(self.loss.scalar, self.loss.target, mass, self.image(state))[2])

    def value_and_slack(self, state: _State) -> tuple[float, float]:
        """The objective, and its distance from what the dual, shortened until it is feasible, proves."""
        rows, image = self.matrix @ state.value, self.image(state)
        size = np.max(np.abs(state.dual) / np.where(self.weight > 0, self.weight, np.inf), initial=1)
        dual = np.clip(state.dual / size, -self.weight, self.weight)
        pull, reach = self.matrix.T @ dual, np.ptp(image)
        # The box at missing nodes.
        low, high = image.min() - BOX_RANGES * reach, image.max() + BOX_RANGES * reach
        loss = dataclasses.replace(self.loss, low=low, high=high)
        # 0 lies in the domain of every loss's conjugate.
        share = float(loss.feasible_share(jnp.asarray(pull), jnp.zeros(len(pull))))
        slack = float(loss.slack(jnp.asarray(image), share * jnp.asarray(pull)))
        slack += np.sum(self.weight * abs(rows) - share * dual * rows)
        # What is left of Zᵀ Δᵀ u, for coefficients as large as any that explain the signal: the columns have length 1.
        most = np.abs(state.c) + np.linalg.norm(image - image.mean()) + np.linalg.norm(self.loss.target)
        slack += share * np.abs(self.columns.T @ pull) @ most
        return float(loss.value(jnp.asarray(image))) + np.sum(self.weight * abs(rows)), slack

    def gap(self, state: _State) -> float:
        objective, slack = self.value_and_slack(state)
        return 0.0 if objective <= self.least else float(relative_gap(jnp.asarray(slack), jnp.asarray(objective)))

    def judge(self, state: _State, asked: Fit) -> TrendSolution:
        """The solution at a state."""
        (objective, _), gap = self.value_and_slack(state), self.gap(state)
        status = Status.CONVERGED if gap <= asked.tol else Status.PRECISION if state.reached else Status.MAX_STEPS
        if not np.isfinite(objective):
            status = Status.NONFINITE
        measure = np.asarray(gap)
        found = Solution(
            state.value, np.asarray(np.int32(status)), np.asarray(np.int32(state.steps)), measure,
            np.asarray(objective), measure, dual=state.dual,
        )  # fmt: skip
        return dataclasses.replace(TrendSolution.of(found, state.nonzero), order=asked.order)


def _newton(asked: Fit, joint: _Joint, state: _State, solve: Solve, tol: float) -> _State:
    """The answer for a loss of the residual to a relative gap, by Newton's method for c."""
    method, z, mass = choose(asked), joint.columns, asked.mass
    inner, fits, last, factors, steps = PART * tol, 0, None, None, state.steps

    def at(c: np.ndarray) -> _State:
        nonlocal fits, last, steps
        start = None if method.cold else last
        values = np.where(mass > 0, asked.values - z @ c, 0)
        fit = asked.list_rows(solve(dataclasses.replace(asked, values=values, method=method, start=start, tol=inner)))
        value, fits = np.asarray(asked.geometry.gather(fit.value, 0), np.float64).reshape(-1), fits + 1
        last = fit = dataclasses.replace(fit, value=value)
        dual = np.zeros(joint.matrix.shape[0]) if fit.dual is None else np.asarray(fit.dual, np.float64)
        steps, reached = steps + int(fit.steps), int(fit.status) != Status.MAX_STEPS
        return _State(c, value, dual, np.asarray(fit.nonzero), steps, reached)

    state, radius = at(state.c), float(np.linalg.norm(np.sqrt(mass) * asked.values))
    while True:
        curvature = joint.curvature(state)
        if factors is None or not factors.hold(curvature, state.nonzero):
            factors = _Factors.of(joint, curvature, state.nonzero)
        best = dataclasses.replace(state, dual=factors.without(joint, state.dual))
        if joint.gap(best) <= tol or fits >= ROUNDS or inner <= LEAST_TOL:
            return best
        objective, p = joint.value_and_slack(state)[0], joint.seen_of(state.dual)
        move = factors.newton(p, radius)
        if p @ move <= PART * tol * objective:
            inner = max(inner / 10, LEAST_TOL)
        after = at(state.c + move)
        # -∇g along the move: far below 0 the move is too long.
        long = move @ joint.seen_of(after.dual) < -OVERSHOOT * (p @ move)
        radius = np.abs(move).max() / SHORTER if long else SHORTER * radius
        if not long or joint.value_and_slack(after)[0] < objective:
            state = after


class _Factors(NamedTuple):
    """What the rows of zero differences say of the columns Z."""

    curvature: np.ndarray
    nonzero: np.ndarray
    multipliers: np.ndarray  # `[zero rows, columns]`, whose pull is W (I - Π) Z
    hessian: np.ndarray

    @classmethod
    def of(cls, joint: _Joint, mass: np.ndarray, nonzero: np.ndarray) -> Self:
        # Not at the top: it takes a tenth of a second, and few fits need it.
        from scipy.sparse.linalg import splu

        rows, z, n = joint.matrix[~nonzero], joint.columns, len(mass)
        scale = mass.mean()
        diagonal = sparse.diags_array(np.where(mass > 0, mass, REGULAR * scale) / scale)
        below = -REGULAR * sparse.eye_array(rows.shape[0])
        weighed = mass[:, None] * z
        system = splu(sparse.block_array([[diagonal, rows.T], [rows, below]], format="csc"))
        found = system.solve(np.concatenate([weighed / scale, np.zeros((rows.shape[0], z.shape[1]))]))
        multipliers = scale * found[n:]
        hessian = z.T @ (rows.T @ multipliers)
        return cls(mass, nonzero, multipliers, (hessian + hessian.T) / 2)

    def hold(self, curvature: np.ndarray, nonzero: np.ndarray) -> bool:
        """Whether they belong to these curvatures and differences."""
        return np.array_equal(self.nonzero, nonzero) and np.array_equal(self.curvature, curvature)

    def newton(self, p: np.ndarray, radius: float) -> np.ndarray:
        """Newton's step, at most `radius` long in the direction of each eigenvector."""
        curvature, vectors = np.linalg.eigh(self.hessian)
        curvature = np.maximum(curvature, REGULAR * max(curvature[-1], self.curvature.mean()))
        return vectors @ np.clip(vectors.T @ p / curvature, -radius, radius)

    def without(self, joint: _Joint, dual: np.ndarray) -> np.ndarray:
        """The dual, moved in the rows of zero differences so that Z sees nothing of its pull."""
        dual, inverse = dual.copy(), np.linalg.pinv(self.hessian, hermitian=True)
        for _ in range(2):  # the second corrects the rounding of the first
            dual[~self.nonzero] -= self.multipliers @ (inverse @ joint.seen_of(dual))
        return dual


def _matrix(asked: Fit) -> sparse.csr_array:
    return asked.geometry.cache(("rows", asked.order), lambda: asked.geometry.matrix(asked.order + 1))
