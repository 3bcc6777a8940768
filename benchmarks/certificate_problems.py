"""Random and degenerate problems with optima from Clarabel, for `bench_certificates.py`.

A problem is drawn in units in which its columns are alike, and solved there by Clarabel. `solve` gets A, b, weights and
bounds in other units: with `A' = alpha A D` and `b' = beta b`, the answer is `x beta / (alpha D)`.
"""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from scipy import sparse

import sparseopt as so

sys.path.append(str(Path(__file__).parent.parent))
# The tests have no annotations for mypy to follow.
conic: Any = importlib.import_module("tests.core.conic")
edges: Any = importlib.import_module("tests.core.problems").edges

GROUPS = np.arange(8) // 2
MEMBERS = [np.flatnonzero(g == GROUPS) for g in range(4)]


@so.pytree
class Expectile(so.scalar.Squared):
    """A loss of the benchmark's own: `r² / 2` times `level` for a positive residual, else times `1 - level`."""

    level: Any
    is_square = adds_up = False

    def _bend(self, r: Any) -> Any:
        level = jnp.asarray(self.level, r.dtype)
        return jnp.where(r > 0, level, 1 - level)

    def value(self, x: Any, y: Any) -> Any:
        return self._bend(x - y) * (x - y) ** 2 / 2

    def derivative(self, x: Any, y: Any) -> Any:
        return self._bend(x - y) * (x - y)

    def prox(self, x: Any, y: Any, step: Any) -> Any:
        bend = step * self._bend(x - y)
        return x + bend / (1 + bend) * (y - x)

    def slack(self, x: Any, dual: Any, y: Any) -> Any:
        r, bend = x - y, self._bend(dual)
        apart = self.value(x, y) + dual**2 / (2 * bend) - dual * r
        return jnp.where(r * dual > 0, (bend * r - dual) ** 2 / (2 * bend), apart)


def expectile(level: float) -> Callable[..., None]:
    def term(form: Any, matrix: Any, target: Any, weights: Any) -> None:
        up, down = form.new(target.size), form.new(target.size)
        form.inside("zero", -target, (matrix, form.x), (-1.0, up), (1.0, down))
        for part, bend in ((up, level), (down, 1 - level)):
            form.inside("positive", np.zeros(target.size), (1.0, part))
            form.cost(part, squares=bend * weights)

    return term


class Loss(NamedTuple):
    """A loss: the power of the unit of b with which it grows, its number, and made of the number what states it.

    That is the scalar loss for `solve`, `f(z; b, number)` in NumPy, and the term for Clarabel.
    """

    degree: int
    number: float
    scalar: Callable[[Any], Any]
    value: Callable[[Any, Any, float], Any]
    term: Callable[[float], Any]


def huber(z: Any, b: Any, delta: float) -> Any:
    near = np.minimum(abs(z - b), delta)
    return near**2 / 2 + delta * (abs(z - b) - near)


SQUARES = Loss(2, 0.0, lambda _: so.scalar.Squared(), lambda z, b, _: (z - b) ** 2 / 2, lambda _: conic.squares)
LOSSES = {
    "squares": SQUARES,
    "quadratic": SQUARES,
    "huber": Loss(2, 0.8, so.scalar.Huber, huber, conic.huber),
    "own": Loss(2, 0.2, Expectile, lambda z, b, n: np.where(z > b, n, 1 - n) * (z - b) ** 2 / 2, expectile),
    "absolute": Loss(1, 0.5, lambda _: so.scalar.Absolute(), lambda z, b, _: abs(z - b), lambda _: conic.slopes(-1, 1)),
    "quantile": Loss(
        1, 0.9, so.scalar.Quantile,
        lambda z, b, n: np.maximum(n * (b - z), (n - 1) * (b - z)), lambda n: conic.slopes(-n, 1 - n),
    ),
    "logistic": Loss(
        0, 0.0, lambda _: so.scalar.Logistic(),
        lambda z, b, _: np.logaddexp(0, np.where(b > 0, -z, z)), lambda _: conic.logistic,
    ),
    "poisson": Loss(
        0, 0.0, lambda _: so.scalar.Poisson(),
        lambda z, b, _: np.exp(z) - b * z + b * np.log(np.where(b > 0, b, 1)) - b, lambda _: conic.poisson,
    ),
    "squared hinge": Loss(
        0, 0.0, lambda _: so.scalar.SquaredHinge(),
        lambda z, b, _: np.maximum(1 - b * z, 0) ** 2 / 2, lambda _: conic.squared_hinge,
    ),
}  # fmt: skip


