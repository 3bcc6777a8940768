"""Hostile input: every entry point of the trend filter gives a clear error before any work.

`BAD_INPUTS` lists inputs that must raise an error, by kind: `(kind, name, call, fragment or pattern of the message)`.
"""

import re
from functools import partial

import jax
import networkx as nx
import numpy as np
import pytest
from scipy import sparse

import sparseopt as so
from sparseopt.trend.base.layout import layout_of
from sparseopt.trend.estimator import GraphTrendClassifier, GraphTrendFilter
from sparseopt.trend.filter import chosen_method
from sparseopt.trend.images import denoise
from sparseopt.trend.paths.selection import random_folds
from tests.trend.problems import two_parts

Y = np.array([0.0, 1.0, 5.0, 2.0, 8.0, 1.0])
CHAIN = so.Graph.chain(6)
NAN, INF = np.nan, np.inf
NODES = np.arange(6)[:, None]


def fit(**changes):
    return so.trend_filter(**{"y": Y, "graph": CHAIN, "penalty": so.L1(1.0), **changes})


def estimate(y=Y, graph=CHAIN, node_weights=None, X=NODES, **settings):
    return so.GraphTrendFilter(graph=graph, **settings).fit(X, y, node_weights)


ENTRIES = {
    "trend_filter": fit,
    "chosen_method": lambda **changes: chosen_method(**{"y": Y, "graph": CHAIN, "penalty": so.L1(1.0), **changes}),
    "trend_path": lambda **changes: so.trend.trend_path(**{"y": Y, "graph": CHAIN, "num": 3, **changes}),
    "cross_validate": lambda **changes: so.trend.cross_validate(
        **{"y": Y, "graph": CHAIN, "folds": 2, "num": 3, **changes}
    ),
    "largest_weight": lambda **changes: so.trend.largest_weight(**{"y": Y, "graph": CHAIN, **changes}),
    "noise_level": lambda **changes: so.trend.noise_level(**{"y": Y, "graph": CHAIN, **changes}),
    "reweighted": lambda **changes: so.trend.reweighted(**{"y": Y, "graph": CHAIN, "penalty": so.MCP(1.0), **changes}),
    "estimator": estimate,
}
# Of the estimator scikit-learn checks X and y, in its own words.
OURS = [name for name in ENTRIES if name != "estimator"]
FILTERS = [*ENTRIES]
ONE_EACH = so.L1(1.0)


def planned(y=Y, graph=CHAIN, penalty=ONE_EACH, node_weights=None, **settings):
    return so.trend_solver(graph, **settings)(y, penalty, node_weights)


ENTRIES |= {
    "trend_solver": planned,
    "labels": lambda y=(0, 1, 1), node_weights=None, **settings: GraphTrendClassifier(**settings).fit(
        NODES[:3], y, node_weights
    ),
    "denoise": lambda **changes: denoise(**{"image": np.arange(25.0).reshape(5, 5), "weight": 1.0, **changes}),
    "TotalVariation": lambda **changes: so.TotalVariation(**{"graph": so.Graph.grid((5, 6)), "weight": 1.0, **changes}),
    "Graph.chain": lambda **changes: so.Graph.chain(3, **changes),
    "Graph.grid": lambda shape=(4, 5), **changes: so.Graph.grid(shape, **changes),
}

BAD_INPUTS = []


def bad(kind, fragment, entries, cases, argument):
    for entry in entries:
        for name, value in cases.items():

            def call(entry=entry, value=value):
                return ENTRIES[entry](**{argument: value})

            BAD_INPUTS.append((kind, f"{entry}: {argument} {name}", call, fragment))


MISSING = '2 NaN of 6 values; missing="nan"'
bad("signal value", MISSING, OURS, {"NaN": np.where(Y > 4, NAN, Y), "masked": np.ma.array(Y, mask=Y > 4)}, "y")
bad("signal value", "2 infinite values", OURS, {"inf": np.where(Y > 4, INF, Y), "-inf": np.where(Y > 4, -INF, Y)}, "y")
bad("signal value", "squares of this signal", ["trend_filter", "trend_path"], {"1e300": 1e300 * Y}, "y")
bad("signal value", "squares of this signal", ["trend_filter", "trend_path"], {"1e-200": 1e-200 * Y}, "y")
bad("signal value", "squares of this signal", ["trend_filter"], {"1e30": np.float32(1e30 * Y)}, "y")
bad("signal value", "squares of this signal", ["trend_filter"], {"1e-25": np.float32(1e-25 * Y)}, "y")
bad("signal value", "NaN", ["estimator"], {"NaN": np.where(Y > 4, NAN, Y)}, "y")
bad("signal value", "infinity", ["estimator"], {"inf": np.where(Y > 4, INF, Y)}, "y")
bad(
    "signal dtype",
    "real numbers",
    OURS,
    {
        "object": np.array([1.0, None, 2.0, 3.0, 4.0, 5.0], object),
        "text": np.array(list("123456")),
        "dates": np.arange(6).astype("M8[s]"),
        "rows of unequal length": [[1.0], [2.0, 3.0]],
        "a dict": {1: 2},
        "None": None,
    },
    "y",
)
bad("signal dtype", "real numbers, given dtype complex128", OURS, {"complex": Y + 1j}, "y")
bad("signal dtype", "omplex", ["estimator"], {"complex": Y + 1j}, "y")
bad("signal dtype", "convert", ["estimator"], {"text": np.array(list("abcdef"))}, "y")
bad(
    "signal shape",
    "the signal has the shape [6]",
    OURS,
    {
        "a number": 3.0,
        "too short": Y[:5],
        "too long": np.r_[Y, 1.0],
        "transposed": Y[None],
        "three axes": np.zeros((6, 2, 2)),
        "no channel": np.zeros((6, 0)),
        "empty": [],
    },
    "y",
)
bad("signal shape", "samples", ["estimator"], {"too short": Y[:5]}, "y")
bad("signal shape", "dim", ["estimator"], {"a number": 3.0, "three axes": np.zeros((6, 2, 2))}, "y")
bad(
    "graph",
    "sparseopt.Graph",
    OURS,
    {"None": None, "a shape": (6,), "networkx": nx.path_graph(6), "SciPy": sparse.eye_array(6)},
    "graph",
)
bad("graph", "sparseopt.Graph", ["estimator"], {"a shape": (6,), "networkx": nx.path_graph(6)}, "graph")
ORDERS = {"-1": -1, "0.5": 0.5, "NaN": NAN, "inf": INF, "text": "1", "None": None, "a list": [1]}
for name, value in (ORDERS | {"56": 56, "10**9": 10**9}).items():
    bad("order", f"order is a whole number from 0 .*given {re.escape(repr(value))}", FILTERS, {name: value}, "order")
