"""Time to a true relative suboptimality of 1e-4 and 1e-6: trend_filter and the public solvers. JSON lines.

    python benchmarks/bench_trend_peers.py [--cores 1] [--limit 120] [--only grid256,road] [--solvers auto,PIQP]
        [--truth FOLDER] [--references FOLDER] [--python "cut pursuit=INTERPRETER"] [--quick]

Every solver runs with a sequence ("ladder") of its own tolerances or iteration counts, each from a cold start. Its time
to a target is that of the fastest run whose fit is that close to the optimum, by one objective in float64. Compilation
is timed separately. Solvers run in separate processes, so a hang or a crash costs one row only.

The optimum comes from accurate runs, which are stored in the folder of --references. The relative distance between the
best objective and the best lower bound is printed with every row as reference_gap. --truth names a folder of problems
with stored optima, NPZ files with the fields y, edges, lam, k, shape, beta_opt, u.
"""

import dataclasses
import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import trend_problems
from common import (
    Child,
    Ended,
    answers,
    emit,
    environment,
    fastest,
    installed,
    names_of,
    options,
    pin,
    say,
    selection,
    timed,
)
from trend_problems import TrendProblem
from trend_solvers import SOLVERS, Solver

TARGETS = (1e-4, 1e-6)
# The gap to which the optimum is computed.
SOUGHT = 1e-9
# Every call is made twice, since "auto" may change its method between rungs and compile again; if both together take
# less than this, once more. The fastest counts.
REPEAT_BELOW, LEAST, REPEATS = 1.0, 2, 3
# The least limit of a run that seeks the optimum.
SEEKING = 120.0
# Seconds for imports, layout and compilation on top of a limit.
STARTING = 60.0


@dataclasses.dataclass
class Bounds:
    """Bounds on the optimum of a problem: the best objective and the best lower bound."""

    upper: float = np.inf
    lower: float = -np.inf

    def learn(self, upper: float, lower: float | None) -> None:
        """Tighten the bounds with those of a run."""
        self.upper = min(self.upper, upper)
        self.lower = max(self.lower, -np.inf if lower is None else lower)

    @property
    def gap(self) -> float:
        """Relative to the lower bound."""
        return self.upper / self.lower - 1 if 0 < self.lower < np.inf else np.inf


def serve(path: Path, name: str) -> None:
    """The separate process: answer every rung on stdin with a line of measurements."""
    out = answers()
    solver, problem = SOLVERS[name], trend_problems.load(path)
    number = installed(solver.package) or "unknown" if find_spec(solver.module) else None
    print(json.dumps({"version": number}), file=out, flush=True)
    cold = solver.compiles
    for line in sys.stdin:
        print(json.dumps(measured(solver, problem, json.loads(line), cold)), file=out, flush=True)
        cold = False


def measured(solver: Solver, problem: TrendProblem, rung: Any, cold: bool) -> dict[str, Any]:
    """Seconds, objective and lower bound of one rung."""
    call = solver.solve(problem, rung)
    record = {"first_call_seconds": timed(call).seconds} if cold else {}
    runs = [timed(call) for _ in range(LEAST)]
    while sum(run.seconds for run in runs) < REPEAT_BELOW and len(runs) < REPEATS:
        runs.append(timed(call))
    seconds, worked, (fit, lower) = min(runs, key=lambda run: run.seconds)
    return record | {
        "seconds": seconds,
        "cpu_seconds": worked,
        "objective": problem.objective(fit),
        "lower": lower,
    }


@dataclasses.dataclass
class Climb:
    """The runs of a solver: its version, None if it is not installed, the measurements, and what went wrong."""

    version: str | None = None
    found: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    trouble: str | None = None