class Numbers(NamedTuple):
    """The numbers of a penalty of `lengths * (matrix @ x)`, where the rows of the matrix are of length 1."""

    weight: Any
    ridge: Any
    of_groups: Any
    low: Any
    high: Any
    radius: Any
    matrix: Any = None
    lengths: Any = None


def l1(form: Any, at: Numbers) -> None:
    conic.absolute(form, at.matrix, at.weight * at.lengths)


def ridge(form: Any, at: Numbers) -> None:
    conic.ridge(form, at.matrix, at.ridge * at.lengths**2)


def groups(form: Any, at: Numbers) -> None:
    mean = np.exp(np.mean(np.log(at.lengths)))
    conic.lengths(form, sparse.diags_array(at.lengths / mean) @ at.matrix, at.of_groups * mean, MEMBERS)


def box(form: Any, at: Numbers) -> None:
    for ends, sign in ((at.low, 1), (at.high, -1)):
        if (known := np.isfinite(ends)).any():
            conic.between(form, sign * at.matrix[known], sign * (ends / at.lengths)[known], np.inf)


def positive(form: Any, at: Numbers) -> None:
    conic.between(form, at.matrix, 0.0, np.inf)


def total(form: Any, at: Numbers) -> None:
    longest = at.lengths.max()
    form.inside("zero", [-at.radius / longest], ((at.lengths / longest)[None] @ at.matrix, form.x))


def summed(v: Any, at: Numbers) -> Any:
    return np.sum(at.weight * abs(v))


def of_groups(v: Any, at: Numbers) -> Any:
    return sum(weight * np.linalg.norm(v[rows]) for weight, rows in zip(at.of_groups, MEMBERS, strict=True))


def on_simplex(v: Any, at: Numbers) -> Any:
    sums = np.cumsum(np.sort(v)[::-1])
    return np.maximum(v - np.max((sums - at.radius) / np.arange(1, v.size + 1)), 0)


def mcp(v: Any, at: Numbers) -> Any:
    size = np.minimum(abs(v), 3 * at.weight)
    return np.sum(at.weight * size - size**2 / 6)


class Penalty(NamedTuple):
    """A penalty: it for `solve`, its terms in NumPy and for Clarabel (None: its optimum is not known), and its set."""

    make: Callable[[Numbers], Any]
    values: tuple[Callable[[Any, Numbers], Any], ...] = ()
    terms: tuple[Callable[[Any, Numbers], None], ...] | None = ()
    nearest: Callable[[Any, Numbers], Any] = lambda v, _: v


PENALTIES = {
    "L1": Penalty(lambda at: so.L1(at.weight), (summed,), (l1,)),
    "elastic net": Penalty(
        lambda at: so.ElasticNet(at.weight, at.ridge),
        (summed, lambda v, at: np.sum(at.ridge * v * v) / 2),
        (l1, ridge),
    ),
    "groups": Penalty(lambda at: so.GroupL2(at.of_groups, groups=GROUPS), (of_groups,), (groups,)),
    "sparse groups": Penalty(
        lambda at: so.SparseGroup(at.weight, at.of_groups, groups=GROUPS), (summed, of_groups), (l1, groups)
    ),
    "box": Penalty(
        lambda at: so.Box(at.low, at.high, at.weight), (summed,), (l1, box), lambda v, at: np.clip(v, at.low, at.high)
    ),
    "nonnegative": Penalty(
        lambda at: so.Nonnegative(at.weight), (summed,), (l1, positive), lambda v, _: np.maximum(v, 0)
    ),
    "simplex": Penalty(lambda at: so.Simplex(at.radius), (), (positive, total), on_simplex),
    "no": Penalty(lambda _: None),
    "nuclear norm": Penalty(
        lambda at: so.NuclearNorm(at.radius), (lambda x, at: at.radius * np.linalg.svd(x, compute_uv=False).sum(),)
    ),
    "L0": Penalty(lambda at: so.L0(at.radius), (lambda v, at: at.radius * np.count_nonzero(v),), None),
    "MCP": Penalty(lambda at: so.MCP(at.weight, 3.0), (mcp,), None),
    "top 3": Penalty(lambda _: so.TopK(3), (), None, lambda v, _: np.where(abs(v) >= np.sort(abs(v))[-3], v, 0)),
}
# "full" has fewer rows than columns: some x meets every constraint.
OPERATORS = {
    "dense": lambda rng: rng.standard_normal((9, 8)),
    "full": lambda rng: rng.standard_normal((5, 8)),
    "square": lambda rng: rng.standard_normal((8, 8)),
    "edges": edges,
    "differences": lambda _: np.diff(np.eye(8), axis=0),
}