WEIGHTS = {
    "negative": (-np.ones(6), "not negative"),
    "NaN": (np.where(Y > 4, NAN, 1.0), "finite"),
    "infinite": (np.where(Y > 4, INF, 1.0), "finite"),
    "too short": (np.ones(5), "given 5"),
    "complex": (np.ones(6) * 1j, "real numbers"),
    "text": (list("123456"), "real numbers"),
    "object": (np.array([None] * 6), "real numbers"),
    "all zero": (np.zeros(6), "observed node"),
}
OF_SAMPLES = {"all zero": "zero", "too short": "given (5,)"}
for name, (value, fragment) in WEIGHTS.items():
    bad("node weights", fragment, OURS, {name: value}, "node_weights")
    bad("node weights", OF_SAMPLES.get(name, fragment), ["estimator"], {name: value}, "node_weights")
SHAPES = {"[6, 1]": np.ones((6, 1)), "[2, 3]": np.ones((2, 3)), "1": 1.0}
bad("node weights", "given the shape", OURS, SHAPES, "node_weights")
PENALTY_WEIGHTS = {
    "negative": (-1.0, "must not be negative, given -1.0"),
    "NaN": (NAN, "must be finite"),
    "infinite": (INF, "must be finite"),
    "text": ("1", "real numbers"),
    "None": (None, "real numbers"),
    "complex": (1j, "real numbers"),
    "object": (np.array([None] * 5), "real numbers"),
    "subnormal": (1e-310, "from 2.23e-308"),
    "one too many": (np.ones(6), "one for each of the 5 rows"),
    "one too few": (np.ones(4), "one for each of the 5 rows"),
    "[5, 1]": (np.ones((5, 1)), "one for each of the 5 rows"),
    "one negative": (np.r_[np.ones(4), -1.0], "must not be negative"),
    "one NaN": (np.r_[np.ones(4), NAN], "must be finite"),
    "one infinite": (np.r_[np.ones(4), INF], "must be finite"),
}
for name, (value, fragment) in PENALTY_WEIGHTS.items():
    bad("penalty weight", fragment, ["trend_filter", "chosen_method"], {name: so.L1(value)}, "penalty")
    for penalty in (so.L0, so.MCP, so.SCAD):
        expected = "one number here" if np.ndim(value) and "one for each" in fragment else fragment
        if not (np.ndim(value) and name != "object"):
            bad("penalty weight", expected, ["trend_filter"], {f"{name} {penalty.__name__}": penalty(value)}, "penalty")
for name, value in {"-1": -1.0, "NaN": NAN, "infinite": INF, "text": "1", "None": None, "complex": 1j}.items():
    said = f"alpha is the weight of the penalty, a finite number >= 0, given {value!r}"
    bad("penalty weight", said, ["estimator"], {name: value}, "alpha")
SAID_OF_LEVELS = {
    "weights are positive and finite, given 0.0": [1.0, 0.0],
    "weights are positive and finite, given -1.0": [-1.0],
    "weights are positive and finite, given nan": [1.0, NAN],
    "weights are positive and finite, given inf": [INF],
    "at least one number, given the shape (0,)": [],
    "at least one number, given the shape ()": 1.0,
    "at least one number, given the shape (1, 1)": [[1.0]],
}
for said, value in SAID_OF_LEVELS.items():
    bad("penalty weight", said, ["trend_path"], {said: value}, "weights")
LEVELS = {"0": [0.0], "-1": [-1.0], "NaN": [NAN], "inf": [INF], "none": [], "a number": 1.0, "a table": [[1.0]]}
bad("penalty weight", "weights are", ["cross_validate"], LEVELS, "weights")
bad("penalty weight", "real numbers", ["trend_path"], {"text": ["1"], "complex": [1j]}, "weights")
bad("penalty", "`value` and `prox`", ["trend_solver"], {"a number": 5.0}, "penalty")
bad("penalty", "`value` and `prox`", ["trend_filter"], {"a number": 10.0, "None": None, "a class": so.L1}, "penalty")
bad("penalty", "gamma of MCP must be above 0", ["trend_filter", "trend_path"], {"MCP 0": so.MCP(1.0, 0.0)}, "penalty")
bad("penalty", "gamma of MCP must be above 0", ["trend_filter", "reweighted"], {"MCP -1": so.MCP(1.0, -1.0)}, "penalty")
bad(
    "penalty",
    "the a of SCAD must be above 2",
    ["trend_filter", "trend_path", "reweighted"],
    {"SCAD 2": so.SCAD(1.0, 2.0)},
    "penalty",
)
bad("penalty", "must be finite", ["trend_filter", "trend_path", "reweighted"], {"MCP NaN": so.MCP(1.0, NAN)}, "penalty")
bad("penalty", "its own", ["trend_filter"], {"TotalVariation": so.TotalVariation(CHAIN, 0.5)}, "penalty")
bad("penalty", "couples the channels", ["trend_filter"], {"GroupL2": so.GroupL2(1.0)}, "penalty")
OF_NO_WEIGHT = {"TopK": so.TopK(2), "NM": so.NM, "2:4": so.NM(2, 4), "a number": 3.0}
bad("penalty", "replaces the penalty's `weight`.*sparseopt.L1", ["trend_path"], OF_NO_WEIGHT, "penalty")
bad("penalty", "where a path of L0.* begins is not known: give its weights", ["trend_path"], {"L0": so.L0}, "penalty")
bad("penalty", "`value` and `slope`", ["reweighted"], {"L1": so.L1(1.0), "a class": so.MCP}, "penalty")
bad("penalty", "one of l1, l0, mcp, scad, group_l2.*given 'l3'", ["estimator"], {"a name": "l3"}, "penalty")
bad("penalty", "penalty is one of", ["estimator"], {"a number": 5}, "penalty")
bad("penalty", "keyed by their orders.*given none", ["trend_filter"], {"of no order": {}}, "penalty")
SUMS = {"of order -2": {-2: so.L1(1.0)}, "of order 'a'": {"a": so.L1(1.0)}, "of order 0.5": {0.5: so.L1(1.0)}}
bad("penalty", "the order of each", ["trend_filter"], SUMS, "penalty")
bad("penalty", "`value` and `prox`", ["trend_filter"], {"a sum with a number": {0: 1.0, 1: so.L1(1.0)}}, "penalty")
SETTINGS = {
    "tol": {"0": 0.0, "-1": -1, "NaN": NAN, "inf": INF, "text": "a", "None": None, "complex": 1j},
    "max_steps": {"0": 0, "-1": -1, "1.5": 1.5, "NaN": NAN, "inf": INF, "text": "a", "None": None, "2**40": 2**40},
    "method": {"None": None, "5": 5, "a class": so.trend.Doge, "a mapping": {"name": "a"}},
    "missing": {"drop": "drop", "True": True, "None": None},
    "dtype": {"float16": np.float16, "int": int, "text": "foo"},
    "start": {"5": 5, "an array": Y},
    "loss": {"text": "cubic", "5": 5, "delta 0": so.scalar.Huber(0.0), "a class": so.scalar.Poisson},
}
SAID = {
    "tol": "tol must be positive and finite, given",
    "max_steps": "max_steps is a whole number from 1",
    "missing": 'missing must be "error" or "nan"',
}
for argument, cases in SETTINGS.items():
    bad("setting", SAID.get(argument, argument), ["trend_filter"], cases, argument)
