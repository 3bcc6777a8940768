"""The argument checks of the solvers, fuzzed with arrays and values of every kind and few sizes.

Few sizes, since each new one compiles a program. Every call returns or raises a documented error.
"""

from typing import Any

import numpy as np

import sparseopt as so
from sparseopt.pruning import prune_layer
from tests.fuzz.choices import Choices, chance, pick
from tests.fuzz.targets import Target

VALUES = (0.0, 1.0, -1.0, 0.5, 3.0, 1e-30, 1e30, 1e300, np.nan, np.inf, -np.inf)
SCALARS: tuple[Any, ...] = (
    *VALUES, 0, 1, 2, -1, 10**30, True, None, "", "auto", "x", b"x", (), [], [1.0], {}, 1j, np.float32(2),
    np.array(1.0), np.array([1.0, 2.0]), object(),
)  # fmt: skip
DTYPES = ("f8", "f4", "f2", "i8", "i4", "u1", "?", "c16", "O", "U3", "M8[s]")


def any_array(choices: Choices, shape: tuple[int, ...]) -> Any:
    """Numbers of the shape; once in six of another shape, kind or value, or no array at all."""
    array = np.array([choices.integer(-8, 8) / 4 for _ in range(int(np.prod(shape)))]).reshape(shape)
    if not chance(choices, 6):
        return array.astype(pick(choices, ("f4", "f8")))
    match choices.integer(0, 4):
        case 0:
            other = pick(choices, ((), (0,), (3,), (4, 4), (1, 1, 1), (0, 4), (4, 0)))
            return np.resize(array, other) if 0 not in other else np.zeros(other)
        case 1:
            with np.errstate(all="ignore"):
                return array.astype(pick(choices, DTYPES))
        case 2:
            if array.size:
                array.flat[choices.integer(0, array.size - 1)] = pick(choices, VALUES)
            return array
        case 3:
            return pick(choices, (array.tolist(), np.ma.masked_less(array, 0), [[1.0], [1.0, 2.0]], "text", None))
        case _:
            return pick(choices, SCALARS)


def maybe(choices: Choices, usual: Any, one_in: int = 5) -> Any:
    """The usual value, or a strange one."""
    return pick(choices, SCALARS) if chance(choices, one_in) else usual


PENALTIES = (so.L1, so.L0, so.MCP, so.SCAD, so.GroupL2, lambda w: {0: so.L1(w)}, lambda w: {-1: so.L1(w), 1: so.L1(w)})


def make_trend(choices: Choices) -> dict[str, Any]:
    kind = choices.integer(0, 2)
    shape = ((4,), (2, 2), (4, 2))[choices.integer(0, 2)]
    arguments = {
        "y": any_array(choices, shape),
        "graph": (kind, any_array(choices, (3, 2)), maybe(choices, 4), any_array(choices, (3,))),
        "penalty": (choices.integer(0, len(PENALTIES) - 1), maybe(choices, 0.5)),
        "order": maybe(choices, pick(choices, (0, 1))),
        "max_steps": maybe(choices, 20),
    }
    settings = {"name": "doge", "B": maybe(choices, 1), "rho": maybe(choices, 1.0)}
    settings |= {"relaxation": maybe(choices, 1.5), "cadence": maybe(choices, 5)}
    more = {
        "method": pick(choices, ("auto", "doge", "admm", "x", "fast_admm", settings)),
        "tol": maybe(choices, 1e-3, 2),
        "node_weights": any_array(choices, (4,)),
        "missing": pick(choices, ("nan", "error", "x", None, 3)),
        "dtype": pick(choices, ("float32", "f8", "int", "x", None, 3, np.complex64)),
        "loss": pick(choices, ("poisson", "logistic", "squared_hinge", "huber", "absolute", "x", 3, None)),
        "start": maybe(choices, None),
    }
    names = [name for name in more if chance(choices, 6)]
    return arguments | {name: more[name] for name in names}


def run_trend(given: dict[str, Any]) -> None:
    given = dict(given)
    kind, pairs, nodes, weights = given.pop("graph")
    make, weight = given.pop("penalty")
    if kind == 0:
        graph = so.Graph.chain(4)
    elif kind == 1:
        graph = so.Graph.grid((2, 2))
    else:
        graph = so.Graph.from_edges(pairs, nodes, weights, merge=True)
        if graph.num_nodes > 100:
            return
    # A limit of steps far beyond any use would only make a slow input of a valid one.
    steps = given["max_steps"]
    if isinstance(steps, int | float) and steps > 1000:
        given["max_steps"] = 1000
    so.trend_filter(graph=graph, penalty=PENALTIES[make](weight), **given)


def make_layer(choices: Choices) -> dict[str, Any]:
    root = np.array([choices.integer(-4, 4) / 2 for _ in range(16)]).reshape(4, 4)
    gram = root @ root.T if not chance(choices, 4) else any_array(choices, (4, 4))
    more = {
        "pattern": pick(
            choices, ("unstructured", "per-row", "2:4", "4:2", "0:0", "block:2x2", "block:0x2", "x", "", None)
        ),
        "method": pick(choices, ("magnitude", "wanda", "maiht", "x", "", None, 3)),
        "preset": pick(choices, ("tuned", "paper", "x", None)),
        "penalty": pick(choices, (None, so.L1(1.0), so.L1(float("nan")), "l1", 3)),
        "test_gram": any_array(choices, (4, 4)),
        "output_weights": any_array(choices, (4,)),
    }
    names = [name for name in more if chance(choices, 6)]
    arguments = {"weight": any_array(choices, (4, 4)), "gram": gram, "sparsity": maybe(choices, 0.5)}
    return {"method": "wanda"} | arguments | {name: more[name] for name in names}


def run_layer(given: dict[str, Any]) -> None:
    prune_layer(**given)


SOLVERS = (
    Target("trend_filter arguments", make_trend, run_trend, (ValueError, TypeError)),
    # RuntimeError is documented for a solve that becomes non-finite.
    Target("prune_layer arguments", make_layer, run_layer, (ValueError, TypeError, RuntimeError)),
)
