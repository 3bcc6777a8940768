"""The cases of `test_facts.py`: a graph with its ends, penalties, an order, a loss and the methods that solve it."""

import dataclasses
import functools
from typing import Any

import numpy as np
import pytest

import sparseopt as so
from tests.trend import problems
from tests.trend.problems import Problem, observations, two_parts

Doge = so.trend.Doge
GRAPHS = {
    **problems.GRAPHS,
    **problems.FREE,
    "two parts": lambda rng: two_parts(rng, isolated=0),
    "turned grid": lambda rng: so.Graph.from_edges(rng.permuted(rng.permutation(so.Graph.grid((4, 5)).edges), axis=1)),
    "spaced grid": lambda rng: so.Graph.grid((4, 5), (1.0, 2.5)),
    "spaced cube": lambda rng: so.Graph.grid((4, 5, 3), (1.0, 0.5, 2.0)),
}
HOST = ("interior", "auto", "fused_lasso")
A_WEIGHT_A_ROW = "a penalty weight for each row"


@dataclasses.dataclass(frozen=True)
class Case:
    graph: str
    penalty: Any
    order: int = 0
    methods: tuple = ("doge", "admm", "auto")
    loss: str = "square"
    channels: tuple[int, ...] = ()
    weighted: bool = False

    @functools.cached_property
    def problem(self):
        """With numbers that float32 holds, so that the answer is that of both types."""
        rng = np.random.default_rng(20251125)
        graph = GRAPHS[self.graph](rng)
        columns = [observations(rng, self.loss, graph.num_nodes) for _ in range(*self.channels or (1,))]
        y = np.stack(columns, axis=-1).reshape(graph.num_nodes, *self.channels)
        weights = rng.uniform(0.5, 2, graph.num_nodes).astype(np.float32) if self.weighted else None
        penalty = self.penalty
        if penalty == A_WEIGHT_A_ROW:
            levels = rng.uniform(0.1, 1.5, graph.matrix(self.order + 1).shape[0]).astype(np.float32)
            levels[:: 5 if self.loss == "square" else len(levels)] *= self.loss != "square"
            penalty = so.L1(levels.astype(float))
        return Problem(y.astype(np.float32).astype(float), graph, penalty, self.order, weights, self.loss)

    @property
    def free(self):
        return self.graph in problems.FREE

    @property
    def l1(self):
        """Whether the penalty is L1 of one weight."""
        return isinstance(self.penalty, so.L1)

    @property
    def tol(self):
        if self.loss != "square":
            return 1e-7
        return 1e-12 if self.free else 1e-9

    @property
    def near(self):
        """How far values lie apart at most where the gap is the tolerance."""
        return 1e-6 if self.tol < 1e-11 else 2e-3

    @property
    def iterative(self):
        return next((method for method in self.methods if method not in HOST), None)

    def found(self, method=None, **changes):
        return self.problem.fit(method or self.iterative, **{"tol": self.tol, "max_steps": 100_000} | changes)

    @functools.cached_property
    def fit(self):
        return self.found()


