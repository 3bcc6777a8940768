"""The trend filter planned once: its gradient, batches of pictures, and the overhead of a call. JSON lines.

    python benchmarks/bench_trend_batch.py [--only gradient,pictures,calls] [--quick]

gradient    of a squared error of the fit, in the signal and in the weight of every row, compared with the fit alone; at
            order 0 also fastprox, to the same gap; both are checked against central differences in one direction
pictures    64 in one program, by `jax.vmap` and by `jax.lax.map`, compared with 64 calls
calls       1,000 on a chain of 5,000 nodes, compared with the same fits in programs of ten

Every part runs in its own process, on one core, in float64. Times are medians after a first call, which compiles.
fastprox needs Python 3.12 or newer.
"""

import platform
import statistics
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import emit, installed, options, run_parts, say, selection, timed, warmed
from trend_problems import NOISE, grid_signal

import sparseopt as so

TOL = 1e-6
WEIGHTS = (20.0, 13.0)
CHAIN_WEIGHT = 10.0
# Step of the central differences, small enough that no piece splits, and the gap of their fits.
MOVE, EXACT = 1e-6, 1e-11
# Of fastprox: the step limit, and the relative errors to which the fit is refined; None for no refinement.
MOST_STEPS = 10_000
REFINED: dict[str, float | None] = {"fastprox": None, "fastprox, refined": 1e-7}
WORK = "the work alone"
# Targets: seconds of a gradient over those of the fit, and overhead of a call in seconds.
MOST_RATIO, MOST_OVERHEAD = 2.0, 1e-3


def gradient(quick: bool) -> None:
    """A gradient in the signal and the row weights at orders 0 and 1, and fastprox at order 0."""
    side = 32 if quick else 256
    y, target = (jnp.asarray(grid_signal((side, side), seed)) for seed in (0, 1))
    for order, weight in enumerate(WEIGHTS):
        solver, rng = so.trend_solver(so.Graph.grid((side, side)), order), np.random.default_rng(order)
        size = solver.layout.count(order + 1)
        point = y, jnp.asarray(weight * rng.uniform(0.5, 1.5, size))
        along = target - y, jnp.asarray(weight * rng.uniform(-0.5, 0.5, size))

        def fit(y: Any, weights: Any, tol: float, solver: Any = solver) -> so.Solution:
            return solver(y, so.L1(weights), tol=tol)

        def loss(y: Any, weights: Any, tol: float, fit: Any = fit) -> Any:
            return jnp.mean((fit(y, weights, tol).value - target) ** 2)

        known = differences(jax.jit(loss), point, along)
        forward, slopes = jax.jit(fit), jax.jit(jax.grad(loss, argnums=(0, 1)))
        found = forward(*point, TOL)
        answer = {
            "solver": "sparseopt",
            "version": installed("sparseopt"),
            "steps": int(found.steps),
            "fit": warmed(partial(forward, *point, TOL)),
            "both": warmed(partial(slopes, *point, TOL)),
            "slopes": [float(jnp.vdot(slope, move)) for slope, move in zip(slopes(*point, TOL), along, strict=True)],
        }
        about = {"side": side, "order": order, "weight": weight, "tol": TOL, "reduced": quick}
        shown = compared(answer, known)
        met = None if quick else shown["ratio"] <= MOST_RATIO
        emit("gradient through a plan", **about, **shown, target=MOST_RATIO, met=met)
        if order == 0:
            nodes = {"y": y, "target": target, "along": along[0]}
            shaped = {name: np.asarray(field).reshape(side, side) for name, field in nodes.items()}
            edges = {"weights": on_axes(point[1], side), "weights_along": on_axes(along[1], side)}
            for peer in fastprox(shaped | edges, TOL * float(found.objective)):
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


