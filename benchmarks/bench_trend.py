"""Trend filtering: steps, seconds and bytes to a certified accuracy. JSON lines.

    python benchmarks/bench_trend.py [--only steps,sizes] [--truth FOLDER] [--seconds 5] [--small]

steps    to a certified gap on a picture, by three methods
paths    fifty weights against one solve of their middle
scaling  time and memory of a step of Doge-ADMM per node, from 256 x 256 to 4096 x 4096 pixels
truth    the gap and the true error, and orders from 2 on in a fixed time: problems with known optima from FOLDER, NPZ
         files with the fields y, edges, lam, k, shape, beta_opt, u
sizes    method "auto" to a certified gap up to sixteen million nodes and ten million edges: pictures, and lattices
         whose nodes are numbered at random, the worst case for the caches, also after `Graph.renumber`

Times are those of a second call, without compilation, and in "sizes" with a new graph. A size runs in its own process.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from common import apart, emit, environment, options, say, selection, timed
from trend_problems import TrendProblem, grid_edges, grid_signal, stored
from trend_solvers import graph_of

import sparseopt as so
from sparseopt.system.machine import peak_memory_bytes

DOGE_LIMIT = 6_000
WEIGHT, TOL = 10.0, 1e-4
# Of the part "sizes", by order.
WEIGHTS = (20.0, 13.0)


def second(call: Callable[[], so.Solution]) -> tuple[so.Solution, dict[str, Any]]:
    """The solution of the second call, and what a line says of it; the first call compiles."""
    timed(call)
    return told(call)


def told(call: Callable[[], so.Solution]) -> tuple[so.Solution, dict[str, Any]]:
    """The solution of a call, and what a line says of it."""
    seconds, _, found = timed(call)
    return found, {"steps": int(found.steps), "seconds": seconds, "gap": float(found.gap)}


def steps(given: argparse.Namespace) -> None:
    """Steps and seconds of three methods."""
    for side, order in ((32, 0), (32, 1)) if given.small else ((256, 0), (256, 1), (64, 0), (64, 1)):
        graph, image = so.Graph.grid((side, side)), grid_signal((side, side)).reshape(side, side)
        for tol in (1e-4, 1e-5):
            for method in ("doge", "admm", "auto"):
                _, row = second(partial(so.trend_filter, image, graph, so.L1(WEIGHT), order, method, tol=tol))
                emit("steps and seconds", side=side, order=order, tol=tol, method=method, **row)


def paths(given: argparse.Namespace) -> None:
    """A path of 50 levels against one solve of its middle level, in seconds and steps."""
    chains, sides = ((300,), (16,)) if given.small else ((1_000, 100_000, 1_000_000), (128, 256))
    for graph in [*map(so.Graph.chain, chains), *(so.Graph.grid((side, side)) for side in sides)]:
        y = grid_signal(graph.node_shape)
        call = partial(so.trend.trend_path, y, graph)
        call()
        seconds, _, path = timed(call)
        _, middle = second(partial(so.trend_filter, y, graph, so.L1(path.weights[len(path) // 2]), tol=TOL))
        emit(
            "path of 50 levels, order 0, tol 1e-4", shape=graph.shape, seconds=seconds,
            middle_seconds=middle["seconds"], middle_solves=seconds / middle["seconds"], steps=int(path.steps.sum()),
            middle_steps=middle["steps"], gap=float(path.gaps.max()),
        )  # fmt: skip


def step_of_size(side: int, order: int) -> tuple[float, int]:
    """Seconds of a step, and the largest resident set."""
    graph, image = so.Graph.grid((side, side)), grid_signal((side, side)).astype(np.float32)
    method = so.trend.Doge(cadence=5)
    call = partial(so.trend_filter, image, graph, so.L1(WEIGHT), order, method, tol=1e-12)
    timed(partial(call, max_steps=5))
    few, many = (timed(partial(call, max_steps=count)).seconds for count in (5, 25))
    return (many - few) / 20, peak_memory_bytes()


def scaling(given: argparse.Namespace) -> None:
    """Time and memory per node."""
    for order in (0, 1):
        before: tuple[int, int] | None = None
        for side in (64, 128) if given.small else (256, 512, 1024, 2048, 4096):
            seconds, peak = apart(step_of_size, side, order)
            nodes = side * side
            # The memory of interpreter and compiler cancels between two sizes.
            growth = None if before is None else (peak - before[1]) / (nodes - before[0])
            before = (nodes, peak)
            emit(
                "scaling", side=side, order=order, dtype="float32", method="doge", step_seconds=seconds,
                nanoseconds_per_node=seconds / nodes * 1e9, peak_bytes=peak, bytes_per_node=growth,
            )  # fmt: skip


def truth(given: argparse.Namespace) -> None:
    """All problems of a folder."""
    if given.truth is None or not given.truth.is_dir():
        emit("SKIPPED truth problems", reason=f"no folder at {given.truth}")
        say("SKIPPED the problems with known optima: give --truth FOLDER")
        return
    for file in sorted(given.truth.glob("*.npz")):
        problem = stored(file, file.stem)
        fit = partial(so.trend_filter, problem.y, graph_of(problem), so.L1(problem.weight), problem.order)
        report = partial(emit, problem=problem.name, nodes=problem.y.size, order=problem.order)
        if problem.order >= 2:
            in_time(problem, fit, given.seconds, report)
            continue
        methods = {"auto": "auto"} | ({"doge": so.trend.Doge(cadence=5)} if problem.y.size <= DOGE_LIMIT else {})
        for name, method in methods.items():
            found, row = second(partial(fit, method, tol=1e-5))
            status, error = so.Status(int(found.status)).name, suboptimality(problem, found)
            report("truth at tol 1e-5", method=name, status=status, **row, true_suboptimality=error)


def in_time(problem: TrendProblem, fit: Callable[..., so.Solution], allowed: float, report: Callable[..., Any]) -> None:
    """What each method reaches in a number of seconds."""
    choices: dict[tuple[str, int | None], Any] = {(name, None): name for name in ("auto", "admm")}
    choices |= {("doge", block): so.trend.Doge(B=block) for block in range(1, problem.order + 2)}
    if problem.shape is not None and len(problem.shape) == 1:
        choices["fast_admm", None] = "fast_admm"
    for (name, block), method in choices.items():
        limited = partial(fit, method, tol=1e-9)
        # Measure the cost of a call and of a step, then run as many steps as fit into the time.
        short, longer = (second(partial(limited, max_steps=count))[1]["seconds"] for count in (10, 60))
        most = int(np.clip((allowed - short) / max((longer - short) / 50, 1e-6), 10, 50_000))
        found, row = told(partial(limited, max_steps=most))
        error = suboptimality(problem, found)
        report("reach in time", method=name, B=block, seconds_allowed=allowed, **row, true_suboptimality=error)


def suboptimality(problem: TrendProblem, found: so.Solution) -> float:
    """The objective in float64 against the stored optimum."""
    assert problem.known
    return problem.objective(np.asarray(found.value)) / problem.known[0] - 1


def fit_of_size(kind: str, side: int, order: int) -> dict[str, Any]:
    """Two fits, each with a new graph."""
    y, edges, renumbering = grid_signal((side, side)), None, 0.0
    if kind != "picture":
        numbers = np.random.default_rng(1).permutation(y.size)
        y, edges = y[np.argsort(numbers)], numbers[grid_edges((side, side))]
    if kind == "renumbered":
        renumbering, _, (graph, nodes) = timed(so.Graph.from_edges(edges, y.size).renumber)
        # Without one edge, or the graph would be a grid again.
        y, edges = y[nodes], graph.edges[1:]
    penalty = so.L1(WEIGHTS[order])

    def new_graph() -> so.Graph:
        return so.Graph.grid((side, side)) if edges is None else so.Graph.from_edges(edges, y.size)

    def call() -> so.Solution:
        return so.trend_filter(y, new_graph(), penalty, order, tol=TOL)

    first = timed(call).seconds
    found, row = told(call)
    peak, graph = peak_memory_bytes(), new_graph()
    about = {"problem": kind, "nodes": graph.num_nodes, "edges": graph.num_edges, "order": order}
    return (
        about
        | row
        | {
            "weight": WEIGHTS[order],
            "tol": TOL,
            "method": so.trend.chosen_method(y, graph, penalty, order, tol=TOL),
            "status": so.Status(int(found.status)).name,
            "renumbering_seconds": renumbering,
            "first_call_seconds": first,
            "nanoseconds_per_node": row["seconds"] / y.size * 1e9,
            "peak_bytes": peak,
        }
    )


def sizes(given: argparse.Namespace) -> None:
    """From small to large."""
    rows = {"picture": (256, 1024, 4096), "lattice": (224, 708), "renumbered": (224, 708, 2237)}
    for kind, sides in rows.items():
        for order in (0, 1) if kind == "picture" else (0,):
            smallest = None
            for side in (32, 64) if given.small else sides:
                say(f"{kind} of side {side}, order {order}")
                found = apart(fit_of_size, kind, side, order)
                smallest = smallest or found["nanoseconds_per_node"]
                emit("size", **found, growth_per_node=found["nanoseconds_per_node"] / smallest)


PARTS: dict[str, Callable[[argparse.Namespace], None]] = {
    "steps": steps, "paths": paths, "scaling": scaling, "truth": truth, "sizes": sizes,
}  # fmt: skip


def main() -> None:
    parser = options(__doc__)
    selection(parser, "--only", PARTS)
    parser.add_argument("--truth", type=Path, help="folder with problems with a known optimum")
    parser.add_argument("--seconds", type=float, default=5.0, help="time for each method at order 2 and up")
    parser.add_argument("--small", action="store_true", help="small problems, for a trial")
    given = parser.parse_args()
    emit("environment", **environment())
    for name in given.only:
        PARTS[name](given)


if __name__ == "__main__":
    main()