@dataclasses.dataclass(frozen=True)
class Course:
    """Settings of all runs.

    Attributes:
        limit: seconds that one call may take.
        cores: number of cores for each solver.
        interpreters: of solvers that need another Python.
        folder: for the problem files.
        kept: folder of computed optima.
        reduced: whether this is a trial.
    """

    limit: float
    cores: int
    interpreters: dict[str, str]
    folder: Path
    kept: Path | None
    reduced: bool

    def climb(
        self, problem: TrendProblem, solver: Solver, rungs: Sequence[Any], enough: Callable[[dict[str, Any]], bool]
    ) -> Climb:
        """Run the rungs until one is accurate enough or too slow."""
        path = self.folder / f"{problem.name}.npz"
        if not path.is_file():
            trend_problems.save(problem, path)
        climb, child = Climb(), None
        try:
            interpreter = self.interpreters.get(solver.name, sys.executable)
            child = Child([interpreter, __file__, "--serve", path, solver.name], STARTING)
            climb.version = child.about["version"]
            for rung in () if climb.version is None else rungs:
                record = child.ask(rung, 2 * self.limit + STARTING)
                if record["seconds"] > self.limit:
                    raise Ended("time limit")
                climb.found.append({"rung": rung, **record})
                say(f"{problem.name}: {solver.name} at {rung}: {record['seconds']:.3g} s, {record['objective']:.9g}")
                if enough(record):
                    break
        except Ended as reason:
            climb.trouble = str(reason)
        finally:
            if child is not None:
                child.close()
        return climb

    def reference(self, problem: TrendProblem) -> Bounds:
        """The optimum: stored with the problem or in a folder, otherwise from accurate runs, which are then stored."""
        if problem.known is not None:
            return Bounds(*problem.known)
        file = None if self.kept is None else self.kept / f"{problem.key}.npz"
        if file is not None and file.is_file():
            with np.load(file) as stored:
                return Bounds(float(stored["upper"]), float(stored["lower"]))
        bounds, patient = Bounds(), dataclasses.replace(self, limit=max(self.limit, SEEKING))

        def enough(record: dict[str, Any]) -> bool:
            bounds.learn(record["objective"], record["lower"])
            return bounds.gap <= SOUGHT

        runs = [("sparseopt auto", [1e-7, SOUGHT]), ("PIQP", [1e-10])]
        # Factorisations are cheap on sparse planar graphs.
        for name, rungs in runs if problem.shape is not None else reversed(runs):
            if bounds.gap > SOUGHT and SOLVERS[name].takes(problem):
                patient.climb(problem, SOLVERS[name], rungs, enough)
        say(f"{problem.name}: the optimum is known to a gap of {bounds.gap:.1e}")
        if file is not None and bounds.upper < np.inf:
            file.parent.mkdir(parents=True, exist_ok=True)
            np.savez(file, upper=bounds.upper, lower=bounds.lower)
        return bounds

    def compare(self, problem: TrendProblem, solvers: Iterable[Solver]) -> None:
        """Every solver on one problem: a line for each target, then a comparison with the fastest peer."""
        bounds = self.reference(problem)

        def enough(record: dict[str, Any]) -> bool:
            bounds.learn(record["objective"], record["lower"])
            # Without a known optimum a solver would be compared with itself.
            return bounds.gap <= min(TARGETS) and record["objective"] <= bounds.upper * (1 + min(TARGETS))

        climbs = {
            solver.name: self.climb(problem, solver, solver.ladder(problem), enough)
            for solver in solvers
            if solver.takes(problem)
        }
        about = {
            "problem": problem.name,
            "nodes": problem.y.size,
            "order": problem.order,
            "weight": problem.weight,
            "cores": self.cores,
            "reduced": self.reduced,
            "reference_gap": bounds.gap,
        }
        times: dict[float, dict[str, float]] = {target: {} for target in TARGETS}
        for name, climb in climbs.items():
            if climb.version is None:
                reason = climb.trouble or "not installed"
                say(f"SKIPPED {name}: {reason}")
                emit("SKIPPED", solver=name, problem=problem.name, reason=reason)
                continue
            rows = [{**row, "suboptimality": row["objective"] / bounds.upper - 1} for row in climb.found]
            best = min((row["suboptimality"] for row in rows), default=None)
            about_solver = {"solver": name, "version": climb.version, **about}
            compiled = rows[0].get("first_call_seconds") if rows else None
            for target in TARGETS:
                close = [row for row in rows if row["suboptimality"] <= target]
                shown = min(close, key=lambda row: row["seconds"], default=None)
                if shown is not None:
                    times[target][name] = shown["seconds"]
                else:
                    trouble = climb.trouble or "end of its ladder"
                    shown = {"seconds": None, "suboptimality": best, "trouble": trouble}
                fields = {key: shown[key] for key in shown if key not in ("objective", "lower")}
                fields |= {"target": target, "first_call_seconds": compiled}
                emit("time to target", **about_solver, **fields)
        for target, reached in times.items():
            (ours, seconds), (peer, theirs) = fastest(reached, True), fastest(reached, False)
            auto = reached.get("sparseopt auto")
            emit(
                "ours against the fastest peer",
                target=target,
                **about,
                auto_seconds=auto,
                ours=ours,
                ours_seconds=seconds,
                peer=peer,
                peer_seconds=theirs,
                # A trial cannot meet a target.
                met=None if self.reduced or theirs is None else auto is not None and auto < theirs,
                note="no peer finished" if peer is None else None,
            )


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--truth", type=Path, help="folder with problems with a stored optimum")
    parser.add_argument("--references", type=Path, help="folder for computed optima")
    parser.add_argument("--cores", type=int, default=1, help="cores for each solver")
    parser.add_argument("--limit", type=float, default=120.0, help="time limit of a call in seconds")
    parser.add_argument("--only", help="parts of problem names, comma-separated")
    selection(parser, "--solvers", SOLVERS)
    parser.add_argument(
        "--python",
        action="append",
        default=[],
        metavar="SOLVER=INTERPRETER",
        help="run a solver with another Python, which also needs NumPy and SciPy",
    )
    parser.add_argument("--quick", action="store_true", help="small problems, for a trial")
    parser.add_argument("--serve", nargs=2, help="for its own processes: a problem's file and a solver")
    arguments = parser.parse_args()
    if arguments.serve:
        serve(Path(arguments.serve[0]), arguments.serve[1])
        return
    interpreters = dict(pair.split("=", 1) for pair in arguments.python)
    if unknown := set(interpreters) - set(SOLVERS):
        parser.error(f"--python names {', '.join(unknown)}; known are {', '.join(SOLVERS)}")
    cores = pin(arguments.cores)
    emit("environment", **environment(), cores=cores)
    if arguments.truth is None or not arguments.truth.is_dir():
        emit("SKIPPED", solver=None, problem="stored optima", reason=f"no folder at {arguments.truth}")
        say("SKIPPED the problems with stored optima: give --truth FOLDER")
        arguments.truth = None
    makers = trend_problems.problems(arguments.quick, arguments.truth)
    with tempfile.TemporaryDirectory() as folder:
        course = Course(arguments.limit, cores, interpreters, Path(folder), arguments.references, arguments.quick)
        for name in names_of(makers)(arguments.only) if arguments.only else makers:
            course.compare(makers[name](), [SOLVERS[name] for name in arguments.solvers])


if __name__ == "__main__":
    main()