# Those of a method.
OF_METHOD = {
    "rho": (0, -1, NAN, INF, "a"),
    "relaxation": (0, 2, NAN, "a", None),
    "cadence": (0, -1, 1.5, "a"),
    "B": (0, 2, 0.5, "a"),
}
for setting, values in OF_METHOD.items():
    cases = {f"of {setting} {value}": {"name": "doge", setting: value} for value in values}
    bad("setting", setting, ["trend_filter"], cases, "method")
TWO_COLUMNS = "one column of node numbers, [m, 1]; given the shape (6, 2)"
for argument in ("tol", "max_steps", "method", "missing", "dtype"):
    bad("setting", SAID.get(argument, argument), ["trend_path"], SETTINGS[argument], argument)
bad(
    "setting",
    "num is a whole number of at least 1, given",
    ["trend_path"],
    {"0": 0, "1.5": 1.5, "NaN": NAN, "text": "a"},
    "num",
)
bad("setting", "lies in (0, 1), given", ["trend_path"], {"0": 0, "1": 1, "2": 2, "NaN": NAN, "text": "a"}, "ratio")
bad("setting", SAID["tol"], ["largest_weight", "reweighted", "estimator", "TotalVariation"], SETTINGS["tol"], "tol")
bad(
    "setting",
    "rounds is a whole number of at least 1, given",
    ["reweighted"],
    {"0": 0, "1.5": 1.5, "NaN": NAN, "text": "a"},
    "rounds",
)
bad(
    "setting",
    "folds is a whole number from 2 to 6",
    ["cross_validate"],
    {"0": 0, "1": 1, "7": 7, "1.5": 1.5, "text": "a"},
    "folds",
)
bad("setting", "seed is", ["cross_validate"], {"-1": -1, "1.5": 1.5, "text": "a", "None": None}, "seed")
bad("setting", "unknown rule 'max'; known are min, half_se, one_se", ["cross_validate"], {"max": "max"}, "rule")
bad(
    "setting",
    "n_neighbors is a whole number of at least 1, given",
    ["estimator"],
    {"0": 0, "1.5": 1.5, "text": "a"},
    "n_neighbors",
)
bad("setting", TWO_COLUMNS, ["estimator"], {"two columns": np.c_[NODES, NODES]}, "X")
bad("setting", "whole numbers 0..5", ["estimator"], {"-1": NODES - 1, "6": NODES + 1, "0.5": NODES + 0.5}, "X")

LOSS_NAMES = "unknown loss 'cauchy'; known are square, poisson, logistic, squared_hinge, huber"
bad("loss", LOSS_NAMES, ["trend_filter", "trend_path", "estimator"], {"cauchy": "cauchy"}, "loss")
bad("loss", "a loss is a name or an object", ["trend_filter", "estimator"], {"a class": so.scalar.Poisson}, "loss")
for value in (0.0, 1.0, NAN):
    said = f"level between 0 and 1, both excluded.*given {value}"
    bad("loss", said, ["trend_filter"], {f"level {value}": so.scalar.Quantile(value)}, "loss")
for value in (0.0, -1.0, NAN):
    said = f"positive, finite delta.*given {value}"
    bad("loss", said, ["trend_filter"], {f"delta {value}": so.scalar.Huber(value)}, "loss")
METHODS = "unknown method 'newton'; known are auto, doge, admm, fast_admm, interior"
bad("method", METHODS, ["trend_filter", "trend_path", "estimator"], {"newton": "newton"}, "method")
bad(
    "method",
    "unknown method 'newton'; known are auto, doge",
    ["trend_solver", "TotalVariation"],
    {"newton": "newton"},
    "method",
)
bad(
    "graph",
    "the graph is a sparseopt.Graph, given (6,)",
    [*FILTERS, "trend_solver", "TotalVariation"],
    {"6": (6,)},
    "graph",
)