class Kind(NamedTuple):
    """What a problem is made of; every kind and dtype has one program.

    There are "many" weights of observations and entries, "one" each, or None of observations; no shape is no matrix.
    """

    loss: str
    penalty: str
    operator: str | None = None
    shape: tuple[int, int] | None = (30, 8)
    weights: str | None = "many"


def listed() -> list[Kind]:
    convex = ["L1", "elastic net", "groups", "sparse groups", "box", "nonnegative", "simplex", "no"]
    mapped = [("dense", "L1"), ("edges", "L1"), ("differences", "elastic net"), ("full", "box"), ("square", "groups")]
    mapped += [("dense", "nonnegative"), ("full", "simplex"), ("differences", "L1"), ("square", "sparse groups")]
    kinds = []
    for i, loss in enumerate(LOSSES):
        names = dict.fromkeys(["L1", *(convex[(i + 2 * j) % len(convex)] for j in range(4))])
        kinds += [Kind(loss, name, weights=("many", "one", None)[(i + j) % 3]) for j, name in enumerate(names)]
        kinds += [Kind(loss, *mapped[(i + 4 * j) % 9][::-1], weights=("many", None)[j]) for j in range(2)]
    kinds += [Kind(loss, "L1", shape=(1, 8)) for loss in ("squares", "absolute", "logistic")]
    kinds += [Kind(loss, "L1", shape=(30, 1)) for loss in ("squares", "quantile", "poisson")]
    kinds += [Kind("absolute", "elastic net", shape=(8, 30)), Kind("quadratic", "L1", shape=(8, 30))]
    kinds += [Kind("squares", "L1", shape=(8, 30)), Kind("squared hinge", "elastic net", "dense")]
    kinds += [Kind("squares", "L1", "edges", None), Kind("absolute", "L1", "differences", None)]
    kinds += [Kind("squares", "no"), Kind("logistic", "no"), Kind("squares", "nuclear norm"), Kind("squares", "L0")]
    return [*kinds, Kind("quadratic", "top 3"), Kind("logistic", "MCP")]


KINDS = listed()


class Value(NamedTuple):
    """The loss, the objective at the nearest point of the set, how far that is, and what rounding changes."""

    loss: float
    objective: float
    violation: float
    rounding: float


