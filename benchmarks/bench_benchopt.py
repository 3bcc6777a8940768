"""sparseopt in the benchmarks of benchopt, beside the solvers that they ship. JSON lines.

    python benchmarks/bench_benchopt.py FOLDER [--only lasso,mcp] [--timeout 10] [--older PYTHON]

FOLDER holds clones of the repositories in `benchopt_suite.yaml`; those that are missing are cloned. Data, objective,
clock and stopping rule are benchopt's; all solvers run on one core. A solver's time is that at which its curve is
within 1e-3, 1e-6 and 1e-9 of the best value that any solver found, relative to the largest value of all curves, that of
the start.
Two repositories are written for benchopt 1.4: `--older` names a Python that has it.
"""

import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from common import Ended, emit, environment, installed, last_line, options, pin, run_program, say, selection

SOLVER = Path(__file__).with_name("benchopt_solver.py")
ADDRESS = "https://github.com/benchopt/"
TARGETS = (1e-3, 1e-6, 1e-9)
# Points of a curve in a record.
POINTS = 40
SUITE: dict[str, dict[str, Any]] = yaml.safe_load(Path(__file__).with_name("benchopt_suite.yaml").read_text())


def clone(folder: Path, name: str) -> Path:
    """The repository of a benchmark at its commit, with our solver among its own."""
    place = folder / f"benchmark_{name}"
    if not place.is_dir():
        run_program(["git", "clone", "--quiet", f"{ADDRESS}benchmark_{name}", place])
    run_program(["git", "-C", place, "checkout", "--quiet", SUITE[name]["commit"]])
    shutil.copyfile(SOLVER, place / "solvers" / "sparseopt.py")
    return place


def curves(place: Path, benchmark: dict[str, Any], python: str, timeout: float) -> list[dict[str, Any]]:
    """Run benchopt, and read the points that it wrote."""
    command = [Path(python).with_name("benchopt"), "run", place, "--no-plot", "--max-runs", 200, "--n-repetitions", 1]
    command += ["--timeout", timeout, "--output", "sparseopt", "-s", "sparseopt"]
    for option, field in (("-s", "solvers"), ("-o", "objectives"), ("-d", "data")):
        for value in benchmark[field]:
            command += [option, value]
    for old in (place / "outputs").glob("sparseopt*"):
        old.unlink()
    done = subprocess.run(list(map(str, command)), stdout=sys.stderr, stderr=subprocess.PIPE, text=True, check=False)
    found = sorted((place / "outputs").glob("sparseopt*.parquet"))
    if done.returncode or not found:
        raise Ended(last_line(done.stderr))
    from pyarrow import parquet

    return list(parquet.read_table(found[-1]).to_pylist())


def shortened(names: Iterable[str]) -> dict[str, str]:
    """Names such as `Simulated[rho=0,snr=3]` with those parameters alone in which they differ."""
    parts = {name: (name.partition("[")[0], name.partition("[")[2].rstrip("]").split(",")) for name in names}
    short = {}
    for name, (head, parameters) in parts.items():
        alike = [others for other, others in parts.values() if other == head]
        kept = [one for one in parameters if any(one not in others for others in alike)]
        short[name] = " ".join([head, ", ".join(kept)]).strip()
    return short


def report(about: dict[str, Any], points: Iterable[dict[str, Any]]) -> None:
    """For every problem and solver: the seconds to each target; for the last problem also a thinned curve."""
    problems: dict[tuple[str, str], dict[str, list[tuple[float, float]]]] = {}
    for point in points:
        # benchopt 1.4 has another name for the data.
        key = point.get("dataset_name") or point["data_name"], point["objective_name"]
        of_solver = problems.setdefault(key, {}).setdefault(point["solver_name"], [])
        of_solver.append((float(point["time"]), float(point["objective_value"])))
    *_, last = problems
    short = shortened({name for key, solvers in problems.items() for name in (*key, *solvers)})
    for (data, objective), solvers in problems.items():
        values = [value for curve in solvers.values() for _, value in curve]
        best, scale = min(values), max(values) - min(values) or 1.0
        for solver, curve in solvers.items():
            of = about | {"data": short[data], "objective": short[objective], "solver": short[solver]}
            apart = [(seconds, (value - best) / scale) for seconds, value in sorted(curve)]
            closest = min(far for _, far in apart)
            for target in TARGETS:
                seconds = next((seconds for seconds, far in apart if far <= target), None)
                emit("seconds to the objective", **of, target=target, seconds=seconds, closest=closest)
            if (data, objective) != last:
                continue
            thinned = apart[:: max(1, len(apart) // POINTS)]
            emit("curve", **of, points=[[float(f"{seconds:.3g}"), float(f"{far:.3g}")] for seconds, far in thinned])


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("folder", type=Path, help="clones of the benchmarks, made where they are missing")
    selection(parser, "--only", SUITE)
    parser.add_argument("--timeout", type=float, default=10.0, help="time limit of a solver in seconds")
    parser.add_argument("--older", default="", help="Python with benchopt 1.4, for elastic_net and mcp")
    given = parser.parse_args()
    peers = {name: installed(name) for name in ("benchopt", "celer", "skglm", "scikit-learn", "scipy", "numba")}
    emit("environment", **environment(), cores=pin(1), peers=peers)
    given.folder.mkdir(parents=True, exist_ok=True)
    for name in given.only:
        benchmark = SUITE[name]
        about = {"benchmark": name, "commit": benchmark["commit"]}
        older = benchmark.get("older", False)
        if older and not given.older:
            emit("SKIPPED", **about, reason="written for benchopt 1.4: name a Python that has it by --older")
            continue
        say(name)
        try:
            place = clone(given.folder, name)
            points = curves(place, benchmark, given.older if older else sys.executable, given.timeout)
        except Ended as error:
            emit("SKIPPED", **about, reason=str(error))
            continue
        report(about, points)


if __name__ == "__main__":
    main()