L1 = so.L1(0.75)
CASES = {
    "chain": Case("chain", L1, 0, ("doge", "admm", "auto", "fused_lasso", "interior"), weighted=True),
    "chain, order 1": Case("chain", L1, 1, ("doge", "interior", Doge(B=1), "auto")),
    "chain, order 2": Case("chain", L1, 2, ("doge", "interior", Doge(B=1), Doge(B=2))),
    "grid": Case("grid", L1, 0, ("doge", "doge_groups", "admm", "auto", "interior"), weighted=True),
    "grid, order 1": Case("grid", L1, 1, ("doge", "admm", "auto", "doge_groups", "interior")),
    "grid, order 2": Case("grid", L1, 2, ("admm", "auto", "interior", Doge(B=2)), weighted=True),
    "grid, coupled": Case("grid", so.GroupL2(1.5), 0, channels=(3,)),
    "grid, a weight a row": Case("grid", A_WEIGHT_A_ROW, 1, channels=(2,)),
    "cube, a weight a row": Case("cube", A_WEIGHT_A_ROW, 2, ("doge", "auto", "interior"), weighted=True),
    "parts": Case("parts", L1, 1, ("doge", "admm", "auto", "interior")),
    "turned grid, a weight a row": Case("turned grid", A_WEIGHT_A_ROW),
    "turned grid": Case("turned grid", L1, 1, channels=(2,)),
    "spaced cube": Case("spaced cube", so.L1(0.5), 1, ("admm", "doge")),
    "even chain": Case("even chain", so.L1(2.0), 2, ("admm", "interior", "auto")),
    "uneven chain": Case("uneven chain", so.L1(2.0), 1, ("doge", "admm", "interior", "auto"), weighted=True),
    "uneven chain, order 2": Case("uneven chain", so.L1(2.0), 2, ("admm", "interior", "auto")),
    "free grid": Case("free grid", so.L1(0.5), 1, ("doge", "admm", "auto"), channels=(2,), weighted=True),
    "free grid, order 2": Case("free grid", so.L1(0.5), 2, ("admm", "doge", "interior")),
    "values and edges": Case("parts", {-1: so.L1(0.25), 0: so.L1(0.5)}, weighted=True, channels=(2,)),
    "two orders": Case("weighted", {0: so.L1(0.25), 1: so.L1(0.5)}, weighted=True),
    "three orders": Case("grid", {-1: so.L1(0.25), 1: so.L1(0.5), 2: so.L1(0.75)}, methods=("admm", "auto")),
    "two orders, free": Case("uneven chain", {0: so.L1(0.25), 1: so.L1(1.0)}, methods=("auto", "admm")),
    "values and a free order": Case("free grid", {-1: so.L1(0.125), 1: so.L1(0.5)}, methods=("auto", "admm")),
    "isotropic": Case("spaced grid", so.GroupL2(1.5, axis=0), methods=("doge", "admm"), weighted=True),
    "isotropic, channels apart": Case("grid", so.GroupL2(1.5, axis=0), methods=("doge",), channels=(2,)),
    "isotropic, channels together": Case("grid", so.GroupL2(0.8, (0, -1)), methods=("admm",), channels=(2,)),
    "isotropic, cube": Case("spaced cube", so.GroupL2(1.5, axis=0), methods=("admm", "doge")),
    "elastic": Case("grid", so.ElasticNet(0.5, ridge=0.75), 1, ("doge", "doge_groups")),
    "elastic, huber": Case("grid", so.ElasticNet(0.5, ridge=0.75), 0, ("doge",), "huber"),
    "own square": Case("grid", L1, 1, ("admm", "doge"), "own square", weighted=True),
    "counts": Case("two parts", L1, 0, (Doge(B=1),), "poisson", weighted=True),
    "counts, chain": Case("chain", L1, 2, ("admm", "auto"), "poisson", weighted=True),
    "counts, a weight a row": Case("chain", A_WEIGHT_A_ROW, 0, ("admm",), "poisson"),
    "counts, coupled": Case("grid", so.GroupL2(0.75), 0, ("doge",), "poisson", channels=(3,)),
    "labels": Case("grid", so.L1(0.125), 1, ("admm", "auto"), "logistic", weighted=True),
    "labels, graph": Case("weighted", so.L1(0.125), 1, (Doge(B=1),), "logistic", weighted=True),
    "hinge": Case("chain", so.L1(0.25), 1, ("admm",), "squared_hinge", weighted=True),
    "outliers": Case("weighted", so.L1(0.5), 2, ("doge",), "huber", weighted=True),
    "median": Case("two parts", so.L1(0.25), 0, ("admm",), "absolute", weighted=True),
    "median, graph": Case("random", so.L1(0.25), 1, ("doge",), "absolute", weighted=True),
    "quantile": Case("chain", so.L1(0.125), 0, ("admm",), "quantile", weighted=True),
    "counts, free": Case("uneven chain", so.L1(1.5), 1, ("admm", "doge"), "poisson", weighted=True),
    "counts, free grid": Case("free grid", so.L1(0.25), 1, ("auto",), "poisson"),
    "labels, free": Case("uneven chain", so.L1(1.5), 1, ("doge", "admm"), "logistic"),
    "outliers, free": Case("even chain", so.L1(1.5), 2, ("admm", "doge"), "huber"),
    "median, free": Case("uneven chain", so.L1(0.5), 1, ("admm", "auto"), "absolute", weighted=True),
    "quantile, free": Case("uneven chain", so.L1(0.125), 2, ("admm", "auto"), "quantile"),
}
for order in range(4):
    CASES[f"random, order {order}"] = Case("random", L1, order, ("doge", "admm", "auto", "interior"))
    CASES[f"free, order {order}"] = Case("even chain", so.L1(2.0), order, ("interior",))
