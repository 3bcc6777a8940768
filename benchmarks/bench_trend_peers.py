"""Time to a true relative suboptimality of 1e-3, 1e-4 and 1e-6: trend_filter and the public solvers. JSON lines.

    python benchmarks/bench_trend_peers.py [--cores 1] [--limit 120] [--only grid256,road] [--solvers auto,PIQP]
        [--truth FOLDER] [--references FOLDER] [--python "cut pursuit=INTERPRETER"] [--quick]

Every solver runs with a sequence ("ladder") of its own tolerances or iteration counts, each from a cold start. Its time
to a target is that of the fastest run whose fit is that close to the optimum, by one objective in float64. Compilation
is timed separately. Solvers run in separate processes, so a hang or a crash costs one row only.

The optimum comes from accurate runs, which are stored in the folder of --references. The relative distance between the
best objective and the best lower bound is printed with every row as reference_gap. --truth names a folder of problems
with stored optima, NPZ files with the fields y, edges, lam, k, shape, beta_opt, u.
"""

import argparse
import dataclasses
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import trend_problems
from trend_peers import OURS, PEERS, SOLVERS, able
from trend_problems import TrendProblem
from trend_solver import Answer, Solver

TARGETS = (1e-3, 1e-4, 1e-6)
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
    # Output of libraries must not mix with the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    solver, problem = SOLVERS[name], trend_problems.load(path)
    found = find_spec(solver.module) is not None
    try:
        number = version(solver.package)
    except PackageNotFoundError:
        number = "unknown"
    print(json.dumps({"version": number if found else None}), file=answers, flush=True)
    cold = solver.compiles
    for line in sys.stdin:
        print(json.dumps(measured(solver, problem, json.loads(line), cold)), file=answers, flush=True)
        cold = False


def seconds_of(call: Callable[[], Answer]) -> tuple[float, float, Answer]:
    """Seconds, seconds of CPU time, and the answer."""
    start, worked = time.perf_counter(), time.process_time()
    answer = call()
    return time.perf_counter() - start, time.process_time() - worked, answer


def measured(solver: Solver, problem: TrendProblem, rung: Any, cold: bool) -> dict[str, Any]:
    """Seconds, objective and lower bound of one rung."""
    call = solver.solve(problem, rung)
    record: dict[str, Any] = {}
    if cold:
        record["first_call_seconds"] = seconds_of(call)[0]
    runs: list[tuple[float, float, Answer]] = []
    while len(runs) < LEAST or (sum(run[0] for run in runs) < REPEAT_BELOW and len(runs) < REPEATS):
        runs.append(seconds_of(call))
    seconds, worked, answer = min(runs, key=lambda run: run[0])
    # More seconds than CPU time on one core: something else ran at the same time.
    record |= {"seconds": seconds, "cpu_seconds": worked, **answer.details}
    again = getattr(solver, "again", None)
    if again is not None and seconds < REPEAT_BELOW:
        kept = again(problem, rung)
        kept()
        record["prepared_seconds"] = seconds_of(kept)[0]
    return record | {"objective": problem.objective(answer.fit), "lower": answer.lower}


class Child:
    """A solver on a problem in a separate process."""

    def __init__(self, path: Path, solver: Solver, interpreter: str) -> None:
        command = [interpreter, __file__, "--serve", str(path), solver.name]
        self.errors = path.with_suffix(".errors")
        with self.errors.open("w") as errors:
            pipe = subprocess.PIPE
            self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=errors, text=True)
        self.lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        hello = self._answer(STARTING)
        self.version: str | None = hello.get("version")
        self.trouble: str | None = hello.get("trouble")

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put("")

    def _answer(self, limit: float) -> dict[str, Any]:
        try:
            line = self.lines.get(timeout=limit)
        except queue.Empty:
            return {"trouble": "time limit"}
        if line:
            return dict(json.loads(line))
        self.process.wait()
        last = self.errors.read_text(errors="replace").strip().rpartition("\n")[2]
        return {"trouble": f"ended with code {self.process.returncode}: {last[:200]}"}

    def run(self, rung: Any, limit: float) -> dict[str, Any]:
        """The measurements of one rung, or the reason why it failed."""
        assert self.process.stdin is not None
        try:
            print(json.dumps(rung), file=self.process.stdin, flush=True)
        except BrokenPipeError:
            return self._answer(STARTING)
        return self._answer(2 * limit + STARTING)

    def end(self) -> None:
        """Kill the process."""
        self.process.kill()
        self.process.wait()