def fastprox(given: dict[str, Any], gap: float) -> Iterator[dict[str, Any]]:
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
    y, operator = given["y"], fastprox.TVAniso(2, edge_weights=given["weights"])
    # Its tolerance is relative to the energy of the signal.
    options = {"threads": 1, "max_iter": MOST_STEPS, "tol": gap / (np.sum(y**2) / 2)}

    def slopes(refine: float | None) -> tuple[Any, Any, Any, int]:
        value, context = operator.prox(y, 1.0, keep=True, **options)
        steps = context.info.iters
        if refine is not None:
            value = context.refine(refine)
            steps += context.info.iters
        in_y, in_parameters = operator.vjp(context, 2 * (value - given["target"]) / value.size)
        return context, in_y, in_parameters.edge_weights, steps

    fit = warmed(lambda: operator.prox(y, 1.0, **options))
    for name, refine in REFINED.items():
        both, (context, in_y, in_weights, steps) = warmed(partial(slopes, refine)), slopes(refine)
        yield {
            "solver": name, "version": installed("fastprox"), "python": platform.python_version(), "steps": steps,
            "exact": bool(context.deriv.exact), "fit": fit, "both": both,
            "slopes": [float(np.vdot(in_y, given["along"])), float(np.vdot(in_weights, given["weights_along"]))],
        }  # fmt: skip


def on_axes(values: Any, side: int) -> np.ndarray:
    """Values of the edges of a picture at the first node of each edge, `[2, side, side]`."""
    values, cut = np.asarray(values), side * (side - 1)
    found = np.zeros((2, side, side))
    found[0, :-1] = values[:cut].reshape(side - 1, side)
    found[1, :, :-1] = values[cut:].reshape(side, side - 1)
    return found


def pictures(quick: bool) -> None:
    """Many pictures at once and one after the other."""
    count, side = (8, 16) if quick else (64, 64)
    graph = so.Graph.grid((side, side))
    signals = np.stack([grid_signal((side, side), seed) for seed in range(count)])
    for order, weight in enumerate(WEIGHTS):
        solver, penalty = so.trend_solver(graph, order), so.L1(weight)
        fit = partial(solver, penalty=penalty, tol=TOL)
        single, batched, looped = jax.jit(fit), jax.jit(jax.vmap(fit)), jax.jit(partial(jax.lax.map, fit))
        filtered = partial(so.trend_filter, graph=graph, penalty=penalty, order=order, tol=TOL)
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
                "pictures", pictures=count, side=side, order=order, weight=weight, tol=TOL, way=way, **spent,
                speedup=calls / spent["seconds"], steps=float(steps.mean()), most_steps=int(steps.max()),
                converged=int((status == so.Status.CONVERGED).sum()),
                # Relative to the largest value.
                difference=float(np.abs(values - known).max() / np.abs(known).max()), reduced=quick,
            )  # fmt: skip


def calls(quick: bool) -> None:
    """Many calls on a chain, and as many fits in few programs."""
    count, block, nodes = (50, 10, 500) if quick else (1000, 10, 5000)
    graph, penalty = so.Graph.chain(nodes), so.L1(CHAIN_WEIGHT)
    fit = partial(so.trend_solver(graph, 0), penalty=penalty, tol=TOL)
    signals = grid_signal((nodes,)) + NOISE / 10 * np.random.default_rng(1).standard_normal((count, nodes))
    looped = jax.jit(partial(jax.lax.map, lambda y: fit(y).value))
    ways: dict[str, Callable[[Any], Any]] = {
        "solver, jitted": jax.jit(fit),
        "solver": fit,
        "trend_filter": partial(so.trend_filter, graph=graph, penalty=penalty, order=0, tol=TOL),
    }
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
            "calls", calls=count, nodes=nodes, order=0, weight=CHAIN_WEIGHT, tol=TOL, way=way, seconds_a_call=each,
            cpu_seconds=worked, first_call_seconds=first[way], overhead_seconds=beyond, target=MOST_OVERHEAD,
            met=None if quick or beyond is None else beyond <= MOST_OVERHEAD, reduced=quick,
        )  # fmt: skip


PARTS: dict[str, Callable[[bool], None]] = {"gradient": gradient, "pictures": pictures, "calls": calls}


def main() -> None:
    parser = options(__doc__)
    selection(parser, "--only", PARTS)
    parser.add_argument("--quick", action="store_true", help="small problems, for a trial")
    arguments = parser.parse_args()
    run_parts(PARTS, arguments.only, arguments.quick)


if __name__ == "__main__":
    main()