class Given(NamedTuple):
    """The data of a problem, rounded, and the units in which they are alike: those of x and of b."""

    kind: Kind
    matrix: Any  # a Hessian for "quadratic"
    target: Any  # a centre for "quadratic"; NaN where it is not seen
    weights: Any
    operator: Any
    numbers: Numbers
    number: float
    units: Any
    beta: float
    traits: list[str]
    exact: Any  # the answer, if there is a formula for it

    def problem(self, dtype: Any, jax: bool = False) -> so.Problem:

        def leaf(part: Any) -> Any:
            if np.ndim(part) == 0 or sparse.issparse(part):
                return part.astype(dtype) if np.ndim(part) else part
            return jnp.asarray(part, dtype) if jax else np.asarray(part, dtype)

        kind, loss, data = self.kind, LOSSES[self.kind.loss], (leaf(self.matrix), leaf(self.target))
        weights = {"many": leaf(self.weights), "one": float(self.weights[0]), None: None}[kind.weights]
        fit = so.DataLoss(loss.scalar(self.number), data[0] if kind.shape else None, data[1], weights)
        penalty = PENALTIES[kind.penalty].make(Numbers(*map(leaf, self.numbers)))
        operator = leaf(self.operator) if kind.operator else None
        return so.Problem(so.Quadratic(*data) if kind.loss == "quadratic" else fit, penalty, operator)

    def seen(self) -> tuple[Any, Any, Any]:
        at = self.weights > 0
        return self.matrix[at], self.target[at], self.weights[at]

    def value(self, x: Any, dtype: Any = np.float64) -> Value:
        penalty, v, eps = PENALTIES[self.kind.penalty], self.operator @ x, 4 * np.finfo(dtype).eps
        near = penalty.nearest(v, self.numbers)
        violation = np.max(abs(v - near), initial=0) / max(1, np.max(abs(v), initial=0))
        if self.kind.loss == "quadratic":
            r, size = x - self.target, abs(x) + abs(self.target)
            found, rounding = r @ self.matrix @ r / 2, eps * (abs(r) @ abs(self.matrix) @ size)
        else:
            matrix, target, weights = self.seen()
            z, size = matrix @ x, abs(matrix) @ abs(x) + abs(target)
            loss = LOSSES[self.kind.loss].value
            f, up, down = (loss(z + sign * eps * size, target, self.number).T for sign in (0, 1, -1))
            found, rounding = np.sum(weights * f), np.sum(weights * (np.maximum(up, down) - f))
        more = abs(near) + eps * (abs(self.operator) @ abs(x))
        at_near, at_more = (sum(part(rows, self.numbers) for part in penalty.values) for rows in (near, more))
        rounding += max(at_more - at_near, 0)
        return Value(float(found), float(found + at_near), float(violation), float(rounding))

    def answer(self) -> Any:
        """Clarabel's; None without one."""
        loss, penalty, beta = LOSSES[self.kind.loss], PENALTIES[self.kind.penalty], self.beta
        if penalty.terms is None or self.exact is not None:
            return self.exact
        over = sparse.csr_array(self.operator * self.units)
        lengths = np.sqrt(over.multiply(over).sum(axis=1))
        scaled = {name: getattr(self.numbers, name) / beta**loss.degree for name in ("weight", "ridge", "of_groups")}
        at = self.numbers._replace(**scaled, matrix=sparse.diags_array(1 / lengths) @ over, lengths=lengths)
        form, number = conic.Conic(len(self.units)), self.number / (beta if self.kind.loss == "huber" else 1)
        if self.kind.loss == "quadratic":
            values, vectors = np.linalg.eigh(self.matrix * np.outer(self.units, self.units) / beta**2)
            root = np.sqrt(np.maximum(values, 0))[:, None] * vectors.T
            data = root, root @ (self.target / self.units), np.ones(len(root))
        else:
            matrix, target, weights = self.seen()
            data = matrix * self.units / beta, target / beta, weights
        loss.term(number)(form, sparse.csr_array(data[0]), *data[1:])
        for term in penalty.terms:
            term(form, at)
        try:
            form.least()
        except AssertionError:
            self.traits.append("not solved by Clarabel")
            return None
        found = form.answer * self.units
        return found if self.kind.operator else penalty.nearest(found, self.numbers)


