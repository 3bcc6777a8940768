"""Small problems of the trend filter, and their independent answers by Clarabel."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import networkx as nx
import numpy as np
import pytest
from scipy import sparse
from scipy.linalg import null_space
from scipy.special import xlogy

import sparseopt as so
from tests.core import conic


def random_graph(rng, n=14, extra=8, weighted=False):
    """A random tree with some more edges."""
    tree = np.stack([np.arange(1, n), rng.integers(0, np.arange(1, n))], axis=1)
    more = np.array([(i, j) for i in range(n) for j in range(i) if not ((tree == (i, j)).all(axis=1)).any()])
    edges = np.concatenate([tree, more[rng.permutation(len(more))[:extra]]])
    weights = rng.uniform(0.5, 2.0, len(edges)) if weighted else None
    return so.Graph.from_edges(edges, n, weights)


def two_parts(rng, isolated=1):
    """A chain of 6, a triangle with a tail, and an isolated node."""
    edges = [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (6, 7), (7, 8), (6, 8), (8, 9)]
    return so.Graph.from_edges(edges, 10 + isolated)


GRAPHS = {
    "chain": lambda rng: so.Graph.chain(15, ends="graph"),
    "grid": lambda rng: so.Graph.grid((4, 5)),
    "cube": lambda rng: so.Graph.grid((3, 2, 3)),
    "random": lambda rng: random_graph(rng),
    "weighted": lambda rng: random_graph(rng, weighted=True),
    "parts": two_parts,
}
TIMES = np.cumsum(np.random.default_rng(5).uniform(0.2, 2.0, 30)) + 100  # steps that differ by a factor of up to ten
FREE = {
    "even chain": lambda rng: so.Graph.chain(30),
    "uneven chain": lambda rng: so.Graph.chain(30, times=TIMES),
    "free grid": lambda rng: so.Graph.grid((6, 5), (1.0, 1.5), ends="free"),
}


@so.pytree
class SquareLoss(so.scalar.Huber):
    """A loss of one's own: the square, which the trend filter otherwise solves by itself."""

    def value(self, x, y):
        return (x - y) ** 2 / 2

    def derivative(self, x, y):
        return x - y

    def prox(self, x, y, step):
        return (x + step * y) / (1 + step)

    def dual_range(self, y):
        return -jnp.inf, jnp.inf

    def slack(self, x, dual, y):
        return (x - y - dual) ** 2 / 2

    def location(self, y, weights, labels):
        return np.bincount(labels, weights * y) / np.bincount(labels, weights)


LOSSES = {
    "square": "square",
    "own square": SquareLoss(),
    "poisson": so.scalar.Poisson(),
    "logistic": so.scalar.Logistic(),
    "squared_hinge": so.scalar.SquaredHinge(),
    "huber": so.scalar.Huber(0.75),
    "absolute": so.scalar.Absolute(),
    "quantile": so.scalar.Quantile(0.9),
}
TERMS = {
    "square": conic.squares,
    "own square": conic.squares,
    "poisson": conic.poisson,
    "logistic": conic.logistic,
    "squared_hinge": conic.squared_hinge,
    "huber": conic.huber(0.75),
    "absolute": conic.slopes(-1.0, 1.0),
    "quantile": conic.slopes(-0.9, 0.1),
}


def observations(rng, loss, n):
    """Data with a fit in every component."""
    if loss == "poisson":
        return rng.poisson(rng.choice([0.5, 6.0], n)) + 1.0 * (np.arange(n) % 5 == 0)
    if loss in ("logistic", "squared_hinge"):
        y = rng.integers(0, 2, n).astype(float)
        y[:2], y[6:8] = (0, 1), (0, 1)
        if loss == "squared_hinge":
            return 2 * y - 1
        y[2:5] = (0.25, 0.875, 1 / 256)  # proportions
        return y
    if loss in ("square", "own square"):
        return 5 * rng.standard_normal(n)
    return 2 * rng.standard_normal(n) + 15 * (rng.random(n) < 0.1)


