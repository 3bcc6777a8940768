"""Time to a true relative suboptimality of 1e-4 and 1e-6: trend_filter and the public solvers. JSON lines.

    python benchmarks/bench_trend_peers.py [--cores 1] [--limit 120] [--only grid256,road] [--solvers auto,PIQP]
        [--truth FOLDER] [--references FOLDER] [--quick]

Every solver runs with a sequence ("ladder") of its own tolerances or iteration counts, each from a cold start. Its time
to a target is that of the fastest run whose fit is that close to the optimum, by one objective in float64. Compilation
is timed separately. Solvers run in separate processes, so a hang or a crash costs one row only.

The optimum comes from accurate runs, which are stored in the folder of --references. The relative distance between the
best objective and the best lower bound is printed with every row as reference_gap. --truth names a folder of problems
with stored optima, NPZ files with the fields y, edges, lam, k, shape, beta_opt, u.
"""

import argparse
import contextlib
import dataclasses
import json
import pickle
import sys
import tempfile
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import common
import numpy as np
from common import emit, say, timed
from trend_problems import TrendProblem, problems
from trend_solvers import SOLVERS, Solver

TARGETS = (1e-4, 1e-6)
# The gap to which the optimum is computed, and the least limit in seconds of a run that seeks it.
SOUGHT, SEEKING = 1e-9, 120.0
# Every call is made twice, since "auto" may change its method between rungs and compile again; if both together take
# less than this, once more. The fastest counts.
REPEAT_BELOW, LEAST, REPEATS = 1.0, 2, 3
# Seconds for imports, layout and compilation on top of a limit.
STARTING = 60.0


@dataclasses.dataclass
class Bounds:
    """The best objective and the best lower bound of a problem, and how close they must be."""

    upper: float = np.inf
    lower: float = -np.inf
    sought: float = SOUGHT

    @property
    def gap(self) -> float:
        return self.upper / self.lower - 1 if 0 < self.lower < np.inf else np.inf

    def enough(self, record: dict[str, Any]) -> bool:
        """Tighten the bounds with those of a run: whether they are close, and the run is at the best objective."""
        self.upper = min(self.upper, record["objective"])
        self.lower = max(self.lower, -np.inf if record["lower"] is None else record["lower"])
        # Without a known optimum a solver would be compared with itself.
        return self.gap <= self.sought and record["objective"] <= self.upper * (1 + self.sought)


def serve(file: Path, name: str) -> None:
    """The separate process: answer every rung on stdin with a line of measurements."""
    out = common.answers()
    solver, problem = SOLVERS[name], pickle.loads(file.read_bytes())
    number = common.installed(solver.package) or "unknown" if find_spec(solver.module) else None
    print(json.dumps({"version": number}), file=out, flush=True)
    cold = solver.compiles
    for line in sys.stdin:
        print(json.dumps(measured(solver, problem, json.loads(line), cold)), file=out, flush=True)
        cold = False


def measured(solver: Solver, problem: TrendProblem, rung: Any, cold: bool) -> dict[str, Any]:
    call = solver.solve(problem, rung)
    record = {"first_call_seconds": timed(call).seconds} if cold else {}
    runs = [timed(call) for _ in range(LEAST)]
    while sum(run.seconds for run in runs) < REPEAT_BELOW and len(runs) < REPEATS:
        runs.append(timed(call))
    seconds, worked, (fit, lower) = min(runs, key=lambda run: run.seconds)
    return record | {"seconds": seconds, "cpu_seconds": worked, "objective": problem.objective(fit), "lower": lower}


@dataclasses.dataclass
class Climb:
    """The runs of a solver: its version, None if it is not installed, the measurements, and what went wrong."""

    version: str | None = None
    found: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    trouble: str | None = None


def climb(
    given: argparse.Namespace, problem: TrendProblem, solver: Solver, rungs: Sequence[Any], limit: float, bounds: Bounds
) -> Climb:
    file = given.folder / f"{problem.name}.pickle"
    if not file.is_file():
        file.write_bytes(pickle.dumps(problem))
    found = Climb()
    command = [sys.executable, __file__, "--serve", file, solver.name]
    try:
        with contextlib.closing(common.Child(command, STARTING)) as child:
            found.version = child.about["version"]
            for rung in () if found.version is None else rungs:
                record = child.ask(rung, 2 * limit + STARTING)
                if record["seconds"] > limit:
                    raise common.Ended("time limit")
                found.found.append({"rung": rung, **record})
                say(f"{problem.name}: {solver.name} at {rung}: {record['seconds']:.3g} s, {record['objective']:.9g}")
                if bounds.enough(record):
                    break
    except common.Ended as reason:
        found.trouble = str(reason)
    return found


