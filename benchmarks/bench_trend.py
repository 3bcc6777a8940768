"""Trend filtering: certified fits, paths, gradients, batches and calls. JSON lines.

    python benchmarks/bench_trend.py [--only steps,gradient] [--truth FOLDER] [--seconds 5] [--small]

steps     to a certified gap on a picture, by three methods
paths     fifty weights against one solve of their middle
truth     the gap and the true error, and orders from 2 on in a fixed time: problems with known optima from FOLDER, NPZ
          files with the fields y, edges, lam, k, shape, beta_opt, u
sizes     method "auto" to a certified gap up to sixteen million nodes and ten million edges: pictures, and lattices
          whose nodes are numbered at random, the worst case for the caches, also after `Graph.renumber`

The others plan once, by `trend_solver`, and run on one core in float64, each in its own process:

gradient  of a squared error of the fit, in the signal and in the weight of every row, compared with the fit alone; at
          order 0 also fastprox (Python 3.12 or newer), to the same gap; both are checked against central differences
pictures  64 in one program, by `jax.vmap` and by `jax.lax.map`, compared with 64 calls
calls     1,000 on a chain of 5,000 nodes, compared with the same fits in programs of ten

Times are those after a first call, which compiles, and in "sizes" with a new graph.
"""

import argparse
import platform
import statistics
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import apart, emit, environment, installed, options, run_parts, say, selection, timed, warmed
from trend_problems import NOISE, TrendProblem, grid_edges, grid_signal, stored
from trend_solvers import graph_of

import sparseopt as so
from sparseopt.system.machine import peak_memory_bytes

# By order; of a picture and a chain in the parts "steps", "truth" and "calls".
WEIGHTS, WEIGHT = (20.0, 13.0), 10.0
TOL, PLANNED_TOL = 1e-4, 1e-6
DOGE_LIMIT = 6_000
# Step of the central differences, small enough that no piece splits, and the gap of their fits.
MOVE, EXACT = 1e-6, 1e-11
# Of fastprox: the step limit, and the relative errors to which the fit is refined; None for no refinement.
MOST_STEPS, REFINED = 10_000, {"fastprox": None, "fastprox, refined": 1e-7}
WORK = "the work alone"
# Targets: seconds of a gradient over those of the fit, and overhead of a call in seconds.
MOST_RATIO, MOST_OVERHEAD = 2.0, 1e-3


def second(call: Callable[[], so.Solution]) -> tuple[so.Solution, dict[str, Any]]:
    """The solution of the second call, and what a line says of it; the first call compiles."""
    timed(call)
    return told(call)


def told(call: Callable[[], so.Solution]) -> tuple[so.Solution, dict[str, Any]]:
    """The solution of a call, and what a line says of it."""
    seconds, _, found = timed(call)
    return found, {"steps": int(found.steps), "seconds": seconds, "gap": float(found.gap)}


def steps(given: argparse.Namespace) -> None:
    for side, order in ((32, 0), (32, 1)) if given.small else ((256, 0), (256, 1), (64, 0), (64, 1)):
        graph, image = so.Graph.grid((side, side)), grid_signal((side, side)).reshape(side, side)
        for tol in (1e-4, 1e-5):
            for method in ("doge", "admm", "auto"):
                _, row = second(partial(so.trend_filter, image, graph, so.L1(WEIGHT), order, method, tol=tol))
                emit("steps and seconds", side=side, order=order, tol=tol, method=method, **row)