# f and its derivative at b, written anew.
VALUES = {
    "square": lambda b, y: ((b - y) ** 2 / 2, b - y),
    "poisson": lambda b, y: (np.exp(b) - y * b + xlogy(y, y) - y, np.exp(b) - y),
    "logistic": lambda b, y: (np.logaddexp(0, b) - y * b + xlogy(y, y) + xlogy(1 - y, 1 - y), 1 / (1 + np.exp(-b)) - y),
    "squared_hinge": lambda b, y: (np.maximum(1 - y * b, 0) ** 2 / 2, -y * np.maximum(1 - y * b, 0)),
    "quantile": lambda b, y: (np.where(b > y, 0.1 * (b - y), 0.9 * (y - b)), np.where(b > y, 0.1, -0.9)),
    "huber": lambda b, y: (
        np.where(abs(b - y) <= 0.75, (b - y) ** 2 / 2, 0.75 * abs(b - y) - 0.28125),
        np.clip(b - y, -0.75, 0.75),
    ),
    "absolute": lambda b, y: (abs(b - y), np.sign(b - y)),
}
VALUES["own square"] = VALUES["square"]


def rows_of(graph, order, channels=1):
    """The differences of an order, those of all channels of a row together; order -1 is the values themselves."""
    rows = sparse.eye_array(graph.num_nodes) if order == -1 else graph.matrix(order + 1)
    return sparse.csr_array(sparse.kron(rows, sparse.eye_array(channels)))


def groups_of(graph, axis, rows, channels):
    """The numbers of the rows that GroupL2 takes together: channels, or all that start at a node."""
    if axis == -1:
        return list(np.arange(rows).reshape(-1, channels))
    tails = np.repeat(graph.edges.min(axis=1), channels)
    groups = [np.flatnonzero(tails == node) for node in np.unique(tails)]
    return groups if axis != 0 else [group[i::channels] for group in groups for i in range(channels)]


