"""The core against public solvers: sparse regression, total variation, derivatives. JSON lines.

    python benchmarks/bench_core.py [--only lasso-dense,tv-deblurring] [--small] [--limit 60]

Sparse regression: seconds to a relative duality gap of 1e-6, measured by one NumPy function for all solvers (see
`core_problems.py`). The tolerance of a solver is divided by about three until its answer has this gap. The time is the
median of calls with that tolerance; the first call, which compiles, is reported separately. Total variation: seconds
and iterations until the objective is within 1e-4 and 1e-6 of the best one known, from a run of 20,000 steps. Every part
runs in its own process, on one core.
"""

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from bench_trend_peers import chosen, emit, pin, tell

GAP = 1e-6
# The factor between two tolerances, and the smallest one.
FALL, LEAST_TOL = 10**-0.5, 1e-15
# All tolerances together may take this many times the limit of one.
LADDER = 4
# A call is repeated this often, or until all repeats took this many seconds.
REPEATS, LONG = 5, 20.0
REFERENCE_TOL, REFERENCE_STEPS = 1e-8, 20_000
DERIVATIVE = "lasso-derivative"


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds and the result."""
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def median_of(call: Callable[[], Any], first: Iterable[float] = ()) -> dict[str, Any]:
    """The median of the seconds, including those in `first`."""
    spent = list(first)
    while not spent or (len(spent) < REPEATS and sum(spent) < LONG):
        spent.append(timed(call)[0])
    return {"seconds": statistics.median(spent), "repeats": len(spent)}


def warmed(call: Callable[[], Any]) -> dict[str, Any]:
    """The first call, which compiles, and the median of the others."""
    return {"first_call_seconds": timed(call)[0], **median_of(call)}


def installed(package: str) -> str | None:
    """The version of a package, None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def climbed(problem: Any, solver: Any, limit: float) -> dict[str, Any]:
    """The record of a solver: its coarsest tolerance that reaches the gap, and the time."""
    solve = solver.prepare(problem)
    tol = solver.first
    first, _ = timed(partial(solve, tol))
    total = first
    while True:
        call = partial(solve, tol)
        seconds, (answer, details) = timed(call)
        if seconds > limit >= first:
            # numba may compile code that no coarser tolerance needed.
            seconds, _ = timed(call)
        total += seconds
        record = {"tol": tol, "gap": problem.gap(answer), "first_call_seconds": first, **details}
        if record["gap"] <= GAP:
            return {**record, **median_of(call, [seconds])}
        slow = seconds > limit or total > LADDER * limit
        if slow or tol * FALL < LEAST_TOL:
            trouble = "time limit" if slow else "end of its tolerances"
            return {**record, "seconds": None, "spent_seconds": seconds, "trouble": trouble}
        tol *= FALL


def compare(part: str, small: bool, limit: float) -> None:
    """All solvers on all problems of a part, then sparseopt against the fastest peer."""
    from core_peers import SOLVERS
    from core_problems import PROBLEMS

    for problem in PROBLEMS[part](small):
        about = {"part": part, "problem": problem.name, "target": GAP, "reduced": small}
        times: dict[str, float] = {}
        for solver in SOLVERS[part]:
            number = installed(solver.package)
            if number is None:
                emit("SKIPPED", **about, solver=solver.name, reason="not installed")
                continue
            try:
                record = climbed(problem, solver, limit)
            except Exception as error:
                # A failing solver is a row and does not stop the others.
                record = {"seconds": None, "trouble": f"{type(error).__name__}: {error}"[:200]}
            if record["seconds"] is not None:
                times[solver.name] = record["seconds"]
            tell(f"{part}, {problem.name}: {solver.name} {record['seconds']}")
            emit("seconds to the gap", **about, solver=solver.name, version=number, **record)
        against("ours against the fastest peer", times, about)


def against(figure: str, times: dict[str, float], about: dict[str, Any]) -> None:
    """A row with our fastest solver, the fastest peer, and the ratio of their times."""
    ours = min((name for name in times if name.startswith("sparseopt")), key=times.__getitem__, default=None)
    peer = min((name for name in times if not name.startswith("sparseopt")), key=times.__getitem__, default=None)
    seconds, theirs = (None if name is None else times[name] for name in (ours, peer))
    ratio = seconds / theirs if seconds and theirs else None
    # A trial cannot meet a target.
    met = None if about["reduced"] or ratio is None else ratio < 1
    emit(figure, **about, ours=ours, ours_seconds=seconds, peer=peer, peer_seconds=theirs, ratio=ratio, met=met)


