"""What the trend filter refuses: an error that names the argument and what was given, before any work.

`SHARED`: what every entry point checks of its signal. `NUMBERS`: arguments that are numbers. `BAD`: the rest, by entry
point.
"""

import jax
import numpy as np
import pytest

import sparseopt as so
from tests.trend.problems import cases_of, refused, two_parts

NAN, INF, NODES = np.nan, np.inf, np.arange(6)[:, None]
Y, CHAIN, GRID = np.array([0.0, 1.0, 5.0, 2.0, 8.0, 1.0]), so.Graph.chain(6), so.Graph.grid((5, 6))
HOLES, ONE = np.where(Y > 4, NAN, Y), so.L1(1.0)
SIGNAL, FIT = {"y": Y, "graph": CHAIN}, {"y": Y, "graph": CHAIN, "penalty": ONE}


def solver(y=Y, graph=CHAIN, penalty=ONE, node_weights=None, **settings):
    return so.trend_solver(graph, **settings)(y, penalty, node_weights)


def estimator(X=NODES, y=Y, node_weights=None, **settings):
    return so.GraphTrendFilter(**{"graph": CHAIN} | settings).fit(X, y, node_weights)


def classifier(y=(0, 1, 1), node_weights=None, **settings):
    return so.GraphTrendClassifier(**settings).fit(NODES[:3], y, node_weights)


def validated(y=Y, graph=CHAIN, **settings):
    return so.cross_validate(so.trend.trend_path(y, graph, weights=[1.0], missing="nan"), **settings)


def doge(**settings):
    return so.trend_filter(**FIT, method={"name": "doge"} | settings)


# The entry points with good arguments.
GOOD = {
    so.trend_filter: FIT,
    so.trend.chosen_method: FIT,
    so.trend.trend_path: SIGNAL | {"num": 3},
    so.trend.choose_weight: SIGNAL | {"num": 3},
    so.trend.largest_weight: SIGNAL,
    so.trend.noise_level: SIGNAL,
    so.trend.reweighted: SIGNAL | {"penalty": so.MCP(1.0)},
    so.trend.denoise: {"image": np.arange(25.0).reshape(5, 5), "weight": 1.0},
    so.trend.degrees_of_freedom: {"nonzero": np.ones(5, bool), "graph": CHAIN},
    so.TotalVariation: {"graph": GRID, "weight": 1.0},
    so.trend.jumps: {"y": np.arange(20.0)},
}
SHARED = {
    "NaN": ({"y": HOLES}, '2 NaN of 6 values; missing="nan"'),
    "graph": ({"graph": (6,)}, "sparseopt.Graph, given (6,)", TypeError),
    "order": ({"order": -1}, "order is a whole number from 0", "given -1"),
    "node weights": ({"node_weights": -np.arange(6.0)}, "not negative, given -1.0 at node 1"),
}
OF_SIGNALS = list(GOOD)[:7]
NO_NUMBERS = (NAN, INF, "a", 1j)
# Entry point, argument, what it should be, and wrong numbers besides those.
NUMBERS = [
    (so.trend_filter, "order", "order is a whole number from 0 to 55", -1, 0.5, 56, 10**9, None, [1]),
    (so.trend_filter, "tol", "tol must be positive and finite", 0.0, -1, None),
    (so.trend_filter, "max_steps", "max_steps is a whole number from 1", 0, -1, 1.5, 2**40, None),
    (so.trend.trend_path, "num", "num is a whole number of at least 1", 0, 1.5),
    (so.trend.trend_path, "ratio", "lies in (0, 1)", 0, 1, 2),
    (validated, "folds", "folds is a whole number from 2 to 6", 0, 1, 7, 1.5),
    (validated, "seed", "seed is a whole number", -1, 1.5, None),
    (so.trend.largest_weight, "tol", "tol must be positive", 0.0),
    (so.trend.reweighted, "rounds", "rounds is a whole number of at least 1", 0, 1.5),
    (so.TotalVariation, "tol", "tol must be positive", 0.0),
    (so.TotalVariation, "max_steps", "max_steps is a whole number", 0),
    (estimator, "alpha", "alpha is the weight of the penalty, a finite number >= 0", -1.0, None),
    (estimator, "tol", "tol must be positive", 0.0),
    (estimator, "n_neighbors", "n_neighbors is a whole number of at least 1", 0, 1.5),
    (classifier, "alpha", "alpha is the weight", -1.0),
    (classifier, "label_smoothing", "label_smoothing is a number in [0, 1)", 1.0, None),
    (solver, "channels", "channels is a whole number of at least 1", 0),
    (doge, "rho", "rho", 0, -1),
    (doge, "relaxation", "relaxation in (0, 2)", 0, 2, None),
    (doge, "cadence", "cadence", 0, -1, 1.5),
    (doge, "B", "B is a whole number from 1 to 1", 0, 2, 0.5),
]
PARTS = {"y": np.r_[np.arange(6.0), np.zeros(4), 10.0], "graph": two_parts(None)}
FLAT, LABELS = so.Graph.from_edges([], 6), np.array([0, 1, 0, 0, 1, 0, 1, 1, 0, 0, 1])
Thinning = so.trend.Thinning
COUNTED, HOLED = {"y": np.arange(6.0), "loss": "poisson"}, {"y": HOLES, "missing": "nan"}
NEGATIVE = np.where(np.arange(12).reshape(2, 3, 2) == 11, -1.0, 1.0)
BOTH = {"penalty": {-1: ONE, 0: ONE}}
ISOTROPIC = {"y": np.arange(30.0), "graph": GRID, "penalty": so.GroupL2(1.0, axis=0)}
ON_CHAIN = {"y": np.array([0.0, 2.0, 1.0, 3.0]), "graph": so.Graph.chain(4), "order": 1}
ON_FREE = {"y": np.arange(30.0), "graph": so.Graph.grid((6, 5), (1.0, 1.5), ends="free"), "order": 1}
LARGE = {"graph": so.Graph.grid((40, 40), ends="free"), "order": 1}
SAMPLES = {"X": [[0.0], [1.0], [3.0]], "y": [1.0, 2.0, 3.0], "graph": so.Graph.from_edges([(0, 1), (1, 2), (3, 4)], 6)}
TINY = so.Graph.chain(4, times=1e-30 * np.arange(4))
LONG = {"y": np.zeros((2, 5000)), "graph": so.Graph.grid((2, 5000), ends="free")}
LINE, X = np.arange(24.0), np.random.default_rng(0).standard_normal((24, 2))
ENDS, LAPLACE = ("use ends=", '"graph"'), {"graph": so.Graph.grid((2, 3))}