@dataclasses.dataclass(eq=False)
class Problem:
    """A call of the trend filter; `penalty` is one, or several by their orders."""

    y: np.ndarray
    graph: so.Graph
    penalty: Any
    order: int = 0
    node_weights: np.ndarray | None = None
    loss: str = "square"

    def fit(self, method="auto", **changes):
        """The package's answer."""
        call = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return so.trend_filter(**call | {"loss": LOSSES[self.loss], "method": method} | changes)

    def but(self, **changes):
        """The same problem with some changes."""
        return dataclasses.replace(self, **changes)

    @functools.cached_property
    def channels(self):
        return self.y.size // self.graph.num_nodes

    @functools.cached_property
    def mass(self):
        """The weight of every entry of the signal, 0 where there is no observation."""
        weights = np.ones(self.graph.num_nodes) if self.node_weights is None else self.node_weights
        weights = np.repeat(np.asarray(weights, float).reshape(-1), self.channels)
        return np.where(np.isnan(self.y.reshape(-1)), 0, weights)

    @functools.cached_property
    def terms(self):
        """Penalty, rows, and for penalties of entries the weight of every row."""
        terms = self.penalty if isinstance(self.penalty, Mapping) else {self.order: self.penalty}
        found = []
        for order, penalty in terms.items():
            rows = rows_of(self.graph, order, self.channels)
            weight = np.broadcast_to(penalty.weight, rows.shape[0] // self.channels)
            found.append((penalty, rows, np.repeat(weight.astype(float), self.channels)))
        return found

    def objective(self, b):
        """In float64, written anew."""
        b, seen = np.asarray(b, float).reshape(-1), self.mass > 0
        total = np.sum((self.mass * VALUES[self.loss](b, self.y.reshape(-1))[0])[seen])
        for penalty, rows, weight in self.terms:
            values = rows @ b
            if isinstance(penalty, so.GroupL2):
                groups = groups_of(self.graph, penalty.axis, len(values), self.channels)
                total += penalty.weight * sum(np.linalg.norm(values[group]) for group in groups)
            else:
                total += np.sum(weight * abs(values))
            if isinstance(penalty, so.ElasticNet):
                total += penalty.ridge / 2 * np.sum(values**2)
        return total

    @functools.cached_property
    def exact(self):
        """Where the objective is least."""
        form, y, seen = conic.Conic(self.y.size), self.y.reshape(-1), self.mass > 0
        TERMS[self.loss](form, sparse.eye_array(y.size, format="csr")[seen], y[seen], self.mass[seen])
        for penalty, rows, weight in self.terms:
            if isinstance(penalty, so.GroupL2):
                groups = groups_of(self.graph, penalty.axis, rows.shape[0], self.channels)
                conic.lengths(form, rows, penalty.weight, groups)
                continue
            if np.any(weight > 0):
                conic.absolute(form, rows[weight > 0], weight[weight > 0])
            if isinstance(penalty, so.ElasticNet):
                conic.ridge(form, rows, penalty.ridge)
            if isinstance(penalty, so.Box | so.Nonnegative):
                conic.between(form, rows, penalty.low, penalty.high)
        self.bound = form.least()
        if self.loss == "logistic":
            self.bound += np.sum((self.mass * (xlogy(y, y) + xlogy(1 - y, 1 - y)))[seen])
        x = form.answer
        if seen.all() and self.loss == "square" and all(type(penalty) is so.L1 for penalty, *_ in self.terms):
            x = self._polished(x)
        return x.reshape(self.y.shape)

    @functools.cached_property
    def least(self):
        """The least objective: of the exact answer, or as Clarabel says."""
        x = self.exact
        constrained = any(isinstance(penalty, so.Box | so.Nonnegative) for penalty, *_ in self.terms)
        return self.bound if constrained else self.objective(x)

    def _polished(self, x):
        """The minimum among the signals with the zero rows and the signs of x, exact up to rounding."""
        rows, weight = sparse.vstack([rows for _, rows, _ in self.terms]), np.concatenate([w for *_, w in self.terms])
        values = rows @ x
        zero = (abs(values) < 1e-5) & (weight > 0)
        free = null_space(rows.tocsr()[zero].toarray()) if zero.any() else np.eye(x.size)
        pull = self.mass * self.y.reshape(-1) - rows.T @ np.where(zero, 0, weight * np.sign(values))
        found = free @ np.linalg.solve(free.T @ (self.mass[:, None] * free), free.T @ pull)
        assert abs(self.objective(found) - self.bound) <= 1e-8 * (1 + abs(self.bound))
        return found


def largest_weight_by_clarabel(y, graph, order, node_weights=None):
    """The least `max |u|` of a dual point that holds the signal at the best fit without a penalty."""
    w = np.ones(graph.num_nodes) if node_weights is None else node_weights
    rows = rows_of(graph, order)
    form = conic.Conic(rows.shape[0])
    top, eye = form.new(1), sparse.eye_array(rows.shape[0])
    form.inside("zero", -(w * (y - unpenalised(y, graph, order, w))), (sparse.csr_array(rows.T), form.x))
    for sign in (1.0, -1.0):
        form.inside("positive", np.zeros(rows.shape[0]), (sign * eye, form.x), (np.ones((rows.shape[0], 1)), top))
    form.cost(top, 1.0)
    return form.least()


def unpenalised(y, graph, order, w=1.0):
    """The least squares fit whose differences are all zero: means of components, or polynomials."""
    w = np.broadcast_to(w, graph.num_nodes)
    free = null_space(rows_of(graph, order).toarray())
    return free @ np.linalg.solve(free.T @ (w[:, None] * free), free.T @ (w * y))


def searched(graph, values):
    """The label of every node: components of the edges with equal ends in all channels, by networkx."""
    values = np.asarray(values).reshape(graph.num_nodes, -1)
    equal = nx.Graph()
    equal.add_nodes_from(range(graph.num_nodes))
    equal.add_edges_from(edge for edge in graph.edges.tolist() if (values[edge[0]] == values[edge[1]]).all())
    labels = np.empty(graph.num_nodes, int)
    for number, part in enumerate(sorted(nx.connected_components(equal), key=min)):
        labels[list(part)] = number
    return labels


def cases_of(bad):
    """Every row of a table of refusals, by entry point, as a case with a name."""
    return [
        pytest.param(entry, changes, words, id=f"{entry.__name__}: {words[0]} {number}")
        for entry, rows in bad.items()
        for number, (changes, *words) in enumerate(rows)
    ]


def refused(call, *words):
    """A ValueError, or what kind of error stands among its words."""
    kinds = [word for word in words if isinstance(word, type)]
    with pytest.raises(kinds[0] if kinds else ValueError) as caught:
        call()
    text = str(caught.value)
    assert all(word in text for word in words if word not in kinds), text
    # An error of another library's inside would not name what the caller gave.
    where = caught.traceback[-1].path.as_posix()
    assert "/sparseopt/" in where or "/sklearn/" in where
