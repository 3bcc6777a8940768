"""Trend filtering: steps, seconds and bytes to a certified accuracy. JSON lines.

    python benchmarks/bench_trend.py --truth FOLDER [--seconds 5] [--sides 256,512,1024,2048,4096]

FOLDER contains problems with known optima as NPZ files with the fields y, edges, lam, k, shape, obj_opt. Times are
those of a second call, without compilation; the time of the first call is printed too.
"""

import argparse
import json
import pathlib
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import numpy as np
from common import emit_line
from trend_problems import grid_signal

import sparseopt as so
from sparseopt.system.machine import environment

DOGE_LIMIT = 6_000


def timed(call: Callable[[], so.Solution]) -> tuple[so.Solution, float, float]:
    """The solution, the seconds of the second call, and those of the first, which compiles."""
    start = time.perf_counter()
    jax.block_until_ready(call().value)
    first = time.perf_counter() - start
    start = time.perf_counter()
    solution = call()
    jax.block_until_ready(solution.value)
    return solution, time.perf_counter() - start, first


def problems(folder: pathlib.Path) -> Iterator[tuple[str, dict[str, Any], so.Graph]]:
    for path in sorted(folder.glob("*.npz")):
        with np.load(path) as stored:
            data = {name: stored[name] for name in ("y", "edges", "lam", "k", "shape", "obj_opt")}
        shape = tuple(int(n) for n in data["shape"])
        graph = so.Graph.from_edges(data["edges"], data["y"].size)
        # Other graphs have a shape (n,) too: only the edges show whether it is a grid.
        if int(np.prod(shape)) == graph.num_nodes and same_edges(so.Graph.grid(shape), graph):
            graph = so.Graph.grid(shape)
        yield path.stem, {**data, "lam": float(data["lam"]), "k": int(data["k"])}, graph


def same_edges(one: so.Graph, other: so.Graph) -> bool:
    one_sorted, other_sorted = (np.unique(np.sort(graph.edges, axis=1), axis=0) for graph in (one, other))
    return np.array_equal(one_sorted, other_sorted)


def true_suboptimality(solution: so.Solution, data: dict[str, Any], graph: so.Graph) -> float:
    """The objective in float64 against the stored optimum."""
    y, b = data["y"].reshape(-1), np.asarray(solution.value, np.float64).reshape(-1)
    rows = graph.matrix(data["k"] + 1) @ b
    value = 0.5 * np.sum((y - b) ** 2) + data["lam"] * np.abs(rows).sum()
    return float(value / float(data["obj_opt"]) - 1)


def reached(name: str, data: dict[str, Any], graph: so.Graph, method: str, **keywords: Any) -> dict[str, Any]:
    given = method if method in ("auto", "interior") else {"name": method, "cadence": 5}
    solution, seconds, first = timed(
        lambda: so.trend_filter(data["y"].reshape(-1), graph, so.L1(data["lam"]), data["k"], given, **keywords)
    )
    true = true_suboptimality(solution, data, graph)
    return {
        "problem": name,
        "method": method,
        "nodes": graph.num_nodes,
        "shape": graph.shape,
        "order": data["k"],
        "status": so.Status(int(solution.status)).name,
        "steps": int(solution.steps),
        "seconds": seconds,
        "first_call_seconds": first,
        "gap": float(solution.gap),
        "true_suboptimality": true,
        "gap_is_a_bound": bool(float(solution.gap) >= true - 1e-12),
    }


def truth(folder: pathlib.Path, seconds: float) -> None:
    for name, data, graph in problems(folder):
        small = graph.num_nodes <= DOGE_LIMIT
        if data["k"] <= 1:
            for method in ("auto", "doge") if small else ("auto",):
                emit_line("truth at tol 1e-5", target=1e-5, **reached(name, data, graph, method, tol=1e-5))
            continue
        choices: list[tuple[Any, int | None]] = [("auto", None), ("admm", None)]
        choices += [(so.trend.Doge(B=block), block) for block in range(1, data["k"] + 2)]
        if graph.shape is not None and len(graph.shape) == 1:
            choices.append(("fast_admm", None))
        for method, block in choices:
            y, penalty = data["y"].reshape(-1), so.L1(data["lam"])
            limited = partial(so.trend_filter, y, graph, penalty, data["k"], method, tol=1e-9)
            # Measure the cost of a call and of a step, then run as many steps as fit into the time.
            _, short, _ = timed(partial(limited, max_steps=10))
            _, longer, _ = timed(partial(limited, max_steps=60))
            each = max((longer - short) / 50, 1e-6)
            steps = int(np.clip((seconds - short) / each, 10, 50_000))
            start = time.perf_counter()
            solution = limited(max_steps=steps)
            emit_line(
                "reach in time",
                problem=name,
                method=getattr(method, "name", method),
                B=block,
                order=data["k"],
                nodes=graph.num_nodes,
                seconds_allowed=seconds,
                seconds=time.perf_counter() - start,
                steps=int(solution.steps),
                gap=float(solution.gap),
                true_suboptimality=true_suboptimality(solution, data, graph),
            )