@dataclasses.dataclass(frozen=True)
class Course:
    """Settings of all runs.

    Attributes:
        limit: seconds that one call may take.
        cores: number of cores for each solver.
        interpreters: of solvers that need another Python.
        folder: for the problem files.
        reduced: whether this is a trial.
    """

    limit: float
    cores: int
    interpreters: dict[str, str]
    folder: Path
    reduced: bool

    def climb(
        self, problem: TrendProblem, solver: Solver, rungs: Sequence[Any], enough: Callable[[dict[str, Any]], bool]
    ) -> tuple[str | None, list[dict[str, Any]], str | None]:
        """Run the rungs until one is accurate enough or too slow: the version, the measurements, and what went wrong.

        The version is None if the solver is not installed.
        """
        path = self.folder / f"{problem.name}.npz"
        if not path.is_file():
            trend_problems.save(problem, path)
        child = Child(path, solver, self.interpreters.get(solver.name, sys.executable))
        found: list[dict[str, Any]] = []
        trouble = child.trouble
        try:
            for rung in rungs if child.version is not None and trouble is None else ():
                record = child.run(rung, self.limit)
                trouble = record.get("trouble")
                if trouble is None and record["seconds"] > self.limit:
                    trouble = "time limit"
                if trouble is not None:
                    break
                found.append({"rung": rung, **record})
                tell(f"{problem.name}: {solver.name} at {rung}: {record['seconds']:.3g} s, {record['objective']:.9g}")
                if enough(record):
                    break
        finally:
            child.end()
        return child.version, found, trouble


def tell(message: str) -> None:
    """Progress, on stderr."""
    print(f"{time.strftime('%H:%M:%S')} {message}", file=sys.stderr, flush=True)


def emit(figure: str, **fields: Any) -> None:
    """One JSON line; numbers that are not finite become null."""
    known = {
        name: None if isinstance(value, float) and not np.isfinite(value) else value for name, value in fields.items()
    }
    print(json.dumps({"figure": figure, **known}), flush=True)


def reference(problem: TrendProblem, course: Course, kept: Path | None) -> Bounds:
    """The optimum: stored with the problem or in a folder, otherwise from accurate runs, which are then stored."""
    if problem.known is not None:
        return Bounds(*problem.known)
    file = None if kept is None else kept / f"{problem.key}.npz"
    if file is not None and file.is_file():
        with np.load(file) as stored:
            return Bounds(float(stored["upper"]), float(stored["lower"]))
    bounds, course = Bounds(), dataclasses.replace(course, limit=max(course.limit, SEEKING))

    def enough(record: dict[str, Any]) -> bool:
        bounds.learn(record["objective"], record["lower"])
        return bounds.gap <= SOUGHT

    runs = [("sparseopt auto", [1e-7, SOUGHT]), ("PIQP", [1e-10])]
    # Factorisations are cheap on sparse planar graphs.
    for name, rungs in runs if problem.shape is not None else reversed(runs):
        if bounds.gap > SOUGHT and able(SOLVERS[name], problem):
            course.climb(problem, SOLVERS[name], rungs, enough)
    tell(f"{problem.name}: the optimum is known to a gap of {bounds.gap:.1e}")
    if file is not None and bounds.upper < np.inf:
        file.parent.mkdir(parents=True, exist_ok=True)
        np.savez(file, upper=bounds.upper, lower=bounds.lower)
    return bounds


