"""The trend filter up to sixteen million nodes and ten million edges: seconds and bytes. JSON lines.

    python benchmarks/bench_trend_sizes.py [--sides 256,1024,4096] [--lattices 224,708] [--renumbered 224,708,2237]

Pictures at orders 0 and 1, and a general graph at order 0: a lattice whose nodes are numbered at random, the worst case
for the caches, and the same after `Graph.renumber`; 2,237 nodes per side give ten million edges. Every fit uses
method="auto" from a cold start to the certified gap of --tol, in its own process. Seconds are those of a second call
with a new graph, without compilation; those of the first call are printed too.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from typing import Any

import numpy as np
import trend_problems
from common import emit_line, say

import sparseopt as so
from sparseopt.system.machine import environment
from sparseopt.trend.filter import chosen_method

WEIGHTS = (20.0, 13.0)
KINDS = {"picture": (0, 1), "lattice": (0,), "renumbered": (0,)}


def problem(kind: str, side: int) -> tuple[np.ndarray, np.ndarray | None]:
    """The signal, and the edges of a general graph."""
    y = trend_problems.grid_signal((side, side))
    if kind == "picture":
        return y, None
    numbers = np.random.default_rng(1).permutation(y.size)
    shuffled = np.empty_like(y)
    shuffled[numbers] = y
    return shuffled, numbers[trend_problems.grid_edges((side, side))]


def one(kind: str, side: int, order: int, tol: float) -> dict[str, Any]:
    """Run one fit; called in a separate process."""
    y, edges = problem(kind, side)
    spent, renumbering = [], 0.0
    if kind == "renumbered":
        assert edges is not None
        start = time.perf_counter()
        graph, order_of_nodes = so.Graph.from_edges(edges, y.size).renumber()
        renumbering = time.perf_counter() - start
        # Without one edge, or the graph would be a grid again.
        y, edges = y[order_of_nodes], graph.edges[1:]
    for _ in range(2):
        start = time.perf_counter()
        graph = so.Graph.grid((side, side)) if edges is None else so.Graph.from_edges(edges, y.size)
        found = so.trend_filter(y, graph, so.L1(WEIGHTS[order]), order, tol=tol)
        spent.append(time.perf_counter() - start)
    return {
        "problem": kind,
        "nodes": graph.num_nodes,
        "edges": graph.num_edges,
        "order": order,
        "weight": WEIGHTS[order],
        "tol": tol,
        "method": chosen_method(y, graph, so.L1(WEIGHTS[order]), order, tol=tol),
        "status": so.Status(int(found.status)).name,
        "steps": int(found.steps),
        "gap": float(found.gap),
        "seconds": spent[1],
        "renumbering_seconds": renumbering,
        "first_call_seconds": spent[0],
        "nanoseconds_per_node": spent[1] / y.size * 1e9,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sides", default="256,1024,4096", help="of the pictures, comma-separated")
    parser.add_argument("--lattices", default="224,708", help="sides of the graphs numbered at random")
    parser.add_argument("--renumbered", default="224,708,2237", help="sides of the renumbered graphs")
    parser.add_argument("--tol", type=float, default=1e-4, help="of the certified gap")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        kind, side, order = arguments.one
        print(json.dumps(one(kind, int(side), int(order), arguments.tol)))
        return
    emit_line("environment", **environment())
    sides = {"picture": arguments.sides, "lattice": arguments.lattices, "renumbered": arguments.renumbered}
    for kind, given in sides.items():
        for order in KINDS[kind]:
            smallest = None
            for side in given.split(",") if given else ():
                say(f"{kind} of side {side}, order {order}")
                command = [sys.executable, __file__, "--tol", str(arguments.tol), "--one", kind, side, str(order)]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                found = json.loads(done.stdout.splitlines()[-1])
                smallest = smallest or found["nanoseconds_per_node"]
                growth = found["nanoseconds_per_node"] / smallest
                emit_line("size", **found, growth_per_node=growth, growth_target=1.5 if kind == "picture" else None)


if __name__ == "__main__":
    main()