def picture(side: int, seed: int = 0) -> np.ndarray:
    """A piecewise smooth image in 0..255 with noise of standard deviation 20."""
    line = np.arange(side, dtype=np.float32) / side
    i, j = line[:, None], line[None, :]
    smooth = 90 + 70 * j * (i > 0.4) + 90 * (((i - 0.4) ** 2 + (j - 0.6) ** 2) < 0.06) - 50 * (i + j < 0.5)
    return smooth + 20 * np.random.default_rng(seed).standard_normal((side, side), np.float32)


def steps_and_times() -> None:
    for side, order in ((256, 0), (256, 1), (64, 0), (64, 1)):
        graph, image = so.Graph.grid((side, side)), picture(side).astype(np.float64)
        for tol in (1e-4, 1e-5):
            for method in ("doge", "admm", "auto"):
                call = partial(so.trend_filter, image, graph, so.L1(10.0), order, method, tol=tol)
                solution, seconds, first = timed(call)
                emit_line(
                    "steps and seconds",
                    side=side,
                    order=order,
                    weight=10,
                    noise=20,
                    method=method,
                    tol=tol,
                    steps=int(solution.steps),
                    steps_target=(100 if tol == 1e-4 else 150) if side == 256 and method == "doge" else None,
                    seconds=seconds,
                    seconds_target=(0.02, 0.05)[order] if side == 64 and tol == 1e-4 and method == "doge" else None,
                    first_call_seconds=first,
                    gap=float(solution.gap),
                )


def paths() -> None:
    """A path of 50 levels against one solve of its middle level, in seconds and steps."""
    graphs = [so.Graph.chain(n) for n in (1_000, 100_000, 1_000_000)] + [so.Graph.grid((n, n)) for n in (128, 256)]
    for graph in graphs:
        y = grid_signal(graph.node_shape)
        for _ in range(2):
            start = time.perf_counter()
            path = so.trend.trend_path(y, graph)
            seconds = time.perf_counter() - start
        middle = so.L1(path.weights[len(path) // 2])
        solution, single, _ = timed(partial(so.trend_filter, y, graph, middle, tol=1e-4))
        emit_line(
            "path of 50 levels, order 0, tol 1e-4",
            shape=graph.shape,
            seconds=seconds,
            middle_seconds=single,
            middle_solves=seconds / single,
            middle_solves_target=5 if graph.is_chain else 12,
            steps=int(path.steps.sum()),
            middle_steps=int(solution.steps),
            gap=float(path.gaps.max()),
        )


def one_size(side: int, order: int) -> None:
    """Run in its own process: seconds per step, and the largest resident set."""
    graph, image = so.Graph.grid((side, side)), picture(side)

    def call(steps: int) -> so.Solution:
        return so.trend_filter(image, graph, so.L1(10.0), order, so.trend.Doge(cadence=5), tol=1e-12, max_steps=steps)

    jax.block_until_ready(call(5).value)
    spent = []
    for steps in (5, 25):
        start = time.perf_counter()
        jax.block_until_ready(call(steps).value)
        spent.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(json.dumps({"step_seconds": (spent[1] - spent[0]) / 20, "peak": peak}))


def scaling(sides: list[int]) -> None:
    for order in (0, 1):
        before: tuple[int, int] | None = None
        for side in sides:
            command = [sys.executable, __file__, "--one", f"{side},{order}"]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            nodes, peak = side * side, found["peak"]
            # The memory of interpreter and compiler cancels between two sizes.
            growth = None if before is None else (peak - before[1]) / (nodes - before[0])
            before = (nodes, peak)
            emit_line(
                "scaling",
                side=side,
                order=order,
                dtype="float32",
                method="doge",
                step_seconds=found["step_seconds"],
                nanoseconds_per_node=found["step_seconds"] / nodes * 1e9,
                peak_bytes=peak,
                bytes_per_node=growth,
                bytes_target=200 if order == 1 else None,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--truth", type=pathlib.Path, help="folder with problems with a known optimum")
    parser.add_argument("--seconds", type=float, default=5.0, help="time for each method at order 2 and up")
    parser.add_argument("--sides", default="256,512,1024,2048,4096", help="grid sides for the scaling")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        one_size(*(int(part) for part in arguments.one.split(",")))
        return
    emit_line("environment", **environment())
    steps_and_times()
    paths()
    scaling([int(side) for side in arguments.sides.split(",")])
    if arguments.truth is None or not arguments.truth.is_dir():
        emit_line("SKIPPED truth problems", reason=f"no folder at {arguments.truth}")
        print("bench_trend: SKIPPED the problems with known optima: give --truth FOLDER", file=sys.stderr)
        return
    truth(arguments.truth, arguments.seconds)


if __name__ == "__main__":
    main()