@so.pytree
class Kinked(so.scalar.Huber):
    smooth = False


@so.pytree
class Doubled:
    """A penalty of a user's own."""

    weight: object

    def value(self, x):
        return 2 * so.L1(self.weight).value(x)

    def prox(self, x, step):
        return so.L1(2 * self.weight).prox(x, step)


class NoPytree:
    weight = 1.0
    value = prox = staticmethod(lambda *_: 0.0)


def close(order, kind, by):
    """A chain with two nearly equal times."""
    times = np.arange(30.0)
    times[10] = times[9] + by
    return {"y": np.arange(30.0) ** 2, "graph": so.Graph.chain(30, times), "order": order, "dtype": kind}


def penalties(*rows):
    return [({"penalty": penalty}, *words) for penalty, *words in rows]


def beside(*rows):
    """Of covariates and a season beside lines."""
    base = {"y": np.sin(LINE), "graph": so.Graph.chain(24)}
    return [(base | changes, *words) for changes, *words in rows]


BAD = {
    so.trend_filter: [
        # The signal.
        ({"y": np.where(Y > 4, -INF, Y)}, "2 infinite values"),
        ({"y": np.full(6, NAN), "missing": "nan"}, "no observed node"),
        ({"y": np.c_[Y, HOLES], "missing": "nan"}, "miss some channels"),
        *[({"y": by * Y}, "squares of this signal", "float64") for by in (1e300, 1e-200)],
        *[({"y": np.float32(by * Y)}, "squares of this signal", "float32") for by in (1e30, 1e-25)],
        *[({"y": y}, "real numbers") for y in (np.array([1.0, None] * 3), list("123456"), Y + 1j, None)],
        ({"y": [[1.0], [2.0, 3.0]]}, "real numbers"),
        *[({"y": np.zeros(shape)}, "shape [6]", str(shape)) for shape in ((), (5,), (1, 6), (6, 2, 2), (6, 0), (0,))],
        ({"y": np.broadcast_to(0.0, (6, 10**12))}, "(6, 1000000000000)", "are free"),
        ({"missing": "drop"}, 'missing must be "error" or "nan"', "drop"),
        ({"dtype": np.float16}, "float32 or float64"),
        ({"start": Y}, "start is a Solution", TypeError),
        # Node weights.
        ({"node_weights": np.ones(5)}, "6 nodes need as many node weights", "given 5"),
        ({"node_weights": 1.0}, "given the shape ()"),
        ({"node_weights": np.where(Y > 4, INF, 1.0)}, "finite", "given inf at node 2"),
        ({"node_weights": np.zeros(6)}, "no observed node"),
        # Counts and labels.
        (COUNTED | {"y": [1, 2, -3, -4, 1, 1]}, "counts, finite and not negative", "-3 at node 2 (2 such)"),
        ({"y": LABELS[:6] * 2, "loss": "logistic"}, "labels 0 or 1 or proportions", "given 2 at node 1 (2 such)"),
        ({"y": [1, 0, -1, 1, 1, 1], "loss": "squared_hinge"}, "labels -1 or 1", "given 0 at node 1 (1 such)"),
        (COUNTED | LAPLACE | {"y": NEGATIVE}, "given -1 at node 5, pixel (1, 2), channel 1"),
        # Parts without a fit.
        (PARTS | {"loss": "poisson", "order": 1}, "component of node 6 (4 nodes) has no positive count", "-inf"),
        (PARTS | {"y": LABELS, "loss": "logistic"}, "node 10 has only one of the labels", "+inf"),
        (COUNTED | {"penalty": so.L1(0.0)}, "node 0 has no positive count", "raise the penalty's weight"),
        (COUNTED | {"y": np.c_[Y, 0 * Y]}, "component of node 0", "in channel 1 has no positive count"),
        (HOLED | {"penalty": so.L1(0.0), "loss": "absolute"}, "not defined at missing nodes"),
        (PARTS | HOLED | {"y": np.r_[np.ones(6), np.full(5, NAN)]}, "2 components have no observed node", "node 6"),
        ({"y": np.arange(6) // 3, "order": 1, "loss": "logistic"}, "no fit exists at order 1", "Logistic"),
        (BOTH | {"graph": FLAT}, "no edges", "apply its prox"),
        # The penalty.
        *penalties(
            (10.0, "`value` and `prox`", "given 10.0", TypeError),
            (so.L1, "`value` and `prox`", "L1", TypeError),
            (NoPytree(), "sparseopt.pytree", TypeError),
            (so.TotalVariation(CHAIN, 0.5), "TotalVariation has its own differences", TypeError),
            ({}, "keyed by their orders", "given none"),
            *[({order: ONE}, "the order of each", repr(order)) for order in (-2, "a", 0.5)],
            *[(so.L1(weight), "must not be negative", "-1.0") for weight in (-1.0, np.r_[np.ones(4), -1.0])],
            *[(so.L1(weight), "must be finite") for weight in (NAN, INF, np.r_[np.ones(4), NAN])],
            *[(so.L1(weight), "real numbers") for weight in ("1", None, 1j, np.array([None] * 5))],
            (so.L1(1e-310), "from 2.23e-308", "1e-310"),
            *[(so.L1(np.ones(shape)), "each of the 5 rows", str(shape)) for shape in ((4,), (6,), (5, 1))],
            (so.MCP(np.ones(6)), "one number here", "(6,)"),
            (so.MCP(1.0, 0.0), "gamma of MCP must be above 0"),
            *[(p, "couples the channels") for p in (so.GroupL2(1.0), so.NuclearNorm(1.0), so.SparseGroup(1, 1))],
            (so.GroupL2(1.0, groups=[0, 0, 1, 1, 1]), "labelled groups of differences"),
        ),
        ({"penalty": so.L1(np.arange(5.0)), "loss": "huber"}, "must be positive", "1 of 5 that are 0"),
        (BOTH | {"order": 1}, "keyed by their orders [-1, 0]", "given order=1"),
        (BOTH | {"loss": "poisson"}, "several penalties need the square loss"),
        ({"y": np.c_[Y, Y], "penalty": so.NuclearNorm(1.0), "method": "doge"}, "couples all rows", '"admm"'),
        (ISOTROPIC | {"order": 1}, "order 0 and a grid of 2 or 3 axes", "given order 1"),
        (ISOTROPIC | {"graph": so.Graph.chain(30)}, "a grid of 2 or 3 axes", "Graph.chain(30"),
        (ISOTROPIC | {"penalty": so.GroupL2(1.0, axis=1)}, "with axis -1", "given 1"),
        (ISOTROPIC | {"penalty": so.GroupL2(1.0, axis=(0, -1))}, "this one has none", "axis 0"),
        (ISOTROPIC | {"penalty": {-1: ONE, 0: so.GroupL2(1.0, axis=0)}}, "must be the only penalty"),
        # The loss.
        ({"loss": "cauchy"}, "unknown loss 'cauchy'", "square, poisson, logistic, squared_hinge, huber"),
        *[({"loss": loss}, "a loss is a name or an object", TypeError) for loss in (5, so.scalar.Poisson)],
        ({"loss": so.scalar.Huber(0.0)}, "positive, finite delta", "0.0"),
        (ON_FREE | {"loss": "absolute"}, "free ends at order 1 need smooth losses"),
        (ON_CHAIN | {"loss": Kinked()}, "need smooth losses", "given Kinked", '"graph"'),
        *[({"method": name, "loss": "huber"}, "solves the square loss only") for name in ("fused_lasso", "interior")],
        # Bounds and a direction.
        *[({"bounds": b}, "bounds are a pair") for b in ((1, 0), 3, "ab", (1, 2, 3), (NAN, 1), (True, 2), (INF, INF))],
        ({"monotone": "sideways"}, "monotone 'sideways'"),
        ({"monotone": "up", "penalty": so.MCP(1.0)}, "monotone joins L1 at order 0"),
        ({"bounds": (0, 1), "order": 1, "loss": "huber"}, "need the square loss"),
        # Covariates and a season.
        *beside(
            ({"covariates": np.column_stack([X, X.sum(axis=1)])}, "covariate 2 is not determined"),
            ({"covariates": np.ones(24)}, "covariate 0 is not determined", "the trend does the same"),
            ({"covariates": LINE, "order": 1}, "covariate 0 is not determined"),
            ({"covariates": LINE % 4, "season": 4}, "covariate 0 is not determined"),
            ({"covariates": X[:20]}, "one row for each of 24 nodes", "(20, 2)"),
            ({"covariates": np.where(X > 2, NAN, X) * [1, INF]}, "known at every node"),
            *[({"season": period}, "season", str(period)) for period in (1, 13)],
            ({"season": 4, "node_weights": LINE % 4 > 0}, "row 0 of the season of 4 rows is never observed"),
            ({"season": 4, "graph": so.Graph.grid((4, 6))}, "a season needs a series"),
            ({"season": 4, "y": np.ones((24, 2))}, "channels"),
            ({"season": 4, "penalty": so.MCP(1.0)}, "L1"),
            ({"season": 4, "penalty": so.L1(0.0)}, "positive weight"),
            ({"season": 4, "penalty": {0: ONE, 1: ONE}}, "one penalty"),
            ({"season": 4, "loss": "absolute"}, "huber"),
            ({"season": 4, "loss": "squared_hinge", "y": np.sign(np.sin(LINE) + 0.1)}, "logistic"),
            ({"season": 4, "history": True}, "history"),
            ({"season": 4, "dtype": np.float32}, "float64"),
            ({"season": 4, "bounds": (0, 1)}, "bounds"),
            ({"covariates": X, "monotone": "up"}, "monotone"),
        ),
        # The method.
        ({"method": "newton"}, "unknown method 'newton'", "auto, doge, admm, fused_lasso, interior"),
        *[({"method": method}, "method") for method in (None, 5, so.trend.Doge, {"name": "a"})],
        ({"method": {"name": "doge", "b": 1}}, "unknown setting of doge 'b'", "rho, relaxation, cadence, B"),
        ({"order": 1, "method": so.trend.Doge(B=3)}, "1 to 2", "given 3"),
        ({"method": {"name": "admm", "rho": -1.0}}, "rho", "must be positive"),
        (LAPLACE | {"method": "fused_lasso"}, "order 0 on chains", '"doge", "admm"'),
        ({"method": "fast_admm"}, "ended in 0.4", '"fused_lasso" at order 0 and "interior" above'),
        *[({"penalty": so.MCP(1.0), "method": name}, "solves the L1 penalty") for name in ("fused_lasso", "interior")],
        ({"method": "interior", "history": True}, "no start and keeps no history"),
        *[(BOTH | {"method": name}, "solves single orders") for name in ("interior", "fused_lasso")],
        (BOTH | {"method": so.trend.Doge(B=1)}, "leave out B"),
        (ISOTROPIC | {"method": "doge_groups"}, "isotropic total variation", '"doge"'),
        *[(each | {"method": so.trend.Doge(B=1)}, "row by row, given B=1", *ENDS) for each in (ON_CHAIN, ON_FREE)],
        *[(each | {"method": "doge_groups"}, "needs the ends of the graph", *ENDS) for each in (ON_CHAIN, ON_FREE)],
        # Free ends.
        (ON_CHAIN | {"node_weights": [1, 0, 0, 0]}, "at least 2 observed nodes, given 1", *ENDS),
        (ON_CHAIN | {"order": 3}, "order 3 with free ends needs at least 5 nodes, given 4", *ENDS),
        (ON_FREE | {"order": 5}, "at least 7 nodes along an axis, given 6"),
        (ON_FREE | {"node_weights": np.arange(30) < 5}, "at least 4 observed nodes, given 5", "a polynomial"),
        (LONG | {"order": 1}, "4,096 nodes", "5,000"),
        (ON_CHAIN | {"graph": TINY, "dtype": np.float32}, "beyond float32: divide the times by"),
        *[
            (close(order, kind, by), "nodes 9 and 10 are", f"order {order + 1} in {np.dtype(kind)}")
            for order, kind, by in ((1, np.float64, 1e-6), (2, np.float64, 1e-12), (3, np.float32, 1e-5))
        ],
    ],
    so.trend.trend_path: [
        *[({"weights": [1.0, w]}, "weights are positive and finite", f"{w}") for w in (0.0, -1.0, NAN, INF)],
        *[({"weights": np.ones(shape)}, "at least one number", str(shape)) for shape in ((0,), (), (1, 1))],
        ({"num": 10**13}, "10,000,000,000,000 fits"),
        *penalties(
            (so.L1(np.r_[np.ones(4), 100.0]), "one number for all rows", "(5,)"),
            *[(p, "replaces the penalty's `weight`", "sparseopt.L1", TypeError) for p in (so.TopK(2), so.NM, 3.0)],
            (so.L0, "where a path of L0", "give its weights"),
        ),
        ({"y": np.full(6, 0.1)}, "the mean of its component everywhere", "every weight gives"),
        ({"y": np.ones(6), "loss": "logistic"}, "only one of the labels 0 and 1"),
        ({"y": np.arange(6.0), "order": 1, "loss": "absolute"}, "the signal is a polynomial of this degree"),
        ({"graph": FLAT}, "no edges, so every weight gives the same fit"),
        (COUNTED | LARGE | {"y": np.ones(1600)}, "free ends of at most 1,024 nodes"),
    ],
    validated: [
        ({"rule": "max"}, "unknown rule 'max'", "min, half_se, one_se"),
        ({"y": [1.0, NAN], "graph": so.Graph.chain(2)}, "two observations", "given 1"),
    ],
    so.trend.choose_weight: [
        *[({"rule": rule, "loss": "logistic", "y": LABELS[:6]}, rule, "labels") for rule in ("gcv", "aic")],
        ({"rule": "sure"} | COUNTED, "sure", "Poisson"),
        ({"rule": "gvc"}, "unknown rule 'gvc'", "gcv"),
        (COUNTED | {"season": 2}, "give a number"),
    ],
    so.trend.reweighted: [
        ({"y": np.zeros((6, 2))}, "shape [6] or (6,)", "given (6, 2): fit channels one by one"),
        *[({"penalty": penalty}, "`value` and `slope`", TypeError) for penalty in (ONE, so.MCP)],
    ],
    so.trend.degrees_of_freedom: [
        ({"nonzero": np.ones(4, bool)}, "5 rows", "(4,)"),
        ({"nonzero": np.full(5, NAN)}, "true or false"),
        ({"observed": [True]}, "one entry for each of 6 nodes"),
        (LARGE | {"nonzero": np.zeros(3040, bool)}, "at most 1,024 nodes, given 1,600"),
    ],
    so.trend.denoise: [
        ({"image": np.zeros(5)}, "an image has the shape", "(5,)"),
        ({"image": np.zeros((6, 6), np.int64)}, "integers of 8, 16 or 32 bits", "int64"),
        ({"volume": True}, "a volume has the shape [depth, height, width]", "(5, 5)"),
        ({"known": np.ones((5, 6), bool)}, "each of (5, 5) pixels", "bool of shape (5, 6)"),
        ({"image": np.full((5, 5), 7.0), "weight": None}, "noise level of the image is 0"),
        ({"weight": np.ones(2)}, "weight is one number", "(2,)"),
        ({"alpha": True}, "two channels or more", "(5, 5)"),
        ({"couple": "no"}, "couple is True, False or None", "'no'"),
        ({"devices": 2, "weight": None}, "a weight is chosen on one device"),
    ],
    so.trend.jumps: [
        ({"graph": so.Graph.grid((5, 4))}, "found on series, given Graph.grid", "regions"),
        ({"graph": so.Graph.chain(7)}, "7 nodes"),
        ({"least": 1}, "least"),
        ({"max_jumps": -1}, "max_jumps"),
        ({"y": np.full(20, NAN), "missing": "error"}, "20 NaN"),
        ({"y": np.full(9, 1.5), "thin": Thinning("poisson")}, "counts 0, 1, 2", "given 1.5 (9 such"),
        ({"y": np.full(9, -1), "thin": Thinning("poisson")}, "given -1"),
        ({"y": np.r_[0, 0, 4], "thin": Thinning("binomial", trials=3)}, "up to their trials, given 4.0"),
        ({"thin": Thinning("binomial", trials=[3, 4])}, "20 nodes need trials of one number or as many, given 2"),
        ({"thin": Thinning("gaussian", noise=[1, 2])}, "1 channels need noise of one number"),
        ({"node_weights": np.full(20, 2.0), "thin": Thinning("poisson")}, "1, or 0 if missing: leave out node_weights"),
        ({"thin": "poisson"}, "thin is a so", TypeError),
    ],
    Thinning: [
        ({"law": "normal"}, "unknown law 'normal'"),
        ({"law": "gaussian"}, "needs noise, the standard deviation", "approximate"),
        ({"law": "gaussian", "noise": -1}, "a positive number", "given -1"),
        ({"law": "poisson", "noise": 1}, "has no noise"),
        ({"law": "binomial"}, "needs trials"),
        ({"law": "binomial", "trials": 1}, "at least 2"),
        ({"law": "poisson", "share": 1}, "share is between"),
        ({"law": "poisson", "seed": -1}, "seed"),
    ],
    so.trend.regions: [({"y": [1.0], "graph": so.Graph.chain(1)}, "edges")],
    so.TotalVariation: [
        ({"weight": np.ones(3)}, "49 rows", "(3,)"),
        ({"graph": (6,)}, "sparseopt.Graph", TypeError),
        ({"graph": so.Graph.chain(1)}, "no edges"),
        ({"graph": None, "order": 1, "solver": so.trend_solver(GRID)}, "needs another plan"),
    ],
    solver: [
        ({"graph": (6,)}, "sparseopt.Graph", TypeError),
        ({"graph": FLAT}, "no edges"),
        ({"y": Y[:5]}, "(6,)", "given (5,)"),
        ({"dtype": np.float64}, "needs 64-bit types"),
        ({"graph": so.Graph.grid((2, 3)), "method": "interior"}, "works on the host"),
        ({"penalty": so.MCP(1.0), "method": "fused_lasso"}, "solve the L1 penalty"),
        (ISOTROPIC | {"method": "doge_groups"}, "isotropic total variation", '"doge"'),
        *penalties(
            (so.L1(np.ones(4)), "each of the 5 rows"),
            *[(make(-1.0), "weight must not be negative", "-1.0") for make in (so.L1, Doubled)],
        ),
    ],
    estimator: [
        ({"y": HOLES}, "NaN"),
        ({"graph": (6,)}, "sparseopt.Graph", TypeError),
        ({"X": np.c_[NODES, NODES]}, "one column of node numbers", "(6, 2)"),
        ({"X": NODES + 1}, "X holds 6 in row 5 (1 such rows)", "whole numbers 0..5"),
        ({"X": NODES + 0.5}, "X holds 0.5 in row 0 (6 such"),
        (SAMPLES | {"X": [[0], [1], [1]], "y": [1, 4, -1], "loss": "poisson"}, "given y = -1 in row 2 (1 such)"),
        ({"node_weights": [1, 1]}, "one entry per sample", "(2,)"),
        ({"node_weights": 1 - NODES[:, 0]}, "not negative", "-1.0 in row 2"),
        ({"node_weights": np.zeros(6)}, "every sample weight is zero"),
        ({"penalty": "l3"}, "one of l1, l0, mcp, scad, group_l2", "'l3'"),
        ({"penalty": ONE}, "function of the weight", "L1("),
        *[({"loss": loss}, "is for labels: use GraphTrendClassifier") for loss in ("logistic", "squared_hinge")],
    ],
    classifier: [
        ({"y": [0.5, 1.5, 1.7]}, "Unknown label type: continuous"),
        ({"y": ["no"] * 3}, "given one class", "'no'"),
        ({"y": ["a", "b", "c"]}, "Only binary", "3 classes", "OneVsRestClassifier"),
        ({"node_weights": [0, 1, 1]}, "one class", "a positive weight"),
    ],
}


@pytest.fixture(autouse=True)
def no_work(monkeypatch):
    monkeypatch.setattr("sparseopt.core.problem.iterate._iterate", lambda *_, **__: pytest.fail("work began"))


@pytest.mark.parametrize("entry", OF_SIGNALS, ids=lambda entry: entry.__name__)
@pytest.mark.parametrize("case", SHARED)
def test_every_entry_point_checks_its_signal(entry, case):
    changes, *words = SHARED[case]
    refused(lambda: entry(**GOOD[entry] | changes), *words)


@pytest.mark.parametrize(("entry", "argument", "said", "wrong"), [(*row[:3], row[3:]) for row in NUMBERS])
def test_a_number_is_one(entry, argument, said, wrong):
    for given in (*NO_NUMBERS, *wrong):
        refused(lambda given=given: entry(**GOOD.get(entry, {}) | {argument: given}), said, str(given))


@pytest.mark.parametrize(("entry", "changes", "words"), cases_of(BAD))
def test_an_error_names_what_was_given(entry, changes, words):
    refused(lambda: entry(**GOOD.get(entry, {}) | changes), *words)


def known(graph):
    """A fit of order 1 that is the signal."""
    return so.trend_filter(np.arange(float(graph.num_nodes)), graph, so.L1(0.0), 1)


def path():
    return so.trend.trend_path(Y, CHAIN, num=3)


def doubled(weight):
    return so.trend_filter(**FIT | {"penalty": so.L1(2 * weight)})


LATER = {
    "select: a path": (lambda: so.select(5), "so.trend.trend_path", "int", TypeError),
    "cross_validate: a path": (lambda: so.cross_validate(Y), "so.trend.trend_path", "ndarray", TypeError),
    "cross_validate: folds": (lambda: validated(folds=[0, 1]), "each of 6 observations", "given 2 of 2 kinds"),
    "cross_validate: one fold": (lambda: validated(folds=np.ones(6)), "at least two labels", "given 6 of 1 kinds"),
    "select: a criterion": (lambda: so.select(path(), "cp"), "unknown criterion 'cp'", "gcv, sure, aic, bic"),
    "select: sigma": (lambda: so.select(path(), "sure", 0.0), "sigma", "positive and finite, given 0"),
    "knots of a grid": (lambda: known(GRID).knots(), "along a chain", "Graph.grid((5, 6))"),
    "pieces of order 1": (lambda: known(CHAIN).pieces(), "a fit of order 1 has no pieces", "`knots"),
    "a traced y": (lambda: jax.jit(lambda y: so.trend_filter(y, CHAIN, ONE))(Y), "sparseopt.trend_solver", TypeError),
    "a traced weight": (lambda: jax.jit(doubled)(1.0), "penalty's numbers", "sparseopt.trend_solver", TypeError),
    "another x": (lambda: so.TotalVariation(GRID, 1.0).value(np.zeros((4, 6))), "(5, 6) or (30,)", "given (4, 6)"),
    "a plot of a series": (lambda: so.trend.regions(Y, CHAIN).plot(), "two axes"),
    "an unknown node": (lambda: estimator(alpha=0).predict([[6]]), "X holds 6 in row 0", "0..5"),
    "a setting": (lambda: so.GraphTrendFilter(method="doge").set_params(method__b=1), "unknown setting of doge 'b'"),
}


@pytest.mark.parametrize("case", LATER)
def test_what_fits_cannot_do_is_an_error(case):
    refused(*LATER[case])
