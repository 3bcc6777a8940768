"""Fits of eight devices and of one, as JSON; run by `test_devices.py` in a separate process.

The number of devices is fixed per process. Eight in every process of the suite would split its threads. XLA writes its
programs to the folder that is given, in which the messages of several devices are counted.
"""

import itertools
import json
import sys
from pathlib import Path

import jax
import numpy as np

import sparseopt as so
from tests.collectives import collectives, times, total_bytes

PROGRAMS, rng = Path(sys.argv[1]), np.random.default_rng(20251125)


def picture(shape):
    steps = np.kron(rng.normal(size=[-(-n // 8) for n in shape]), np.ones([8] * len(shape)))
    return steps[tuple(slice(0, n) for n in shape)] + 0.1 * rng.normal(size=shape)


def uneven_graph():
    """A hub, weights, several components and isolated nodes."""
    pairs = rng.integers(0, 55, (110, 2))
    pairs = np.concatenate([pairs[pairs[:, 0] != pairs[:, 1]], [(0, i) for i in range(1, 20)], [(55, 56), (56, 57)]])
    edges = so.Graph.from_edges(pairs, 60, merge=True).edges
    return so.Graph.from_edges(edges, 60, rng.uniform(0.5, 2.0, len(edges)))


GRID, CHAIN, UNEVEN = so.Graph.grid((37, 23)), so.Graph.chain(50, ends="graph"), uneven_graph()
CUBE = so.Graph.grid((4, 5, 11))


def told(solution):
    return {name: float(getattr(solution, name)) for name in ("status", "steps", "objective", "gap")}


def fit(y, graph, penalty, devices, **options):
    """One device and several on the same problem, and what the several exchanged in the loop."""
    values = np.asarray(y)
    one = so.trend_filter(y, graph, penalty, method="doge", **options)
    old = set(PROGRAMS.iterdir())
    several = so.trend_filter(y, graph, penalty, devices=devices, **options)
    texts = [file.read_text() for file in PROGRAMS.glob("*after_optimizations.txt") if file not in old]
    parts = [
        list(part) for text in texts for _, part in itertools.groupby(collectives(text), lambda each: each.loops > ())
    ]
    (found,) = [part for part in parts if any(each.loops == (None, 8) for each in part)]  # eight of ten iterations
    permuted = [each for each in found if each.kind == "collective-permute"]
    # The rows of one neighbour along the longest axis; ten iterations and the check after them have a product with Ψ
    # and one with Ψᵀ each, of k + 1 factors.
    factors = 2 * (options.get("order", 0) + 1) * (10 + 1)
    face = 0 if graph.shape is None else values.size // max(graph.shape) * values.dtype.itemsize
    return {
        "one": told(one),
        "several": told(several),
        "apart": float(np.abs(np.asarray(one.value) - several.value).max()),
        "shape": several.value.shape == values.shape and several.value.dtype == values.dtype,
        "eps": float(np.finfo(values.dtype).eps),
        "history": one.history is None
        or bool(np.allclose(one.history.objective, several.history.objective, rtol=1e-12, equal_nan=True)),
        "kinds": sorted({each.kind for each in found}),
        "messages": [sum(times(each) for each in permuted), factors],
        "bytes": [total_bytes(found, "collective-permute"), factors * face],
        "reduced": [each.bytes for each in found if each.kind == "all-reduce"],
    }


def fits():
    flat = picture((37, 23))
    holes = np.where(rng.random(flat.shape) < 0.2, np.nan, flat)
    both, on_graph = np.stack([flat, -flat], -1).astype(np.float32), rng.normal(size=(60, 2))
    few = {"tol": 1e-4, "max_steps": 400}
    return {
        "grid, float32, two channels, 8": fit(both, GRID, so.GroupL2(0.1), 8, order=2, tol=1e-3),
        "grid, missing, 3": fit(holes, GRID, so.L1(0.1), 3, order=1, missing="nan", history=True, **few),
        "chain, weight a row, 8": fit(picture((50,)), CHAIN, so.L1(rng.uniform(0.1, 0.2, 50)), 8, order=1, **few),
        "cube, MCP, 8": fit(picture((4, 5, 11)), CUBE, so.MCP(0.1, 2.0), 8, tol=1e-4),
        "grid, isotropic, 8": fit(flat, GRID, so.GroupL2(0.1, axis=0), 8, tol=1e-4),
        "graph, 8": fit(on_graph[:, 0], UNEVEN, so.L1(0.2), 8, order=1, tol=1e-5),
        "graph, the means are the fit, 3": fit(on_graph, UNEVEN, so.GroupL2(1e4), 3, tol=1e-5),
    }


def refusals():
    y = rng.normal(size=(37, 23))
    single = so.trend_filter(y, GRID, so.L1(0.1), devices=2, tol=1e-1)
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("x",))
    triangle, free = so.Graph.from_edges([(0, 1), (1, 2), (0, 2)]), so.Graph.grid((37, 23), ends="free")
    several = "given penalties of several orders"
    wrong = [
        ({"devices": 9}, "devices must be a number from 1 to 8"),
        ({"method": "admm"}, 'given method="admm"'),
        ({"order": 2, "method": so.trend.Doge(B=1)}, "several devices need B = order + 1 = 3"),
        ({"loss": "huber"}, "several devices fit the square loss, given Huber"),
        ({"penalty": {0: so.L1(1.0), 1: so.L1(1.0)}}, several),
        ({"bounds": (0, 1)}, "bounds and monotone fits work on one device"),
        ({"penalty": {-1: so.Box(0.0, 1.0), 0: so.L1(1.0)}}, several),
        ({"penalty": so.MCP(0.1, rng.uniform(2, 3, 5))}, "gamma of MCP is one number on a grid, given the shape (5,)"),
        ({"devices": mesh}, 'the mesh must have one axis, "devices"'),
        ({"devices": 3, "start": single}, "start was found by 2 devices"),
        ({"devices": 8, "y": np.zeros((5, 5)), "graph": so.Graph.grid((5, 5))}, "(5, 5) has 5 nodes for 8 devices"),
        ({"devices": 8, "y": np.arange(3.0), "graph": triangle}, "3 nodes are too few for 8 devices"),
        ({"order": 1, "graph": free}, "several devices need the ends of the graph"),
        ({"order": 1, "y": np.arange(9.0), "graph": so.Graph.chain(9)}, "several devices need"),
    ]
    found = []
    for changes, words in wrong:
        try:
            so.trend_filter(**{"y": y, "graph": GRID, "penalty": so.L1(0.1), "devices": 2} | changes)
            found.append((words, "no error"))
        except ValueError as error:
            found.append((words, str(error)))
    return found


def warm_starts():
    """Steps from nothing, and from what one device and what two found, with two devices."""
    y = picture((37, 23))
    one, two = (so.trend_filter(y, GRID, so.L1(0.1), method="doge", tol=1e-3, devices=d) for d in (None, 2))
    starts = (None, one, two)
    return [int(so.trend_filter(y, GRID, so.L1(0.1), tol=1e-6, devices=2, start=s).steps) for s in starts]


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    json.dump({"fits": fits(), "refusals": refusals(), "warm": warm_starts()}, sys.stdout)