for order in range(6):
    CASES[f"weighted, order {order}"] = Case("weighted", L1, order, ("interior",), weighted=order % 2 == 0)

SMOOTH = ("square", "own square", "poisson", "logistic", "squared_hinge", "huber")
# Facts, a condition on the case, and why it has none of these.
WITHOUT = [
    (
        "bound start history once solver derivative lanes unit float32 short dual",
        lambda case: all(method in HOST for method in case.methods),
        "the method counts no steps of its own and keeps no program; other cases have its problem",
    ),
    ("solver derivative lanes unit short", lambda case: case.loss != "square", "these are of the square loss"),
    ("float32", lambda case: case.free and case.order > 0, "free ends are computed in float64"),
    ("float32", lambda case: case.loss not in ("square", "huber"), "the objective is not strongly convex"),
    ("unit short limit path solver derivative lanes", lambda case: not case.l1, "these are of one weight"),
    ("limit", lambda case: case.loss == "huber" and case.order > 1, "its gap is of rounding at a weight of 1e11"),
    ("limit path derivative lanes", lambda case: case.channels, "these are of one channel"),
    ("missing", lambda case: case.channels and not case.l1, "one channel has the fact"),
    ("dual", lambda case: case.loss not in SMOOTH, "its dual is one of many"),
    ("limit", lambda case: case.free and case.loss in ("poisson", "logistic", "huber"), "its fit has no closed form"),
    ("path", lambda case: case.loss in ("own square", "squared_hinge"), "its largest weight is not known"),
    ("pieces", lambda case: case.order or isinstance(case.penalty, dict), "it has no pieces of one value"),
    ("named", lambda case: case.loss != "square" or "auto" not in case.methods, 'it is of the square loss, by "auto"'),
    ("knots", lambda case: "chain" not in case.graph or not case.free or not case.l1, "it has no knots"),
    ("knots", lambda case: case.loss != "square", "knots are known to the tolerance alone"),
    ("short", lambda case: case.free, "free ends are computed in float64"),
]
# These are tested for every fact; the others for their optimum and the facts that name them.
WHOLE = {"chain", "grid", "grid, order 1", "random, order 1", "cube, a weight a row", "uneven chain"}
WHOLE |= {"free grid, order 2", "two orders", "isotropic", "elastic", "counts", "labels", "median", "counts, free"}


def has(fact, *quick):
    """The cases that are tested for a fact; all but the quick ones in the thorough tests alone."""
    reasons = [when for facts, when, _ in WITHOUT if fact in facts.split()]
    tested = CASES if fact == "optimum" else WHOLE | set(quick)
    names = [name for name, case in CASES.items() if name in tested and not any(when(case) for when in reasons)]
    assert set(quick) <= set(names), (fact, set(quick) - set(names))
    marks = {True: (), False: pytest.mark.thorough}
    return pytest.mark.parametrize("case", [pytest.param(CASES[n], id=n, marks=marks[n in quick]) for n in names])