def reference(given: argparse.Namespace, problem: TrendProblem) -> Bounds:
    """The optimum: stored with the problem or in a folder, otherwise from accurate runs, which are then stored."""
    if problem.known is not None:
        return Bounds(*problem.known)
    file = None if given.references is None else given.references / f"{problem.key}.npz"
    if file is not None and file.is_file():
        with np.load(file) as stored:
            return Bounds(float(stored["upper"]), float(stored["lower"]))
    bounds = Bounds()
    runs = [("sparseopt auto", [1e-7, SOUGHT]), ("PIQP", [1e-10])]
    # Factorisations are cheap on sparse planar graphs.
    for name, rungs in runs if problem.shape is not None else reversed(runs):
        if bounds.gap > SOUGHT and SOLVERS[name].takes(problem):
            climb(given, problem, SOLVERS[name], rungs, max(given.limit, SEEKING), bounds)
    say(f"{problem.name}: the optimum is known to a gap of {bounds.gap:.1e}")
    if file is not None and bounds.upper < np.inf:
        file.parent.mkdir(parents=True, exist_ok=True)
        np.savez(file, upper=bounds.upper, lower=bounds.lower)
    return bounds


def compare(given: argparse.Namespace, problem: TrendProblem, solvers: Iterable[Solver]) -> None:
    """Every solver on one problem: a line for each target, then a comparison with the fastest peer."""
    bounds = reference(given, problem)
    bounds.sought = min(TARGETS)
    taking = [solver for solver in solvers if solver.takes(problem)]
    climbs = {
        solver.name: climb(given, problem, solver, solver.rungs(problem), given.limit, bounds) for solver in taking
    }
    about = {
        "problem": problem.name, "nodes": problem.y.size, "order": problem.order, "weight": problem.weight,
        "cores": given.cores, "reduced": given.quick, "reference_gap": bounds.gap,
    }  # fmt: skip
    times: dict[float, dict[str, float]] = {target: {} for target in TARGETS}
    for name, climbed in climbs.items():
        if climbed.version is None:
            reason = climbed.trouble or "not installed"
            say(f"SKIPPED {name}: {reason}")
            emit("SKIPPED", solver=name, problem=problem.name, reason=reason)
            continue
        rows = [{**row, "suboptimality": row["objective"] / bounds.upper - 1} for row in climbed.found]
        closest = min((row["suboptimality"] for row in rows), default=None)
        compiled = rows[0].get("first_call_seconds") if rows else None
        for target in TARGETS:
            close = [row for row in rows if row["suboptimality"] <= target]
            trouble = climbed.trouble or "end of its ladder"
            shown: dict[str, Any] = {"seconds": None, "suboptimality": closest, "trouble": trouble}
            if close:
                shown = min(close, key=lambda row: row["seconds"])
                times[target][name] = shown["seconds"]
            fields = {key: shown[key] for key in shown if key not in ("objective", "lower")}
            fields |= {"solver": name, "version": climbed.version, "target": target, "first_call_seconds": compiled}
            emit("time to target", **about, **fields)
    for target, reached in times.items():
        (ours, seconds), (peer, theirs) = common.fastest(reached, True), common.fastest(reached, False)
        auto = reached.get("sparseopt auto")
        # A trial cannot meet a target.
        met = None if given.quick or theirs is None else auto is not None and auto < theirs
        emit(
            "ours against the fastest peer", target=target, **about, auto_seconds=auto, ours=ours, ours_seconds=seconds,
            peer=peer, peer_seconds=theirs, met=met, note="no peer finished" if peer is None else None,
        )  # fmt: skip


def main() -> None:
    parser = common.options(__doc__)
    parser.add_argument("--truth", type=Path, help="folder with problems with a stored optimum")
    parser.add_argument("--references", type=Path, help="folder for computed optima")
    parser.add_argument("--cores", type=int, default=1, help="cores for each solver")
    parser.add_argument("--limit", type=float, default=120.0, help="time limit of a call in seconds")
    parser.add_argument("--only", help="parts of problem names, comma-separated")
    common.selection(parser, "--solvers", SOLVERS)
    parser.add_argument("--quick", action="store_true", help="small problems, for a trial")
    parser.add_argument("--serve", nargs=2, help="for its own processes: a problem's file and a solver")
    given = parser.parse_args()
    if given.serve:
        serve(Path(given.serve[0]), given.serve[1])
        return
    given.cores = common.pin(given.cores)
    emit("environment", **common.environment(), cores=given.cores)
    if given.truth is None or not given.truth.is_dir():
        emit("SKIPPED", solver=None, problem="stored optima", reason=f"no folder at {given.truth}")
        say("SKIPPED the problems with stored optima: give --truth FOLDER")
        given.truth = None
    makers = problems(given.quick, given.truth)
    with tempfile.TemporaryDirectory() as folder:
        given.folder = Path(folder)
        for name in common.names_of(makers)(given.only) if given.only else makers:
            compare(given, makers[name](), [SOLVERS[name] for name in given.solvers])


if __name__ == "__main__":
    main()