MAKERS = {
    "grid": so.Graph.grid,
    "chain": so.Graph.chain,
    "edges": lambda given: so.Graph.from_edges(given),
    "nodes": lambda given: so.Graph.from_edges([(0, 1)], given),
    "weights": lambda given: so.Graph.from_edges([(0, 1), (1, 2)], weights=given),
    "scipy": so.Graph.from_scipy,
    "networkx": so.Graph.from_networkx,
}
BAD_GRAPHS = [
    ("grid", "no axis", (), "1 to 3 axes"),
    ("grid", "four axes", (2, 2, 2, 2), "1 to 3 axes"),
    ("grid", "a number", 5, "1 to 3 axes"),
    ("grid", "an empty axis", (2, 0), "axis 1 .* at least 1, given 0"),
    ("grid", "a negative axis", (-2, 3), "axis 0 .* given -2"),
    ("grid", "half a node", (2.5, 3), "axis 0 .* given 2.5"),
    ("grid", "NaN", (NAN, 3), "axis 0 .* given nan"),
    ("grid", "text", "ab", "axis 0 .* given 'a'"),
    ("chain", "0", 0, "at least 1, given 0"),
    ("chain", "1.5", 1.5, "given 1.5"),
    ("chain", "None", None, "given None"),
    ("edges", "text", [("a", "b")], "whole node numbers"),
    ("edges", "NaN", [(0, NAN)], "whole node numbers"),
    ("edges", "inf", [(0, INF)], "whole node numbers"),
    ("edges", "halves", [(0.5, 1)], "whole node numbers"),
    ("edges", "booleans", [(False, True)], "whole node numbers"),
    ("edges", "complex", [(0, 1j)], "whole node numbers"),
    ("edges", "objects", np.array([[0, 1]], object), "whole node numbers"),
    ("edges", "rows of unequal length", [(0, 1), (2,)], r"shape \[m, 2\]"),
    ("edges", "transposed", [(0, 1, 2), (1, 2, 3)], r"pass the transpose"),
    ("edges", "a number", 5, r"shape \[m, 2\], given \(\)"),
    ("edges", "nothing", [], "at least one node"),
    ("edges", "negative", [(0, -1)], r"edge 0, \(0, -1\)"),
    ("edges", "a self-loop", [(0, 1), (2, 2)], "edge 1 joins node 2 to itself"),
    ("edges", "parallel", [(0, 1), (1, 0)], r"edge 1, \(1, 0\), was given before"),
    ("edges", "beyond int64", np.array([[0, 2**63 + 5]], np.uint64), "num_nodes is"),
    ("edges", "a huge number", [(0, 2**62)], "num_nodes is"),
    ("nodes", "0", 0, "num_nodes is"),
    ("nodes", "-1", -1, "num_nodes is"),
    ("nodes", "2.5", 2.5, "num_nodes is"),
    ("nodes", "NaN", NAN, "num_nodes is"),
    ("nodes", "text", "3", "num_nodes is"),
    ("nodes", "too few", 1, "leaves the node numbers"),
    ("weights", "0", [1.0, 0.0], "positive and finite, given 0.0 at edge 1"),
    ("weights", "negative", [1.0, -1.0], "positive and finite, given -1.0 at edge 1"),
    ("weights", "NaN", [1.0, NAN], "positive and finite, given nan at edge 1"),
    ("weights", "inf", [INF, 1.0], "positive and finite, given inf at edge 0"),
    ("weights", "too few", [1.0], "2 edges need as many weights"),
    ("weights", "too many", np.ones(3), "2 edges need as many weights"),
    ("weights", "a number", 1.0, "2 edges need as many weights"),
    ("weights", "complex", [1j, 1j], "real numbers"),
    ("weights", "text", ["1", "2"], "real numbers"),
    ("weights", "objects", [None, 1.0], "real numbers"),
    ("scipy", "not square", np.ones((2, 3)), "square"),
    ("scipy", "one axis", np.ones(3), "square"),
    ("scipy", "empty", np.zeros((0, 0)), "num_nodes is"),
    ("scipy", "not symmetric", [[0, 1], [0, 0]], "symmetric"),
    ("scipy", "not symmetric, unsigned", np.array([[0, 1], [2, 0]], np.uint8), "symmetric"),
    ("scipy", "a self-loop", [[0, 1], [1, 2]], "1 diagonal entries (self-loops), the first at node 1"),
    ("scipy", "NaN", [[0, NAN], [NAN, 0]], r"finite, given nan at \(0, 1\)"),
    ("scipy", "inf", [[0, INF], [INF, 0]], r"finite, given inf at \(0, 1\)"),
    ("scipy", "negative", [[0, -1], [-1, 0]], "positive and finite"),
    ("scipy", "complex", [[0, 1j], [1j, 0]], "real numbers"),
    ("scipy", "complex, sparse", sparse.csr_array(np.array([[0, 1j], [1j, 0]])), "real numbers"),
    ("scipy", "text", "ab", "real numbers"),
    ("scipy", "None", None, "real numbers"),
    ("networkx", "a number", 5, "networkx.Graph"),
    ("networkx", "directed", nx.DiGraph([(0, 1)]), "undirected"),
    ("networkx", "empty", nx.Graph(), "num_nodes is"),
    ("networkx", "a self-loop", nx.Graph([(0, 0)]), "to itself"),
    ("networkx", "parallel", nx.MultiGraph([(0, 1), (0, 1)]), "was given before"),
    ("networkx", "NaN", nx.Graph([(0, 1, {"weight": NAN})]), "positive and finite"),
    ("networkx", "text", nx.Graph([(0, 1, {"weight": "a"})]), "real numbers"),
]
for maker, name, given, fragment in BAD_GRAPHS:
    BAD_INPUTS.append(
        ("graph constructor", f"{maker}: {name}", lambda maker=maker, given=given: MAKERS[maker](given), fragment)
    )

ONE, APART, WIDE = so.Graph.chain(1), so.Graph.from_edges([], 2), np.broadcast_to(0.0, (6, 10**12))
HOLES = np.where(Y > 4, NAN, Y)
FOUR, FLAT, TWELVE = np.array([0.0, 2.0, 1.0, 3.0]), so.Graph.from_edges([], 6), so.Graph.chain(12)
GRID, LARGE_GRID = so.Graph.grid((5, 6)), so.Graph.grid((40, 40), ends="free")
NEGATIVE = np.where(np.arange(12).reshape(2, 3, 2) == 11, -1.0, 1.0)
LABELS = np.array([0, 1, 0, 0, 1, 0, 1, 1, 0, 0, 1])
# Arguments that several rows begin with.
BOTH = {"penalty": {-1: so.L1(1.0), 0: so.L1(1.0)}, "y": np.arange(12.0), "graph": TWELVE}
ISOTROPIC = {"y": np.arange(30.0), "graph": GRID, "penalty": so.GroupL2(1.0, axis=0)}
ON_CHAIN = {"y": FOUR, "graph": so.Graph.chain(4), "order": 1}
ON_FREE = {"y": np.arange(30.0), "graph": so.Graph.grid((6, 5), (1.0, 1.5), ends="free"), "order": 1}
PARTS = {"y": np.r_[np.arange(6.0), np.zeros(4), 10.0], "graph": two_parts(np.random.default_rng(0))}
SAMPLES = {
    "X": np.array([[0.0], [1], [3]]),
    "y": [1.0, 2.0, 3.0],
    "graph": so.Graph.from_edges([(0, 1), (1, 2), (3, 4), (4, 5)]),
}
COUNTED, HOLED = {"y": np.arange(6.0), "loss": "poisson"}, {"y": HOLES, "missing": "nan"}
LONG = {"y": np.zeros((2, 5000)), "graph": so.Graph.grid((2, 5000), ends="free")}
SIX, CLOSE = so.Graph.grid((2, 3)), so.Graph.chain(4, times=1e-30 * np.arange(4))
HALF = np.r_[np.ones(6), np.full(5, NAN)]
SEPARATED = "no fit exists at order 1: Logistic falls without end along a polynomial"
AXES = "with axis -1, the differences of a node along a grid's axes with axis 0"
OF_KINKS = "free ends at order 1 need smooth losses, or on a chain Absolute or .*, given Kinked"
# Of free ends: what does not go with them is told with the way out.
GRAPH_ENDS = '.*use .*ends="graph"'