def drawn(seed: int, dtype: Any) -> Given:
    """The problem of a seed: the same in both precisions, but for the rounding of its data."""
    rng, kind, traits = np.random.default_rng(seed), KINDS[seed % len(KINDS)], list[str]()
    loss, (rows, columns) = LOSSES[kind.loss], kind.shape or (8, 8)

    def happens(trait: str, chance: float) -> bool:
        traits.extend([trait] if (hit := rng.random() < chance) else [])
        return hit

    def some(size: Any, number: float) -> Any:
        return np.where(rng.random(size) < 0.3, number, 1.0)

    # The matrix, in units in which its columns are alike, and these units.
    base, spread, alpha, beta, nuclear = np.eye(8), np.ones(columns), 1.0, 1.0, kind.penalty == "nuclear norm"
    if kind.shape:
        base = rng.standard_normal((rows, columns)) / (3 if kind.loss == "poisson" else 1)
        if happens("duplicate columns", 0.15):
            base[:, -1] = base[:, 0]
        if happens("nearly duplicate columns", 0.1):
            base[:, -1] = base[:, 0] + 10 ** rng.uniform(-8, -1) * base[:, -1]
        if happens("a column of zeros", 0.15):
            base[:, columns // 2] = 0
        if happens("columns off centre", 0.2):
            base += rng.choice([3.0, 30.0, 300.0])
        if happens("unlike columns", 0.25):
            spread = 10 ** rng.uniform(-2, 2, columns)
        if happens("scale of A", 0.25):
            alpha = 10 ** rng.uniform(-8, 8)
    if loss.degree and happens("scale of b", 0.25):
        beta = 10 ** rng.uniform(-8, 8)
    if nuclear:  # orthonormal columns: the answer is a threshold of singular values
        base, spread = np.linalg.qr(rng.standard_normal((rows, columns)))[0], np.ones(columns)
    # The target and its weights.
    truth = rng.standard_normal((columns, 3) if nuclear else columns)
    clean = base @ (truth * some((columns, 1) if nuclear else columns, 0.0)) / 2
    exact = kind.loss != "poisson" and happens("interpolation" if loss.degree else "separable", 0.15)
    target = clean + (0 if exact else rng.choice([0.1, 1.0, 10.0])) * rng.standard_normal(clean.shape)
    if kind.loss == "poisson":
        target = rng.poisson(np.exp(np.clip(clean, -3, 3))).astype(float)
    elif loss.degree == 0:
        target = np.where(target > 0, 1.0, 0.0 if kind.loss == "logistic" else -1.0)
    elif kind.loss == "quadratic":
        centre = np.linalg.lstsq(base, target)[0]
        target = base @ centre
    weights = rng.uniform(0.5, 2, rows if kind.weights == "many" else 1) * np.ones(rows)
    if kind.weights == "many" and not nuclear:
        weights *= some(rows, 0.0) if rows > 1 and happens("observations of weight 0", 0.3) else 1.0
        weights *= some(rows, 1e-6) if happens("observations of tiny weight", 0.1) else 1.0
    weights = np.ones(rows) if kind.weights is None or kind.loss == "quadratic" or nuclear else weights
    # The penalty, in units of the largest slope of the loss at 0.
    slope = loss.value(1e-4, target, loss.number) - loss.value(-1e-4, target, loss.number)
    top = max(np.max(abs(base.T @ (weights * slope.T).T)) / 2e-4, 1e-3)
    over = OPERATORS[kind.operator](rng) if kind.operator else sparse.eye_array(columns).tocsr()
    size, own = over.shape[0], np.ones(over.shape[0])
    if happens("penalty in the units of the columns", 0.6) and kind.weights != "one":
        over, own = (over * spread, own) if kind.operator else (over, spread)
    level = top * 10 ** rng.uniform(-3, 0.2) * (rng.choice([0.0, 1e-9, 1.0]) if exact else 1.0)
    level *= 0.0 if happens("penalty of weight 0", 0.05) else 1e-9 if happens("tiny penalty", 0.08) else 1.0
    share = rng.uniform(0.5, 2, size)
    share *= some(size, 0.0) if happens("entries of weight 0", 0.25) else 1.0
    share *= some(size, 1e-6) if happens("entries of tiny weight", 0.12) else 1.0
    low, high = rng.uniform(0.1, 1, (2, size)) * [[-1], [1]]
    if kind.operator in (None, "full") and happens("0 outside the box", 0.2):
        low, high = -low / 2, high - low
    if happens("open box", 0.3):
        low, high = np.where(rng.random((2, size)) < 0.3, [[-np.inf], [np.inf]], [low, high])
    share, own_unit = (1.0, 1.0) if kind.weights == "one" else (share, own)
    unit = beta ** (loss.degree - 1) * alpha
    radius = {"L0": level * beta**loss.degree, "nuclear norm": level * unit}
    numbers = Numbers(
        level * share * unit * own_unit,
        top * 10 ** rng.uniform(-3, 0) * share * unit * alpha / beta * own_unit**2,
        level * rng.uniform(0.5, 2, 4) * unit,
        low * beta / (alpha * own), high * beta / (alpha * own),
        radius.get(kind.penalty, rng.uniform(0.5, 3) * beta / alpha),
    )  # fmt: skip

    def rounded(part: Any) -> Any:
        return part.astype(dtype).astype(float) if np.ndim(part) else float(dtype(part))

    units = beta / (alpha * spread)
    matrix, given = rounded(base * spread * alpha), rounded(target * beta)
    if not np.all(weights) and happens("NaN", 0.5):
        given[weights == 0] = np.nan
    if kind.loss == "quadratic":
        matrix, given = rounded(matrix.T @ matrix), rounded(centre * units)
    answer = None
    if nuclear:
        left, sizes, right = np.linalg.svd(base.T @ target, full_matrices=False)
        answer = (left * np.maximum(sizes - level, 0)) @ right * beta / alpha
    numbers = Numbers(*(part if part is None else rounded(part) for part in numbers))
    number = rounded(loss.number * (beta if kind.loss == "huber" else 1.0))
    return Given(kind, matrix, given, rounded(weights), rounded(over), numbers, number, units, beta, traits, answer)
