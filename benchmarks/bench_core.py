"""The core against public solvers: total variation, and derivatives of a lasso. JSON lines.

    python benchmarks/bench_core.py [--only tv-deblurring,lasso-derivative] [--small] [--limit 60]

Total variation: seconds and iterations until the objective is within 1e-4 and 1e-6 of the best one known, from a run of
20,000 steps. Every part runs in its own process, on one core. Regressions are compared by `bench_benchopt.py`.
"""

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

import core_imaging
import numpy as np
from common import emit, installed, median_of, options, run_parts, say, selection, timed, warmed
from core_derivative import Study
from core_imaging import TARGETS

import sparseopt as so

# Fractions of the smallest weight at which the answer of the lasso is 0.
SHARES = (0.1, 0.02)
REFERENCE_TOL, REFERENCE_STEPS = 1e-8, 20_000


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