def compare(problem: TrendProblem, solvers: Iterable[Solver], course: Course, kept: Path | None) -> None:
    """Every solver on one problem: a line for each target, then a comparison with the fastest peer."""
    bounds = reference(problem, course, kept)

    def enough(record: dict[str, Any]) -> bool:
        bounds.learn(record["objective"], record["lower"])
        # Without a known optimum a solver would be compared with itself.
        return bounds.gap <= min(TARGETS) and record["objective"] <= bounds.upper * (1 + min(TARGETS))

    runs = {}
    for solver in solvers:
        if able(solver, problem):
            runs[solver.name] = course.climb(problem, solver, solver.ladder(problem), enough)
            if runs[solver.name][0] is None:
                tell(f"SKIPPED {solver.name}: {runs[solver.name][2] or f'{solver.module} is not installed'}")
    about = {
        "problem": problem.name,
        "nodes": problem.y.size,
        "order": problem.order,
        "weight": problem.weight,
        "cores": course.cores,
        "reduced": course.reduced,
        "reference_gap": bounds.gap,
    }
    times: dict[tuple[str, float], float] = {}
    for name, (number, found, trouble) in runs.items():
        if number is None:
            emit("SKIPPED", solver=name, problem=problem.name, reason=trouble or "not installed")
            continue
        judged = [{**record, "suboptimality": record["objective"] / bounds.upper - 1} for record in found]
        best = min((record["suboptimality"] for record in judged), default=None)
        compiled = found[0].get("first_call_seconds") if found else None
        for target in TARGETS:
            close = [record for record in judged if record["suboptimality"] <= target]
            fastest = min(close, key=lambda record: record["seconds"], default=None)
            if fastest is not None:
                times[name, target] = fastest["seconds"]
            shown = fastest or {"seconds": None, "suboptimality": best, "trouble": trouble or "end of its ladder"}
            fields = {key: shown[key] for key in shown if key not in ("objective", "lower", "first_call_seconds")}
            emit(
                "time to target",
                solver=name,
                version=number,
                target=target,
                **about,
                **fields,
                first_call_seconds=compiled,
            )
    for target in TARGETS:
        ours = fastest_of(OURS, times, target)
        auto = times.get(("sparseopt auto", target))
        peer = fastest_of(PEERS, times, target)
        # A trial cannot meet a target.
        met = None if course.reduced or peer is None else auto is not None and auto < peer[1]
        emit(
            "ours against the fastest peer",
            target=target,
            **about,
            auto_seconds=auto,
            ours=ours and ours[0],
            ours_seconds=ours and ours[1],
            peer=peer and peer[0],
            peer_seconds=peer and peer[1],
            ratio=auto / peer[1] if auto and peer else None,
            met=met,
            note="no peer finished" if peer is None else None,
        )


def fastest_of(
    solvers: Iterable[Solver], times: dict[tuple[str, float], float], target: float
) -> tuple[str, float] | None:
    """Name and seconds of the fastest of these solvers that reached a target."""
    reached = [(name, times[name, target]) for solver in solvers if ((name := solver.name), target) in times]
    return min(reached, key=lambda pair: pair[1], default=None)


def pin(cores: int) -> int:
    """Pin this process and its children to a number of cores; returns how many they have."""
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(cores)
    if cores == 1:
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false".strip()
    if hasattr(os, "sched_setaffinity"):
        allowed = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, allowed[-cores:])
        return min(cores, len(allowed))
    tell("this system cannot pin processes: threads are limited only in libraries that read OMP_NUM_THREADS")
    return cores


def chosen(known: Iterable[str], wanted: str | None) -> list[str]:
    """The names that equal, or else contain, one of comma-separated parts; without parts all names."""
    names, parts = list(known), [part.strip() for part in (wanted or "").split(",")]
    for part in parts:
        if not any(part in name for name in names):
            sys.exit(f"unknown name {part!r}; known are {', '.join(names)}")
    return [name for name in names if any(name == part or (part not in names and part in name) for part in parts)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--truth", type=Path, help="folder with problems with a stored optimum")
    parser.add_argument("--references", type=Path, help="folder for computed optima")
    parser.add_argument("--cores", type=int, default=1, help="cores for each solver")
    parser.add_argument("--limit", type=float, default=120.0, help="time limit of a call in seconds")
    parser.add_argument("--only", help="parts of problem names, comma-separated")
    parser.add_argument("--solvers", help="parts of solver names, comma-separated")
    parser.add_argument(
        "--python",
        action="append",
        default=[],
        metavar="SOLVER=INTERPRETER",
        help="run a solver with another Python, which also needs NumPy and SciPy",
    )
    parser.add_argument("--quick", action="store_true", help="small problems, for a trial")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(Path(arguments.serve[0]), arguments.serve[1])
        return
    cores = pin(arguments.cores)
    interpreters = dict(pair.split("=", 1) for pair in arguments.python)
    if unknown := set(interpreters) - set(SOLVERS):
        parser.error(f"--python names {', '.join(unknown)}; known are {', '.join(SOLVERS)}")
    from sparseopt.system.machine import environment

    emit("environment", **environment(), cores=cores)
    if arguments.truth is None or not arguments.truth.is_dir():
        emit("SKIPPED", solver=None, problem="stored optima", reason=f"no folder at {arguments.truth}")
        tell("SKIPPED the problems with stored optima: give --truth FOLDER")
        arguments.truth = None
    makers = trend_problems.problems(arguments.quick, arguments.truth)
    solvers = [SOLVERS[name] for name in chosen(SOLVERS, arguments.solvers)]
    with tempfile.TemporaryDirectory() as folder:
        course = Course(arguments.limit, cores, interpreters, Path(folder), arguments.quick)
        for name in chosen(makers, arguments.only):
            compare(makers[name](), solvers, course, arguments.references)


if __name__ == "__main__":
    main()
