"""The core against public solvers: sparse regression, total variation, derivatives. JSON lines.

    python benchmarks/bench_core.py [--only lasso-dense,tv-deblurring] [--small] [--limit 60]

Sparse regression: seconds to a relative duality gap of 1e-6, measured by one NumPy function for all solvers (see
`core_problems.py`). The tolerance of a solver is divided by about three until its answer has this gap. The time is the
median of calls with that tolerance; the first call, which compiles, is reported separately. Total variation: seconds
and iterations until the objective is within 1e-4 and 1e-6 of the best one known, from a run of 20,000 steps. Every part
runs in its own process, on one core.
"""

import contextlib
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import core_imaging
import numpy as np
from common import emit, fastest, installed, median_of, options, run_parts, say, selection, timed, warmed
from core_derivative import Study
from core_imaging import TARGETS
from core_peers import SOLVERS
from core_problems import PROBLEMS, SHARES

import sparseopt as so

GAP = 1e-6
# The factor between two tolerances, and the smallest one.
FALL, LEAST_TOL = 10**-0.5, 1e-15
# All tolerances together may take this many times the limit of one.
LADDER = 4
REFERENCE_TOL, REFERENCE_STEPS = 1e-8, 20_000


def climbed(problem: Any, solver: Any, limit: float) -> dict[str, Any]:
    """The record of a solver: its coarsest tolerance that reaches the gap, and the time."""
    solve = solver.prepare(problem)
    tol = solver.first
    total = first = timed(partial(solve, tol)).seconds
    while True:
        call = partial(solve, tol)
        seconds, _, (answer, details) = timed(call)
        if seconds > limit >= first:
            # numba may compile code that no coarser tolerance needed.
            seconds = timed(call).seconds
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
    # Coordinate descents warn at coarse tolerances.
    warnings.simplefilter("ignore")
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
            say(f"{part}, {problem.name}: {solver.name} {record['seconds']}")
            emit("seconds to the gap", **about, solver=solver.name, version=number, **record)
        (ours, seconds), (peer, theirs) = fastest(times, True), fastest(times, False)
        ratio = seconds / theirs if seconds and theirs else None
        # A trial cannot meet a target.
        met = None if small or ratio is None else ratio < 1
        shown = {
            "ours": ours,
            "ours_seconds": seconds,
            "peer": peer,
            "peer_seconds": theirs,
            "ratio": ratio,
            "met": met,
        }
        emit("ours against the fastest peer", **about, **shown)


def picture(part: str, small: bool, limit: float) -> None:
    """Total variation: the time at which the objective of each solver reaches the targets."""
    given = core_imaging.PICTURES[part](32 if small else 128)
    problem, method = core_imaging.core_problem(given), so.PrimalDual()
    reference = so.solve(problem, method, tol=REFERENCE_TOL, max_steps=REFERENCE_STEPS, history=True)
    best = given.objective(np.asarray(reference.value))
    about = {"part": part, "problem": given.name, "reduced": small, "reference_gap": float(reference.gap)}
    say(f"{part}: reference solution with a gap of {about['reference_gap']:.1e} after {int(reference.steps)} steps")
    course = np.asarray(reference.history.objective)
    steps = {target: int(np.argmax(course <= best * (1 + target))) + 1 for target in TARGETS}
    rows: dict[str, dict[float, dict[str, Any]]] = {"sparseopt": {}}
    for target in TARGETS:
        until = partial(so.solve, problem, method, tol=-1.0, max_steps=steps[target])
        certified = partial(so.solve, problem, method, tol=target, max_steps=REFERENCE_STEPS)
        objective = given.objective(np.asarray(until().value))
        known = timed(certified)
        again = median_of(certified, [known.seconds])
        rows["sparseopt"][target] = {
            "iterations": steps[target],
            "suboptimality": objective / best - 1,
            **warmed(until),
            # A gap needs a good dual point as well, which may take many more steps.
            "certified_seconds": again["seconds"] if known.result.gap <= target else None,
        }
    if installed("pyproximal"):
        rows |= {name: watched(run, given, best, limit) for name, run in core_imaging.peers(given).items()}
    else:
        emit("SKIPPED", **about, solver="pyproximal", reason="not installed")
    for name, found in rows.items():
        number = installed(name.split()[0])
        for target in TARGETS:
            emit("seconds to the objective", **about, target=target, solver=name, version=number, **found[target])


def watched(run: Callable, given: Any, best: float, limit: float) -> dict[float, dict[str, Any]]:
    """The record of a peer for every target; the best ratio of its steps counts, which a user would have to find."""
    runs = {ratio: core_imaging.Watch(given, best, limit) for ratio in core_imaging.RATIOS}
    for ratio, watch in runs.items():
        with contextlib.suppress(core_imaging.Reached):
            run(ratio, watch)
    closest = min(watch.objective for watch in runs.values())
    found: dict[float, dict[str, Any]] = {}
    for target in TARGETS:
        ratio = min(runs, key=lambda ratio: runs[ratio].reached.get(target, (np.inf, 0)))
        seconds, steps = runs[ratio].reached.get(target, (None, None))
        found[target] = {"seconds": seconds, "iterations": steps, "ratio_of_steps": ratio}
        if seconds is None:
            found[target] |= {"suboptimality": closest / best - 1, "trouble": "time limit"}
    return found


def derivative(small: bool, limit: float) -> None:
    """The gradient of a validation loss by several methods."""
    del limit
    for share in SHARES:
        for record in Study(small, share).rows():
            emit("derivative", part="lasso-derivative", **record, reduced=small)


PARTS: dict[str, Callable[[bool, float], None]] = {
    **{part: partial(compare, part) for part in PROBLEMS},
    **{part: partial(picture, part) for part in core_imaging.PICTURES},
    "lasso-derivative": derivative,
}


def main() -> None:
    parser = options(__doc__)
    selection(parser, "--only", PARTS)
    parser.add_argument("--limit", type=float, default=60.0, help="time limit of a solver in seconds")
    parser.add_argument("--small", action="store_true", help="small problems, for a trial")
    arguments = parser.parse_args()
    run_parts(PARTS, arguments.only, arguments.small, arguments.limit)


if __name__ == "__main__":
    main()
