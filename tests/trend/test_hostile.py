"""Hostile input: every entry point of the trend filter gives the known answer, or a clear error before any work.

`BAD_INPUTS` lists inputs that must raise an error, by kind: `(kind, name, call, fragment of the message)`.
"""

import networkx as nx
import numpy as np
import pytest
from scipy import sparse

import sparseopt as so
from sparseopt.trend.filter import chosen_method
from sparseopt.trend.paths.selection import random_folds

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
        "complex": Y + 1j,
        "object": np.array([1.0, None, 2.0, 3.0, 4.0, 5.0], object),
        "text": np.array(list("123456")),
        "dates": np.arange(6).astype("M8[s]"),
        "rows of unequal length": [[1.0], [2.0, 3.0]],
        "a dict": {1: 2},
        "None": None,
    },
    "y",
)
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
bad("order", "order is", list(ENTRIES), ORDERS, "order")
bad("order", "order is", list(ENTRIES), {"56": 56, "10**9": 10**9}, "order")
WEIGHTS = {
    "negative": (-np.ones(6), "not negative"),
    "NaN": (np.where(Y > 4, NAN, 1.0), "finite"),
    "infinite": (np.where(Y > 4, INF, 1.0), "finite"),
    "too short": (np.ones(5), "given"),
    "complex": (np.ones(6) * 1j, "real numbers"),
    "text": (list("123456"), "real numbers"),
    "object": (np.array([None] * 6), "real numbers"),
    "all zero": (np.zeros(6), "observed node"),
}
for name, (value, fragment) in WEIGHTS.items():
    bad("node weights", fragment, OURS, {name: value}, "node_weights")
    bad("node weights", "zero" if name == "all zero" else fragment, ["estimator"], {name: value}, "node_weights")
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
    bad("penalty weight", "alpha is", ["estimator"], {name: value}, "alpha")
LEVELS = {"0": [0.0], "-1": [-1.0], "NaN": [NAN], "inf": [INF], "none": [], "a number": 1.0, "a table": [[1.0]]}
bad("penalty weight", "weights are", ["trend_path", "cross_validate"], LEVELS, "weights")
bad("penalty weight", "real numbers", ["trend_path"], {"text": ["1"], "complex": [1j]}, "weights")
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
bad("penalty", "must be finite", ["trend_filter", "reweighted"], {"MCP NaN": so.MCP(1.0, NAN)}, "penalty")
bad("penalty", "of its own", ["trend_filter"], {"TotalVariation": so.TotalVariation(CHAIN, 0.5)}, "penalty")
bad("penalty", "couples the channels", ["trend_filter"], {"GroupL2": so.GroupL2(1.0)}, "penalty")
bad("penalty", "replaces the penalty's `weight`", ["trend_path"], {"TopK": so.TopK(2), "NM": so.NM}, "penalty")
bad("penalty", "is not known: give its weights", ["trend_path"], {"L0": so.L0}, "penalty")
bad("penalty", "`value` and `slope`", ["reweighted"], {"L1": so.L1(1.0), "a class": so.MCP}, "penalty")
bad("penalty", "penalty is one of", ["estimator"], {"a name": "l3", "a number": 5}, "penalty")
bad("penalty", "given none", ["trend_filter"], {"of no order": {}}, "penalty")
SUMS = {"of order -2": {-2: so.L1(1.0)}, "of order 'a'": {"a": so.L1(1.0)}, "of order 0.5": {0.5: so.L1(1.0)}}
bad("penalty", "the order of each", ["trend_filter"], SUMS, "penalty")
bad("penalty", "`value` and `prox`", ["trend_filter"], {"a sum with a number": {0: 1.0, 1: so.L1(1.0)}}, "penalty")
SETTINGS = {
    "tol": {"0": 0.0, "-1": -1, "NaN": NAN, "inf": INF, "text": "a", "None": None, "complex": 1j},
    "max_steps": {"0": 0, "-1": -1, "1.5": 1.5, "NaN": NAN, "inf": INF, "text": "a", "None": None, "2**40": 2**40},
    "method": {
        "newton": "newton",
        "None": None,
        "5": 5,
        "a class": so.trend.Doge,
        "a mapping": {"name": "a"},
    },
    "missing": {"drop": "drop", "True": True, "None": None},
    "dtype": {"float16": np.float16, "int": int, "text": "foo"},
    "start": {"5": 5, "an array": Y},
    "loss": {"text": "cubic", "5": 5, "delta 0": so.scalar.Huber(0.0), "a class": so.scalar.Poisson},
}
for argument, cases in SETTINGS.items():
    bad("setting", argument, ["trend_filter"], cases, argument)
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
for argument in ("tol", "max_steps", "method", "missing", "dtype"):
    bad("setting", argument, ["trend_path"], SETTINGS[argument], argument)
bad("setting", "num is", ["trend_path"], {"0": 0, "1.5": 1.5, "NaN": NAN, "text": "a"}, "num")
bad("setting", "ratio", ["trend_path"], {"0": 0, "1": 1, "2": 2, "NaN": NAN, "text": "a"}, "ratio")
bad("setting", "tol", ["largest_weight", "reweighted"], SETTINGS["tol"], "tol")
bad("setting", "rounds is", ["reweighted"], {"0": 0, "1.5": 1.5, "NaN": NAN, "text": "a"}, "rounds")
bad("setting", "folds is", ["cross_validate"], {"0": 0, "1": 1, "7": 7, "1.5": 1.5, "text": "a"}, "folds")
bad("setting", "seed is", ["cross_validate"], {"-1": -1, "1.5": 1.5, "text": "a", "None": None}, "seed")
bad("setting", "unknown rule", ["cross_validate"], {"max": "max"}, "rule")
bad("setting", "n_neighbors is", ["estimator"], {"0": 0, "1.5": 1.5, "text": "a"}, "n_neighbors")
bad("setting", "node numbers", ["estimator"], {"two columns": np.c_[NODES, NODES]}, "X")
bad("setting", "whole numbers 0..5", ["estimator"], {"-1": NODES - 1, "6": NODES + 1, "0.5": NODES + 0.5}, "X")

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