def column(*numbers):
    return np.asarray(numbers, float).reshape(-1, 1)


def apart(order, kind=np.float64, by=1e-6):
    """A chain with two nearly equal times, and what is said of them."""
    times = np.arange(30.0)
    times[10] = times[9] + by
    said = f"nodes 9 and 10 are {by:.3g} apart, .*order {order + 1} in {np.dtype(kind)}: use one"
    return {"y": np.arange(30.0) ** 2, "graph": so.Graph.chain(30, times), "order": order, "dtype": kind}, said


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


FIT, ALONG, PLANNED, ESTIMATOR = "trend_filter", "trend_path", "trend_solver", "estimator"


def rows(kind, *cases):
    """Each a case of entry points, arguments, and what is said."""
    for number, (entries, changes, fragment) in enumerate(cases):
        for entry in entries.split():
            BAD_INPUTS.append((kind, f"{number}, {entry}: {fragment}", partial(ENTRIES[entry], **changes), fragment))


rows(
    "signal shape",
    (FIT, {"y": Y[:5]}, r"6 nodes.*given \(5,\)"),
    (PLANNED, {"y": Y[:5]}, "have the shape (6,)"),
    ("reweighted", {"y": np.zeros((6, 2))}, "shape [6] or (6,); given (6, 2): fit channels one by one"),
    ("denoise", {"image": np.zeros(5)}, r"an image has the shape.*given \(5,\)"),
    ("denoise", {"volume": True}, r"a volume has the shape \[depth, height, width\].*given \(5, 5\)"),
    ("denoise", {"known": np.ones((5, 6), bool)}, r"for each of \(5, 5\) pixels.*given bool of shape \(5, 6\)"),
    ("denoise", {"known": np.ones((5, 5))}, "given float64 of shape"),
)
rows(
    "signal dtype",
    ("denoise", {"image": np.zeros((6, 6), np.int64)}, "integers of 8, 16 or 32 bits, given (6, 6) of int64"),
    (PLANNED, {"dtype": np.float64}, "needs 64-bit types"),
    (PLANNED, {"dtype": np.float16}, "float32 or float64"),
)
rows(
    "signal value",
    (FIT, {"y": [1, 2, -3, -4, 1, 1], "loss": "poisson"}, "counts, finite and not negative, given -3 at"),
    (FIT, {"y": [1, 2, -3, -4, 1, 1], "loss": "poisson"}, "given -3 at node 2 (2 such)"),
    (FIT, {"y": LABELS[:6] * 2, "loss": "logistic"}, "needs labels 0 or 1 or proportions between them"),
    (FIT, {"y": LABELS[:6] * 2, "loss": "logistic"}, "given 2 at node 1 (2 such)"),
    (FIT, {"y": [-0.5, 1, 0, 1, 1, 1], "loss": "logistic"}, "given -0.5 at node 0"),
    (FIT, {"y": [1, INF, 0, 0, 1, 1], "loss": "poisson"}, "1 infinite values"),
    (FIT, {"y": [1, 0, -1, 1, 1, 1], "loss": "squared_hinge"}, "labels -1 or 1, given 0 at node 1 (1 such)"),
    (FIT, COUNTED | {"y": NEGATIVE, "graph": SIX}, "given -1 at node 5, pixel (1, 2), channel 1"),
    (ALONG, {"y": Y - 1, "loss": "poisson"}, "Poisson needs counts"),
    (ESTIMATOR, SAMPLES | COUNTED | {"X": column(0, 1, 1), "y": [1, 4, -1]}, "given y = -1 in row 2 (1 such)"),
    ("labels", {"y": [0.5, 1.5, 1.7]}, "Unknown label type: continuous"),
    ("denoise", {"image": np.full((5, 5), 7.0), "weight": None}, "noise level of the image is 0; give weight"),
)
rows(
    "component",
    (FIT, PARTS | {"loss": "poisson"}, r"component of node 6 \(4 nodes\) has no positive count.*-inf.*\(1 such\)"),
    (FIT, PARTS | {"loss": "poisson", "order": 1}, r"component of node 6 \(4 nodes\) has no positive count"),
    (FIT, PARTS | {"y": LABELS, "loss": "logistic"}, r"node 10 has only one of the labels.*\+inf.*\(1 such\)"),
    (FIT, COUNTED | {"penalty": so.L1(0.0)}, "node 0 has no positive count.*raise the penalty's weight"),
    (FIT, COUNTED | {"y": np.c_[Y, 0 * Y]}, "component of node 0 .* in channel 1 has no positive count"),
    # A positive count without weight is no observation.
    (FIT, COUNTED | {"y": np.arange(6) // 5, "node_weights": np.arange(6) < 5}, "no positive count"),
    (FIT, HOLED | {"penalty": so.L1(0.0), "loss": "absolute"}, "not defined at missing nodes"),
    (FIT, PARTS | HOLED | {"y": HALF}, "2 components have no observed node (one holds node 6)"),
    ("cross_validate", PARTS, "1 components have one observed node only (one of them is node 10)"),
    (ALONG, {"y": np.full(6, 0.1)}, "the signal is the mean of its component everywhere.*every weight gives"),
    (ALONG, {"graph": FLAT}, "no edges, so every weight gives the same fit"),
    (ALONG, {"y": np.ones(6), "loss": "logistic"}, "only one of the labels 0 and 1"),
    (ALONG, {"y": np.full(6, 3.0), "loss": "poisson"}, "so every weight gives the same fit"),
    (ALONG, {"order": 1, "loss": "absolute", "y": np.arange(6.0)}, "the signal is a polynomial of this degree"),
    (FIT, {"y": np.arange(6) // 3, "order": 1, "loss": "logistic"}, SEPARATED),
    (ESTIMATOR, SAMPLES | {"X": column(0, 1, 2)}, "1 components have no observed node (one holds node 3)"),
    ("labels", {"y": ["no"] * 3}, "two classes, given one class, .*'no'"),
    ("labels", {"node_weights": [0, 1, 1]}, "one class, .*1.* with a positive weight"),
    (PLANNED, {"graph": FLAT}, "no edges"),
    ("TotalVariation", {"graph": so.Graph.chain(1)}, "no edges"),
    (FIT, BOTH | {"graph": so.Graph.from_edges([], 12)}, "no edges.*apply its prox"),
)
rows(
    "node weights",
    (FIT, {"node_weights": np.ones(5)}, "6 nodes need as many node weights, [6] or (6,), given 5"),
    (FIT, {"node_weights": -np.arange(6.0)}, "not negative, given -1.0 at node 1"),
    (PLANNED, {"node_weights": np.ones(3)}, "6 nodes need as many"),
    (ESTIMATOR, SAMPLES | {"node_weights": [1, 1]}, "one entry per sample, the shape (3,), given (2,)"),
    (ESTIMATOR, SAMPLES | {"node_weights": [1, -1, 1]}, "finite and not negative, given -1.0 in row 1"),
    (ESTIMATOR, SAMPLES | {"node_weights": [1, NAN, 1]}, "given nan in row 1"),
    (ESTIMATOR, SAMPLES | {"node_weights": [0, 0, 0]}, "every sample weight is zero"),
)
rows(
    "sample",
    (ESTIMATOR, SAMPLES | {"X": column(0, 1, 6)}, "X holds 6 in row 2 (1 such rows); the nodes of this graph are"),
    (ESTIMATOR, SAMPLES | {"X": column(0, 1, 6)}, "of this graph are the whole numbers 0..5"),
    (ESTIMATOR, SAMPLES | {"X": column(0, -1, 2)}, "X holds -1 in row 1"),
    (ESTIMATOR, SAMPLES | {"X": column(0, 1.5, 2.5)}, "X holds 1.5 in row 1 (2 such"),
    (ESTIMATOR, SAMPLES | {"X": column(0, 9, 3), "node_weights": [1, 0, 1]}, "X holds 9 in row 1"),
)
rows(
    "penalty weight",
    (FIT, {"penalty": so.L1(np.ones(5)), "order": 1}, "one for each of the 4 rows.*given the shape \\(5,\\)"),
    (FIT, {"penalty": so.MCP(np.ones(6))}, "one number here, given the shape (6,)"),
    (FIT, BOTH | {"penalty": {0: so.L1(1.0), 1: so.L1(-1.0)}}, "must not be negative, given -1.0"),
    (FIT, BOTH | {"penalty": {0: so.L1(np.ones(4))}}, r"one for each of the 11 rows.*\(4,\)"),
    (FIT, BOTH | {"penalty": so.L1(np.full(11, -2.0))}, "must not be negative, given -2.0"),
    (FIT, BOTH | {"penalty": so.L1(np.ones(11)), "method": "fast_admm"}, "one weight for all differences"),
    (FIT, {"penalty": so.L1(np.arange(5.0)), "loss": "huber"}, "must be positive, given 1 of 5 that are 0"),
    (ALONG, {"penalty": so.L1(np.r_[np.ones(4), 100.0])}, "one number for all rows, given one of shape (5,)"),
    (PLANNED, {"penalty": so.ElasticNet(1.0, -1.0)}, "ridge must not be negative"),
    (PLANNED, {"penalty": so.L1(np.ones(4))}, "each of the 5 rows"),
    (PLANNED, {"penalty": so.L1(-1.0)}, "weight must not be negative, given -1.0"),
    (PLANNED, {"penalty": Doubled(-1.0)}, "weight must not be negative, given -1.0"),
    ("reweighted", {"penalty": so.MCP(-1.0)}, "must not be negative, given -1.0"),
    ("denoise", {"weight": -1.0}, "must not be negative"),
    ("denoise", {"weight": np.ones(2)}, "weight is one number, given an array of shape (2,)"),
    ("TotalVariation", {"weight": -1.0}, "must not be negative, given -1.0"),
    ("TotalVariation", {"weight": np.ones(3)}, "49 rows .*given the shape \\(3,\\)"),
    ("labels", {"alpha": -1.0}, "alpha .* given -1.0"),
)
rows(
    "penalty",
    (FIT, {"penalty": 10.0}, "such as sparseopt.L1"),
    (FIT, {"penalty": so.SparseGroup(1.0, 1.0)}, "couples the channels"),
    (FIT, {"penalty": so.NuclearNorm(1.0)}, "couples the channels of a signal [n, channels]; this one has none"),
    (FIT, {"y": np.c_[Y, Y], "penalty": so.NuclearNorm(1.0), "method": "doge"}, 'couples all rows.*use method="admm"'),
    (
        "denoise",
        {"image": np.ones((4, 4)), "alpha": True},
        "of two channels or more, no volume; given (4, 4)",
    ),
    (FIT, {"penalty": so.GroupL2(1.0, groups=[0, 0, 1, 1, 1])}, "labelled groups of differences are not supported"),
    (FIT, {"penalty": {-2: so.L1(1.0)}}, "the order of each .* whole number from -1 .*given -2"),
    (FIT, BOTH | {"order": 1}, "keyed by their orders [-1, 0], leave order out; given order=1"),
    ("trend_filter trend_solver", {"penalty": so.MCP(1.0), "method": "fast_admm"}, "solves the L1 penalty"),
    (FIT, {"penalty": so.MCP(1.0), "method": "interior"}, "solves the L1 penalty, given MCP"),
    (FIT, ISOTROPIC | {"order": 1}, "needs order 0 and a grid of 2 or 3 axes, given order 1"),
    (FIT, ISOTROPIC | {"graph": so.Graph.chain(30)}, "a grid of 2 or 3 axes, given order 0 on Graph.chain"),
    (FIT, ISOTROPIC | {"penalty": so.GroupL2(1.0, axis=1)}, AXES),
    (FIT, ISOTROPIC | {"penalty": so.GroupL2(1.0, axis=(0, -1))}, "this one has none: use L1, or on a grid axis 0"),
    (FIT, ISOTROPIC | {"penalty": {-1: so.L1(1.0), 0: so.GroupL2(1.0, axis=0)}}, "must be the only penalty here"),
    (ALONG, {"penalty": so.GroupL2}, "couples the channels"),
    (PLANNED, {"penalty": so.Box(2.0, 1.0)}, "must be low <= high"),
    (PLANNED, ISOTROPIC | {"method": "doge_groups"}, 'for isotropic total variation use "doge"'),
    (ESTIMATOR, {"penalty": so.L1(1.0)}, "function of the weight such as sparseopt.MCP, given L1("),
    (ESTIMATOR, {"penalty": "group_l2"}, "couples the channels"),
)
rows(
    "loss",
    (FIT, BOTH | {"loss": "poisson"}, "several penalties need the square loss"),
    (FIT, ON_FREE | {"loss": "absolute"}, "free ends at order 1 need smooth losses"),
    (FIT, ON_CHAIN | {"loss": Kinked()}, OF_KINKS + GRAPH_ENDS),
    *[(FIT, {"method": name, "loss": "huber"}, "solves the square loss only") for name in ("fast_admm", "interior")],
    (ALONG, COUNTED | {"y": np.ones(1600), "graph": LARGE_GRID, "order": 1}, "free ends of at most 1,024 nodes"),
    (ESTIMATOR, {"loss": "logistic"}, "Logistic is for labels: use GraphTrendClassifier"),
    (ESTIMATOR, {"loss": "squared_hinge"}, "SquaredHinge is for labels: use GraphTrendClassifier"),
)
rows(
    "method",
    (FIT, {"order": 1, "method": {"name": "doge", "B": 0}}, "B is a whole number from 1 to 2 .*given 0"),
    (FIT, {"order": 1, "method": so.trend.Doge(B=3)}, "1 to 2 .*given 3"),
    (FIT, {"method": {"name": "doge", "relaxation": 2.0}}, "relaxation in (0, 2)"),
    (FIT, {"method": {"name": "admm", "rho": -1.0}}, "must be positive"),
    (FIT, {"graph": so.Graph.grid((2, 3)), "method": "fast_admm"}, 'needs a chain.*"doge" or "admm"'),
    (FIT, {"method": "interior", "history": True}, "no start and keeps no history"),
    (FIT, BOTH | {"method": "interior"}, "solves single orders"),
    (FIT, BOTH | {"method": "fast_admm"}, "solves single orders.*doge, admm"),
    (FIT, BOTH | {"method": so.trend.Doge(B=1)}, "leave out B"),
    (FIT, ISOTROPIC | {"method": "doge_groups"}, 'for isotropic total variation use "doge"'),
    (FIT, ON_CHAIN | {"method": so.trend.Doge(B=1)}, "treats all differences row by row, given B=1" + GRAPH_ENDS),
    (FIT, ON_CHAIN | {"method": "doge_groups"}, 'method="doge_groups" needs the ends of the graph' + GRAPH_ENDS),
    (FIT, ON_FREE | {"method": so.trend.Doge(B=1)}, "treats all differences row by row, given B=1"),
    (FIT, ON_FREE | {"method": "doge_groups"}, "needs the ends of the graph"),
    (FIT, ON_FREE | {"method": "fast_admm"}, "needs a chain"),
    (PLANNED, {"method": "interior"}, "works on the host"),
    (PLANNED, {"graph": so.Graph.grid((2, 3)), "method": "fast_admm"}, "needs a chain"),
    (PLANNED, {"method": so.trend.Doge(B=2)}, "B is a whole number from 1 to 1"),
    ("TotalVariation", {"method": "magic"}, "unknown method 'magic'"),
)
rows(
    "free ends",
    (FIT, ON_CHAIN | {"node_weights": [1, 0, 0, 0]}, "at least 2 observed nodes, given 1" + GRAPH_ENDS),
    (FIT, ON_CHAIN | {"order": 3}, "order 3 with free ends needs at least 5 nodes, given 4" + GRAPH_ENDS),
    (FIT, ON_FREE | {"order": 5}, "order 5 with free ends needs at least 7 nodes along an axis, given 6"),
    (FIT, ON_FREE | {"node_weights": np.arange(30) < 5}, "at least 4 observed nodes, given 5, and they must"),
    (FIT, ON_FREE | {"node_weights": np.arange(30) < 5}, "they must determine a polynomial"),
    (FIT, LONG | {"order": 1}, "needs a grid of at most 4,096 nodes along an axis, given 5,000"),
    (FIT, ON_CHAIN | {"graph": CLOSE, "dtype": np.float32}, "squares are beyond float32: divide the times by"),
    *[
        ("trend_filter trend_path", *apart(order, kind, by))
        for order in (1, 2, 3)
        for kind, by in ((np.float64, 1e-6), (np.float64, 1e-12), (np.float32, 1e-5))
    ],
    ("Graph.chain", {"times": [0.0, 1.0]}, "as many times, [3], given the shape (2,)"),
    ("Graph.chain", {"times": [0.0, NAN, 2.0]}, "times are finite, given nan at node 1"),
    ("Graph.chain", {"times": [0.0, 2.0, 2.0]}, "increase from node to node, given 2 and then 2 at node 2"),
    ("Graph.chain", {"ends": "fre"}, "unknown ends 'fre'; known are graph, free; did you mean 'free'"),
    ("Graph.chain", {"times": [0.0, 1.0, 2.0], "ends": "graph"}, 'times need ends="free"'),
    ("Graph.chain", {"times": ["a", "b", "c"]}, "times must hold real numbers"),
    ("Graph.grid", {"ends": "open"}, "unknown ends 'open'; known are graph, free"),
    ("Graph.grid", {"shape": (5,), "spacing": (2.0,), "ends": "free"}, "a grid of one axis has no spacing"),
    ("Graph.grid", {"shape": (4,), "spacing": (2.0,)}, "a grid of one axis has no spacing"),
)
rows(
    "setting",
    (PLANNED, {"channels": 0}, "channels is a whole number of at least 1"),
    (PLANNED, {"order": -1}, "order is a whole number from 0"),
    ("labels", {"label_smoothing": 1.0}, "label_smoothing is a number in [0, 1), given 1.0"),
    ("labels", {"label_smoothing": None}, "given None"),
    ("denoise", {"devices": 2, "weight": None}, "a weight is chosen on one device"),
    ("denoise", {"spacing": (1, 2, 3)}, "each of its 2 axes"),
    ("TotalVariation", {"order": -1}, "order is a whole number from 0"),
    ("TotalVariation", {"max_steps": 0}, "max_steps is a whole number"),
    *[
        ("Graph.grid", {"spacing": spacing}, "one positive number for each of its 2 axes")
        for spacing in ((1, 2, 3), (1, 0), (1, NAN), 2.0, (1, -1), ("a", 1))
    ],
)


def mesh():
    return jax.sharding.Mesh(np.array(jax.devices()[:1]), ("devices",))


def known(graph):
    """A fit of order 1 that is the signal."""
    return so.trend_filter(np.arange(float(graph.num_nodes)), graph, so.L1(0.0), 1)


def fitted():
    return GraphTrendFilter(alpha=0, graph=CHAIN).fit(NODES, Y)


def path():
    return so.trend.trend_path(Y, CHAIN, num=3)


PLAN = so.TotalVariation(GRID, 1.0)
TOO_LARGE = "the rank of a matrix, which is found for at most 1,024 nodes, given 1,600"
TRACED = r"a penalty's numbers, .* make a solver outside with sparseopt\.trend_solver"
OF_DOGE = "unknown setting of doge 'b'; known are rho, relaxation, cadence, B"
OTHERS = {
    "graph constructor": [
        ("merge", lambda: so.Graph.from_edges([(0, 1)] * 2, weights=[1e308] * 2, merge=True), "given inf"),
        ("beyond", lambda: so.Graph.from_edges([(0, 1), (1, 6)], 6), "edge 1, (1, 6), leaves the node numbers 0..5"),
        ("names", lambda: so.Graph.from_edges([(0, 1)], nodes="abc"), "2 nodes need as many names, given 3"),
    ],
    "size": [
        ("10**12 nodes", lambda: so.Graph.grid((10**6, 10**6)), "1,000,000,000,000 nodes takes at least 7450"),
        ("10**27 nodes", lambda: so.Graph.grid((10**9,) * 3), "are free"),
        ("10**15 nodes", lambda: so.Graph.chain(10**15), "are free"),
        ("10**12 channels", lambda: fit(y=WIDE), "shape (6, 1000000000000), 6,000,000,000,000 values"),
        ("10**12 channels of noise", lambda: so.trend.noise_level(WIDE, CHAIN), "are free"),
        ("10**13 levels", lambda: so.trend.trend_path(Y, CHAIN, num=10**13), "10,000,000,000,000 fits"),
    ],
    "component": [
        ("nothing observed", lambda: fit(y=np.full(6, NAN), missing="nan"), "no observed node"),
        ("one channel missing", lambda: fit(y=np.c_[Y, HOLES], missing="nan"), "miss some channels"),
        ("one observation", lambda: so.trend.cross_validate([1.0, 2.0], APART, folds=2), "one observed node"),
        ("no edge, a path", lambda: so.trend.trend_path([1.0, 2.0], APART), "no edges"),
        ("no edge, b itself", lambda: so.trend_filter([1.0], ONE, {-1: so.L1(1.0)}), "apply its prox"),
        ("a constant, a path", lambda: so.trend.trend_path(np.ones(6), CHAIN), "every weight gives the same fit"),
    ],
    "setting": [
        ("select: no path", lambda: so.trend.select(5), "TrendPath"),
        ("degrees_of_freedom: rows", lambda: so.trend.degrees_of_freedom(np.ones(4, bool), CHAIN), "5 rows"),
        ("degrees_of_freedom: NaN", lambda: so.trend.degrees_of_freedom(np.full(5, NAN), CHAIN), "true or false"),
        ("degrees_of_freedom: text", lambda: so.trend.degrees_of_freedom(list("abcde"), CHAIN), "real numbers"),
        ("degrees_of_freedom: graph", lambda: so.trend.degrees_of_freedom(np.ones(5, bool), None), "sparseopt.Graph"),
        ("random_folds: one node", lambda: random_folds(CHAIN, Y > 5, 2, 0), "two observed nodes"),
        ("rows", lambda: so.trend.degrees_of_freedom(np.zeros(4), CHAIN), r"order 1 has 5 rows.*given \(4,\)"),
        (
            "observed",
            lambda: so.trend.degrees_of_freedom(Y[1:] > 5, CHAIN, observed=[True]),
            "one entry for each of 6 nodes",
        ),
        ("rank", lambda: so.trend.degrees_of_freedom(np.zeros(3040, bool), LARGE_GRID, 1), TOO_LARGE),
        ("criterion", lambda: so.trend.select(path(), "cp"), "unknown criterion 'cp'; known are gcv, sure, aic, bic"),
        ("sigma", lambda: so.trend.select(path(), "sure", 0.0), "must be positive and finite, given 0"),
        ("knots", lambda: known(GRID).knots(), "knots are ordered along a chain, and Graph.grid((5, 6)) is not"),
        ("knots of a free grid", lambda: known(ON_FREE["graph"]).knots(), "knots are ordered along a chain"),
        ("pieces", lambda: known(CHAIN).pieces(), "a fit of order 1 has no pieces of one value, .*: on a chain `knots"),
        ("devices, free chain", lambda: layout_of(CHAIN, mesh()), r"several devices need .* or use ends=\"graph\""),
        ("devices, grid", lambda: layout_of(ON_FREE["graph"], mesh()), "several devices need the ends of the graph"),
        ("traced signal", lambda: jax.jit(lambda y: fit(y=y))(Y), "make a solver outside with"),
        ("traced weight", lambda: jax.jit(lambda w: fit(penalty=so.L1(w)))(1.0), TRACED),
        ("another plan", lambda: so.TotalVariation(weight=1.0, order=1, solver=PLAN.solver), "needs another plan"),
        *[
            (str(shape), lambda shape=shape: PLAN.value(np.zeros(shape)), "an x of shape (5, 6) or (30,), given")
            for shape in ((4, 6), (30, 2), (5, 6, 2))
        ],
        ("an unknown node", lambda: fitted().predict([[6]]), r"X holds 6 in row 0.*0\.\.5"),
        ("a setting", lambda: GraphTrendFilter(method="doge").set_params(method__b=1), OF_DOGE),
    ],
}


class NoPytree:
    weight = 1.0
    value = prox = staticmethod(lambda *_: 0.0)


OTHERS["penalty"] = [("no pytree", lambda: fit(penalty=NoPytree()), "made so by the decorator sparseopt.pytree")]
BAD_INPUTS += [(kind, *case) for kind, cases in OTHERS.items() for case in cases]


@pytest.mark.parametrize(
    ("call", "fragment"), [case[2:] for case in BAD_INPUTS], ids=[f"{case[0]}, {case[1]}" for case in BAD_INPUTS]
)
def test_bad_input_ends_in_an_error_that_says_what_was_given(call, fragment, monkeypatch):
    monkeypatch.setattr("sparseopt.core.problem.iterate._iterate", lambda *_, **__: pytest.fail("work began"))
    pattern = fragment if any(sign in fragment for sign in ("\\", ".*")) else None
    with pytest.raises((ValueError, TypeError), match=pattern) as caught:
        call()
    text = str(caught.value)
    assert pattern or fragment in text
    assert len(text) > 20
    # An error of another library's inside would not name what the caller gave.
    where = caught.traceback[-1].path.as_posix()
    assert "/sparseopt/" in where or "/sklearn/" in where


def test_the_names_of_bad_inputs_differ():
    assert len({case[:2] for case in BAD_INPUTS}) == len(BAD_INPUTS)