def picture(part: str, small: bool, limit: float) -> None:
    """Total variation: the time at which the objective of each solver reaches the targets."""
    import core_imaging
    import jax
    import numpy as np

    import sparseopt as so

    given = core_imaging.PICTURES[part](32 if small else 128)
    problem, method = core_imaging.core_problem(given), so.PrimalDual()
    reference = so.solve(problem, method, tol=REFERENCE_TOL, max_steps=REFERENCE_STEPS, history=True)
    best = given.objective(np.asarray(reference.value))
    about = {"part": part, "problem": given.name, "reduced": small, "reference_gap": float(reference.gap)}
    tell(f"{part}: reference solution with a gap of {about['reference_gap']:.1e} after {int(reference.steps)} steps")
    reached: dict[float, dict[str, float]] = {target: {} for target in core_imaging.TARGETS}

    course = np.asarray(reference.history.objective)
    for target in core_imaging.TARGETS:
        level = best * (1 + target)
        steps = int(np.argmax(course <= level)) + 1

        def until(steps: int = steps) -> so.Solution:
            return jax.block_until_ready(so.solve(problem, method, tol=-1.0, max_steps=steps))

        def certified(tol: float = target) -> so.Solution:
            return jax.block_until_ready(so.solve(problem, method, tol=tol, max_steps=REFERENCE_STEPS))

        record = warmed(until)
        objective = given.objective(np.asarray(until().value))
        spent, known = timed(certified)
        reached[target]["sparseopt"] = record["seconds"]
        emit(
            "seconds to the objective",
            **about,
            target=target,
            solver="sparseopt",
            version=installed("sparseopt"),
            iterations=steps,
            suboptimality=objective / best - 1,
            **record,
            # A gap needs a good dual point as well, which may take many more steps.
            certified_seconds=median_of(certified, [spent])["seconds"] if known.gap <= target else None,
            certified_steps=int(known.steps),
            certified_gap=float(known.gap),
        )
    number = installed("pyproximal")
    if number is None:
        emit("SKIPPED", **about, solver="pyproximal", reason="not installed")
    for name, run in core_imaging.peers(given).items() if number else ():
        runs = {ratio: _watched(core_imaging, given, best, limit, run, ratio) for ratio in core_imaging.RATIOS}
        for target in core_imaging.TARGETS:
            # The best ratio counts for every peer; a user would have to find it.
            ratio = min(runs, key=lambda ratio: runs[ratio].reached.get(target, (np.inf, 0)))
            seconds, steps = runs[ratio].reached.get(target, (None, None))
            fields: dict[str, Any] = {"seconds": seconds, "iterations": steps, "ratio_of_steps": ratio}
            if seconds is None:
                closest = min(watch.objective for watch in runs.values())
                fields |= {"suboptimality": closest / best - 1, "trouble": "time limit"}
            else:
                reached[target][name] = seconds
            emit("seconds to the objective", **about, target=target, solver=name, version=number, **fields)
            tell(f"{part}: {name}, {target:g}: {seconds}")
    for target, times in reached.items():
        against("ours against the fastest peer", times, {**about, "target": target})


def _watched(imaging: Any, given: Any, best: float, limit: float, run: Callable, ratio: float) -> Any:
    watch = imaging.Watch(given, best, limit)
    with contextlib.suppress(imaging.Reached):
        run(ratio, watch)
    return watch


def derivative(part: str, small: bool, limit: float) -> None:
    """The gradient of a validation loss by several methods."""
    from core_derivative import Study
    from core_problems import SHARES

    del limit
    for share in SHARES:
        for record in Study(small, share).rows(warmed):
            emit("derivative", part=part, **record, reduced=small)


def run_apart(script: str, parts: Iterable[str], only: str | None) -> None:
    """The selected parts of a benchmark, each in its own process, on one core."""
    cores = pin(1)
    os.environ["NUMBA_NUM_THREADS"] = str(cores)
    from sparseopt.system.machine import environment

    emit("environment", **environment(), cores=cores)
    for part in chosen(parts, only):
        tell(part)
        given = [*sys.argv[1:], "--part", part]
        done = subprocess.run([sys.executable, script, *given], check=False)
        if done.returncode:
            emit("SKIPPED", part=part, solver=None, reason=f"ended with code {done.returncode}")


PARTS: dict[str, Callable[[str, bool, float], None]] = {
    "lasso-dense": compare,
    "lasso-sparse": compare,
    "logistic-sparse": compare,
    "group-lasso": compare,
    "lasso-path": compare,
    "tv-deblurring": picture,
    "tv-tomography": picture,
    DERIVATIVE: derivative,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="parts, comma-separated")
    parser.add_argument("--limit", type=float, default=60.0, help="time limit of a solver in seconds")
    parser.add_argument("--small", action="store_true", help="small problems, for a trial")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        import jax

        jax.config.update("jax_enable_x64", True)
        # Coordinate descents warn at coarse tolerances.
        warnings.simplefilter("ignore")
        PARTS[arguments.part](arguments.part, arguments.small, arguments.limit)
        return
    run_apart(__file__, PARTS, arguments.only)


if __name__ == "__main__":
    main()