def paths(given: argparse.Namespace) -> None:
    chains, sides = ((300,), (16,)) if given.small else ((1_000, 100_000, 1_000_000), (128, 256))
    for graph in [*map(so.Graph.chain, chains), *(so.Graph.grid((side, side)) for side in sides)]:
        y = grid_signal(graph.geometry.node_shape)
        call = partial(so.trend.trend_path, y, graph)
        call()
        seconds, _, path = timed(call)
        _, middle = second(partial(so.trend_filter, y, graph, so.L1(path.weights[len(path) // 2]), tol=TOL))
        emit(
            "path of 50 levels, order 0, tol 1e-4", shape=graph.shape, seconds=seconds,
            middle_seconds=middle["seconds"], middle_solves=seconds / middle["seconds"], steps=int(path.steps.sum()),
            middle_steps=middle["steps"], gap=float(path.gaps.max()),
        )  # fmt: skip


def truth(given: argparse.Namespace) -> None:
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
    for (name, block), method in choices.items():
        limited = partial(fit, method, tol=1e-9)
        # Measure the cost of a call and of a step, then run as many steps as fit into the time.
        short, longer = (second(partial(limited, max_steps=count))[1]["seconds"] for count in (10, 60))
        most = int(np.clip((allowed - short) / max((longer - short) / 50, 1e-6), 10, 50_000))
        found, row = told(partial(limited, max_steps=most))
        error = suboptimality(problem, found)
        report("reach in time", method=name, B=block, seconds_allowed=allowed, **row, true_suboptimality=error)


def suboptimality(problem: TrendProblem, found: so.Solution) -> float:
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
    return {
        "problem": kind, "nodes": graph.num_nodes, "edges": graph.num_edges, "order": order, **row,
        "weight": WEIGHTS[order], "tol": TOL, "method": so.trend.chosen_method(y, graph, penalty, order, tol=TOL),
        "status": so.Status(int(found.status)).name, "renumbering_seconds": renumbering, "first_call_seconds": first,
        "nanoseconds_per_node": row["seconds"] / y.size * 1e9, "peak_bytes": peak,
    }  # fmt: skip


def sizes(given: argparse.Namespace) -> None:
    rows = {"picture": (256, 1024, 4096), "lattice": (224, 708), "renumbered": (224, 708, 2237)}
    for kind, sides in rows.items():
        for order in (0, 1) if kind == "picture" else (0,):
            smallest = None
            for side in (32, 64) if given.small else sides:
                say(f"{kind} of side {side}, order {order}")
                found = apart(fit_of_size, kind, side, order)
                smallest = smallest or found["nanoseconds_per_node"]
                emit("size", **found, growth_per_node=found["nanoseconds_per_node"] / smallest)


def gradient(small: bool) -> None:
    side = 32 if small else 256
    y, target = (jnp.asarray(grid_signal((side, side), seed)) for seed in (0, 1))
    for order, weight in enumerate(WEIGHTS):
        solver, rng = so.trend_solver(so.Graph.grid((side, side)), order), np.random.default_rng(order)
        size = solver.geometry.count(order + 1)
        point = y, jnp.asarray(weight * rng.uniform(0.5, 1.5, size))
        along = target - y, jnp.asarray(weight * rng.uniform(-0.5, 0.5, size))

        def fit(y: Any, weights: Any, tol: float, solver: Any = solver) -> so.Solution:
            return solver(y, so.L1(weights), tol=tol)

        def loss(y: Any, weights: Any, tol: float, fit: Any = fit) -> Any:
            return jnp.mean((fit(y, weights, tol).value - target) ** 2)

        known = differences(jax.jit(loss), point, along)
        forward, slopes = jax.jit(fit), jax.jit(jax.grad(loss, argnums=(0, 1)))
        found, both = forward(*point, PLANNED_TOL), partial(slopes, *point, PLANNED_TOL)
        answer = {
            "solver": "sparseopt", "version": installed("sparseopt"), "steps": int(found.steps),
            "fit": warmed(partial(forward, *point, PLANNED_TOL)), "both": warmed(both),
            "slopes": [float(jnp.vdot(slope, move)) for slope, move in zip(both(), along, strict=True)],
        }  # fmt: skip
        about = {"side": side, "order": order, "weight": weight, "tol": PLANNED_TOL, "reduced": small}
        shown = compared(answer, known)
        met = None if small else shown["ratio"] <= MOST_RATIO
        emit("gradient through a plan", **about, **shown, target=MOST_RATIO, met=met)
        if order == 0:
            pictures = [np.asarray(field).reshape(side, side) for field in (y, target, along[0])]
            edges = [on_axes(values, side) for values in (point[1], along[1])]
            for peer in fastprox(PLANNED_TOL * float(found.objective), *pictures, *edges):
                emit("gradient through a plan", **about, **compared(peer, known))


def differences(loss: Callable[..., Any], point: tuple, along: tuple) -> list[float]:
    """Central differences of the loss in one direction of the signal and in one of the weights."""
    found = []
    for index in range(2):
        ends = []
        for sign in (1, -1):
            moved = list(point)
            moved[index] = point[index] + sign * MOVE * along[index]
            ends.append(float(loss(*moved, EXACT)))
        found.append((ends[0] - ends[1]) / (2 * MOVE))
    return found


def compared(answer: dict[str, Any], known: list[float]) -> dict[str, Any]:
    """An answer with the times of its fit and of a fit with its gradient, and its errors in the two directions."""
    fit, both, slopes = (answer.pop(name) for name in ("fit", "both", "slopes"))
    in_signal, in_weights = (abs(slope / value - 1) for slope, value in zip(slopes, known, strict=True))
    return answer | {
        "fit_seconds": fit["seconds"], "gradient_seconds": both["seconds"], "ratio": both["seconds"] / fit["seconds"],
        "first_call_seconds": both["first_call_seconds"], "error_in_signal": in_signal, "error_in_weights": in_weights,
    }  # fmt: skip


def fastprox(gap: float, y: Any, target: Any, along: Any, weights: Any, weights_along: Any) -> Iterator[dict[str, Any]]:
    """The answers of fastprox to a duality gap; none, with a line on the reason, if it is missing.

    The first gradient is taken at its fit, whose pieces may differ from those of the optimum, the second once refined.
    """
    if installed("fastprox") is None:
        reason = f"not installed for Python {platform.python_version()}; it needs 3.12 or newer"
        say(f"SKIPPED fastprox: {reason}")
        emit("SKIPPED", part="gradient", solver="fastprox", reason=reason)
        return
    import fastprox

    # The record says whether the derivative is exact.
    warnings.simplefilter("ignore")
    operator = fastprox.TVAniso(2, edge_weights=weights)
    # Its tolerance is relative to the energy of the signal.
    options = {"threads": 1, "max_iter": MOST_STEPS, "tol": gap / (np.sum(y**2) / 2)}

    def slopes(refine: float | None) -> tuple[Any, Any, Any, int]:
        value, context = operator.prox(y, 1.0, keep=True, **options)
        steps = context.info.iters
        if refine is not None:
            value = context.refine(refine)
            steps += context.info.iters
        in_y, in_parameters = operator.vjp(context, 2 * (value - target) / value.size)
        return context, in_y, in_parameters.edge_weights, steps

    fit = warmed(lambda: operator.prox(y, 1.0, **options))
    for name, refine in REFINED.items():
        both, (context, in_y, in_weights, steps) = warmed(partial(slopes, refine)), slopes(refine)
        yield {
            "solver": name, "version": installed("fastprox"), "python": platform.python_version(), "steps": steps,
            "exact": bool(context.deriv.exact), "fit": fit, "both": both,
            "slopes": [float(np.vdot(in_y, along)), float(np.vdot(in_weights, weights_along))],
        }  # fmt: skip


def on_axes(values: Any, side: int) -> np.ndarray:
    """Values of the edges of a picture at the first node of each edge, `[2, side, side]`."""
    values, cut = np.asarray(values), side * (side - 1)
    found = np.zeros((2, side, side))
    found[0, :-1] = values[:cut].reshape(side - 1, side)
    found[1, :, :-1] = values[cut:].reshape(side, side - 1)
    return found


def pictures(small: bool) -> None:
    count, side = (8, 16) if small else (64, 64)
    graph = so.Graph.grid((side, side))
    signals = np.stack([grid_signal((side, side), seed) for seed in range(count)])
    for order, weight in enumerate(WEIGHTS):
        solver, penalty = so.trend_solver(graph, order), so.L1(weight)
        fit = partial(solver, penalty=penalty, tol=PLANNED_TOL)
        filtered = partial(so.trend_filter, graph=graph, penalty=penalty, order=order, tol=PLANNED_TOL)
        single, batched, looped = jax.jit(fit), jax.jit(jax.vmap(fit)), jax.jit(partial(jax.lax.map, fit))
        ways: dict[str, Callable[[], list[so.Solution]]] = {
            "solver, a call each": lambda: list(map(single, signals)),  # noqa: B023
            "solver, vmap": lambda: [batched(signals)],  # noqa: B023
            "solver, lax.map": lambda: [looped(signals)],  # noqa: B023
            "trend_filter, a call each": lambda: list(map(filtered, signals)),  # noqa: B023
        }
        known: np.ndarray | None = None
        calls: float | None = None
        for way, call in ways.items():
            spent, found = warmed(call), call()
            values, steps, status = (
                np.concatenate([np.asarray(getattr(one, name)).reshape(-1) for one in found])
                for name in ("value", "steps", "status")
            )
            known, calls = values if known is None else known, calls or spent["seconds"]
            emit(
                "pictures", pictures=count, side=side, order=order, weight=weight, tol=PLANNED_TOL, way=way, **spent,
                speedup=calls / spent["seconds"], steps=float(steps.mean()), most_steps=int(steps.max()),
                converged=int((status == so.Status.CONVERGED).sum()),
                # Relative to the largest value.
                difference=float(np.abs(values - known).max() / np.abs(known).max()), reduced=small,
            )  # fmt: skip


def calls(small: bool) -> None:
    count, block, nodes = (50, 10, 500) if small else (1000, 10, 5000)
    graph, penalty = so.Graph.chain(nodes), so.L1(WEIGHT)
    fit = partial(so.trend_solver(graph, 0), penalty=penalty, tol=PLANNED_TOL)
    signals = grid_signal((nodes,)) + NOISE / 10 * np.random.default_rng(1).standard_normal((count, nodes))
    looped = jax.jit(partial(jax.lax.map, lambda y: fit(y).value))
    filtered = partial(so.trend_filter, graph=graph, penalty=penalty, order=0, tol=PLANNED_TOL)
    ways: dict[str, Callable[[Any], Any]] = {"solver, jitted": jax.jit(fit), "solver": fit, "trend_filter": filtered}
    first = {WORK: timed(partial(looped, jnp.asarray(signals[:block]))).seconds}
    first |= {way: timed(partial(call, signals[0])).seconds for way, call in ways.items()}
    spent: dict[str, list[tuple[float, float]]] = {way: [] for way in first}
    # In turn, so that other load on the machine affects all of them.
    for some in np.split(signals, count // block):
        together = timed(partial(looped, jax.block_until_ready(jnp.asarray(some))))
        spent[WORK].append((together.seconds / block, together.cpu_seconds / block))
        for way, call in ways.items():
            spent[way] += [timed(partial(call, y))[:2] for y in some]
    times = {way: [statistics.median(column) for column in zip(*found, strict=True)] for way, found in spent.items()}
    for way, (each, worked) in times.items():
        beyond = None if way == WORK else each - times[WORK][0]
        emit(
            "calls", calls=count, nodes=nodes, order=0, weight=WEIGHT, tol=PLANNED_TOL, way=way, seconds_a_call=each,
            cpu_seconds=worked, first_call_seconds=first[way], overhead_seconds=beyond, target=MOST_OVERHEAD,
            met=None if small or beyond is None else beyond <= MOST_OVERHEAD, reduced=small,
        )  # fmt: skip


PARTS = {"steps": steps, "paths": paths, "truth": truth, "sizes": sizes}
PLANNED = {"gradient": gradient, "pictures": pictures, "calls": calls}


def main() -> None:
    parser = options(__doc__)
    selection(parser, "--only", [*PARTS, *PLANNED])
    parser.add_argument("--truth", type=Path, help="folder with problems with a known optimum")
    parser.add_argument("--seconds", type=float, default=5.0, help="time for each method at order 2 and up")
    parser.add_argument("--small", action="store_true", help="small problems, for a trial")
    given = parser.parse_args()
    if chosen := [name for name in given.only if name in PARTS]:
        emit("environment", **environment())
    for name in chosen:
        PARTS[name](given)
    if planned := [name for name in given.only if name in PLANNED]:
        run_parts(PLANNED, planned, given.small)


if __name__ == "__main__":
    main()
